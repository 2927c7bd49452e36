# SPDX-License-Identifier: Apache-2.0
"""Several weighted sums of the same candidates' outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnas._extension import has_kernels
from fastnas.ops._common import (
    MAX_CANDIDATES,
    check_candidates,
    check_devices,
    differentiate,
    fake_like,
)
from fastnas.ops._mixed import (
    composite,
    keep,
    kept,
    pack_gradients,
    split_tensors,
    stand_in,
    used_statistics,
)
from fastnas.ops._norms import Norm, gather_norms, update_running_statistics
from fastnas.ops.reference import PLAIN, accumulate_dtype, result_dtype


def multi_target_sum(
    xs: Sequence[Tensor | None],
    weights: Tensor,
    norms: Sequence[Norm | None] | None = None,
    training: bool | None = None,
) -> list[Tensor]:
    """``ys[t] = sum_k weights[t, k] * norms[k](xs[k])`` for several targets t at once.

    What the candidates of one node contribute to all later nodes where their outputs are shared
    (EnTranNAS, arXiv 2101.11342). Equivalent to T calls of :func:`mixed_sum` or of
    :func:`mixed_batch_norm`, but every input is read and normalised once for all of them, and its
    gradient written once. As there no normalised output is stored.

    Args:
        xs: 1 to 64 floating-point tensors of one shape and device, ``(N, C, ...)`` where there are
            norms; dtypes and memory formats may differ. None stands for a candidate that was not
            run, which no target uses, whatever its weights are.
        weights: ``(T, K)`` floating point, T at most 64. A weight of 0 leaves its input out of that
            sum: one that no target uses is not read by it, and its gradient is 0. (Behind a norm a
            NaN or an infinity in it still comes through.)
        norms: for each input None (it enters as it is) or a ``BatchNorm2d``, affine or not. Running
            statistics and counters of those in training are updated once, whatever the number of
            targets; that of an input that is None is left alone.
        training: overrides the norms' own ``training``.

    Returns:
        T new tensors of that shape, in the promoted dtype of ``xs`` and the memory format of the
        first of them.

    Raises:
        ValueError: counts or shapes that do not fit, or one value per channel in training.
        TypeError: an input is not a floating-point tensor, or a norm is a module of another kind.

    Example:
        >>> a, b = torch.ones(2), torch.full((2,), 4.0)
        >>> multi_target_sum([a, b], torch.tensor([[1.0, 0.0], [0.5, 0.25]]))
        [tensor([1., 1.]), tensor([1.5000, 1.5000])]
    """
    op = "multi_target_sum"
    if isinstance(xs, Tensor):
        raise TypeError(f"{op}: expected xs to be a list of tensors, but got one tensor")
    live = [k for k, x in enumerate(xs) if x is not None]
    given = [x for x in xs if x is not None]
    check_candidates(op, given)
    _check_weights(op, weights, len(xs), given[0])
    if norms is not None and len(norms) != len(xs):
        raise ValueError(
            f"{op}: expected one norm (or None) per input, but got {len(xs)} inputs and "
            f"{len(norms)} norms"
        )
    weights = weights.to(accumulate_dtype(result_dtype(given)))
    if len(live) < len(xs):  # no index that would have to be copied to the device
        weights = torch.stack([weights[:, k] for k in live], 1)
    mine = [None] * len(live) if norms is None else [norms[k] for k in live]
    if all(norm is None for norm in mine):
        kinds, eps, affine = ((value,) * len(live) for value in (PLAIN, 0.0, False))
        return list(MultiTargetSum.apply(kinds, eps, affine, weights, *given)[:-2])
    n = gather_norms(op, given, mine, training)
    *ys, mean, var = MultiTargetSum.apply(
        n.kinds, n.eps, n.affine, weights, *given, *n.gammas, *n.betas, *n.running_means,
        *n.running_vars,
    )  # fmt: skip
    if n.updates:
        count = given[0].numel() // max(given[0].shape[1], 1)
        update_running_statistics(n.updates, mean, var, count)
    return ys


def _check_weights(op: str, weights: Tensor, count: int, like: Tensor) -> None:
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        got = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"{op}: expected weights to be a floating-point tensor, but got {got}")
    if weights.dim() != 2 or weights.shape[1] != count or not 1 <= len(weights) <= MAX_CANDIDATES:
        raise ValueError(
            f"{op}: expected weights of shape (T, {count}) with T of 1 to {MAX_CANDIDATES}, one "
            f"column per input, but got {list(weights.shape)}"
        )
    if weights.device != like.device:
        raise ValueError(
            f"{op}: expected weights on {like.device} like the inputs, but got {weights.device}"
        )


class MultiTargetSum(torch.autograd.Function):
    """Autograd of :func:`multi_target_sum`; the second derivative goes through the reference."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        """The sums, and the ``(K, C)`` means and biased variances that were used, or empty."""
        # One parameter for all: without gradients, torch.compile would take the first argument for
        # ctx where there are as many arguments as parameters.
        ctx, kinds, eps, affine, weights, *tensors = arguments
        xs, gammas, betas, means, variances = split_tensors(kinds, affine, tensors)
        if has_kernels(xs[0].device.type):
            ys, mean, var = torch.ops.fastnas.multi_target_sum(
                xs, weights, kinds, eps, affine, gammas, betas, means, variances
            )
        else:
            ys, mean, var = composite("multi_target_sum", kinds, eps, affine, weights, tensors)
        keep(ctx, [weights], kinds, eps, affine, tensors, mean, var)
        return (*ys, mean, var)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the weights, the inputs and the affine parameters that ask for one."""
        (weights, mean, var), xs, gammas, betas = kept(ctx, 1)
        rows = [t for t, g in enumerate(grads[:-2]) if g is not None]
        given = [g for g in grads[:-2] if g is not None]
        if not given:
            return (None,) * len(ctx.needs_input_grad)
        kinds, eps, affine = ctx.kinds, ctx.eps, ctx.affine
        need_w, *need = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled() or not has_kernels(given[0].device.type):
            stand_ins = [stand_in(x, given[0].shape) for x in xs]

            def sums(weights: Tensor, *tensors: Tensor) -> list[Tensor]:
                ys, *_ = composite("multi_target_sum", kinds, eps, affine, weights, tensors)
                return [ys[t] for t in rows]

            inputs = (weights, *stand_ins, *gammas, *betas, *used_statistics(kinds, mean, var))
            return (None, None, None, *differentiate(sums, inputs, (need_w, *need), given))
        whole = len(rows) == len(weights)
        given = [g.contiguous(memory_format=ctx.format) for g in given]
        dxs, dw, dgamma, dbeta = torch.ops.fastnas.multi_target_sum_backward(
            given,
            xs,
            weights if whole else torch.stack([weights[t] for t in rows]),
            mean,
            var,
            kinds,
            eps,
            affine,
            gammas,
            betas,
            need[: len(xs)],
            need_w,
        )
        if need_w and not whole:
            found = dict(zip(rows, dw, strict=True))
            nothing = torch.zeros_like(weights[0])
            dw = torch.stack([found.get(t, nothing) for t in range(len(weights))])
        return (None, None, None, *pack_gradients(ctx, dxs, dw, dgamma, dbeta))


@torch.library.register_fake("fastnas::multi_target_sum")
def _(
    xs: list[Tensor],
    weights: Tensor,
    kinds: list[int],
    eps: list[float],
    affine: list[bool],
    gammas: list[Tensor],
    betas: list[Tensor],
    running_means: list[Tensor],
    running_vars: list[Tensor],
) -> tuple[list[Tensor], Tensor, Tensor]:
    tensors = (weights, *xs, *gammas, *betas, *running_means, *running_vars)
    check_devices("multi_target_sum", *tensors)
    dtype = result_dtype(xs)
    ys = [fake_like(xs[0], dtype) for _ in range(weights.shape[0])]
    plain = all(kind == PLAIN for kind in kinds)
    mean = weights.new_empty(0) if plain else weights.new_empty(len(xs), xs[0].shape[1])
    return ys, mean, torch.empty_like(mean)


@torch.library.register_fake("fastnas::multi_target_sum_backward")
def _(
    grads: list[Tensor],
    xs: list[Tensor],
    weights: Tensor,
    mean: Tensor,
    var: Tensor,
    kinds: list[int],
    eps: list[float],
    affine: list[bool],
    gammas: list[Tensor],
    betas: list[Tensor],
    need_xs: list[bool],
    need_weights: bool,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    tensors = (weights, *grads, mean, var, *xs, *gammas, *betas)
    check_devices("multi_target_sum_backward", *tensors)
    grad = grads[0]
    like = next((x for x in xs if x.shape == grad.shape), grad)
    dxs = [fake_like(like, grad.dtype) for need in need_xs if need]
    plain = all(kind == PLAIN for kind in kinds)
    dgamma = weights.new_empty(len(gammas), 1 if plain else grad.shape[1])
    dw = weights.new_empty(weights.shape) if need_weights else weights.new_empty(0)
    return dxs, dw, dgamma, torch.empty_like(dgamma)
