# SPDX-License-Identifier: Apache-2.0
"""All depthwise convolutions of one source, with the ReLU before them, fused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnas._extension import has_kernels
from fastnas.ops import reference
from fastnas.ops._common import (
    MAX_CANDIDATES,
    autocast_dtype,
    check_devices,
    differentiate,
    fake_like,
    memory_format,
)

#: What the kernels serve: the side of a convolution, its dilation, and rows and columns of x.
MAX_KERNEL, MAX_DILATION, MAX_SIZE = 7, 1 << 20, 1 << 30


def depthwise_group(
    x: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    stride: int = 1,
    relu: bool = True,
) -> list[Tensor]:
    """The depthwise convolutions that read one source, ReLU included, in one pass over it.

    Equivalent to ``[F.conv2d(F.relu(x), w, None, stride, d * (k // 2), d, groups=C) for w, d in
    zip(weights, dilations)]``: the depthwise parts of DARTS' separable and dilated convolutions
    (arXiv 1806.09055, section 3.1). Sums are taken in float32 (float64 for float64 inputs). The
    rectified ``x`` is never stored; the backward keeps ``x`` and the weights and gives ``dx`` once,
    summed over all of them. Under autocast ``x`` is cast as ``F.conv2d`` would.

    Args:
        x: ``(N, C, H, W)``, floating-point.
        weights: 1 to 64 tensors ``(C, 1, k, k)``, k of 1, 3, 5 or 7; dtypes may differ from that of
            ``x``.
        dilations: one for each weight.
        stride: 1 or 2, for all.
        relu: whether the convolutions read ``relu(x)``, or ``x`` as it is.

    Returns:
        For each weight a tensor ``(N, C, ceil(H / stride), ceil(W / stride))`` in the dtype and
        memory format of ``x``.

    Raises:
        ValueError: shapes, counts, dilations or strides other than these.
        TypeError: ``x`` or a weight is not a floating-point tensor.

    Example:
        >>> x = torch.tensor([[[[-1.0, 2.0]]]])
        >>> depthwise_group(x, [torch.ones(1, 1, 3, 3), torch.ones(1, 1, 1, 1)], [1, 1])
        [tensor([[[[2., 2.]]]]), tensor([[[[0., 2.]]]])]
    """
    check_depthwise("depthwise_group", x, weights, dilations, stride)
    dtype = autocast_dtype(x)
    return list(
        DepthwiseGroup.apply(
            list(dilations), stride, relu, x if x.dtype == dtype else x.to(dtype), *weights
        )
    )


def check_depthwise(
    op: str,
    x: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    stride: int,
    name: str = "weights",
) -> None:
    """Raise unless depthwise convolutions of ``x`` are what these arguments describe.

    ``name`` is what the op calls its weights.
    """
    for argument, values in ((name, weights), ("dilations", dilations)):
        if not isinstance(values, (list, tuple)):
            raise TypeError(
                f"{op}: expected {argument} to be a list, but got {type(values).__name__}"
            )
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: expected x to be a tensor, but got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{op}: expected x to be floating-point, but got {x.dtype}")
    if x.dim() != 4:
        raise ValueError(f"{op}: expected x of shape (N, C, H, W), but got {list(x.shape)}")
    if max(x.shape[2:]) > MAX_SIZE:
        raise ValueError(
            f"{op}: expected x of at most 2^30 rows and columns, but got {list(x.shape)}"
        )
    if stride not in (1, 2):
        raise ValueError(f"{op}: expected stride 1 or 2, but got {stride}")
    if not 1 <= len(weights) <= MAX_CANDIDATES:
        raise ValueError(
            f"{op}: expected 1 to {MAX_CANDIDATES} tensors in {name}, but got {len(weights)}"
        )
    if len(weights) != len(dilations):
        raise ValueError(
            f"{op}: expected one dilation per weight, but got {len(weights)} {name} and "
            f"{len(dilations)} dilations"
        )
    channels, device = x.shape[1], x.device
    for i, w in enumerate(weights):
        if not isinstance(w, Tensor):
            raise TypeError(
                f"{op}: expected {name}[{i}] to be a tensor, but got {type(w).__name__}"
            )
        if not w.is_floating_point():
            raise TypeError(f"{op}: expected floating-point weights, but {name}[{i}] is {w.dtype}")
        shape = w.shape
        k = shape[-1] if shape else 0
        if shape != (channels, 1, k, k) or k % 2 == 0 or k > MAX_KERNEL:
            raise ValueError(
                f"{op}: expected {name}[{i}] of shape ({channels}, 1, k, k) with k of 1, 3, 5 or "
                f"7, but got {list(shape)}"
            )
        if w.device != device:
            raise ValueError(f"{op}: expected {name}[{i}] on {device} like x, but got {w.device}")
        if not isinstance(dilations[i], int):
            raise TypeError(
                f"{op}: expected dilations to be integers, but dilations[{i}] is {dilations[i]!r}"
            )
        if not 1 <= dilations[i] <= MAX_DILATION:
            raise ValueError(
                f"{op}: expected dilations of 1 to 2^20, but dilations[{i}] is {dilations[i]}"
            )


class DepthwiseGroup(torch.autograd.Function):
    """Autograd of :func:`depthwise_group`; the second derivative goes through the reference."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        """The outputs from the kernel of the device, or from the reference where there is none."""
        # One parameter for all: without gradients, torch.compile would take the first argument for
        # ctx where there are as many arguments as parameters.
        ctx, dilations, stride, relu, x, *weights = arguments
        need_x, *need_weights = ctx.needs_input_grad[3:]
        # Without a ReLU, dx = sum_i conv_i^T(g_i) needs no input.
        reads_x = any(need_weights) or (need_x and relu)
        ctx.save_for_backward(x if reads_x else x.new_empty(0), *weights)
        ctx.dilations, ctx.stride, ctx.relu = dilations, stride, relu
        ctx.shape, ctx.format = x.shape, memory_format(x)
        ctx.set_materialize_grads(False)
        if has_kernels(x.device.type):
            return tuple(torch.ops.fastnas.depthwise_group(x, weights, dilations, stride, relu))
        return tuple(reference.depthwise_group(x, weights, dilations, stride, relu))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of ``x`` and of every weight that asks for one and has an output that does."""
        x, *weights = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:]
        present = [g is not None for g in grads]
        given = [g for g in grads if g is not None]
        # What has no gradient has none here either: autograd tells it from zeros.
        needs = [
            needs[0] and any(present),
            *(n and p for n, p in zip(needs[1:], present, strict=True)),
        ]
        if not any(needs):
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled() or not has_kernels(given[0].device.type):
            x = x if x.shape == ctx.shape else given[0].new_zeros(()).expand(ctx.shape)

            def composite(x: Tensor, *weights: Tensor) -> list[Tensor]:
                ys = reference.depthwise_group(x, weights, ctx.dilations, ctx.stride, ctx.relu)
                return [y for y, p in zip(ys, present, strict=True) if p]

            return (None, None, None, *differentiate(composite, (x, *weights), needs, given))
        given = [g.contiguous(memory_format=ctx.format) for g in given]
        dx, dws = torch.ops.fastnas.depthwise_group_backward(
            given, present, x, list(ctx.shape[2:]), weights, ctx.dilations, ctx.stride, ctx.relu,
            needs[0], needs[1:],
        )  # fmt: skip
        items = iter(dws)
        return (
            None,
            None,
            None,
            dx if needs[0] else None,
            *(next(items) if need else None for need in needs[1:]),
        )


@torch.library.register_fake("fastnas::depthwise_group")
def _(
    x: Tensor, weights: list[Tensor], dilations: list[int], stride: int, relu: bool
) -> list[Tensor]:
    check_devices("depthwise_group", x, *weights)
    n, c, *space = x.shape
    shape = (n, c, *((size + stride - 1) // stride for size in space))
    return [fake_like(x, x.dtype, shape) for _ in weights]


@torch.library.register_fake("fastnas::depthwise_group_backward")
def _(
    grads: list[Tensor],
    present: list[bool],
    x: Tensor,
    size: list[int],
    weights: list[Tensor],
    dilations: list[int],
    stride: int,
    relu: bool,
    need_x: bool,
    need_weights: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    check_devices("depthwise_group_backward", x, *grads, *weights)
    like = x if x.dim() == 4 else grads[0]
    dtype, shape = grads[0].dtype, (*grads[0].shape[:2], *size)
    dx = fake_like(like, dtype, shape) if need_x else grads[0].new_empty(0)
    dws = [w.new_empty(w.shape) for w, need in zip(weights, need_weights, strict=True) if need]
    return dx, dws
