# SPDX-License-Identifier: Apache-2.0
"""The end of a PC-DARTS node whose states are kept in two parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnas._extension import has_kernels
from fastnas.ops import reference
from fastnas.ops._common import (
    as_weights,
    check_candidates,
    check_devices,
    differentiate,
    fake_like,
    memory_format,
)


def partial_channel_node(
    mixed: Tensor, rests: Sequence[Tensor], weights: Tensor | Sequence[Tensor | float], k: int
) -> tuple[Tensor, Tensor]:
    """Bypassed channels of a node's edges summed up, shuffled with the mixed ones, in two parts.

    Where :func:`partial_channel_mix` is one edge of PC-DARTS (arXiv 1907.05737, section 3.2), this
    is the end of a node: the weighted sum over its edges commutes with the shuffle. The next edges
    read the first ``c = C / k`` channels and the others apart, so nothing has to split them.
    Equivalent to::

        z = torch.cat([mixed, mixed_sum(rests, weights)], 1)
        out = z.view(N, k, c, H, W).transpose(1, 2).reshape(N, C, H, W)
        return out[:, :c], out[:, c:]  # two dense tensors

    in one pass; so is the backward, where either gradient may be missing, and both are read where
    they stand, if they are parts of the gradient of a concatenation.

    Args:
        mixed: ``(N, C/k, H, W)``, floating-point: the sum over the candidates of all edges.
        rests: for each of 1 to 64 edges its other channels, ``(N, C - C/k, H, W)``.
        weights: ``(E,)``, or E numbers or 0-d tensors: the factors of the edges.
        k: one channel in ``k`` is mixed.

    Returns:
        ``(N, C/k, H, W)`` and ``(N, C - C/k, H, W)`` in the promoted dtype of ``mixed`` and
        ``rests`` and the memory format of ``mixed``.

    Raises:
        ValueError: ``k`` below 2, shapes or devices that do not fit, another number of weights
            than of rests.
        TypeError: an input is not a floating-point tensor, or ``k`` no integer.
    """
    _check(mixed, rests, k)
    w = as_weights("partial_channel_node", weights, rests)
    acc = reference.accumulate_dtype(reference.result_dtype([mixed, *rests]))
    return PartialChannelNode.apply(k, mixed, w.to(acc), *rests)


def _check(mixed: Tensor, rests: Sequence[Tensor], k: int) -> None:
    op = "partial_channel_node"
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"{op}: expected k to be an integer, but got {type(k).__name__}")
    if k < 2:
        raise ValueError(f"{op}: expected k of at least 2, but got {k}")
    check_candidates(op, [mixed], "mixed")
    check_candidates(op, rests, "rests")
    if mixed.dim() != 4:
        raise ValueError(
            f"{op}: expected mixed of shape (N, C/k, H, W), but got {list(mixed.shape)}"
        )
    n, c, *space = mixed.shape
    wanted = [n, (k - 1) * c, *space]
    if list(rests[0].shape) != wanted:
        raise ValueError(
            f"{op}: expected rests of shape {wanted} for k = {k} and mixed of shape "
            f"{list(mixed.shape)}, but got {list(rests[0].shape)}"
        )
    if rests[0].device != mixed.device:
        raise ValueError(
            f"{op}: expected rests on {mixed.device} like mixed, but got {rests[0].device}"
        )


class PartialChannelNode(torch.autograd.Function):
    """Autograd of :func:`partial_channel_node`; the second derivative is the reference's."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        """Both parts from the kernel of the device, or from the reference where there is none."""
        # One parameter for all: without gradients, torch.compile would take the first argument for
        # ctx where there are as many arguments as parameters.
        ctx, k, mixed, weights, *rests = arguments
        # Shuffled and weighted gradients need no values; only those of the weights do.
        saved = rests if ctx.needs_input_grad[2] else ()
        ctx.save_for_backward(weights, *saved)
        ctx.k = k
        ctx.layout = [(x.shape, x.dtype) for x in (mixed, *rests)]
        ctx.format = memory_format(mixed)
        ctx.set_materialize_grads(False)
        if has_kernels(mixed.device.type):
            return torch.ops.fastnas.partial_channel_node(mixed, rests, weights, k)
        return reference.partial_channel_node(mixed, rests, weights, k)

    @staticmethod
    def backward(
        ctx: Any, grad_mixed: Tensor | None, grad_rest: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of all that ask for one."""
        grads = [grad_mixed, grad_rest]
        given = [g for g in grads if g is not None]
        if not given:
            return (None,) * len(ctx.needs_input_grad)
        need_mixed, need_w, *need = ctx.needs_input_grad[1:]
        weights, *rests = ctx.saved_tensors
        if torch.is_grad_enabled() or not has_kernels(given[0].device.type):
            # What was not saved does not enter by its values.
            blank = [given[0].new_zeros((), dtype=d).expand(s) for s, d in ctx.layout]
            rests = rests or blank[1:]

            def composite(mixed: Tensor, weights: Tensor, *rests: Tensor) -> list[Tensor]:
                parts = reference.partial_channel_node(mixed, rests, weights, ctx.k)
                return [y for y, g in zip(parts, grads, strict=True) if g is not None]

            asked = (need_mixed, need_w, *need)
            return None, *differentiate(composite, (blank[0], weights, *rests), asked, given)
        # No copy of what is read through its strides. And a list: torch.compile stumbles over
        # generators here.
        first, second = [
            g if g is None or memory_format(g) == ctx.format
            else g.contiguous(memory_format=ctx.format)
            for g in grads
        ]  # fmt: skip
        dmixed, drests, dw = torch.ops.fastnas.partial_channel_node_backward(
            first, second, rests, weights, ctx.k, need_mixed, need, need_w
        )
        (_, dtype), *layouts = ctx.layout
        wanted = [d for (_, d), asked in zip(layouts, need, strict=True) if asked]
        found = iter([dx.to(d) for dx, d in zip(drests, wanted, strict=True)])
        return (
            None,
            dmixed.to(dtype) if need_mixed else None,
            dw if need_w else None,
            *[next(found) if asked else None for asked in need],
        )


@torch.library.register_fake("fastnas::partial_channel_node")
def _(mixed: Tensor, rests: list[Tensor], weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    check_devices("partial_channel_node", mixed, weights, *rests)
    dtype = reference.result_dtype([mixed, *rests])
    return fake_like(mixed, dtype), fake_like(mixed, dtype, rests[0].shape)


@torch.library.register_fake("fastnas::partial_channel_node_backward")
def _(
    grad_mixed: Tensor | None,
    grad_rest: Tensor | None,
    rests: list[Tensor],
    weights: Tensor,
    k: int,
    need_mixed: bool,
    need_rests: list[bool],
    need_weights: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:
    given = [g for g in (grad_mixed, grad_rest) if g is not None]
    check_devices("partial_channel_node_backward", weights, *given, *rests)
    n, channels, *space = given[0].shape
    c = channels if grad_mixed is not None else channels // (k - 1)
    like, dtype = given[0], given[0].dtype
    return (
        fake_like(like, dtype, (n, c, *space)) if need_mixed else like.new_empty(0),
        [fake_like(like, dtype, (n, (k - 1) * c, *space)) for need in need_rests if need],
        torch.empty_like(weights) if need_weights else weights.new_empty(0),
    )
