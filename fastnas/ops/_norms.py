# SPDX-License-Identifier: Apache-2.0
"""BatchNorms as arguments of a fused op: what is read of them, what they are left with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

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


class Update(NamedTuple):
    """Row k of the statistics goes into these running ones."""

    k: int
    mean: Tensor
    var: Tensor
    counter: Tensor | None
    momentum: float | None


class NormArguments(NamedTuple):
    """``kinds``, ``eps``, ``affine``: one entry per candidate; lists: of those that have one."""

    kinds: tuple[int, ...]
    eps: tuple[float, ...]
    affine: tuple[bool, ...]
    gammas: list[Tensor]
    betas: list[Tensor]
    running_means: list[Tensor]
    running_vars: list[Tensor]
    updates: list[Update]


_TORCH_NORMS = frozenset((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm))


def _tensors(norm: Norm) -> tuple[Tensor | None, ...]:
    """Weight, bias, running mean, running variance and counter."""
    if type(norm) in _TORCH_NORMS:
        # Straight from where a module keeps them: by attribute these five reads of every norm cost
        # more than a small call's kernels.
        module: Any = norm
        p, b = module._parameters, module._buffers
        mean, var, counter = b["running_mean"], b["running_var"], b["num_batches_tracked"]
        return p["weight"], p["bias"], mean, var, counter
    return norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked


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
    shape = (channels,)
    out = NormArguments((), (), (), [], [], [], [], [])
    kinds, eps, affine = [], [], []
    for k, norm in enumerate(norms):
        if norm is None:
            kinds.append(PLAIN)
            eps.append(0.0)
            affine.append(False)
            continue
        train = norm.training if training is None else training
        weight, bias, mean, var, counter = _tensors(norm)
        if train or mean is None or var is None:
            kinds.append(BATCH)
            if train and mean is not None and getattr(norm, "track_running_stats", True):
                assert var is not None
                out.updates.append(Update(k, mean, var, counter, norm.momentum))
        else:
            kinds.append(RUNNING)
            out.running_means.append(mean)
            out.running_vars.append(var)
        eps.append(norm.eps)
        affine.append(weight is not None)
        if weight is not None:
            out.gammas.append(weight)
            out.betas.append(torch.zeros_like(weight) if bias is None else bias)
        for name, t in (("weight", weight), ("running_mean", mean)):
            if t is not None and t.shape != shape:
                raise ValueError(
                    f"{op}: expected norms[{k}].{name} of shape [{channels}] like the inputs' "
                    f"channels, but got {list(t.shape)}"
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
    updates: Sequence[Update], mean: Tensor, var: Tensor, count: int
) -> None:
    """Move running statistics and counters as one BatchNorm step does.

    Args:
        updates: those of the norms that are in training and keep statistics.
        mean: ``(K, C)`` batch means.
        var: ``(K, C)`` biased batch variances; the running one takes the unbiased.
        count: values per channel.
    """
    counters = [u.counter for u in updates if u.counter is not None]
    if counters:
        torch._foreach_add_(counters, 1)
    if not updates or count == 0:  # an empty batch is counted, and leaves no statistics
        return
    means, variances = mean.unbind(0), (var * (count / (count - 1))).unbind(0)
    first = updates[0]
    if first.momentum is not None and all(
        u.momentum == first.momentum and u.mean.dtype == mean.dtype for u in updates
    ):
        torch._foreach_lerp_(
            [u.mean for u in updates] + [u.var for u in updates],
            [means[u.k] for u in updates] + [variances[u.k] for u in updates],
            first.momentum,
        )
        return
    for u in updates:
        for running, new in ((u.mean, means[u.k]), (u.var, variances[u.k])):
            if u.momentum is None:
                # A cumulative average: the factor stays a tensor, reading it would wait for the
                # device.
                assert u.counter is not None
                factor: Any = u.counter.to(running.dtype).reciprocal()
            else:
                factor = u.momentum
            running.lerp_(new.to(running.dtype), factor)
