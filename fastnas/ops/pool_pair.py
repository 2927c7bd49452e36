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
    return PoolPair.apply(x, stride, 0)


def run_pool_pair(
    x: Tensor, stride: int, readers: int
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """The same without the checks at the door, for callers inside; the kernels check shapes too.

    Returns each output once for every reader, all in the same memory, and as often their carriers
    (``fastnas.ops._carried``), if any.
    """
    carries = count_carriers(x, readers, True) > 0
    found = list(PoolPair.apply(x, stride, readers if carries else 0))
    if not carries:
        return [[y] * readers for y in found], [[], []]
    rows = [found[i : i + readers] for i in range(0, len(found), readers)]
    return rows[:2], rows[2:]


class PoolPair(torch.autograd.Function):
    """Autograd of :func:`pool_pair`; the second derivative goes through the reference.

    Its arguments are x, the stride and the number of readers that the outputs are returned apart
    for, with carriers; 0 for outputs that may have any, without.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: int, readers: int) -> tuple[Tensor, ...]:
        """Outputs, and carriers, of the device's kernel, or the reference where there is none."""
        ctx.stride, ctx.format, ctx.readers = stride, memory_format(x), readers
        ctx.set_materialize_grads(False)
        if has_kernels(x.device.type):
            top, mean, made = torch.ops.fastnas.pool_pair(x, stride, readers > 0)
        else:
            top, mean = reference.pool_pair(x, stride)
            made = make_carriers([top, mean] if readers else [])
        ctx.save_for_backward(x, *([top, mean] if readers else []))
        if not readers:
            return top, mean
        return tuple(t.detach() for t in (top, mean, *made) for _ in range(readers))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        """Gradient of ``x`` from those of the outputs that have one."""
        x, *outputs = ctx.saved_tensors
        count = ctx.readers or 1
        rows = [list(grads[i : i + count]) for i in range(0, len(grads), count)]
        given = [g for row in rows[:2] for g in row if g is not None]
        if not given:
            return None, None, None
        if torch.is_grad_enabled() or not has_kernels(x.device.type):
            ys = [i for i, row in enumerate(rows[:2]) for g in row if g is not None]

            def composite(x: Tensor) -> list[Tensor]:
                both = reference.pool_pair(x, ctx.stride)
                return [both[i] for i in ys]

            (dx,) = differentiate(composite, (x,), [True], given)
            return dx, None, None
        rows[:2] = [
            [g if g is None else g.contiguous(memory_format=ctx.format) for g in row]
            for row in rows[:2]
        ]
        if not ctx.readers:
            size = list(x.shape[2:])
            (top,), (mean,) = rows
            dx = torch.ops.fastnas.pool_pair_backward(top, mean, x, size, ctx.stride)
            return dx, None, None
        none = x.new_empty(0)
        lists = []
        for row, numbers in zip(rows[:2], rows[2:], strict=True):
            pairs = [
                (g, none if n is None else n)
                for g, n in zip(row, numbers, strict=True)
                if g is not None
            ]
            lists += [[g for g, _ in pairs], [n for _, n in pairs]]
        dx = torch.ops.fastnas.pool_pair_carried_backward(*lists, *outputs, x, ctx.stride)
        return dx, None, None


@torch.library.register_fake("fastnas::pool_pair")
def _(x: Tensor, stride: int, carry: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    n, c, *space = x.shape
    shape = (n, c, *((size + stride - 1) // stride for size in space))
    carriers = [x.new_empty(4, c) for _ in range(2)] if carry else []
    return fake_like(x, x.dtype, shape), fake_like(x, x.dtype, shape), carriers


@torch.library.register_fake("fastnas::pool_pair_carried_backward")
def _(
    grads_max: list[Tensor],
    numbers_max: list[Tensor],
    grads_avg: list[Tensor],
    numbers_avg: list[Tensor],
    max: Tensor,
    avg: Tensor,
    x: Tensor,
    stride: int,
) -> Tensor:
    tensors = (x, max, avg, *grads_max, *grads_avg, *numbers_max, *numbers_avg)
    check_devices("pool_pair_carried_backward", *tensors)
    return fake_like(x, x.dtype)


@torch.library.register_fake("fastnas::pool_pair_backward")
def _(
    grad_max: Tensor | None, grad_avg: Tensor | None, x: Tensor, size: list[int], stride: int
) -> Tensor:
    given = [g for g in (grad_max, grad_avg) if g is not None]
    check_devices("pool_pair_backward", x, *given)
    like = x if x.dim() == 4 else given[0]
    return fake_like(like, given[0].dtype, (*given[0].shape[:2], *size))
