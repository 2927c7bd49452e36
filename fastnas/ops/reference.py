# SPDX-License-Identifier: Apache-2.0
"""Every op once more in plain PyTorch: what it computes, with nothing done for speed.

The tests compare the kernels with these functions, devices without kernels run them, and second
derivatives are taken through them. They are meant to be read beside the papers. What works on
architecture parameters alone is in reference_architecture.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnas.ops._dtypes import accumulate_dtype as accumulate_dtype
from fastnas.ops._dtypes import result_dtype as result_dtype
from fastnas.ops.reference_architecture import path_probabilities as path_probabilities
from fastnas.ops.reference_architecture import path_softmax as path_softmax
from fastnas.ops.reference_architecture import philox4x32 as philox4x32
from fastnas.ops.reference_architecture import sample_path_indices as sample_path_indices
from fastnas.ops.reference_architecture import sparse_connections as sparse_connections

# How a candidate's output enters the sum.
PLAIN, BATCH, RUNNING = 0, 1, 2


def mixed_sum(xs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """``y = sum_k weights[k] * xs[k]``, the mixed op of DARTS (arXiv 1806.09055, eq. 2).

    Args:
        xs: K tensors of one shape.
        weights: ``(K,)``.

    Returns:
        A tensor of the shape of ``xs[0]``.
    """
    dtype = result_dtype(xs)
    acc = accumulate_dtype(dtype)
    w = weights.to(acc)
    y = w[0] * xs[0].to(acc)
    for k in range(1, len(xs)):
        y = y + w[k] * xs[k].to(acc)
    return y.to(dtype)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of ``x`` (N, C, ...), in the accumulation dtype."""
    dims = [d for d in range(x.dim()) if d != 1]
    var, mean = torch.var_mean(x.to(accumulate_dtype(x.dtype)), dims, correction=0)
    return mean, var


def normalise(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * gamma + beta`` per channel, in the accumulation dtype."""
    acc = accumulate_dtype(x.dtype)
    shape = (1, -1) + (1,) * (x.dim() - 2)
    y = (x.to(acc) - mean.to(acc).view(shape)) * torch.rsqrt(var.to(acc) + eps).view(shape)
    if gamma is not None:
        y = y * gamma.to(acc).view(shape)
    if beta is not None:
        y = y + beta.to(acc).view(shape)
    return y


def mixed_batch_norm(
    xs: Sequence[Tensor],
    weights: Tensor,
    kinds: Sequence[int],
    eps: Sequence[float],
    gammas: Sequence[Tensor | None],
    betas: Sequence[Tensor | None],
    running_means: Sequence[Tensor | None],
    running_vars: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm of some of the candidates' outputs, then the weighted sum of all.

    Every sequence has one entry per candidate. ``kinds[k]`` says how candidate k enters: ``PLAIN``
    as it is, ``BATCH`` normalised with the statistics of this batch, ``RUNNING`` with the given
    running ones.

    Returns:
        ``y`` of the shape of ``xs[0]``; the means and the biased variances that were used, ``(K,
        C)`` each (zeros and ones where nothing was normalised).
    """
    terms, mean, var = _normalised(
        xs, weights, kinds, eps, gammas, betas, running_means, running_vars
    )
    return mixed_sum(terms, weights).to(result_dtype(xs)), mean, var


def _normalised(
    xs: Sequence[Tensor],
    like: Tensor,
    kinds: Sequence[int],
    eps: Sequence[float],
    gammas: Sequence[Tensor | None],
    betas: Sequence[Tensor | None],
    running_means: Sequence[Tensor | None],
    running_vars: Sequence[Tensor | None],
) -> tuple[list[Tensor], Tensor, Tensor]:
    """What the sum of :func:`mixed_batch_norm` is over, and the statistics that were used."""
    acc = accumulate_dtype(result_dtype(xs))
    channels = xs[0].shape[1]
    terms: list[Tensor] = []
    means: list[Tensor] = []
    variances: list[Tensor] = []
    for k, x in enumerate(xs):
        mean, var = like.new_zeros(channels, dtype=acc), like.new_ones(channels, dtype=acc)
        if kinds[k] == BATCH:
            mean, var = (t.to(acc) for t in statistics(x))
        elif kinds[k] == RUNNING:
            running_mean, running_var = running_means[k], running_vars[k]
            assert running_mean is not None and running_var is not None
            mean, var = running_mean.to(acc), running_var.to(acc)
        plain = kinds[k] == PLAIN
        terms.append(
            x.to(acc) if plain else normalise(x.to(acc), mean, var, eps[k], gammas[k], betas[k])
        )
        means.append(mean)
        variances.append(var)
    return terms, torch.stack(means), torch.stack(variances)


def multi_target_sum(
    xs: Sequence[Tensor],
    weights: Tensor,
    kinds: Sequence[int],
    eps: Sequence[float],
    gammas: Sequence[Tensor | None],
    betas: Sequence[Tensor | None],
    running_means: Sequence[Tensor | None],
    running_vars: Sequence[Tensor | None],
) -> tuple[list[Tensor], Tensor, Tensor]:
    """``ys[t] = sum_k weights[t, k] * norm_k(xs[k])``: outputs that several nodes share.

    Args:
        xs: K tensors of one shape.
        weights: ``(T, K)``.
        kinds: see :func:`mixed_batch_norm`, also for what follows.
        eps: see ``kinds``.
        gammas: see ``kinds``.
        betas: see ``kinds``.
        running_means: see ``kinds``.
        running_vars: see ``kinds``.

    Returns:
        T tensors of the shape of ``xs[0]``; the means and the biased variances that were used,
        ``(K, C)`` each, empty where nothing was normalised.
    """
    if all(kind == PLAIN for kind in kinds):
        return [mixed_sum(xs, w) for w in weights], weights.new_empty(0), weights.new_empty(0)
    terms, mean, var = _normalised(
        xs, weights, kinds, eps, gammas, betas, running_means, running_vars
    )
    return [mixed_sum(terms, w).to(result_dtype(xs)) for w in weights], mean, var


def channel_shuffle(z: Tensor, k: int) -> Tensor:
    """``out[:, o] = z[:, (o mod k) * (C / k) + o div k]``: PC-DARTS' shuffle with k groups."""
    n, channels, *space = z.shape
    return z.reshape(n, k, channels // k, *space).transpose(1, 2).reshape(z.shape)


def partial_channel_join(rest: Tensor, mixed: Tensor, k: int) -> Tensor:
    """The tail of PC-DARTS' mixed op: the mixed channels, the bypassed ones, and the shuffle.

    Args:
        rest: ``(N, C - C/k, H, W)``, the channels no candidate saw.
        mixed: ``(N, C/k, H', W')``, the mixed op's output on the others.
        k: one channel in k is processed.

    Returns:
        ``(N, C, H', W')``. The bypass is pooled 2x2 when the sizes differ.
    """
    if mixed.shape[2:] != rest.shape[2:]:
        rest = F.max_pool2d(rest, 2, 2)
    return channel_shuffle(torch.cat([mixed, rest.to(mixed.dtype)], 1), k)


def partial_channel_node(
    mixed: Tensor, rests: Sequence[Tensor], weights: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The end of a PC-DARTS node: the bypassed channels of its edges summed up, and the shuffle.

    Args:
        mixed: ``(N, C/k, H, W)``.
        rests: for each edge ``(N, C - C/k, H, W)``.
        weights: ``(E,)``, the factors of the edges.
        k: one channel in k is mixed.

    Returns:
        The first C/k shuffled channels, and the others.
    """
    dtype, c = result_dtype([mixed, *rests]), mixed.shape[1]
    y = partial_channel_join(mixed_sum(rests, weights).to(dtype), mixed.to(dtype), k)
    first, others = y.split([c, y.shape[1] - c], 1)
    return first.clone(), others.clone()


def gate_gradient(grad_output: Tensor, outputs: Sequence[Tensor | None], probs: Tensor) -> Tensor:
    """Gradient of the gate logits, ProxylessNAS (arXiv 1812.00332) eq. 4 in closed form.

    ``G_j = <grad_output, outputs[j]>`` and ``dalpha_i = p_i (G_i - sum_j p_j G_j)``. An output that
    is None is zero (the Zero candidate).

    Returns:
        ``(K,)`` in the dtype of ``probs``.
    """
    given = [o for o in outputs if o is not None]
    acc = accumulate_dtype(result_dtype([grad_output, *given]))
    g = grad_output.to(acc)
    dots = [probs.new_zeros((), dtype=acc) if o is None else (g * o.to(acc)).sum() for o in outputs]
    big_g, p = torch.stack(dots), probs.to(acc)
    return (p * (big_g - (p * big_g).sum())).to(probs.dtype)


def depthwise_group(
    x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], stride: int, relu: bool
) -> list[Tensor]:
    """Depthwise convolutions of one source: the first steps of DARTS' ``SepConv`` and ``DilConv``.

    Args:
        x: ``(N, C, H, W)``.
        weights: a ``(C, 1, k, k)`` for each convolution, k odd.
        dilations: one for each convolution.
        stride: of all of them.
        relu: whether they read ``relu(x)`` or ``x``.

    Returns:
        For each weight ``(N, C, ceil(H / stride), ceil(W / stride))``: ``x`` is padded by
        ``dilation * (k // 2)``.
    """
    acc = accumulate_dtype(x.dtype)
    source = (F.relu(x) if relu else x).to(acc)
    return [
        F.conv2d(source, w.to(acc), None, stride, d * (w.shape[-1] // 2), d, groups=x.shape[1]).to(
            x.dtype
        )
        for w, d in zip(weights, dilations, strict=True)
    ]


def pool_pair(x: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Maximum and average over windows of 3x3, padding 1: two candidates of DARTS.

    Args:
        x: ``(N, C, H, W)``.
        stride: of both.

    Returns:
        Two tensors ``(N, C, H', W')``; averages are over the pixels inside the image.
    """
    wide = x.to(accumulate_dtype(x.dtype))
    top = F.max_pool2d(wide, 3, stride, 1)
    mean = F.avg_pool2d(wide, 3, stride, 1, count_include_pad=False)
    return top.to(x.dtype), mean.to(x.dtype)


def relu_pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """ReLU and a 1x1 convolution: how DARTS' cells bring their inputs to their width.

    Args:
        x: ``(N, C, H, W)``.
        weight: ``(C', C, 1, 1)``.

    Returns:
        ``(N, C', H, W)``.
    """
    acc = accumulate_dtype(x.dtype)
    return F.conv2d(F.relu(x).to(acc), weight.to(acc)).to(x.dtype)


def batch_norm_depthwise(
    x: Tensor,
    kind: int,
    eps: float,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    stride: int,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """BatchNorm, ReLU and depthwise convolutions: the middle of DARTS' ``SepConv``.

    Args:
        x: ``(N, C, H, W)``.
        kind: ``BATCH`` or ``RUNNING``, whose statistics are used.
        eps: of the norm, as ``gamma``, ``beta`` and the running statistics, which may be None.
        gamma: ``(C,)`` as the others.
        beta: see ``gamma``.
        running_mean: see ``gamma``.
        running_var: see ``gamma``.
        weights: as in :func:`depthwise_group`, also what follows.
        dilations: one for each weight.
        stride: of all of them.

    Returns:
        The outputs of :func:`depthwise_group`, and the mean and biased variance that were used.
    """
    acc = accumulate_dtype(x.dtype)
    if kind == BATCH:
        mean, var = statistics(x)
    else:
        assert running_mean is not None and running_var is not None
        mean, var = running_mean.to(acc, copy=True), running_var.to(acc, copy=True)
    h = normalise(x.to(acc), mean, var, eps, gamma, beta)
    ys = depthwise_group(h, weights, dilations, stride, True)
    return [y.to(x.dtype) for y in ys], mean, var


def separable_group(
    x: Tensor,
    kind: int,
    eps: float,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    dilations: Sequence[int],
    stride: int,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """ReLU, depthwise and pointwise convolutions: a half of ``SepConv``, or ``DilConv``.

    Args:
        x: ``(N, C, H, W)``.
        kind: of the norm before the ReLU; ``PLAIN`` for none.
        eps: see :func:`batch_norm_depthwise`, also for the arguments up to ``running_var``.
        gamma: see ``eps``.
        beta: see ``eps``.
        running_mean: see ``eps``.
        running_var: see ``eps``.
        depthwise: a ``(C, 1, k, k)`` for each convolution, k odd.
        pointwise: a ``(C, C, 1, 1)`` for each.
        dilations: one for each.
        stride: of all depthwise convolutions.

    Returns:
        For each ``(N, C, ceil(H / stride), ceil(W / stride))``; mean and biased variance that were
        used, empty without a norm.
    """
    acc = accumulate_dtype(x.dtype)
    if kind == PLAIN:
        mean = var = x.new_empty(0, dtype=acc)
        hs = depthwise_group(x.to(acc), depthwise, dilations, stride, True)
    else:
        hs, mean, var = batch_norm_depthwise(
            x.to(acc), kind, eps, gamma, beta, running_mean, running_var, depthwise, dilations,
            stride,
        )  # fmt: skip
    ys = [F.conv2d(h, p.to(acc)).to(x.dtype) for h, p in zip(hs, pointwise, strict=True)]
    return ys, mean, var
