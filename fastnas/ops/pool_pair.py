# SPDX-License-Identifier: Apache-2.0
"""The max pool and the average pool of one source, fused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastnas._extension import has_kernels
from fastnas.ops import reference
from fastnas.ops._carried import count_carriers, make_carriers
from fastnas.ops._common import check_devices, differentiate, fake_like, memory_format
from fastnas.ops.depthwise_group import MAX_SIZE


def pool_pair(x: Tensor, stride: int = 1) -> tuple[Tensor, Tensor]:
    """The 3x3 max pool and the 3x3 average pool that read one source, in one pass over it.

    Equivalent to ``F.max_pool2d(x, 3, stride, 1), F.avg_pool2d(x, 3, stride, 1,
    count_include_pad=False)``: two candidates of DARTS (arXiv 1806.09055, section 3.1). Among equal
    values the first of a window, row by row, gets the gradient; NaN is the maximum of its windows.
    The backward keeps ``x`` and no indices, and gives ``dx`` once, summed over both. Averages and
    gradients are taken in float32 (float64 for float64 inputs). Autocast changes nothing, as with
    the pools of PyTorch.

    Args:
        x: ``(N, C, H, W)``, floating-point.
        stride: 1 or 2, of both.

    Returns:
        Maximum and average, each ``(N, C, ceil(H / stride), ceil(W / stride))`` in the dtype and
        memory format of ``x``.

    Raises:
        ValueError: a shape or stride other than these.
        TypeError: ``x`` is not a floating-point tensor.

    Example:
        >>> pool_pair(torch.tensor([[[[1.0, 3.0]]]]))
        (tensor([[[[3., 3.]]]]), tensor([[[[2., 2.]]]]))
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"pool_pair: expected x to be a tensor, but got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"pool_pair: expected x to be floating-point, but got {x.dtype}")
    if x.dim() != 4:
        raise ValueError(f"pool_pair: expected x of shape (N, C, H, W), but got {list(x.shape)}")
    if max(x.shape[2:]) > MAX_SIZE:
        raise ValueError(
            f"pool_pair: expected x of at most 2^30 rows and columns, but got {list(x.shape)}"
        )
    if type(stride) is not int or stride not in (1, 2):
        raise ValueError(f"pool_pair: expected stride 1 or 2, but got {stride!r}")
    return run_pool_pair(x, stride)[0]


def run_pool_pair(
    x: Tensor, stride: int, carry: bool = False
) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """The same without the checks at the door, for callers inside; the kernels check shapes too.

    Returns with the outputs their carriers (``fastnas.ops._carried``), if any: with statistics
    alone, since every edge that leaves the source may read the outputs.
    """
    top, mean, *carriers = PoolPair.apply(x, stride, count_carriers(x, 2, carry) > 0)
    return (top, mean), carriers


class PoolPair(torch.autograd.Function):
    """Autograd of :func:`pool_pair`; the second derivative goes through the reference."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: int, carry: bool) -> tuple[Tensor, ...]:
        """Outputs, and carriers, of the device's kernel, or the reference where there is none."""
        ctx.save_for_backward(x)
        ctx.stride, ctx.format = stride, memory_format(x)
        ctx.set_materialize_grads(False)
        if has_kernels(x.device.type):
            top, mean, made = torch.ops.fastnas.pool_pair(x, stride, carry)
        else:
            top, mean = reference.pool_pair(x, stride)
            made = make_carriers([top, mean] if carry else [])
        if made:
            ctx.mark_non_differentiable(*made)
        return (top, mean, *made)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        """Gradient of ``x`` from those of the outputs that have one."""
        (x,) = ctx.saved_tensors
        grads = grads[:2]
        given = [g for g in grads if g is not None]
        if not given:
            return None, None, None
        if torch.is_grad_enabled() or not has_kernels(x.device.type):

            def composite(x: Tensor) -> list[Tensor]:
                ys = reference.pool_pair(x, ctx.stride)
                return [y for y, g in zip(ys, grads, strict=True) if g is not None]

            (dx,) = differentiate(composite, (x,), [True], given)
            return dx, None, None
        top, mean = (g if g is None else g.contiguous(memory_format=ctx.format) for g in grads)
        size = list(x.shape[2:])
        return torch.ops.fastnas.pool_pair_backward(top, mean, x, size, ctx.stride), None, None


@torch.library.register_fake("fastnas::pool_pair")
def _(x: Tensor, stride: int, carry: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    n, c, *space = x.shape
    shape = (n, c, *((size + stride - 1) // stride for size in space))
    carriers = [x.new_empty(4, c) for _ in range(2)] if carry else []
    return fake_like(x, x.dtype, shape), fake_like(x, x.dtype, shape), carriers


@torch.library.register_fake("fastnas::pool_pair_backward")
def _(
    grad_max: Tensor | None, grad_avg: Tensor | None, x: Tensor, size: list[int], stride: int
) -> Tensor:
    given = [g for g in (grad_max, grad_avg) if g is not None]
    check_devices("pool_pair_backward", x, *given)
    like = x if x.dim() == 4 else given[0]
    return fake_like(like, given[0].dtype, (*given[0].shape[:2], *size))
