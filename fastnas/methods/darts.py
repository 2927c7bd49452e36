# SPDX-License-Identifier: Apache-2.0
"""DARTS: Liu, Simonyan, Yang, "DARTS: Differentiable Architecture Search", ICLR 2019.

The weight of a candidate is the softmax of its edge's alphas. The architecture follows the gradient
of the validation loss, either at the current weights (first order) or at the weights one step of
training further (second order).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from fastnas.methods.base import Method, MethodOptions, Moment, register_method
from fastnas.methods.learner import Batch, Learner, Outcome, preserved
from fastnas.methods.parameters import ArchParameters, normal_logits
from fastnas.spaces.base import CellWeights, Weighting


@dataclass(frozen=True)
class DartsOptions(MethodOptions):
    """Options of the method ``darts``."""

    order: Literal["first", "second"] = "first"
    """First order: gradient at the current weights. Second order: gradient through one step of
    training, four forward and backward passes instead of one."""


@register_method("darts")
class Darts(Method):
    """Softmax over the candidates of an edge, plain sum over the edges of a node."""

    Options: ClassVar[type[MethodOptions]] = DartsOptions
    # Released script: 50 epochs, batches of 64, lr 0.025 to 0.001, alphas trained from the start.
    # The authors did not search on ImageNet; that preset stays as it is for partial channels.
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # All channels pass through the candidates: half as many take the time of PC-DARTS.
        "demo": {"C": 4},
        "cifar10": {
            "batch_size": 64,
            "lr": 0.025,
            "lr_min": 0.001,
            "arch_lr": 3e-4,
            "arch_warmup_epochs": 0,
            "validate": "every",
        },
    }

    def parameters(self) -> ArchParameters:
        """Alphas drawn from N(0, 1e-6), one row an edge."""
        return ArchParameters(
            {
                kind: normal_logits(spec.edges, len(spec.primitives))
                for kind, spec in self.specs.items()
            },
            counts={kind: spec.counts for kind, spec in self.specs.items()},
        )

    def weights(self, arch: ArchParameters, moment: Moment) -> Mapping[str, Weighting]:
        """``softmax(alpha)`` per edge (section 2.2)."""
        return {
            kind: CellWeights(torch.softmax(arch.alpha(kind), dim=-1), None) for kind in self.specs
        }

    def scores(self, arch: ArchParameters) -> dict[str, Tensor]:
        """``softmax(alpha)`` per edge (section 2.4)."""
        return {kind: torch.softmax(arch.alpha(kind), dim=-1) for kind in self.specs}

    def graph_obstacle(self) -> str | None:
        """Of the second order the host reads a norm; of a target it holds the costs."""
        if cast(DartsOptions, self.options).order == "second":
            return "the second order reads a norm in every step"
        return None if self.term is None else "a target's costs are kept by the host"

    def architecture_step(
        self, learner: Learner, train: Batch, val: Batch, moment: Moment
    ) -> Outcome:
        """One step of the architecture, of the order the options ask for."""
        if cast(DartsOptions, self.options).order == "first":
            return learner.architecture_step(val, moment)
        return self._second_order_step(learner, train, val, moment)

    def _second_order_step(
        self, learner: Learner, train: Batch, val: Batch, moment: Moment
    ) -> Outcome:
        outcomes: list[Outcome] = []

        def train_loss() -> Tensor:
            # The architecture's extra terms have no gradient in the weights; they are counted once,
            # in the validation loss.
            weights = self.weights(learner.arch, moment.during("weights"))
            loss, _ = learner.forward(train, weights, learner.weight_criterion)
            return loss

        def val_loss() -> Tensor:
            loss, outcome = learner.forward(val, self.weights(learner.arch, moment))
            outcomes.append(outcome)
            return self.objective(loss, learner.arch, moment)

        weights = [p for p in learner.supernet.parameters() if p.requires_grad]
        # All four passes are made at trial weights or repeat the batch of the weight step, so
        # running statistics of BatchNorm are put back along with the weights.
        with preserved(learner.supernet):
            gradient = unrolled_gradient(
                weights,
                list(learner.arch.parameters()),
                train_loss,
                val_loss,
                learner.gradient,
                *_sgd_settings(learner.weight_optimizer, weights),
            )
        learner.apply_architecture_gradient(gradient)
        return outcomes[0]


def unrolled_gradient(
    weights: Sequence[Tensor],
    arch: Sequence[Tensor],
    train_loss: Callable[[], Tensor],
    val_loss: Callable[[], Tensor],
    gradient: Callable[[Tensor, Sequence[Tensor]], list[Tensor]],
    lr: float,
    weight_decay: float,
    momentum: Sequence[Tensor | None],
) -> list[Tensor]:
    """Second-order gradient of the architecture, by finite differences (section 2.3).

    With the step ``w' = w - lr (momentum + grad_w L_train + weight_decay w)``,
    ``v = grad_w' L_val(w')``, ``eps = 0.01 / |v|`` and ``w+- = w +- eps v`` it is
    ``grad_a L_val(w') - lr (grad_a L_train(w+) - grad_a L_train(w-)) / (2 eps)``.

    Args:
        weights: w. Left at ``w-``: the caller restores them.
        arch: a.
        train_loss: evaluates L_train at the present values of ``weights``.
        val_loss: the same for L_val.
        gradient: ``(loss, inputs) -> gradients``.
        lr: step size, the current learning rate of the weights.
        weight_decay: L2 factor of the weights.
        momentum: momentum coefficient times momentum buffer of each weight, None for none yet.

    Returns:
        One tensor for each of ``arch``.
    """
    with torch.no_grad():
        start = [w.detach().clone() for w in weights]
    step = gradient(train_loss(), weights)
    with torch.no_grad():
        for w, g, velocity in zip(weights, step, momentum, strict=True):
            direction = g.add(w, alpha=weight_decay)
            if velocity is not None:
                direction += velocity
            w.sub_(direction, alpha=lr)

    both = gradient(val_loss(), [*arch, *weights])
    direct, v = both[: len(arch)], both[len(arch) :]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in v])).item()
    if norm == 0:
        # L_val does not depend on the weights: there is nothing to correct.
        return direct
    eps = 0.01 / norm

    def at(distance: float) -> list[Tensor]:
        with torch.no_grad():
            for w, w0, g in zip(weights, start, v, strict=True):
                w.copy_(w0).add_(g, alpha=distance)
        return gradient(train_loss(), arch)

    plus = at(eps)
    minus = at(-eps)
    return [d - lr * (p - m) / (2 * eps) for d, p, m in zip(direct, plus, minus, strict=True)]


def _sgd_settings(
    optimizer: torch.optim.Optimizer, weights: Sequence[Tensor]
) -> tuple[float, float, list[Tensor | None]]:
    """Learning rate, weight decay and momentum terms of the optimizer of the weights."""
    (group,) = optimizer.param_groups
    terms: list[Tensor | None] = []
    for weight in weights:
        buffer = optimizer.state.get(weight, {}).get("momentum_buffer")
        terms.append(None if buffer is None else buffer * group["momentum"])
    return float(group["lr"]), group["weight_decay"], terms
