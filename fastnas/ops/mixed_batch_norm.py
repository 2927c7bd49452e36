# SPDX-License-Identifier: Apache-2.0
"""BatchNorm of the candidates' outputs and their weighted sum, fused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastnas._extension import has_kernels
from fastnas.ops import reference
from fastnas.ops._carried import CARRIED, WRITTEN
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
from fastnas.ops.reference import BATCH, PLAIN, RUNNING


def mixed_batch_norm(
    xs: Sequence[Tensor],
    weights: Tensor | Sequence[Tensor | float],
    norms: Sequence[Norm | None],
    training: bool | None = None,
) -> Tensor:
    """``y = sum_k weights[k] * norms[k](xs[k])`` without ever storing a normalised output.

    Equivalent to ``sum(w * (n(x) if n else x) for w, x, n in zip(weights, xs, norms))``. Reads
    every input twice in training (once in evaluation) and writes one tensor; keeps only the inputs
    and, per channel, two numbers for the backward, whose one reduction gives the gradients of
    weights and BatchNorms together.

    Args:
        xs: 1 to 64 floating-point tensors ``(N, C, ...)`` of one shape and device.
        weights: ``(K,)``, or K numbers or 0-d tensors.
        norms: for each input None (it enters as it is) or a ``BatchNorm2d``, affine or not. Running
            statistics and counters of those in training are updated once, as calling them would.
        training: overrides the norms' own ``training``.

    Returns:
        A new tensor of that shape, in the promoted dtype of ``xs`` and the memory format of
        ``xs[0]``.

    Raises:
        ValueError: counts or shapes that do not fit, or one value per channel in training.
        TypeError: an input is not a floating-point tensor, or a norm is a module of another kind
            (``SyncBatchNorm``, whose statistics go over processes, among them).
    """
    return mix_apart(xs, weights, norms, {}, training)


def mix_apart(
    xs: Sequence[Tensor],
    weights: Tensor | Sequence[Tensor | float],
    norms: Sequence[Norm | None],
    carriers: Mapping[int, Tensor],
    training: bool | None = None,
) -> Tensor:
    """:func:`mixed_batch_norm` of inputs of which some come with their statistics.

    ``carriers`` has, by number of such an input, what came with it (``fastnas.ops._carried``). The
    gradient of that input is finished by its maker.
    """
    check_candidates("mixed_batch_norm", xs)
    w = as_weights("mixed_batch_norm", weights, xs)
    n = gather_norms("mixed_batch_norm", xs, norms, training)
    tensors = (*xs, *n.gammas, *n.betas, *n.running_means, *n.running_vars)
    y, mean, var = MixedBatchNorm.apply(
        tuple(carriers), n.kinds, n.eps, n.affine, *carriers.values(), w, *tensors
    )
    if n.updates:
        count = xs[0].numel() // max(xs[0].shape[1], 1)
        update_running_statistics(n.updates, mean, var, count)
    return y


class MixedBatchNorm(torch.autograd.Function):
    """Autograd of :func:`mixed_batch_norm`; the second derivative goes through the reference.

    Its arguments are which inputs have a carrier, kinds, eps, which norms are affine, the carriers,
    the weights, and all tensors (``fastnas.ops._mixed``).
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        """``y``, and the ``(K, C)`` means and biased variances that were used."""
        # One parameter for all: without gradients, torch.compile would take the first argument for
        # ctx where there are as many arguments as parameters.
        ctx, carried, kinds, eps, affine, *rest = arguments
        carriers, (weights, *tensors) = rest[: len(carried)], rest[len(carried) :]
        xs, gammas, betas, means, variances = split_tensors(kinds, affine, tensors)
        if has_kernels(xs[0].device.type):
            known = [weights.new_empty(0)] * len(xs) if carried else []
            for k, carrier in zip(carried, carriers, strict=True):
                known[k] = carrier
            y, mean, var = torch.ops.fastnas.mixed_batch_norm(
                xs, weights, kinds, eps, affine, gammas, betas, means, variances, known
            )
        else:
            y, mean, var = composite("mixed_batch_norm", kinds, eps, affine, weights, tensors)
        keep(ctx, [weights], kinds, eps, affine, tensors, mean, var)
        ctx.carried, ctx.alone = carried, True
        return y, mean, var

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, _mean: Tensor | None, _var: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the weights, the inputs and the affine parameters that ask for one."""
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        kinds, eps, affine = ctx.kinds, ctx.eps, ctx.affine
        (weights, mean, var), xs, gammas, betas = kept(ctx, 1)
        carried, head = ctx.carried, (None,) * 4
        need_w, *need = ctx.needs_input_grad[4 + len(carried) :]
        if torch.is_grad_enabled() or not has_kernels(grad.device.type):
            ctx.alone = False  # the derivative of what follows reads the inputs as well
            stand_ins = [stand_in(x, grad.shape) for x in xs]
            grads = differentiate(
                lambda w, *t: composite("mixed_batch_norm", kinds, eps, affine, w, t)[0],
                (weights, *stand_ins, *gammas, *betas, *used_statistics(kinds, mean, var)),
                (need_w, *need),
                grad,
            )
            return (*head, *(None,) * len(carried), *grads)
        grad = grad.contiguous(memory_format=ctx.format)
        ways = [int(n) for n in need[: len(xs)]]
        for k in carried:
            # By other statistics than the batch's nothing but the gradient counts, not even a NaN.
            ways[k] *= CARRIED if ctx.alone and kinds[k] == BATCH else WRITTEN
        dxs, dw, dgamma, dbeta, numbers = torch.ops.fastnas.mixed_batch_norm_backward(
            grad, xs, weights, mean, var, kinds, eps, affine, gammas, betas, ways, need_w
        )
        ours, rows = iter(dxs), iter(numbers.unbind(0))
        dxs = [grad if way == CARRIED else next(ours) for way in ways if way]
        found = {k: next(rows) for k, way in enumerate(ways) if way == CARRIED}
        packed = pack_gradients(ctx, dxs, dw, dgamma, dbeta)
        return (*head, *[found.get(k) for k in carried], *packed)


@torch.library.register_fake("fastnas::mixed_batch_norm")
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
    carriers: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (weights, *xs, *gammas, *betas, *running_means, *running_vars, *carriers)
    check_devices("mixed_batch_norm", *tensors)
    mean = weights.new_empty(len(xs), xs[0].shape[1])
    y = fake_like(xs[0], reference.result_dtype(xs))
    return y, mean, torch.empty_like(mean)


@torch.library.register_fake("fastnas::mixed_batch_norm_backward")
def _(
    grad: Tensor,
    xs: list[Tensor],
    weights: Tensor,
    mean: Tensor,
    var: Tensor,
    kinds: list[int],
    eps: list[float],
    affine: list[bool],
    gammas: list[Tensor],
    betas: list[Tensor],
    need_xs: list[int],
    need_weights: bool,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    tensors = (grad, weights, mean, var, *xs, *gammas, *betas)
    check_devices("mixed_batch_norm_backward", *tensors)
    like = next((x for x in xs if x.shape == grad.shape), grad)
    dxs = [fake_like(like, grad.dtype) for need in need_xs if need == WRITTEN]
    carried = weights.new_empty(need_xs.count(CARRIED), 4, grad.shape[1])
    dgamma = weights.new_empty(len(gammas), grad.shape[1])
    dw = torch.empty_like(weights) if need_weights else weights.new_empty(0)
    return dxs, dw, dgamma, torch.empty_like(dgamma), carried


__all__ = ["BATCH", "PLAIN", "RUNNING", "MixedBatchNorm", "mixed_batch_norm"]
