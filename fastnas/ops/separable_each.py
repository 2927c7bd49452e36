# SPDX-License-Identifier: Apache-2.0
"""Separable convolutions of several sources, each with the BatchNorm and ReLU before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnas._extension import has_kernels
from fastnas.ops import reference
from fastnas.ops._carried import CARRIED, WRITTEN, count_carriers, make_carriers, with_outputs
from fastnas.ops._common import (
    autocast_dtype,
    check_candidates,
    check_devices,
    differentiate,
    fake_like,
    memory_format,
)
from fastnas.ops._mixed import split_tensors, used_statistics
from fastnas.ops._norms import Norm, gather_norms, spread, update_running_statistics
from fastnas.ops.depthwise_group import check_depthwise
from fastnas.ops.reference import BATCH, RUNNING
from fastnas.ops.separable_group import check_pointwise

_OP = "separable_each"


def separable_each(
    xs: Sequence[Tensor],
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    dilations: Sequence[int],
    norms: Sequence[Norm],
    stride: int = 1,
    training: bool | None = None,
) -> list[Tensor]:
    """:func:`separable_group` of one convolution for each of several sources, in one call.

    Equivalent to ``[separable_group(x, [w], [p], [d], stride, norm, training)[0] for x, w, p, d,
    norm in zip(xs, depthwise, pointwise, dilations, norms)]``, the second
    halves of all separable convolutions (arXiv 1806.09055, section 3.1) that read one state. What
    is saved is the cost of a call, once for all instead of for each: autograd's, the checks, the
    norms' bookkeeping; and on CUDA the launches, which serve all sources at once where these are of
    one dtype and memory format and no dilation is above 2.

    Args:
        xs: 1 to 64 tensors ``(N, C, H, W)`` of one shape.
        depthwise: as many ``(C, 1, k, k)``, k of 1, 3, 5 or 7.
        pointwise: as many ``(C, C, 1, 1)``.
        dilations: as many, of the depthwise convolutions.
        norms: as many ``BatchNorm2d`` of C channels. In training their running statistics and
            counters are updated once, as calling them would.
        stride: 1 or 2, of all depthwise convolutions.
        training: overrides ``training`` of every norm.

    Returns:
        For each source a tensor ``(N, C, ceil(H / stride), ceil(W / stride))`` in its memory format
        and, without autocast, its dtype.

    Raises:
        ValueError: shapes, counts, dilations or strides other than these; one value per channel in
            training.
        TypeError: an input is not a floating-point tensor, or a norm no BatchNorm.
    """
    check_candidates(_OP, xs)
    check_depthwise(_OP, xs[0], depthwise, dilations, stride, "depthwise")
    check_pointwise(_OP, xs[0], depthwise, pointwise)
    if len(depthwise) != len(xs):
        raise ValueError(
            f"{_OP}: expected one depthwise weight per input, but got {len(xs)} inputs and "
            f"{len(depthwise)} weights"
        )
    if not isinstance(norms, (list, tuple)) and not hasattr(norms, "__len__"):
        raise TypeError(
            f"{_OP}: expected norms to be a list of BatchNorms, but got {type(norms).__name__}"
        )
    for k, norm in enumerate(norms):
        if norm is None:
            raise TypeError(f"{_OP}: expected norms[{k}] to be a BatchNorm, but got None")
    return run_separable_each(xs, depthwise, pointwise, dilations, norms, stride, training)[0]


def run_separable_each(
    xs: Sequence[Tensor],
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    dilations: Sequence[int],
    norms: Sequence[Norm],
    stride: int = 1,
    training: bool | None = None,
    given: Sequence[Tensor] = (),
    carry: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """The same without the checks at the door, for callers inside; the kernels check shapes too.

    Returns with the outputs their carriers (``fastnas.ops._carried``), if any. ``given``: those of
    ``xs``, or none.
    """
    n = gather_norms(_OP, xs, norms, training)
    k, carriers = len(xs), count_carriers(xs[0], len(xs), carry)
    found = SeparableEach.apply(
        n.kinds, n.eps, n.affine, tuple(dilations), stride, carriers, len(given), *given, *xs,
        *n.gammas, *n.betas, *n.running_means, *n.running_vars, *depthwise, *pointwise
    )  # fmt: skip
    mean, var = found[k], found[k + 1]
    if n.updates:
        count = xs[0].numel() // max(xs[0].shape[1], 1)
        update_running_statistics(n.updates, mean, var, count)
    dtypes = [autocast_dtype(x) for x in xs]
    ys = [
        y if y.dtype == dtype else y.to(dtype) for y, dtype in zip(found[:k], dtypes, strict=True)
    ]
    same = all(x.dtype == y.dtype for x, y in zip(xs, ys, strict=True))
    return ys, list(found[k + 2 :]) if same else []


class SeparableEach(torch.autograd.Function):
    """Autograd of :func:`separable_each`; a second derivative goes through the reference.

    Its arguments are kinds, eps, which norms are affine, dilations, stride, how many carriers there
    are to be, for the outputs, and how many are given, of xs (``fastnas.ops._carried``; none, or
    one for each), and all tensors: those, xs, gammas, betas, running means, running variances,
    depthwise and pointwise weights.
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        """The outputs, the ``(K, C)`` means and biased variances that were used, and carriers."""
        # One parameter for all: without gradients, torch.compile would take the first argument for
        # ctx where there are as many arguments as parameters.
        ctx, kinds, eps, affine, dilations, stride, carriers, given, *tensors = arguments
        known, tensors = tensors[:given], tensors[given:]
        xs, gammas, betas, means, variances = split_tensors(kinds, affine, tensors)
        weights = tensors[-2 * len(kinds) :]
        depthwise, pointwise = weights[: len(kinds)], weights[len(kinds) :]
        if has_kernels(tensors[0].device.type):
            ys, mean, var, made = torch.ops.fastnas.separable_each(
                xs, kinds, eps, affine, gammas, betas, means, variances, depthwise, pointwise,
                dilations, stride, known, carriers > 0,
            )  # fmt: skip
        else:
            ys, mean, var = _composite(kinds, eps, affine, dilations, stride, tensors)
            made = make_carriers(ys[:carriers])
        # Not the running statistics: a training step may move them before the backward.
        ctx.save_for_backward(mean, var, *xs, *gammas, *betas, *weights, *ys[:carriers])
        ctx.carriers, ctx.given, ctx.alone = carriers, given, True
        ctx.kinds, ctx.eps, ctx.affine = kinds, eps, affine
        ctx.dilations, ctx.stride = dilations, stride
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return (*ys, mean, var, *made)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of xs, of the affine parameters and of the weights that ask for one."""
        mean, var, *tensors = ctx.saved_tensors
        kinds, affine, count = ctx.kinds, ctx.affine, len(ctx.kinds)
        first = len(tensors) - ctx.carriers
        tensors, ys = tensors[:first], tensors[first:]
        unused = (None,) * (2 * kinds.count(RUNNING))
        front = 7 + ctx.given
        need = ctx.needs_input_grad[front:]
        head = count + 2 * sum(affine)  # before the running statistics
        need = [*need[:head], *need[head + len(unused) :]]
        needs = _columns(affine, need)
        chosen = [k for k in range(count) if grads[k] is not None and any(c[k] for c in needs)]
        if not chosen:
            return (None,) * len(ctx.needs_input_grad)
        numbers: list[Tensor | None] = [None] * count
        given = [g for g in grads[:count] if g is not None]
        if torch.is_grad_enabled() or not has_kernels(given[0].device.type):
            ctx.alone = False  # the derivative of what follows reads xs as well
            statistics = used_statistics(kinds, mean, var)

            def composite(*t: Tensor) -> list[Tensor]:
                flat = [*t[:head], *statistics, *t[head:]]
                ys, *_ = _composite(kinds, ctx.eps, affine, ctx.dilations, ctx.stride, flat)
                return [y for y, g in zip(ys, grads, strict=False) if g is not None]

            found = list(differentiate(composite, tensors, need, given))
        else:
            came = grads[count + 2 :] if ctx.carriers else ()
            columns, numbers = _gradients(ctx, chosen, grads, came, ys, mean, var, tensors, needs)
            every = (True,) * count
            # Without the places of affine parameters that there are not.
            present = (every, affine, affine, every, every)
            found = []
            for column, has in zip(columns, present, strict=True):
                found += [t for t, there in zip(column, has, strict=True) if there]
        return (*(None,) * 7, *numbers[: ctx.given], *found[:head], *unused, *found[head:])


def _columns(affine: Sequence[bool], items: Sequence[Any]) -> list[list[Any]]:
    """For all sources x, gamma, beta, depthwise and pointwise weight, None for what is not."""
    count, rows = len(affine), sum(affine)
    xs, items = items[:count], items[count:]
    scales, shifts, items = items[:rows], items[rows : 2 * rows], items[2 * rows :]
    weights = list(items[:count]), list(items[count:])
    return [list(xs), spread(affine, scales), spread(affine, shifts), *weights]


def _gradients(
    ctx: Any,
    chosen: Sequence[int],
    grads: Sequence[Tensor | None],
    came: Sequence[Tensor | None],
    ys: Sequence[Tensor],
    mean: Tensor,
    var: Tensor,
    tensors: Sequence[Tensor],
    needs: Sequence[Sequence[bool | None]],
) -> tuple[list[list[Tensor | None]], list[Tensor | None]]:
    """Gradients as ``_columns`` has their tensors, and of the carriers; None for no need.

    ``chosen``: the sources whose outputs have a gradient that is needed; ``came``: the gradients of
    the outputs' carriers, if there are any.
    """
    count = len(ctx.kinds)
    xs, scales, shifts, depthwise, pointwise = _columns(ctx.affine, tensors)
    carry = ctx.given > 0 and ctx.alone
    ways, gs = [], []
    for k in chosen:
        # By other statistics a NaN in x would count, where only the gradient does.
        way = CARRIED if carry and ctx.kinds[k] == BATCH else WRITTEN
        ways.append(way if needs[0][k] else 0)
        grad: Any = grads[k]
        gs.append(grad.contiguous(memory_format=memory_format(xs[k])))
    if len(chosen) < count:  # not by an index that would have to be brought to the device
        mean, var = (torch.stack([t[k] for k in chosen]) for t in (mean, var))
    affine = [ctx.affine[k] for k in chosen]
    rows = [k for k in chosen if ctx.affine[k]]
    carried = with_outputs(_of(chosen, came), _of(chosen, ys)) if came else ([], [])
    dxs, dws, dps, dgamma, dbeta, numbers = torch.ops.fastnas.separable_each_backward(
        gs, _of(chosen, xs), mean, var, _of(chosen, ctx.kinds), _of(chosen, ctx.eps), affine,
        _of(rows, scales), _of(rows, shifts), _of(chosen, depthwise), _of(chosen, pointwise),
        _of(chosen, ctx.dilations), ctx.stride, ways,
        [bool(needs[1][k] or needs[2][k]) for k in chosen],
        [bool(needs[3][k]) for k in chosen], [bool(needs[4][k]) for k in chosen], *carried,
    )  # fmt: skip
    found: list[list[Tensor | None]] = [[None] * count for _ in needs]
    for column, results in ((0, dxs), (3, dws), (4, dps)):
        wanted = [k for k in chosen if needs[column][k]]
        for k, result in zip(wanted, results, strict=True):
            found[column][k] = result
    for column, table, parameters in ((1, dgamma, scales), (2, dbeta, shifts)):
        for k, row in zip(rows, table.unbind(0), strict=False):  # no rows where no source needs one
            if needs[column][k]:
                found[column][k] = row.to(parameters[k].dtype)
    sent: list[Tensor | None] = [None] * count
    carriers = [k for k, way in zip(chosen, ways, strict=True) if way == CARRIED]
    for k, number in zip(carriers, numbers.unbind(0), strict=True):
        sent[k] = number
    return found, sent


def _of(chosen: Sequence[int], items: Sequence[Any]) -> list[Any]:
    return [items[k] for k in chosen]


def _composite(
    kinds: Sequence[int],
    eps: Sequence[float],
    affine: Sequence[bool],
    dilations: Sequence[int],
    stride: int,
    tensors: Sequence[Tensor],
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The forward from the flat list of tensors, by the reference: outputs and statistics used."""
    xs, gammas, betas, means, variances = split_tensors(kinds, affine, tensors)
    count, running = len(kinds), [kind == RUNNING for kind in kinds]
    depthwise, pointwise = tensors[-2 * count : -count], tensors[-count:]
    rows = zip(
        xs, kinds, eps, spread(affine, gammas), spread(affine, betas), spread(running, means),
        spread(running, variances), strict=True,
    )  # fmt: skip
    convolve: Any = reference.separable_group
    found = [
        convolve(*row, [depthwise[k]], [pointwise[k]], [dilations[k]], stride)
        for k, row in enumerate(rows)
    ]
    mean, var = torch.stack([each[1] for each in found]), torch.stack([each[2] for each in found])
    return [each[0][0] for each in found], mean, var


@torch.library.register_fake("fastnas::separable_each")
def _(
    xs: list[Tensor],
    kinds: list[int],
    eps: list[float],
    affine: list[bool],
    gammas: list[Tensor],
    betas: list[Tensor],
    running_means: list[Tensor],
    running_vars: list[Tensor],
    depthwise: list[Tensor],
    pointwise: list[Tensor],
    dilations: list[int],
    stride: int,
    carriers: list[Tensor],
    carry: bool,
) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor]]:
    tensors = (*gammas, *betas, *running_means, *running_vars, *carriers, *depthwise, *pointwise)
    check_devices(_OP, *xs, *tensors)
    n, c, *space = xs[0].shape
    shape = (n, c, *((size + stride - 1) // stride for size in space))
    ys = [fake_like(x, x.dtype, shape) for x in xs]
    dtype = reference.accumulate_dtype(reference.result_dtype(xs))
    mean = xs[0].new_empty(len(xs), c, dtype=dtype)
    made = [mean.new_empty(4, c) for _ in xs] if carry else []
    return ys, mean, torch.empty_like(mean), made


@torch.library.register_fake("fastnas::separable_each_backward")
def _(
    grads: list[Tensor],
    xs: list[Tensor],
    mean: Tensor,
    var: Tensor,
    kinds: list[int],
    eps: list[float],
    affine: list[bool],
    gammas: list[Tensor],
    betas: list[Tensor],
    depthwise: list[Tensor],
    pointwise: list[Tensor],
    dilations: list[int],
    stride: int,
    need_xs: list[int],
    need_norms: list[bool],
    need_depthwise: list[bool],
    need_pointwise: list[bool],
    outputs: list[Tensor],
    carried: list[Tensor],
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
    tensors = (mean, var, *gammas, *betas, *depthwise, *pointwise, *outputs, *carried)
    check_devices(f"{_OP}_backward", *grads, *xs, *tensors)
    pairs = zip(xs, grads, need_xs, strict=True)
    dxs = [fake_like(x, g.dtype) for x, g, need in pairs if need]
    ddepthwise, dpointwise = (
        [w.new_empty(w.shape) for w, need in zip(weights, needs, strict=True) if need]
        for weights, needs in ((depthwise, need_depthwise), (pointwise, need_pointwise))
    )
    dtype, c = reference.accumulate_dtype(reference.result_dtype(grads)), xs[0].shape[1]
    rows = len(gammas) if any(need_xs) or any(need_norms) else 0
    dgamma = mean.new_empty(rows, c, dtype=dtype)
    numbers = dgamma.new_empty(list(need_xs).count(CARRIED), 4, c)
    return dxs, ddepthwise, dpointwise, dgamma, torch.empty_like(dgamma), numbers
