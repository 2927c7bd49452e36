# SPDX-License-Identifier: Apache-2.0
"""Separable convolutions of several sources, each with the BatchNorm and ReLU before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastnas._extension import has_kernels
from fastnas.ops import reference
from fastnas.ops._carried import CARRIED, count_carriers, make_carriers, with_outputs
from fastnas.ops._common import autocast_dtype, check_candidates, differentiate, memory_format
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
    norm in zip(xs, depthwise, pointwise, dilations, norms)]``, by the same kernels: the second
    halves of all separable convolutions (arXiv 1806.09055, section 3.1) that read one state. What
    is saved is the cost of a call, once for all instead of for each: autograd's, the checks, the
    norms' bookkeeping.

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
        known: Sequence[Tensor | None] = tensors[:given] if given else [None] * len(kinds)
        tensors = tensors[given:]
        arguments = kinds, eps, affine, dilations, stride, tensors
        if has_kernels(tensors[0].device.type):
            more = [(carrier, carriers > 0) for carrier in known]
            ys, mean, var, made = _each(torch.ops.fastnas.separable_group, *arguments, more)
        else:
            ys, mean, var, _ = _each(reference.separable_group, *arguments)
            made = make_carriers(ys[:carriers])
        # Not the running statistics: a training step may move them before the backward.
        xs, gammas, betas, *_ = split_tensors(kinds, affine, tensors)
        weights = tensors[-2 * len(kinds) :]
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
        given = [g for g in grads[:count] if g is not None]
        if not given or not any(need):
            return (None,) * len(ctx.needs_input_grad)
        numbers: list[Tensor | None] = [None] * ctx.given
        if torch.is_grad_enabled() or not has_kernels(given[0].device.type):
            ctx.alone = False  # the derivative of what follows reads xs as well
            statistics = used_statistics(kinds, mean, var)

            def composite(*t: Tensor) -> list[Tensor]:
                flat = [*t[:head], *statistics, *t[head:]]
                convolve, tail = reference.separable_group, (ctx.dilations, ctx.stride)
                ys, *_ = _each(convolve, kinds, ctx.eps, affine, *tail, flat)
                return [y for y, g in zip(ys, grads, strict=False) if g is not None]

            found = list(differentiate(composite, tensors, need, given))
        else:
            came = grads[count + 2 :] if ctx.carriers else [None] * count
            rows = zip(
                zip(grads, came, ys if ctx.carriers else came, strict=False),
                mean.unbind(0), var.unbind(0), kinds, ctx.eps, ctx.dilations,
                _columns(affine, tensors), _columns(affine, need), strict=False,
            )  # fmt: skip
            # Lists and loops: torch.compile stumbles over generators within generators.
            carry = ctx.given > 0 and ctx.alone
            columns = list(
                zip(
                    *[_gradients(*row, stride=ctx.stride, carry=carry) for row in rows], strict=True
                )
            )
            numbers = list(columns.pop())[: ctx.given]
            every = (True,) * count
            # Without the places of affine parameters that there are not.
            present = (every, affine, affine, every, every)
            found = []
            for column, has in zip(columns, present, strict=True):
                found += [t for t, there in zip(column, has, strict=True) if there]
        return (*(None,) * 7, *numbers, *found[:head], *unused, *found[head:])


def _columns(affine: Sequence[bool], items: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """For each source its x, gamma, beta, depthwise and pointwise weight, None for what is not."""
    count, rows = len(affine), sum(affine)
    xs, items = items[:count], items[count:]
    scales, shifts, items = items[:rows], items[rows : 2 * rows], items[2 * rows :]
    return zip(
        xs, spread(affine, scales), spread(affine, shifts), items[:count], items[count:],
        strict=True,
    )  # fmt: skip


def _gradients(
    came: tuple[Tensor | None, ...],
    mean: Tensor,
    var: Tensor,
    kind: int,
    eps: float,
    dilation: int,
    tensors: Sequence[Tensor],
    need: Sequence[bool | None],
    *,
    stride: int,
    carry: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of one source's tensors, as many as it has, and of its carrier; None for no need.

    ``came``: the gradients of its output and of that one's carrier, and the output.
    """
    grad, number, y = came
    if grad is None or not any(need):
        return (None,) * 6
    carry = carry and kind == BATCH  # or a NaN in x would count, where only the gradient does
    x, scale, shift, depthwise, pointwise = tensors
    need_x, need_scale, need_shift, need_depthwise, need_pointwise = map(bool, need)
    carried = with_outputs([number], [x if y is None else y])
    dx, dws, dps, dscale, dshift, numbers = torch.ops.fastnas.separable_group_backward(
        [grad.contiguous(memory_format=memory_format(x))], [True], x, mean, var, kind, eps, scale,
        shift, [depthwise], [pointwise], [dilation], stride,
        CARRIED if need_x and carry else int(need_x), need_scale or need_shift,
        [need_depthwise], [need_pointwise], *carried,
    )  # fmt: skip
    return (
        dx if need_x else None,
        dscale.view(-1).to(scale.dtype) if need_scale else None,
        dshift.view(-1).to(shift.dtype) if need_shift else None,
        dws[0] if need_depthwise else None,
        dps[0] if need_pointwise else None,
        numbers[0] if need_x and carry else None,
    )


def _each(
    convolve: Callable[..., Any],
    kinds: Sequence[int],
    eps: Sequence[float],
    affine: Sequence[bool],
    dilations: Sequence[int],
    stride: int,
    tensors: Sequence[Tensor],
    more: Sequence[tuple[Any, ...]] = (),
) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor]]:
    """The forward from the flat list of tensors: outputs, statistics that were used, and carriers.

    ``convolve`` is a ``separable_group``, ``more`` what it takes besides, for each source.
    """
    xs, gammas, betas, means, variances = split_tensors(kinds, affine, tensors)
    count, running = len(kinds), [kind == RUNNING for kind in kinds]
    depthwise, pointwise = tensors[-2 * count : -count], tensors[-count:]
    rows = zip(
        xs, kinds, eps, spread(affine, gammas), spread(affine, betas), spread(running, means),
        spread(running, variances), strict=True,
    )  # fmt: skip
    found = [
        convolve(
            *row, [depthwise[k]], [pointwise[k]], [dilations[k]], stride, *(more[k] if more else ())
        )
        for k, row in enumerate(rows)
    ]
    mean, var = torch.stack([each[1] for each in found]), torch.stack([each[2] for each in found])
    made = [carrier for each in found for carriers in each[3:] for carrier in carriers]
    return [each[0][0] for each in found], mean, var, made
