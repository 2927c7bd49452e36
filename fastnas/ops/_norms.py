# SPDX-License-Identifier: Apache-2.0
"""BatchNorms as arguments of a fused op: what is read of them, what they are left with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastnas._extension import has_kernels
from fastnas.ops._common import check_devices
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


class Updates(NamedTuple):
    """Rows of the statistics, and the running ones they go into: one entry each per norm.

    In columns: a thousand small tuples a step, made and taken apart, add up.
    """

    rows: list[int]
    means: list[Tensor]
    vars: list[Tensor]
    counters: list[Tensor | None]
    momenta: list[float | None]


class NormArguments(NamedTuple):
    """``kinds``, ``eps``, ``affine``: one entry per candidate; lists: of those that have one."""

    kinds: tuple[int, ...]
    eps: tuple[float, ...]
    affine: tuple[bool, ...]
    gammas: list[Tensor]
    betas: list[Tensor]
    running_means: list[Tensor]
    running_vars: list[Tensor]
    updates: Updates | None


_TORCH_NORMS: frozenset[type] = frozenset((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))


_NAMES = ("weight", "bias", "running_mean", "running_var")


def _check_class(op: str, name: str, norm: Norm) -> None:
    """Raise for a module that normalises in another way than BatchNorm, or is not ready to."""
    if not isinstance(norm, nn.Module):
        if not hasattr(norm, "running_mean"):
            raise TypeError(
                f"{op}: expected {name} to be None or a BatchNorm, but got {type(norm).__name__}"
            )
        return  # an object with the attributes of one
    batch_norm = nn.modules.batchnorm._BatchNorm
    is_one = isinstance(norm, batch_norm) and not isinstance(norm, nn.SyncBatchNorm)
    if not is_one or type(norm).forward is not batch_norm.forward:
        raise TypeError(
            f"{op}: expected {name} to be None or a BatchNorm with the forward of torch's, but "
            f"got {type(norm).__name__}; call it yourself and pass None in its place"
        )
    if isinstance(norm, nn.modules.lazy.LazyModuleMixin) and norm.has_uninitialized_params():
        raise ValueError(
            f"{op}: expected {name} with parameters, but got a {type(norm).__name__} that has "
            f"seen no input yet"
        )


def gather_norms(
    op: str,
    xs: Sequence[Tensor],
    norms: Sequence[Norm | None],
    training: bool | None,
    only: str | None = None,
) -> NormArguments:
    """Read ``norms`` as ``BatchNorm2d.forward`` would: what each uses, which are to be updated.

    ``only`` is the name of the argument where the op takes one norm.
    """
    if len(norms) != len(xs):
        raise ValueError(
            f"{op}: expected one norm (or None) per input, "
            f"but got {len(xs)} inputs and {len(norms)} norms"
        )
    if xs[0].dim() < 2:
        raise ValueError(f"{op}: expected inputs of shape (N, C, ...), but got {list(xs[0].shape)}")
    channels, device = xs[0].shape[1], xs[0].device
    shape = (channels,)
    kinds, eps, affine = [], [], []
    gammas: list[Tensor] = []
    betas: list[Tensor] = []
    running_means: list[Tensor] = []
    running_vars: list[Tensor] = []
    updates = Updates([], [], [], [], [])
    for k, norm in enumerate(norms):
        if norm is None:
            kinds.append(PLAIN)
            eps.append(0.0)
            affine.append(False)
            continue
        module: Any = norm
        if type(norm) in _TORCH_NORMS and len(p := module._parameters) == 2:
            # Straight from where a module keeps them (but for a replica of DataParallel): by
            # attribute these five reads of every norm cost more than a small call's kernels.
            b = module._buffers
            weight, bias, mean, var = p["weight"], p["bias"], b["running_mean"], b["running_var"]
            counter = b["num_batches_tracked"]
        else:
            _check_class(op, only or f"norms[{k}]", norm)
            weight, bias, mean, var = norm.weight, norm.bias, norm.running_mean, norm.running_var
            counter = norm.num_batches_tracked
        for t in (weight, bias, mean, var):
            if t is not None and (t.shape != shape or t.device != device):
                name = _NAMES[[x is t for x in (weight, bias, mean, var)].index(True)]
                raise ValueError(
                    f"{op}: expected {only or f'norms[{k}]'}.{name} of shape [{channels}] on "
                    f"{device} like the inputs' channels, but got {list(t.shape)} on {t.device}"
                )
        if (mean is None) != (var is None):
            raise ValueError(
                f"{op}: expected {only or f'norms[{k}]'} with running_mean and running_var or "
                f"without both, but got one of them"
            )
        train = norm.training if training is None else training
        if train or mean is None or var is None:
            kinds.append(BATCH)
            if train and mean is not None and getattr(norm, "track_running_stats", True):
                assert var is not None  # as checked
                updates.rows.append(k)
                updates.means.append(mean)
                updates.vars.append(var)
                updates.counters.append(counter)
                updates.momenta.append(norm.momentum)
        else:
            kinds.append(RUNNING)
            running_means.append(mean)
            running_vars.append(var)
        eps.append(norm.eps)
        affine.append(weight is not None or bias is not None)
        if weight is not None:
            gammas.append(weight)
            betas.append(torch.zeros_like(weight) if bias is None else bias)
        elif bias is not None:
            gammas.append(torch.ones_like(bias))
            betas.append(bias)
    count = xs[0].numel() // max(channels, 1)
    if count == 1 and BATCH in kinds:
        raise ValueError(
            f"{op}: expected more than 1 value per channel when training, but got "
            f"{list(xs[0].shape)}"
        )
    return NormArguments(
        tuple(kinds),
        tuple(eps),
        tuple(affine),
        gammas,
        betas,
        running_means,
        running_vars,
        updates if updates.rows else None,
    )


def spread(affine: Sequence[bool], present: Sequence[Tensor]) -> list[Tensor | None]:
    """One entry per candidate from the list of those that have one."""
    items = iter(present)
    return [next(items) if has else None for has in affine]


def update_running_statistics(
    updates: Updates | None, mean: Tensor, var: Tensor, count: int
) -> None:
    """Move running statistics and counters as one BatchNorm step does.

    Args:
        updates: those of the norms that are in training and keep statistics, if any.
        mean: ``(K, C)`` batch means.
        var: ``(K, C)`` biased batch variances; the running one takes the unbiased.
        count: values per channel.
    """
    if updates is None:
        return
    with torch.no_grad():
        _step(updates, mean, var, count)
    _save_something()


def _step(updates: Updates, mean: Tensor, var: Tensor, count: int) -> None:
    distinct = len(set(map(id, updates.means))) == len(updates.means)
    if distinct and _update_plain(updates, mean, var, count):
        return
    # One norm of several candidates: its steps build on each other. And others in the call do not
    # decide how a norm is moved, nor the last bit of its statistics.
    for part in _one_by_one(updates):
        if not _update_plain(part, mean, var, count):
            _update(part, mean, var, count)


def _save_something() -> None:
    """Save a number, for a backward that never comes, where somebody follows what is saved.

    A checkpoint without reentry (``torch.utils.checkpoint``) computes a function again up to the
    last tensor that was saved, and no further. BatchNorm moves its statistics before it saves
    anything; ours move when the op has saved its tensors, and would be left out there.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        # Of sin it is the input, a leaf: an output in the hands of a hook would keep itself alive.
        torch.zeros((), device="cpu", requires_grad=True).sin()


def _one_by_one(updates: Updates) -> Iterator[Updates]:
    for k, running_mean, running_var, counter, momentum in zip(*updates, strict=True):
        yield Updates([k], [running_mean], [running_var], [counter], [momentum])


def _update_plain(updates: Updates, mean: Tensor, var: Tensor, count: int) -> bool:
    """The same by the kernel, where all is as it serves it; False if nothing was done."""
    rows, means, variances, counters, momenta = updates
    if None in momenta or not has_kernels(mean.device.type):
        return False
    if {t.dtype for t in means + variances} != {mean.dtype}:
        return False
    counted = [counter for counter in counters if counter is not None]
    if not all(c.device == mean.device and c.dtype == torch.int64 for c in counted):
        return False
    torch.ops.fastnas.update_running_statistics(
        means, variances, counted, mean, var, rows, momenta, count
    )
    return True


def _update(updates: Updates, mean: Tensor, var: Tensor, count: int) -> None:
    """The same by PyTorch's operations, for norms that are all different."""
    counters = updates.counters
    counted = [counter for counter in counters if counter is not None]
    if counted:
        torch._foreach_add_(counted, 1)
    if count == 0:  # an empty batch is counted, and leaves no statistics
        return
    unbiased = var * (count / (count - 1))
    for k, running_mean, running_var, counter, momentum in zip(*updates, strict=True):
        for running, new in ((running_mean, mean[k]), (running_var, unbiased[k])):
            # In the wider dtype: half precision does not hold every variance that its average is
            # moved by.
            dtype = torch.promote_types(running.dtype, new.dtype)
            factor: Any = momentum
            if factor is None and counter is None:
                continue  # torch takes a factor of 0 for a cumulative average without a counter
            if factor is None:
                # A cumulative average: the factor stays a tensor, reading it would wait for the
                # device.
                assert counter is not None
                factor = counter.to(dtype).reciprocal()
            # No lerp: by a difference, an infinity would become NaN in the next step.
            running.copy_(running.to(dtype) * (1 - factor) + new.to(dtype) * factor)


@torch.library.register_fake("fastnas::update_running_statistics")
def _(
    running_means: list[Tensor],
    running_vars: list[Tensor],
    counters: list[Tensor],
    mean: Tensor,
    var: Tensor,
    rows: list[int],
    momenta: list[float],
    count: int,
) -> None:
    tensors = (*running_means, *running_vars, *counters, var)
    check_devices("update_running_statistics", mean, *tensors)
