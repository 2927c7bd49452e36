# SPDX-License-Identifier: Apache-2.0
"""BatchNorm, ReLU and the depthwise convolutions behind them, fused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnas.ops import reference
from fastnas.ops._common import autocast_dtype, check_devices, fake_like
from fastnas.ops._norms import Norm
from fastnas.ops._source import SourceConvolutions, read_norm
from fastnas.ops.depthwise_group import check_depthwise

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
    if norm is None:
        raise TypeError(f"{_OP}: expected norm to be a BatchNorm, but got None")
    n = read_norm(_OP, x, norm, training)
    *ys, mean, var = SourceConvolutions.apply(
        _OP, n.kind, n.eps, list(dilations), stride, 0, x, *n.tensors, *weights
    )
    n.update(x, mean, var)
    dtype = autocast_dtype(x)
    return [y if y.dtype == dtype else y.to(dtype) for y in ys]


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
