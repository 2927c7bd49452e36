# SPDX-License-Identifier: Apache-2.0
"""DA2S: discretization-aware architecture search, arXiv 2007.03154 (Pattern Recognition 2021).

DARTS with a second loss that grows during the search and pushes the weights of candidates and edges
towards the shape they will have in the derived architecture, so that little is lost by deriving it:

    L = L_task + A s(e) (a s_O(e) L_O + b s_E(e) L_E)

``L_O`` is the entropy of the candidates' weights, summed over all edges; ``L_E``, over the nodes,
the entropy of the edges' weights and a term that holds the number of edges at the target. The
formulas, transforms and constants are those of the released code. It keeps two edges at every node;
targets that differ from node to node, or count the edges of the cell, are its formulas with the 2
replaced, see ``docs/discretization.md``. The released code applies each cell kind's betas in cells
of the other kind; here each kind has its own.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from fastnas.methods.base import Method, MethodOptions, Moment, register_method
from fastnas.methods.continuation import ContinuationName, continuation
from fastnas.methods.edge_target import EdgeGroup, EdgeTarget
from fastnas.methods.learner import Batch, Learner, Outcome
from fastnas.methods.optimizers import set_rate
from fastnas.methods.parameters import ArchParameters, normal_logits
from fastnas.methods.target import CostTerm
from fastnas.spaces.base import CellSpec, CellWeights, Space

__all__ = ["DA2S", "DA2SOptions", "edge_loss", "entropy", "least_sum_weight", "released_logits"]


@dataclass(frozen=True)
class DA2SOptions(MethodOptions):
    """Options of the method ``da2s``."""

    keep: str = "2"
    """Edges that the derived cells keep: 2 at every node (1 at one that has no more); 1,2,2,3
    node by node; total:8 in the cell, wherever they are."""
    parametrisation: Literal["released", "plain"] = "released"
    """Logits of the candidates: released takes 2 alpha and its cube below -1, plain takes alpha."""
    schedule: ContinuationName = "linear"
    """Growth of the second loss over the epochs; see aux_weight."""
    op_schedule: ContinuationName = "delayed-log"
    """Growth of the candidates' term in the second loss."""
    edge_schedule: ContinuationName = "const"
    """Growth of the edges' term in the second loss."""
    delay: int = 8
    """Epochs for which a schedule called delayed-... stays 0."""
    aux_weight: float = 0.1
    """A: weight of the second loss, which pushes the weights of candidates and edges to what they
    are in a derived cell."""
    op_weight: float = 1.0
    """a: weight of the candidates' term in the second loss."""
    edge_weight: float = 4.0
    """b: weight of the edges' term in the second loss."""
    sum_weight: float = 0.2
    """Weight, within the edges' term, of what holds their number at keep. To keep m edges it must
    exceed (m - 1) / (2 m^2)."""
    alpha_warmup_epochs: int = 8
    """First epochs in which of the architecture only the weights of the edges (betas) move."""
    partial_channels: int = 1
    """k: one in k channels of an edge passes through the candidates, as in PC-DARTS; 1 is all."""

    def __post_init__(self) -> None:
        """Check the ranges; whether a cell can meet the target is for the method to say."""
        EdgeTarget.parse(self.keep)
        for name, least in (("delay", 0), ("alpha_warmup_epochs", 0), ("partial_channels", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name}: expected at least {least}, but got {getattr(self, name)}"
                )
        for name in ("aux_weight", "op_weight", "edge_weight", "sum_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected at least 0, but got {getattr(self, name)}")


# Far beyond any logit of a search, and small enough that neither its double nor its cube overflows
# in float32. What lies beyond is held here, so that no 0 * inf arises.
_LOWEST, _HIGHEST = -5e11, 1e37


def released_logits(alpha: Tensor) -> Tensor:
    """The effective logits of the released code: with t = 2 alpha, t where t >= -1, else t^3."""
    t = 2 * alpha.clamp(_LOWEST, _HIGHEST)
    # The cube of what is not taken must not overflow either: its gradient would be 0 * inf.
    return torch.where(t >= -1, t, t.clamp(max=-1) ** 3)


def entropy(logits: Tensor) -> Tensor:
    """``-sum p ln p`` of ``p = softmax(logits)`` over the last dimension; finite for finite logits.

    By log_softmax: ``p * p.log()`` is NaN as soon as a p underflows, which the cube makes likely.
    """
    log_p = torch.log_softmax(logits, dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


def capped(beta: Tensor) -> Tensor:
    """``min(beta, 1)``, without gradient from 1 on."""
    beta = beta.clamp(min=_LOWEST)
    return torch.where(beta < 1, beta, torch.ones_like(beta))


def edge_loss(b: Tensor, keep: int, sum_weight: float) -> Tensor:
    """The loss of one group of edges: ``sum_weight (sum of positive b - keep)^2 + H(softmax(b))``.

    Args:
        b: ``[n]``, the capped betas.
        keep: m, edges that are to stay.
        sum_weight: weight of the first term.
    """
    return sum_weight * (b.clamp(min=0).sum() - keep) ** 2 + entropy(b)


def least_sum_weight(keep: int) -> float:
    """``(m - 1) / (2 m^2)``: above it m betas at 1 and the others at -infinity are a minimum.

    To the second order, lowering one of the m by d lowers the entropy by d^2 (m - 1) / (2 m^2) and
    costs ``sum_weight`` d^2; lowering several costs more, and the cap leaves no way up.
    """
    return (keep - 1) / (2 * keep**2)


@register_method("da2s")
class DA2S(Method):
    """DARTS with weights for the edges and a loss that pushes all weights to their final shape."""

    Options: ClassVar[type[MethodOptions]] = DA2SOptions
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # Few steps: a strong second loss, most of a search for it to act, and fast alphas.
        "demo": {
            "C": 4,
            "arch_warmup_epochs": 0,
            "arch_lr": 0.05,
            "options": DA2SOptions(aux_weight=0.3, delay=1, alpha_warmup_epochs=1),
        },
        # Released script: as DARTS; one Adam for alphas and betas, the alphas at rest for 8 epochs.
        "cifar10": {
            "batch_size": 64,
            "lr": 0.025,
            "lr_min": 0.001,
            "arch_lr": 3e-4,
            "arch_warmup_epochs": 0,
            "validate": "every",
        },
    }
    needs: ClassVar[frozenset[str]] = frozenset({"partial_channels"})
    options: DA2SOptions

    def __init__(
        self,
        specs: Mapping[str, CellSpec],
        options: MethodOptions | None = None,
        *,
        seed: int = 0,
        term: CostTerm | None = None,
    ) -> None:
        """Check the target against the cells.

        Raises:
            ValueError: a cell cannot meet the target, or ``sum_weight`` is too small for it.
        """
        super().__init__(specs, options, seed=seed, term=term)
        self.target = EdgeTarget.parse(self.options.keep)
        self.groups = {kind: self.target.groups(spec) for kind, spec in self.specs.items()}
        for group in (group for groups in self.groups.values() for group in groups):
            least = least_sum_weight(group.keep)
            if group.free and self.options.sum_weight <= least:
                raise ValueError(
                    f"sum_weight: expected more than {least:.4g}, or {group.keep} edges that stay "
                    f"are no stable state, but got {self.options.sum_weight:g}"
                )

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuse a target of cost: its tables have the candidate `none`, which is not searched."""
        if config.target is not None:
            raise ValueError(
                f"target: expected none with the method 'da2s', whose target are edges (keep), "
                f"but got {config.target!r}"
            )

    @classmethod
    def idle(cls, config: Any) -> dict[str, str]:
        """What belongs to terms without weight, and the delay of schedules without one."""
        o, idle = cast(DA2SOptions, config.options), {}
        terms = {"op_weight": ("op_schedule",), "edge_weight": ("edge_schedule", "sum_weight")}
        if not o.aux_weight:
            names = ("schedule", *terms, *(name for names in terms.values() for name in names))
            idle = dict.fromkeys(names, "aux_weight above 0, but got 0")
        for weight, names in terms.items():
            if not getattr(o, weight):
                idle |= dict.fromkeys(names, f"{weight} above 0, but got 0")
        schedules = {"schedule", "op_schedule", "edge_schedule"} - set(idle)
        if not any(getattr(o, name).startswith("delayed-") for name in schedules):
            idle["delay"] = "a schedule that is delayed, but got none"
        return idle

    @classmethod
    def frozen(cls, config: Any, steps_per_epoch: int) -> str | None:
        """The alphas, where the search ends before they may move."""
        epochs, rest = config.epochs, config.options.alpha_warmup_epochs
        if epochs > rest:
            return None
        return (
            f"the alphas take no step: --alpha-warmup-epochs {rest} leaves every epoch (--epochs "
            f"{epochs}) to the weights and the betas, and the candidates of the genotype are read "
            f"off the initial alphas; try --epochs above {rest}, or --alpha-warmup-epochs below "
            f"{epochs}"
        )

    @classmethod
    def supernet_options(cls, options: MethodOptions) -> dict[str, Any]:
        """Edges without `none`: here a weight of the edge says that it is not needed."""
        return {"none": False, "partial_channels": cast(DA2SOptions, options).partial_channels}

    def parameters(self) -> ArchParameters:
        """Alphas from N(0, 1e-8), one row an edge; a beta for each edge that may have to go.

        A group that keeps all its edges has no betas. The others begin at m / n, so that their sum
        is at its target.
        """
        alphas, betas = {}, {}
        for kind, spec in self.specs.items():
            alphas[kind] = normal_logits(spec.edges, len(spec.primitives), std=1e-4)
            if means := [torch.full((g.count,), g.keep / g.count) for g in self._free(kind)]:
                start = torch.cat(means)
                betas[kind] = start + normal_logits(len(start), std=1e-4)
        return ArchParameters(alphas, betas)

    def parameter_groups(self, arch: ArchParameters) -> list[dict[str, Any]]:
        """Alphas and betas apart: for some epochs only the betas move."""
        alphas = [arch.alpha(kind) for kind in self.specs]
        betas = [arch.beta(kind) for kind in self.specs if any(self._free(kind))]
        return [{"params": alphas}, {"params": betas}]

    def weights(self, arch: ArchParameters, moment: Moment) -> dict[str, CellWeights]:
        """Softmax over an edge's candidates, and n times that over the n edges of a group.

        The factor makes equal betas the plain sum of DARTS.
        """
        return {
            kind: CellWeights(torch.softmax(self._logits(arch, kind), -1), self._edges(arch, kind))
            for kind in self.specs
        }

    def pruned_weights(
        self, arch: ArchParameters, one_hot: Mapping[str, CellWeights]
    ) -> dict[str, CellWeights]:
        """The kept edges share their group's weight, as if the others' betas were -infinity."""
        return {
            kind: CellWeights(weights.ops, self._edges(arch, kind, weights.edges))
            for kind, weights in one_hot.items()
        }

    def operation_loss(self, arch: ArchParameters) -> Tensor:
        """``L_O``: entropy of the candidates' weights, summed over the edges of all kinds."""
        return torch.stack([entropy(self._logits(arch, k)).sum() for k in self.specs]).sum()

    def edge_loss(self, arch: ArchParameters) -> Tensor:
        """``L_E``: :func:`edge_loss`, summed over all groups that lose an edge; 0 without any."""
        losses = [
            edge_loss(b, group.keep, self.options.sum_weight)
            for kind in self.specs
            for group, b in self._betas(arch, kind)
        ]
        return torch.stack(losses).sum() if losses else next(arch.parameters()).new_zeros(())

    def objective(self, loss: Tensor, arch: ArchParameters, moment: Moment) -> Tensor:
        """The loss of the task and, weighted by the schedules, those of candidates and edges."""
        whole, op_weight, edge_weight = self._grown(moment)
        ops = op_weight * self.operation_loss(arch)
        edges = edge_weight * self.edge_loss(arch)
        return loss + whole * (ops + edges)

    def _grown(self, moment: Moment) -> tuple[float, float, float]:
        """Weights, as of now, of the second loss and of the terms of candidates and edges in it."""
        o = self.options
        weights = (
            (o.aux_weight, o.schedule),
            (o.op_weight, o.op_schedule),
            (o.edge_weight, o.edge_schedule),
        )
        whole, ops, edges = (
            weight * continuation(name, moment.epoch + 1, moment.epochs, o.delay)
            for weight, name in weights
        )
        return whole, ops, edges

    def graph_obstacle(self) -> str | None:
        """None: a step is the same in all iterations of an epoch."""
        return None

    def graph_key(self, moment: Moment) -> Hashable:
        """What the architecture's loss and rates take from schedules of the epoch."""
        return self._grown(moment) if moment.phase == "architecture" else None

    def architecture_step(
        self, learner: Learner, train: Batch, val: Batch, moment: Moment
    ) -> Outcome:
        """First-order step; a learning rate of 0 holds the alphas while Adam learns its moments."""
        alphas, betas = learner.arch_optimizer.param_groups
        set_rate(alphas, 0.0 if moment.epoch < self.options.alpha_warmup_epochs else betas["lr"])
        return learner.architecture_step(val, moment)

    def scores(self, arch: ArchParameters) -> dict[str, Tensor]:
        """The candidates' weights; which edges stay is for the betas to say, see :meth:`kept`."""
        return {kind: torch.softmax(self._logits(arch, kind), dim=-1) for kind in self.specs}

    def kept(self, arch: ArchParameters) -> dict[str, Tensor]:
        """By cell kind ``[E]``, bool: the edges with the largest betas, as many as are to stay."""
        kept = {}
        for kind, spec in self.specs.items():
            strength = arch.alpha(kind).new_zeros(spec.edges)
            for group, beta in self._raw_betas(arch, kind):
                strength[group.rows] = beta.detach()
            kept[kind] = self.target.choose(strength, spec)
        return kept

    def derive(self, arch: ArchParameters, space: Space) -> Any:
        """The edges by their betas, on each the candidate of the largest weight."""
        with torch.no_grad():
            return space.derive(self.scores(arch), self.specs, self.kept(arch))

    def entropy(self, arch: ArchParameters) -> dict[str, float]:
        """Mean entropy of the candidates' weights over the edges of each kind, in nats."""
        with torch.no_grad():
            return {kind: entropy(self._logits(arch, kind)).mean().item() for kind in self.specs}

    def _logits(self, arch: ArchParameters, kind: str) -> Tensor:
        alpha = arch.alpha(kind)
        if self.options.parametrisation == "released":
            return released_logits(alpha)
        return alpha.clamp(-_HIGHEST, _HIGHEST)

    def _free(self, kind: str) -> list[EdgeGroup]:
        return [group for group in self.groups[kind] if group.free]

    def _raw_betas(self, arch: ArchParameters, kind: str) -> Iterator[tuple[EdgeGroup, Tensor]]:
        """Each group that has betas, and these."""
        if groups := self._free(kind):
            yield from zip(groups, arch.beta(kind).split([g.count for g in groups]), strict=True)

    def _betas(self, arch: ArchParameters, kind: str) -> Iterator[tuple[EdgeGroup, Tensor]]:
        return ((group, capped(beta)) for group, beta in self._raw_betas(arch, kind))

    def _edges(self, arch: ArchParameters, kind: str, mask: Tensor | None = None) -> Tensor:
        """``[E]``: the factor of each edge; only those in ``mask`` share in it, if there is one."""
        betas = dict((group.rows.start, b) for group, b in self._betas(arch, kind))
        parts = []
        for group in self.groups[kind]:
            stays = None if mask is None else mask[group.rows] > 0
            b = betas.get(group.rows.start)
            if b is None:
                ones = arch.alpha(kind).new_ones(group.count)
                parts.append(ones if stays is None else ones * stays)
                continue
            if stays is not None:
                b = b.masked_fill(~stays, -math.inf)
            parts.append(group.count * torch.softmax(b, dim=0))
        return torch.cat(parts)
