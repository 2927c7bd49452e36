# SPDX-License-Identifier: Apache-2.0
"""What the ops share that mix candidates behind their norms: their flat lists of tensors.

An autograd Function takes tensors one by one. Theirs come after the weights: the inputs, then
gammas, betas, running means and running variances of those inputs that have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnas.ops import reference
from fastnas.ops._common import memory_format
from fastnas.ops._norms import spread
from fastnas.ops.reference import BATCH, RUNNING


def split_tensors(
    kinds: Sequence[int], affine: Sequence[bool], tensors: Sequence[Tensor]
) -> tuple[list[Tensor], ...]:
    """The Functions' flat argument list: xs, gammas, betas, running means and variances."""
    lengths = (len(kinds), sum(affine), sum(affine), kinds.count(RUNNING), kinds.count(RUNNING))
    parts, start = [], 0
    for length in lengths:
        parts.append(list(tensors[start : start + length]))
        start += length
    return tuple(parts)


def _inputs_to_save(
    kinds: Sequence[int],
    affine: Sequence[bool],
    need_w: bool,
    need_xs: Sequence[bool],
    need_norms: bool,
) -> list[bool]:
    """Which inputs the backward reads: normalised by their batch, or in a dot product."""
    return [
        need_w or (affine[k] and need_norms) or (kind == BATCH and need_xs[k])
        for k, kind in enumerate(kinds)
    ]


def composite(
    op: str,
    kinds: Sequence[int],
    eps: Sequence[float],
    affine: Sequence[bool],
    weights: Tensor,
    tensors: Sequence[Tensor],
) -> tuple[Any, Tensor, Tensor]:
    """The forward of an op from the flat argument list, by the reference of its name."""
    xs, gammas, betas, means, variances = split_tensors(kinds, affine, tensors)
    running = [kind == RUNNING for kind in kinds]
    return getattr(reference, op)(
        xs,
        weights,
        kinds,
        eps,
        spread(affine, gammas),
        spread(affine, betas),
        spread(running, means),
        spread(running, variances),
    )


def keep(
    ctx: Any,
    first: Sequence[Tensor],
    kinds: Sequence[int],
    eps: Sequence[float],
    affine: Sequence[bool],
    tensors: Sequence[Tensor],
    mean: Tensor,
    var: Tensor,
) -> None:
    """Keep for the backward what it reads: ``first``, the statistics used, inputs that it needs.

    Not the running statistics: a training step may move them before the backward, and ``mean`` and
    ``var`` hold the values that were used.
    """
    xs, gammas, betas, *_ = split_tensors(kinds, affine, tensors)
    need_w, *need = ctx.needs_input_grad[-len(tensors) - 1 :]
    k = len(kinds)
    wanted = _inputs_to_save(kinds, affine, need_w, need[:k], any(need[k : k + 2 * len(gammas)]))
    saved = [x if kept else x.new_empty(0) for x, kept in zip(xs, wanted, strict=True)]
    ctx.save_for_backward(*first, mean, var, *saved, *gammas, *betas)
    ctx.kinds, ctx.eps, ctx.affine = kinds, eps, affine
    ctx.format = memory_format(xs[0])
    ctx.dtypes = [t.dtype for t in tensors]
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)


def kept(ctx: Any, first: int) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """What was kept: ``first`` tensors with mean and variance behind them, xs, gammas, betas."""
    saved, k, rows = list(ctx.saved_tensors), len(ctx.kinds), sum(ctx.affine)
    start = first + 2
    ends = start, start + k, start + k + rows
    return saved[:start], saved[start : ends[1]], saved[ends[1] : ends[2]], saved[ends[2] :]


def stand_in(x: Tensor, shape: torch.Size) -> Tensor:
    """An input as it was, or of its shape where it was not kept since nothing reads its values."""
    return x if x.shape == shape else x.new_zeros(()).expand(shape)


def used_statistics(kinds: Sequence[int], mean: Tensor, var: Tensor) -> list[Tensor]:
    """The running means and variances of the flat argument list, from what the forward returned."""
    rows = [k for k, kind in enumerate(kinds) if kind == RUNNING]
    return [table[k] for table in (mean, var) for k in rows]


def pack_gradients(
    ctx: Any, dxs: list[Tensor], dw: Tensor, dgamma: Tensor, dbeta: Tensor
) -> list[Tensor | None]:
    """The kernels' results in the order of the Function's tensor arguments, in their dtypes."""
    need_w, *need = ctx.needs_input_grad[-len(ctx.dtypes) - 1 :]
    items = iter(dxs)
    k, affine = len(ctx.kinds), sum(ctx.affine)
    flat: list[Tensor | None] = [next(items) if n else None for n in need[:k]]
    flat += dgamma.unbind(0) if affine else []
    flat += dbeta.unbind(0) if affine else []
    flat += [None] * (len(need) - len(flat))
    grads = [
        (t if t.dtype == d else t.to(d)) if n and t is not None else None
        for t, d, n in zip(flat, ctx.dtypes, need, strict=True)
    ]
    return [dw if need_w else None, *grads]
