# SPDX-License-Identifier: Apache-2.0
"""A ReLU and the pointwise convolution behind it, fused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastnas._extension import has_kernels
from fastnas.ops import reference
from fastnas.ops._common import (
    autocast_dtype,
    check_devices,
    differentiate,
    fake_like,
    memory_format,
)


def relu_pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """ReLU and a 1x1 convolution: what DARTS' cells do to the output of a cell before.

    Equivalent to ``F.conv2d(F.relu(x), weight)`` (arXiv 1806.09055, appendix A.1.1: the ReLU and
    convolution of ReLU-Conv-BN). The backward keeps ``x``, which several readers have in common,
    and no ``relu(x)`` of each. Sums are taken in float32 (float64 for float64 inputs). Under
    autocast ``x`` is cast as ``F.conv2d`` would.

    The CPU kernels are at their best where both numbers of channels fill vectors (of 16, 8 or 4
    float32). On CUDA, with more than 64 channels, PyTorch's own run one after the other, and
    ``relu(x)`` exists while they do.

    Args:
        x: ``(N, C, H, W)``, floating-point.
        weight: ``(C', C, 1, 1)`` in any floating-point dtype.

    Returns:
        ``(N, C', H, W)`` in the memory format of ``x`` and, without autocast, in its dtype.

    Raises:
        ValueError: shapes or devices other than these.
        TypeError: ``x`` or ``weight`` is not a floating-point tensor.

    Example:
        >>> relu_pointwise(torch.tensor([[[[-1.0]], [[3.0]]]]), torch.full((1, 2, 1, 1), 2.0))
        tensor([[[[6.]]]])
    """
    for name, t in (("x", x), ("weight", weight)):
        if not isinstance(t, Tensor):
            raise TypeError(
                f"relu_pointwise: expected {name} to be a tensor, but got {type(t).__name__}"
            )
        if not t.is_floating_point():
            raise TypeError(
                f"relu_pointwise: expected {name} to be floating-point, but got {t.dtype}"
            )
    if x.dim() != 4:
        raise ValueError(
            f"relu_pointwise: expected x of shape (N, C, H, W), but got {list(x.shape)}"
        )
    shape = (max(weight.shape[:1], default=0), x.shape[1], 1, 1)
    if weight.shape != shape or shape[0] == 0 or weight.device != x.device:
        raise ValueError(
            f"relu_pointwise: expected weight of shape (C', {x.shape[1]}, 1, 1), C' at least 1, on "
            f"{x.device}, but got {list(weight.shape)} on {weight.device}"
        )
    return ReluPointwise.apply(x.to(autocast_dtype(x)), weight)


class ReluPointwise(torch.autograd.Function):
    """Autograd of :func:`relu_pointwise`; the second derivative goes through the reference."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """The output from the kernel of the device, or from the reference where there is none."""
        ctx.save_for_backward(x, weight)
        ctx.format = memory_format(x)
        ctx.set_materialize_grads(False)
        if has_kernels(x.device.type):
            return torch.ops.fastnas.relu_pointwise(x, weight)
        return reference.relu_pointwise(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of ``x`` and of the weight, as they ask for one."""
        needs = ctx.needs_input_grad
        if grad is None:
            return None, None
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled() or not has_kernels(x.device.type):
            return differentiate(reference.relu_pointwise, (x, weight), needs, grad)
        grad = grad.contiguous(memory_format=ctx.format)
        gradients = torch.ops.fastnas.relu_pointwise_backward(grad, x, weight, *needs)
        return tuple(g if need else None for g, need in zip(gradients, needs, strict=True))


@torch.library.register_fake("fastnas::relu_pointwise")
def _(x: Tensor, weight: Tensor) -> Tensor:
    check_devices("relu_pointwise", x, weight)
    return fake_like(x, x.dtype, (x.shape[0], weight.shape[0], *x.shape[2:]))


@torch.library.register_fake("fastnas::relu_pointwise_backward")
def _(
    grad: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    check_devices("relu_pointwise_backward", x, grad, weight)
    dx = fake_like(x, grad.dtype) if need_x else grad.new_empty(0)
    return dx, weight.new_empty(weight.shape if need_weight else 0)
