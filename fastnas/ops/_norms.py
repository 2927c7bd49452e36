# SPDX-License-Identifier: Apache-2.0
"""BatchNorms as arguments of a fused op: what is read of them, what they are left with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastnas.ops.reference import BATCH, PLAIN, RUNNING


class Norm(Protocol):
    """What an op reads of a normalisation: ``torch.nn.BatchNorm2d`` has all of it."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    momentum: float | None
    eps: float
    training: bool


class NormArguments(NamedTuple):
    """``kinds``, ``eps``, ``affine``: one entry per candidate; lists: of those that have one."""

    kinds: tuple[int, ...]
    eps: tuple[float, ...]
    affine: tuple[bool, ...]
    gammas: list[Tensor]
    betas: list[Tensor]
    running_means: list[Tensor]
    running_vars: list[Tensor]
    updates: list[int]


def gather_norms(
    op: str, xs: Sequence[Tensor], norms: Sequence[Norm | None], training: bool | None
) -> NormArguments:
    """Read ``norms`` as ``BatchNorm2d.forward`` would: what each uses, which are to be updated."""
    if len(norms) != len(xs):
        raise ValueError(
            f"{op}: expected one norm (or None) per input, "
            f"but got {len(xs)} inputs and {len(norms)} norms"
        )
    if xs[0].dim() < 2:
        raise ValueError(f"{op}: expected inputs of shape (N, C, ...), but got {list(xs[0].shape)}")
    channels = xs[0].shape[1]
    out = NormArguments((), (), (), [], [], [], [], [])
    kinds, eps, affine = [], [], []
    for k, norm in enumerate(norms):
        if norm is None:
            kinds.append(PLAIN)
            eps.append(0.0)
            affine.append(False)
            continue
        train = norm.training if training is None else training
        mean, var = norm.running_mean, norm.running_var
        if train or mean is None or var is None:
            kinds.append(BATCH)
            if train and mean is not None and getattr(norm, "track_running_stats", True):
                out.updates.append(k)
        else:
            kinds.append(RUNNING)
            out.running_means.append(mean)
            out.running_vars.append(var)
        eps.append(norm.eps)
        affine.append(norm.weight is not None)
        if norm.weight is not None:
            out.gammas.append(norm.weight)
            out.betas.append(norm.bias if norm.bias is not None else torch.zeros_like(norm.weight))
        for name in ("weight", "running_mean"):
            t = getattr(norm, name)
            if t is not None and t.shape != (channels,):
                raise ValueError(
                    f"{op}: expected norms[{k}].{name} of shape [{channels}] like the inputs' "
                    f"channels, "
                    f"but got {list(t.shape)}"
                )
    count = xs[0].numel() // max(channels, 1)
    if count == 1 and BATCH in kinds:
        raise ValueError(
            f"{op}: expected more than 1 value per channel when training, but got "
            f"{list(xs[0].shape)}"
        )
    return out._replace(kinds=tuple(kinds), eps=tuple(eps), affine=tuple(affine))


def spread(affine: Sequence[bool], present: Sequence[Tensor]) -> list[Tensor | None]:
    """One entry per candidate from the list of those that have one."""
    items = iter(present)
    return [next(items) if has else None for has in affine]


@torch.no_grad()
def update_running_statistics(
    norms: Sequence[Norm | None], updates: Sequence[int], mean: Tensor, var: Tensor, count: int
) -> None:
    """Move statistics and counters of ``norms[k]``, k in updates, as one BatchNorm step does.

    Args:
        norms: the normalisations of all candidates.
        updates: which of them are in training and keep statistics.
        mean: ``(K, C)`` batch means.
        var: ``(K, C)`` biased batch variances; the running one takes the unbiased.
        count: values per channel.
    """
    updated: list[Any] = [norms[k] for k in updates]  # all keep statistics: see gather_norms
    counters = [n.num_batches_tracked for n in updated if n.num_batches_tracked is not None]
    if counters:
        torch._foreach_add_(counters, 1)
    if not updates or count == 0:  # an empty batch is counted, and leaves no statistics
        return
    unbiased = var * (count / (count - 1))
    used = [(norm, mean[k], unbiased[k]) for norm, k in zip(updated, updates, strict=True)]
    momentum = {n.momentum for n, _, _ in used}
    dtypes = {n.running_mean.dtype for n, _, _ in used}
    if len(momentum) == 1 and dtypes == {mean.dtype} and (m := momentum.pop()) is not None:
        torch._foreach_lerp_(
            [n.running_mean for n, _, _ in used] + [n.running_var for n, _, _ in used],
            [m_k for _, m_k, _ in used] + [v_k for _, _, v_k in used],
            m,
        )
        return
    for norm, m_k, v_k in used:
        # momentum None is a cumulative average: the factor stays a tensor, reading it would wait
        # for the device.
        factor = norm.momentum
        for running, new in ((norm.running_mean, m_k), (norm.running_var, v_k)):
            if factor is None:
                weight: Any = norm.num_batches_tracked.to(running.dtype).reciprocal()
            else:
                weight = factor
            running.lerp_(new.to(running.dtype), weight)
