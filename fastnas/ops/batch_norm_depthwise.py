# SPDX-License-Identifier: Apache-2.0
"""BatchNorm, ReLU and the depthwise convolutions behind them, fused."""

from __future__ import annotations

from collections.abc import Sequence
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
from fastnas.ops._norms import Norm, gather_norms, update_running_statistics
from fastnas.ops.depthwise_group import check_depthwise
from fastnas.ops.reference import RUNNING

_OP = "batch_norm_depthwise"


def batch_norm_depthwise(
    x: Tensor,
    norm: Norm,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    stride: int = 1,
    training: bool | None = None,
) -> list[Tensor]:
    """Depthwise convolutions of ``relu(norm(x))``, which is never stored.

    Equivalent to ``[F.conv2d(F.relu(norm(x)), w, None, stride, d * (k // 2), d, groups=C) for w, d
    in zip(weights, dilations)]``: what stands between the two halves of DARTS' separable
    convolution (arXiv 1806.09055, section 3.1). The backward keeps ``x``, two numbers a channel and
    the weights. Under autocast the outputs have the dtype that ``F.conv2d``'s would have.

    Args:
        x: ``(N, C, H, W)``, floating-point.
        norm: a ``BatchNorm2d`` of C channels, affine or not. In training its running statistics and
            counter are updated once, as calling it would.
        weights: 1 to 64 tensors ``(C, 1, k, k)``, k of 1, 3, 5 or 7.
        dilations: one for each weight.
        stride: 1 or 2, for all.
        training: overrides ``norm.training``.

    Returns:
        For each weight a tensor ``(N, C, ceil(H / stride), ceil(W / stride))`` in the memory format
        of ``x`` and, without autocast, in its dtype.

    Raises:
        ValueError: shapes, counts, dilations or strides other than these; one value per channel in
            training.
        TypeError: ``x`` or a weight is not a floating-point tensor, or ``norm`` no BatchNorm.
    """
    check_depthwise(_OP, x, weights, dilations, stride)
    n = gather_norms(_OP, [x], [norm], training, "norm")
    arguments = [(items[0] if items else None) for items in n[3:7]]
    *ys, mean, var = BatchNormDepthwise.apply(
        n.kinds[0], n.eps[0], list(dilations), stride, x, *arguments, *weights
    )
    if n.updates:
        count = x.numel() // max(x.shape[1], 1)
        update_running_statistics(n.updates, mean.unsqueeze(0), var.unsqueeze(0), count)
    dtype = autocast_dtype(x)
    return [y if y.dtype == dtype else y.to(dtype) for y in ys]


class BatchNormDepthwise(torch.autograd.Function):
    """Autograd of :func:`batch_norm_depthwise`; second derivatives go through the reference."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        """The outputs, and the ``(C,)`` mean and biased variance that were used."""
        # One parameter for all: without gradients, torch.compile would take the first argument for
        # ctx where there are as many arguments as parameters.
        ctx, kind, eps, dilations, stride, x, gamma, beta, running_mean, running_var, *weights = (
            arguments
        )
        if has_kernels(x.device.type):
            ys, mean, var = torch.ops.fastnas.batch_norm_depthwise(
                x, kind, eps, gamma, beta, running_mean, running_var, weights, dilations, stride
            )
        else:
            ys, mean, var = reference.batch_norm_depthwise(
                x, kind, eps, gamma, beta, running_mean, running_var, weights, dilations, stride
            )
        # Not the running statistics: a training step may move them before the backward.
        ctx.save_for_backward(x, mean, var, gamma, beta, *weights)
        ctx.kind, ctx.eps, ctx.dilations, ctx.stride = kind, eps, dilations, stride
        ctx.format = memory_format(x)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return (*ys, mean, var)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of ``x``, of the affine parameters and of the weights that ask for one."""
        x, mean, var, gamma, beta, *weights = ctx.saved_tensors
        need_x, need_gamma, need_beta, _, _, *need_weights = ctx.needs_input_grad[4:]
        present = [g is not None for g in grads[:-2]]
        given = [g for g in grads[:-2] if g is not None]
        # What has no gradient has none here either: autograd tells it from zeros.
        need_weights = [n and p for n, p in zip(need_weights, present, strict=True)]
        if not given or not any((need_x, need_gamma, need_beta, *need_weights)):
            return (None,) * len(ctx.needs_input_grad)
        kind, eps, dilations, stride = ctx.kind, ctx.eps, ctx.dilations, ctx.stride
        if torch.is_grad_enabled() or not has_kernels(given[0].device.type):
            affine = [] if gamma is None else [gamma, beta]
            needs = [need_x, *([need_gamma, need_beta] if affine else []), *need_weights]

            def composite(x: Tensor, *tensors: Tensor) -> list[Tensor]:
                scale, shift = tensors[:2] if affine else (None, None)
                rest = tensors[2:] if affine else tensors
                running = kind == RUNNING
                ys, *_ = reference.batch_norm_depthwise(
                    x, kind, eps, scale, shift, mean if running else None, var if running else None,
                    rest, dilations, stride,
                )  # fmt: skip
                return [y for y, p in zip(ys, present, strict=True) if p]

            dx, *more = differentiate(composite, (x, *affine, *weights), needs, given)
            dgamma, dbeta = more[:2] if affine else (None, None)
            dws = more[2:] if affine else more
            return (None,) * 4 + (dx, dgamma, dbeta, None, None, *dws)
        given = [g.contiguous(memory_format=ctx.format) for g in given]
        dx, dweights, dgamma, dbeta = torch.ops.fastnas.batch_norm_depthwise_backward(
            given, present, x, mean, var, kind, eps, gamma, beta, weights, dilations, stride,
            need_x, need_gamma or need_beta, need_weights,
        )  # fmt: skip
        items = iter(dweights)
        return (
            *(None,) * 4,
            dx if need_x else None,
            dgamma.view(-1).to(gamma.dtype) if need_gamma else None,
            dbeta.view(-1).to(beta.dtype) if need_beta else None,
            None,
            None,
            *(next(items) if need else None for need in need_weights),
        )


@torch.library.register_fake("fastnas::batch_norm_depthwise")
def _(
    x: Tensor,
    kind: int,
    eps: float,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weights: list[Tensor],
    dilations: list[int],
    stride: int,
) -> tuple[list[Tensor], Tensor, Tensor]:
    optional = [t for t in (gamma, beta, running_mean, running_var) if t is not None]
    check_devices(_OP, x, *optional, *weights)
    n, c, *space = x.shape
    shape = (n, c, *((size + stride - 1) // stride for size in space))
    mean = x.new_empty(c, dtype=reference.accumulate_dtype(x.dtype))
    return [fake_like(x, x.dtype, shape) for _ in weights], mean, torch.empty_like(mean)


@torch.library.register_fake("fastnas::batch_norm_depthwise_backward")
def _(
    grads: list[Tensor],
    present: list[bool],
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    kind: int,
    eps: float,
    gamma: Tensor | None,
    beta: Tensor | None,
    weights: list[Tensor],
    dilations: list[int],
    stride: int,
    need_x: bool,
    need_norm: bool,
    need_weights: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    optional = [t for t in (gamma, beta) if t is not None]
    check_devices(f"{_OP}_backward", x, mean, var, *grads, *optional, *weights)
    dx = fake_like(x, grads[0].dtype) if need_x else grads[0].new_empty(0)
    dws = [w.new_empty(w.shape) for w, need in zip(weights, need_weights, strict=True) if need]
    rows = int(gamma is not None and (need_x or need_norm))
    dgamma = x.new_empty(rows, x.shape[1], dtype=reference.accumulate_dtype(grads[0].dtype))
    return dx, dws, dgamma, torch.empty_like(dgamma)
