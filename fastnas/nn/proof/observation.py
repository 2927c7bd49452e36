# SPDX-License-Identifier: Apache-2.0
"""Run a mixed op on random data, and compare what two of them make of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastnas.nn.batch_norm import hook_tables
from fastnas.nn.proof.watch import Watch

__all__ = [
    "Random",
    "Trial",
    "clean_copy",
    "first_difference",
    "is_same",
    "observe",
    "one_line",
    "record",
]

_SEED = 20190501
# Largest relative difference of two orders of summation; anything above is another formula.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# Results smaller than this are compared absolutely: a gradient that is zero on paper is noise.
_SMALL = 1e-3


class Random:
    """A source of random tensors of one kind, the same for everything that is compared."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """Start from the seed that every proof starts from."""
        self.device, self.dtype = device, dtype
        self.seed()

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def seed(self) -> None:
        """Start the generators alike, for candidates that draw random numbers."""
        torch.default_generator.manual_seed(_SEED)
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(_SEED)


@dataclass(frozen=True)
class Trial:
    """What a mixed op is run on.

    Attributes:
        name: what is special, in a few words.
        x: the input.
        weights: one per candidate.
        training: the mode.
    """

    name: str
    x: Tensor
    weights: Tensor
    training: bool = True


def observe(
    op: nn.Module, trial: Trial, random: Random, watch: Watch | None = None
) -> dict[str, Tensor]:
    """Everything a training or evaluation step takes from ``op``, by name.

    Raises:
        Exception: whatever ``op`` raises.
        TypeError: it returns something else than a tensor.
        RuntimeError: it writes to its input.
    """
    # A row of a matrix, as a supernet has them.
    given = {"x": trial.x, "the weights": torch.stack([trial.weights, trial.weights])}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
    x, row = leaves["x"], leaves["the weights"][1]
    op.train(trial.training)
    return {
        f"{what} ({trial.name})": value
        for what, value in record(op, given, leaves, lambda: op(x, row), random, watch, row).items()
    }


def record(
    module: nn.Module,
    given: Mapping[str, Tensor],
    leaves: Mapping[str, Tensor],
    call: Callable[[], Tensor],
    random: Random,
    watch: Watch | None = None,
    weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """What a step takes from one call: output, all gradients, and the buffers afterwards.

    Args:
        module: whose parameters and buffers belong to it.
        given: what it is called with, by name.
        leaves: copies of these that ask for gradients; ``call`` reads them.
        call: runs ``module``.
        random: the source of the output's gradient.
        watch: notes what runs meanwhile.
        weights: what a watched ``call`` may ask for zeros.

    Raises:
        Exception: whatever ``call`` raises.
        TypeError: it returns something else than a tensor.
        RuntimeError: it writes to its input.
    """
    random.seed()
    watching: AbstractContextManager[None] = nullcontext() if watch is None else watch.run(weights)
    with watching:
        y = call()
    if not isinstance(y, Tensor):
        raise TypeError(f"it returns {type(y).__name__}, not a tensor")
    seen = {"the output": y.detach().clone()}
    named = {**leaves, **dict(module.named_parameters())}
    grads: tuple[Tensor | None, ...] = (None,) * len(named)
    if y.requires_grad:
        random.seed()
        grad = random.normal(*y.shape).to(y.dtype)
        grads = torch.autograd.grad(y, list(named.values()), grad, allow_unused=True)
    for (name, tensor), g in zip(named.items(), grads, strict=True):
        seen[f"the gradient of {name}"] = torch.zeros_like(tensor) if g is None else g
    for name, buffer in module.named_buffers():
        seen[f"the buffer {name}"] = buffer.clone()
    if not all(torch.equal(leaves[name], tensor) for name, tensor in given.items()):
        raise RuntimeError("it writes to its input")
    return seen


def first_difference(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[str, float] | None:
    """The first thing seen that differs by more than rounding, and by how much."""
    for name, value in theirs.items():
        difference = _difference(ours[name], value)
        if difference > _TOLERANCE[dtype]:
            return name, difference
    return None


def is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two results differ by no more than rounding."""
    return _difference(a, b) <= _TOLERANCE[b.dtype]


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest value; infinite where the two cannot be compared."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return float("inf")
    if theirs.numel() == 0:
        return 0.0
    a, b = ours.detach().double(), theirs.detach().double()
    if not (a.isfinite().all() and b.isfinite().all()):
        return 0.0 if torch.equal(a.nan_to_num(), b.nan_to_num()) else float("inf")
    return float((a - b).abs().max() / b.abs().max().clamp(min=_SMALL))


def clean_copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose hooks do not fire and whose parameters all ask for gradients."""
    clone = copy.deepcopy(module).to(dtype)
    for part in clone.modules():
        for table in hook_tables(part):
            table.clear()
    for parameter in clone.parameters():
        parameter.requires_grad_()
        parameter.grad = None
    return clone


def one_line(error: BaseException) -> str:
    """An error as it is quoted in a report."""
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text[:200]}"
