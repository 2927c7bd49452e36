# SPDX-License-Identifier: Apache-2.0
"""PC-DARTS' partial channels: mixed sum, bypass and channel shuffle in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnas._extension import has_kernels
from fastnas.ops import reference
from fastnas.ops._common import (
    as_weights,
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


def partial_channel_mix(
    x: Tensor,
    xs: Sequence[Tensor],
    weights: Tensor | Sequence[Tensor | float],
    k: int,
    norms: Sequence[Norm | None] | None = None,
    training: bool | None = None,
) -> Tensor:
    """PC-DARTS' mixed op after its candidates have run (arXiv 1907.05737).

    With ``c = C / k`` and ``mixed = mixed_batch_norm(xs, weights, norms)``, equivalent to::

        rest = x[:, c:] if same_height else max_pool2d(x[:, c:], 2, 2)
        z = torch.cat([mixed, rest], 1)
        out = z.view(N, k, c, H, W).transpose(1, 2).reshape(N, C, H, W)  # out[:, o] = z[:, (o % k)
        * c + o // k]

    ``x`` is read through its strides and nothing but ``out`` is written.

    Args:
        x: the edge's input ``(N, C, H, W)``, or only its bypassed channels ``(N, C - c, H, W)``.
            After ``processed, rest = x.split([c, C - c], 1)`` hand over ``rest``: autograd then
            joins the two gradients once, where slices of ``x`` would cost it two tensors of zeros
            and a sum.
        xs: the candidates' outputs, ``(N, c, H', W')`` each, computed from ``x[:, :c]``.
        weights: ``(K,)``, or K numbers or 0-d tensors.
        k: one channel in ``k`` is processed.
        norms: as in :func:`mixed_batch_norm`; None: no input is normalised.
        training: as in :func:`mixed_batch_norm`.

    Returns:
        ``(N, C, H', W')`` in the promoted dtype of ``xs`` and ``x`` and the memory format of
        ``xs[0]``.

    Raises:
        ValueError: channels that do not fit ``k``, or sizes that are neither equal nor halved.
    """
    check_candidates("partial_channel_mix", xs)
    rest = _bypassed(x, xs[0], k)
    acc = reference.accumulate_dtype(reference.result_dtype([*xs, rest]))
    w = as_weights("partial_channel_mix", weights, xs).to(acc)
    norms = [None] * len(xs) if norms is None else norms
    n = gather_norms("partial_channel_mix", xs, norms, training)
    y, mean, var = PartialChannelMix.apply(
        k, n.kinds, n.eps, n.affine, rest, w, *xs, *n.gammas, *n.betas, *n.running_means,
        *n.running_vars
    )  # fmt: skip
    if n.updates:
        count = xs[0].numel() // max(xs[0].shape[1], 1)
        update_running_statistics(n.updates, mean, var, count)
    return y


def _bypassed(x: Tensor, mixed: Tensor, k: int) -> Tensor:
    """The channels of ``x`` that no candidate saw, after checking that everything fits."""
    op = "partial_channel_mix"
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"{op}: expected k to be an integer, but got {type(k).__name__}")
    if k < 2:
        raise ValueError(f"{op}: expected k of at least 2, but got {k}")
    if x.dim() != 4 or mixed.dim() != 4:
        raise ValueError(
            f"{op}: expected x and xs of shape (N, C, H, W), but got {list(x.shape)} and "
            f"{list(mixed.shape)}"
        )
    if not x.is_floating_point():
        raise TypeError(f"{op}: expected x to be floating-point like xs, but got {x.dtype}")
    if x.device != mixed.device:
        raise ValueError(f"{op}: expected x on {mixed.device} like xs, but got {x.device}")
    c = mixed.shape[1]
    if x.shape[1] not in (k * c, (k - 1) * c) or x.shape[0] != mixed.shape[0]:
        raise ValueError(
            f"{op}: expected x with {k * c} channels, or its last {(k - 1) * c}, for k = {k} "
            f"and xs of shape {list(mixed.shape)}, but got {list(x.shape)}"
        )
    (h, w), out = x.shape[2:], mixed.shape[2:]
    if tuple(out) not in ((h, w), (h // 2, w // 2)):
        raise ValueError(
            f"{op}: expected xs of {h}x{w} like x or of half that, but got {out[0]}x{out[1]}"
        )
    return x[:, c:] if x.shape[1] == k * c else x


class PartialChannelMix(torch.autograd.Function):
    """Autograd of :func:`partial_channel_mix`; the second derivative goes through the reference."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The output, and the ``(K, C/k)`` means and biased variances that were used."""
        # One parameter for all: without gradients, torch.compile would take the first argument for
        # ctx where there are as many arguments as parameters.
        ctx, k, kinds, eps, affine, rest, weights, *tensors = arguments
        xs, gammas, betas, means, variances = split_tensors(kinds, affine, tensors)
        if has_kernels(rest.device.type):
            y, mean, var = torch.ops.fastnas.partial_channel_mix(
                rest, xs, weights, k, kinds, eps, affine, gammas, betas, means, variances
            )
        else:
            y, mean, var = _join(k, kinds, eps, affine, rest, weights, tensors)
        pooled = rest.shape[2:] != xs[0].shape[2:]
        # A copied bypass has a gradient without its values; a pooled one needs them to find the
        # maxima again.
        kept_rest = rest if ctx.needs_input_grad[4] and pooled else rest.new_empty(0)
        keep(ctx, [kept_rest, weights], kinds, eps, affine, tensors, mean, var)
        ctx.k = k
        ctx.rest, ctx.mixed_shape = (rest.shape, rest.dtype), xs[0].shape
        return y, mean, var

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, _mean: Tensor | None, _var: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of all that ask for one: bypass, weights, inputs, affine parameters."""
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        k, kinds, eps, affine = ctx.k, ctx.kinds, ctx.eps, ctx.affine
        (rest, weights, mean, var), xs, gammas, betas = kept(ctx, 2)
        need_rest, need_w, *need = ctx.needs_input_grad[4:]
        rest_shape, rest_dtype = ctx.rest
        if torch.is_grad_enabled() or not has_kernels(grad.device.type):
            stand_ins = [stand_in(x, ctx.mixed_shape) for x in xs]
            statistics = used_statistics(kinds, mean, var)
            composed = differentiate(
                lambda r, w, *t: _join(k, kinds, eps, affine, r, w, t)[0],
                (stand_in(rest, rest_shape), weights, *stand_ins, *gammas, *betas, *statistics),
                (need_rest, need_w, *need),
                grad,
            )
            return (None, None, None, None, *composed)
        grad = grad.contiguous(memory_format=ctx.format)
        drest, dxs, dw, dgamma, dbeta = torch.ops.fastnas.partial_channel_mix_backward(
            grad, rest, list(rest_shape[2:]), xs, weights, k, mean, var, kinds, eps, affine, gammas,
            betas, need_rest, need[: len(xs)], need_w,
        )  # fmt: skip
        grads = pack_gradients(ctx, dxs, dw, dgamma, dbeta)
        return (None, None, None, None, drest.to(rest_dtype) if need_rest else None, *grads)


def _join(
    k: int,
    kinds: Sequence[int],
    eps: Sequence[float],
    affine: Sequence[bool],
    rest: Tensor,
    weights: Tensor,
    tensors: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """The whole op by the reference."""
    mixed, mean, var = composite("mixed_batch_norm", kinds, eps, affine, weights, tensors)
    dtype = torch.promote_types(mixed.dtype, rest.dtype)
    return reference.partial_channel_join(rest.to(dtype), mixed.to(dtype), k), mean, var


@torch.library.register_fake("fastnas::partial_channel_mix")
def _(
    rest: Tensor,
    xs: list[Tensor],
    weights: Tensor,
    k: int,
    kinds: list[int],
    eps: list[float],
    affine: list[bool],
    gammas: list[Tensor],
    betas: list[Tensor],
    running_means: list[Tensor],
    running_vars: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    op = "partial_channel_mix"
    check_devices(op, rest, weights, *xs, *gammas, *betas, *running_means, *running_vars)
    n, c, *space = xs[0].shape
    mean = weights.new_empty(len(xs), c)
    y = fake_like(xs[0], reference.result_dtype([*xs, rest]), (n, k * c, *space))
    return y, mean, torch.empty_like(mean)


@torch.library.register_fake("fastnas::partial_channel_mix_backward")
def _(
    grad: Tensor,
    rest: Tensor,
    rest_size: list[int],
    xs: list[Tensor],
    weights: Tensor,
    k: int,
    mean: Tensor,
    var: Tensor,
    kinds: list[int],
    eps: list[float],
    affine: list[bool],
    gammas: list[Tensor],
    betas: list[Tensor],
    need_rest: bool,
    need_xs: list[bool],
    need_weights: bool,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    op = "partial_channel_mix_backward"
    check_devices(op, grad, rest, weights, mean, var, *xs, *gammas, *betas)
    n, channels, *space = grad.shape
    c = channels // k
    like = next((x for x in xs if x.dim() == grad.dim()), grad)
    dxs = [fake_like(like, grad.dtype, (n, c, *space)) for need in need_xs if need]
    drest = (
        fake_like(like, grad.dtype, (n, channels - c, *rest_size))
        if need_rest
        else grad.new_empty(0)
    )
    dgamma = weights.new_empty(len(gammas), c)
    dw = torch.empty_like(weights) if need_weights else weights.new_empty(0)
    return drest, dxs, dw, dgamma, torch.empty_like(dgamma)
