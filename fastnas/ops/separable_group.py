# SPDX-License-Identifier: Apache-2.0
"""All separable convolutions of one source, with the BatchNorm and ReLU before them, fused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnas.ops import reference
from fastnas.ops._carried import CARRIED, count_carriers
from fastnas.ops._common import autocast_dtype, check_devices, fake_like
from fastnas.ops._norms import Norm
from fastnas.ops._source import SourceConvolutions, read_norm
from fastnas.ops.depthwise_group import check_depthwise
from fastnas.ops.reference import PLAIN

_OP = "separable_group"


def separable_group(
    x: Tensor,
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    dilations: Sequence[int],
    stride: int = 1,
    norm: Norm | None = None,
    training: bool | None = None,
) -> list[Tensor]:
    """ReLU, depthwise and pointwise convolution: what DARTS' candidates are made of.

    Equivalent to ``[F.conv2d(F.conv2d(h, w, None, stride, d * (k // 2), d, groups=C), p) for w, p,
    d in zip(depthwise, pointwise, dilations)]`` with ``h = relu(x)``, or ``relu(norm(x))``: a
    dilated convolution and either half of a separable one (arXiv 1806.09055, section 3.1). The
    backward keeps ``x``, two numbers a channel and the weights: neither ``h`` nor what is between
    the convolutions is stored. It gives ``dx`` once, summed over all of them. Sums are taken in
    float32 (float64 for float64 inputs). Under autocast ``x`` is cast as ``F.conv2d`` would, and
    behind a norm the outputs have the dtype that ``F.conv2d``'s would have.

    The CPU kernels are at their best where the channels fill vectors (of 16, 8 or 4 float32) or
    divide one; on CUDA, what is between the convolutions exists while they run.

    Args:
        x: ``(N, C, H, W)``, floating-point.
        depthwise: 1 to 64 tensors ``(C, 1, k, k)``, k of 1, 3, 5 or 7.
        pointwise: as many tensors ``(C, C, 1, 1)``.
        dilations: of the depthwise convolutions.
        stride: 1 or 2, of all depthwise convolutions.
        norm: a ``BatchNorm2d`` of C channels before the ReLU. In training its running statistics
            and counter are updated once, as calling it would.
        training: overrides ``norm.training``.

    Returns:
        For each pair of weights a tensor ``(N, C, ceil(H / stride), ceil(W / stride))`` in the
        memory format of ``x`` and, without autocast, in its dtype.

    Raises:
        ValueError: shapes, counts, dilations or strides other than these; one value per channel in
            training.
        TypeError: ``x`` or a weight is not a floating-point tensor, or ``norm`` no BatchNorm.
    """
    check_depthwise(_OP, x, depthwise, dilations, stride, "depthwise")
    check_pointwise(_OP, x, depthwise, pointwise)
    return run_separable_group(x, depthwise, pointwise, dilations, stride, norm, training)[0]


def run_separable_group(
    x: Tensor,
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    dilations: Sequence[int],
    stride: int = 1,
    norm: Norm | None = None,
    training: bool | None = None,
    carry: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """The same without the checks at the door, for callers inside; the kernels check shapes too.

    Returns with the outputs their carriers (``fastnas.ops._carried``), if any.
    """
    dtype = autocast_dtype(x)
    n = read_norm(_OP, x, norm, training)
    if norm is None and x.dtype != dtype:
        x = x.to(dtype)
    count, carriers = len(depthwise), count_carriers(x, len(depthwise), carry)
    found = SourceConvolutions.apply(
        _OP, n.kind, n.eps, list(dilations), stride, carriers, x, *n.tensors, *depthwise, *pointwise
    )
    n.update(x, found[count], found[count + 1])
    ys = [y if y.dtype == dtype else y.to(dtype) for y in found[:count]]
    return ys, list(found[count + 2 :]) if ys[0].dtype == found[0].dtype else []


def check_pointwise(
    op: str, x: Tensor, depthwise: Sequence[Tensor], pointwise: Sequence[Tensor]
) -> None:
    """Raise unless ``pointwise`` has a ``(C, C, 1, 1)`` for every depthwise weight."""
    if not isinstance(pointwise, (list, tuple)):
        raise TypeError(
            f"{op}: expected pointwise to be a list, but got {type(pointwise).__name__}"
        )
    if len(pointwise) != len(depthwise):
        raise ValueError(
            f"{op}: expected one pointwise weight per depthwise one, but got {len(depthwise)} "
            f"depthwise and {len(pointwise)} pointwise"
        )
    shape, device = (x.shape[1], x.shape[1], 1, 1), x.device
    for i, w in enumerate(pointwise):
        if not isinstance(w, Tensor):
            raise TypeError(
                f"{op}: expected pointwise[{i}] to be a tensor, but got {type(w).__name__}"
            )
        if not w.is_floating_point():
            raise TypeError(
                f"{op}: expected floating-point weights, but pointwise[{i}] is {w.dtype}"
            )
        if w.shape != shape or w.device != device:
            raise ValueError(
                f"{op}: expected pointwise[{i}] of shape {list(shape)} on {device}, but got "
                f"{list(w.shape)} on {w.device}"
            )


@torch.library.register_fake("fastnas::separable_group")
def _(
    x: Tensor,
    kind: int,
    eps: float,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    depthwise: list[Tensor],
    pointwise: list[Tensor],
    dilations: list[int],
    stride: int,
    carrier: Tensor | None,
    carry: bool,
) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor]]:
    optional = [t for t in (gamma, beta, running_mean, running_var, carrier) if t is not None]
    check_devices(_OP, x, *optional, *depthwise, *pointwise)
    n, c, *space = x.shape
    shape = (n, c, *((size + stride - 1) // stride for size in space))
    mean = x.new_empty(c if kind != PLAIN else 0, dtype=reference.accumulate_dtype(x.dtype))
    carriers = [mean.new_empty(4, c) for _ in depthwise] if carry else []
    ys = [fake_like(x, x.dtype, shape) for _ in depthwise]
    return ys, mean, torch.empty_like(mean), carriers


@torch.library.register_fake("fastnas::separable_group_backward")
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
    depthwise: list[Tensor],
    pointwise: list[Tensor],
    dilations: list[int],
    stride: int,
    need_x: int,
    need_norm: bool,
    need_depthwise: list[bool],
    need_pointwise: list[bool],
    outputs: list[Tensor],
    carried: list[Tensor],
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
    optional = [t for t in (gamma, beta) if t is not None]
    check_devices(f"{_OP}_backward", x, mean, var, *grads, *optional, *depthwise, *pointwise)
    dx = fake_like(x, grads[0].dtype) if need_x else grads[0].new_empty(0)
    ddepthwise, dpointwise = (
        [w.new_empty(w.shape) for w, need in zip(weights, needs, strict=True) if need]
        for weights, needs in ((depthwise, need_depthwise), (pointwise, need_pointwise))
    )
    rows = int(gamma is not None and kind != PLAIN and bool(need_x or need_norm))
    dgamma = x.new_empty(rows, x.shape[1], dtype=reference.accumulate_dtype(grads[0].dtype))
    numbers = dgamma.new_empty(int(need_x == CARRIED and kind != PLAIN), 4, x.shape[1])
    return dx, ddepthwise, dpointwise, dgamma, torch.empty_like(dgamma), numbers
