# SPDX-License-Identifier: Apache-2.0
"""All binary gates of a network in one draw."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnas._extension import has_kernels
from fastnas.ops import reference
from fastnas.ops._common import MAX_CANDIDATES, check_devices


class Paths(NamedTuple):
    """One draw of the gates of E edges.

    Attributes:
        active: ``(E,)`` int64, the candidate that runs; -1 for an edge without any live candidate.
        inactive: ``(E,)`` int64, the other one of the pair; -1 where only one was drawn.
        probs: ``(E, 2)``, differentiable in the logits: with a pair, the two probabilities
            renormalised to sum to 1; else the active one's softmax probability, and 0.
    """

    active: Tensor
    inactive: Tensor
    probs: Tensor

    def tolist(self) -> tuple[list[int], list[int]]:
        """Active and inactive indices on the host, by one transfer for the whole network."""
        both = torch.stack([self.active, self.inactive]).tolist()
        return both[0], both[1]


def sample_paths(
    logits: Tensor,
    seed: int,
    step: int,
    counts: Tensor | None = None,
    two: bool = False,
) -> Paths:
    """Draw the active candidate of every edge from ``softmax(logits)`` (ProxylessNAS, section 3.2).

    The draw is a function of its arguments alone: Philox-4x32-10 keyed by ``seed`` with the counter
    ``(edge, 0, step)``. The same arguments give the same paths on the CPU, on a GPU, on every rank
    and after every resume. Probabilities are resolved to 2^-24 of an edge's largest; a live
    candidate is never impossible.

    Args:
        logits: ``(E, K)`` floating point, K at most 64. A logit of -inf or NaN marks a dead
            candidate; one of +inf has all the probability, shared with others of +inf.
        seed: non-negative integer below 2^64.
        step: non-negative integer below 2^64; another step, another draw.
        counts: ``(E,)`` int64, the number of candidates of each edge (the first ones of its row);
            None: all K.
        two: draw an ordered pair without replacement and which of the two is active (two-path
            mode), by their renormalised probabilities.

    Returns:
        The draw; see :class:`Paths`.

    Raises:
        ValueError: shapes, seed or step out of range.
        TypeError: logits that are not floating point, or counts that are not int64.
    """
    _check(logits, seed, step, counts)
    return Paths(*SamplePaths.apply(logits, counts, seed, step, two))


def _check(logits: Tensor, seed: int, step: int, counts: Tensor | None) -> None:
    if not logits.is_floating_point():
        raise TypeError(f"sample_paths: expected floating-point logits, but got {logits.dtype}")
    if logits.dim() != 2 or not 1 <= logits.shape[1] <= MAX_CANDIDATES:
        raise ValueError(
            f"sample_paths: expected logits of shape (E, K) with K of 1 to {MAX_CANDIDATES}, "
            f"but got {list(logits.shape)}"
        )
    for name, value in (("seed", seed), ("step", step)):
        if not 0 <= value < 1 << 64:
            raise ValueError(f"sample_paths: expected {name} in [0, 2^64), but got {value}")
    if counts is None:
        return
    if counts.dtype != torch.int64:
        raise TypeError(f"sample_paths: expected counts of dtype int64, but got {counts.dtype}")
    if counts.shape != logits.shape[:1] or counts.device != logits.device:
        raise ValueError(
            f"sample_paths: expected counts of shape [{logits.shape[0]}] on {logits.device}, "
            f"but got {list(counts.shape)} on {counts.device}"
        )


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit value: schemas know no other integer."""
    return value - (1 << 64) if value >= 1 << 63 else value


class SamplePaths(torch.autograd.Function):
    """Autograd of :func:`sample_paths`: the draw is constant, its probabilities are not."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, counts: Tensor | None, seed: int, step: int, two: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Active, inactive and probabilities."""
        if has_kernels(logits.device.type):
            active, inactive, probs = torch.ops.fastnas.sample_paths(
                logits, counts, _signed(seed), _signed(step), two
            )
        else:
            active, inactive = reference.sample_path_indices(logits, counts, seed, step, two)
            probs = reference.path_probabilities(logits, counts, active, inactive)
        ctx.save_for_backward(logits, counts, active, inactive)
        ctx.mark_non_differentiable(active, inactive)
        ctx.set_materialize_grads(False)
        return active, inactive, probs

    @staticmethod
    def backward(
        ctx: Any, _active: Tensor | None, _inactive: Tensor | None, grad: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradient of the logits."""
        if grad is None:
            return (None,) * 5
        logits, counts, active, inactive = ctx.saved_tensors
        if not torch.is_grad_enabled() and has_kernels(logits.device.type):
            dlogits = torch.ops.fastnas.sample_paths_backward(
                grad, logits, counts, active, inactive
            )
            return (dlogits, None, None, None, None)
        p, chosen, other = reference.path_softmax(logits, counts, active, inactive)
        grad = grad.to(p.dtype)
        dp = grad[:, :1] * chosen + grad[:, 1:] * other
        dlogits = p * (dp - (p * dp).sum(1, keepdim=True))
        return (dlogits.to(logits.dtype), None, None, None, None)


@torch.library.register_fake("fastnas::sample_paths")
def _(
    logits: Tensor, counts: Tensor | None, seed: int, step: int, two: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check_devices("sample_paths", logits, *([] if counts is None else [counts]))
    active = logits.new_empty(logits.shape[0], dtype=torch.int64)
    return active, torch.empty_like(active), logits.new_empty(logits.shape[0], 2)


@torch.library.register_fake("fastnas::sample_paths_backward")
def _(
    grad: Tensor, logits: Tensor, counts: Tensor | None, active: Tensor, inactive: Tensor
) -> Tensor:
    others = [] if counts is None else [counts]
    check_devices("sample_paths_backward", grad, logits, active, inactive, *others)
    return logits.new_empty(logits.shape)
