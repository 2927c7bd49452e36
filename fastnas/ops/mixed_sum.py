# SPDX-License-Identifier: Apache-2.0
"""Weighted sum of the candidates' outputs."""

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


def mixed_sum(xs: Sequence[Tensor], weights: Tensor | Sequence[Tensor | float]) -> Tensor:
    """``y = sum_k weights[k] * xs[k]`` in one pass over the inputs.

    Equivalent to ``sum(w * x for w, x in zip(weights, xs))``, with sums in float32 (float64 for
    float64 inputs) whatever the storage. Reads K tensors and writes one, where the loop reads about
    2K and writes K.

    Args:
        xs: 1 to 64 floating-point tensors of one shape and device; dtypes and memory formats may
        differ.
        weights: ``(K,)``, or K numbers or 0-d tensors. They need not sum to 1 nor be positive.

    Returns:
        A new tensor of that shape, in the promoted dtype of ``xs`` and the memory format of
        ``xs[0]``.

    Raises:
        ValueError: no inputs, another number of weights than inputs, or shapes that differ.
        TypeError: an input is not a floating-point tensor.

    Example:
        >>> mixed_sum([torch.ones(2), torch.full((2,), 4.0)], [0.5, 0.25])
        tensor([1.5000, 1.5000])
    """
    check_candidates("mixed_sum", xs)
    w = as_weights("mixed_sum", weights, xs)
    return MixedSum.apply(w, *xs)


class MixedSum(torch.autograd.Function):
    """Autograd of :func:`mixed_sum`; the second derivative goes through the reference."""

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        """``y`` from the kernel of the device, or from the reference where there is none."""
        # One parameter for all: without gradients, torch.compile would take the first argument for
        # ctx where there are as many arguments as parameters.
        ctx, weights, *xs = arguments
        # dx_k = w_k g needs no input; only dw_k = <g, x_k> does.
        saved = xs if ctx.needs_input_grad[0] else ()
        ctx.save_for_backward(weights, *saved)
        ctx.layout = [(x.shape, x.dtype, x.device) for x in xs]
        ctx.format = memory_format(xs[0])
        ctx.set_materialize_grads(False)
        if has_kernels(xs[0].device.type):
            return torch.ops.fastnas.mixed_sum(list(xs), weights)
        return reference.mixed_sum(xs, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the weights and of every input that asks for one."""
        need_w, *need_x = ctx.needs_input_grad
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        weights, *xs = ctx.saved_tensors
        if torch.is_grad_enabled() or not has_kernels(grad.device.type):
            if not xs:
                # The values of the inputs do not enter what is asked for: any tensor of the shape
                # will do.
                xs = [grad.new_zeros((), dtype=d).expand(s) for s, d, _ in ctx.layout]
            return differentiate(
                lambda w, *x: reference.mixed_sum(x, w), (weights, *xs), ctx.needs_input_grad, grad
            )
        dtypes = [d for (_, d, _), need in zip(ctx.layout, need_x, strict=True) if need]
        grad = grad.contiguous(memory_format=ctx.format)
        dxs, dw = torch.ops.fastnas.mixed_sum_backward(grad, xs, weights, need_x, need_w)
        grads = iter(dx.to(d) for dx, d in zip(dxs, dtypes, strict=True))
        return (dw if need_w else None, *(next(grads) if need else None for need in need_x))


@torch.library.register_fake("fastnas::mixed_sum")
def _(xs: list[Tensor], weights: Tensor) -> Tensor:
    check_devices("mixed_sum", weights, *xs)
    return fake_like(xs[0], reference.result_dtype(xs))


@torch.library.register_fake("fastnas::mixed_sum_backward")
def _(
    grad: Tensor, xs: list[Tensor], weights: Tensor, need_xs: list[bool], need_weights: bool
) -> tuple[list[Tensor], Tensor]:
    check_devices("mixed_sum_backward", grad, weights, *xs)
    dxs = [fake_like(grad, grad.dtype) for need in need_xs if need]
    return dxs, torch.empty_like(weights) if need_weights else weights.new_empty(0)
