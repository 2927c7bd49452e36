# SPDX-License-Identifier: Apache-2.0
"""The two steps of a bilevel search, as every method uses them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastnas.methods.base import Method, Moment
from fastnas.methods.optimizers import follow_layout, load_optimizer, optimizer_state, set_rate
from fastnas.methods.parameters import ArchParameters
from fastnas.parallel import ALONE, Group
from fastnas.spaces.base import Weighting

Batch = tuple[Tensor, Tensor]


class Outcome(NamedTuple):
    """What a step or a forward pass brought, kept on the device so that nothing waits for it.

    Attributes:
        loss: 0-d, mean task loss of the batch.
        correct: 0-d int64, number of images classified rightly.
        images: number of images.
    """

    loss: Tensor
    correct: Tensor
    images: int


@dataclass
class Learner:
    """Supernet, architecture parameters, their optimizers, and the steps they make.

    Attributes:
        supernet: called as ``supernet(x, weights)``.
        arch: the architecture parameters.
        method: makes weights and objective of them.
        weight_optimizer: over the parameters of ``supernet`` only.
        arch_optimizer: over those of ``arch`` only.
        criterion: ``(logits, labels) -> 0-d loss``.
        weight_criterion: the same in steps of the weights, None for ``criterion``.
        group: the processes that share each batch; outcomes and gradients are of all of it.
        grad_clip: largest norm of the gradient of the weights, 0 for no clipping.
        arch_grad_clip: the same for the architecture parameters.
        amp: autocast to this type, None for full precision.
        scaler: loss scaling; enabled for float16 only.
    """

    supernet: nn.Module
    arch: ArchParameters
    method: Method
    weight_optimizer: torch.optim.Optimizer
    arch_optimizer: torch.optim.Optimizer
    criterion: Callable[[Tensor, Tensor], Tensor]
    grad_clip: float = 5.0
    arch_grad_clip: float = 0.0
    amp: torch.dtype | None = None
    scaler: torch.amp.GradScaler | None = None
    weight_criterion: Callable[[Tensor, Tensor], Tensor] | None = None
    group: Group = ALONE

    @property
    def lead(self) -> int:
        """Steps until they take the time that they are going to take, but for the very first."""
        return 0

    def forward(
        self,
        batch: Batch,
        weights: Mapping[str, Weighting],
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Outcome]:
        """Task loss of a batch (differentiable) and its outcome.

        With several processes the loss is of the share that is given, the outcome of all shares.
        """
        x, y = batch
        with torch.autocast(x.device.type, dtype=self.amp, enabled=self.amp is not None):
            logits = self.supernet(x, weights)
        # The loss is taken in full precision: ten logits are no place to save bits.
        loss = (criterion or self.criterion)(logits.float(), y)
        with torch.no_grad():
            correct = (logits.argmax(dim=1) == y).sum()
        return loss, Outcome(*self.group.total(loss.detach(), correct, y.numel()))

    def weight_step(self, batch: Batch, moment: Moment) -> Outcome:
        """Step the weights on a training batch; the architecture is held fixed.

        The weights of the mixed ops carry no gradient here, so nothing is stored for theirs.
        """
        with torch.no_grad():
            weights = self.method.weights(self.arch, moment)
        loss, outcome = self.forward(batch, weights, self.weight_criterion)
        self.weight_optimizer.zero_grad(set_to_none=True)
        self._scaled(loss).backward()
        self.group.equalize(
            p.grad for p in parameters_of(self.weight_optimizer) if p.grad is not None
        )
        if self.scaler is not None:
            self.scaler.unscale_(self.weight_optimizer)
        if self.grad_clip > 0:
            nn.utils.clip_grad_norm_(parameters_of(self.weight_optimizer), self.grad_clip)
        if self.scaler is None:
            self.weight_optimizer.step()
        else:
            self.scaler.step(self.weight_optimizer)
            self.scaler.update()
        # Between the steps the gradients would only hold memory.
        self.weight_optimizer.zero_grad(set_to_none=True)
        return outcome

    def architecture_step(self, batch: Batch, moment: Moment) -> Outcome:
        """First-order step of the architecture on a validation batch; the weights are held fixed.

        The weights do not require gradients here, so nothing is stored or computed for theirs.
        """
        with frozen(parameters_of(self.weight_optimizer)):
            loss, outcome = self.forward(batch, self.method.weights(self.arch, moment))
            loss = self.method.objective(loss, self.arch, moment)
            gradient = self.gradient(loss, list(self.arch.parameters()))
        self.apply_architecture_gradient(gradient)
        return outcome

    def gradient(self, loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Gradient of ``loss`` in ``inputs``; zeros where it does not depend on one."""
        gradient = self.group.mean(
            torch.autograd.grad(
                self._scaled(loss), inputs, allow_unused=True, materialize_grads=True
            )
        )
        if self.scaler is None:
            return gradient
        return list(torch._foreach_mul(gradient, 1.0 / self.scaler.get_scale()))

    def apply_architecture_gradient(self, gradient: Sequence[Tensor | None]) -> None:
        """Let the optimizer of the architecture take one step along ``gradient``.

        A parameter whose gradient is None stays as it is, and so does its optimizer's state.
        """
        # Under loss scaling an overflow is expected now and then; such a step is left out, as
        # GradScaler does.
        given = [g for g in gradient if g is not None]
        if self.scaler is not None and not all(bool(g.isfinite().all()) for g in given):
            return
        parameters = list(self.arch.parameters())
        for parameter, g in zip(parameters, gradient, strict=True):
            parameter.grad = g
        if self.arch_grad_clip > 0:
            nn.utils.clip_grad_norm_(parameters, self.arch_grad_clip)
        self.arch_optimizer.step()
        # A fused step leaves the versions as they were, by which methods notice that it was made.
        torch.autograd.graph.increment_version(parameters)
        self.arch_optimizer.zero_grad(set_to_none=True)

    def set_rate(self, rate: float) -> None:
        """Give the weights a learning rate."""
        for group in self.weight_optimizer.param_groups:
            set_rate(group, rate)

    def lay_out(self, layout: torch.memory_format) -> None:
        """Bring weights and their momentum into a memory format; they stay the same parameters."""
        self.supernet.to(memory_format=layout)  # type: ignore[call-overload]  # missing in the stubs
        follow_layout(self.weight_optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Weights, architecture, method, optimizers and loss scale; tensors are not copied."""
        return {
            "supernet": self.supernet.state_dict(),
            "arch": self.arch.state_dict(),
            "method": self.method.state_dict(),
            "weight_optimizer": optimizer_state(self.weight_optimizer),
            "arch_optimizer": optimizer_state(self.arch_optimizer),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`, which may hold other keys beside."""
        self.supernet.load_state_dict(state["supernet"])
        self.arch.load_state_dict(state["arch"])
        self.method.load_state_dict(state["method"])
        load_optimizer(self.weight_optimizer, state["weight_optimizer"])
        load_optimizer(self.arch_optimizer, state["arch_optimizer"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])

    def evaluate(self, batch: Batch, moment: Moment) -> Outcome:
        """Forward pass without gradients; the caller puts the supernet into eval mode."""
        with torch.no_grad():
            _, outcome = self.forward(batch, self.method.weights(self.arch, moment))
        return outcome

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self.scaler is None else self.scaler.scale(loss)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters an optimizer steps; quicker than walking the modules of a supernet."""
    return [p for group in optimizer.param_groups for p in group["params"]]


@contextlib.contextmanager
def frozen(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Within the block none of the parameters requires a gradient."""
    trained = [p for p in parameters if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def preserved(module: nn.Module) -> Iterator[None]:
    """After the block, parameters and buffers of ``module`` hold their former values exactly."""
    tensors = [*module.parameters(), *module.buffers()]
    saved = [t.detach().clone() for t in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, saved, strict=True):
                tensor.copy_(value)
