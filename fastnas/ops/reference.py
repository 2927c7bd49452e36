# SPDX-License-Identifier: Apache-2.0
"""Every op once more in plain PyTorch: what it computes, with nothing done for speed.

The tests compare the kernels with these functions, devices without kernels run them, and second
derivatives are taken through them. They are meant to be read beside the papers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# How a candidate's output enters the sum.
PLAIN, BATCH, RUNNING = 0, 1, 2


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are taken in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def result_dtype(xs: Sequence[Tensor]) -> torch.dtype:
    """What ``sum(w * x for x in xs)`` has for 0-d weights, which promote nothing."""
    return functools.reduce(torch.promote_types, (x.dtype for x in xs))


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
    dtype = result_dtype(xs)
    acc = accumulate_dtype(dtype)
    channels = xs[0].shape[1]
    terms: list[Tensor] = []
    means: list[Tensor] = []
    variances: list[Tensor] = []
    for k, x in enumerate(xs):
        mean, var = weights.new_zeros(channels, dtype=acc), weights.new_ones(channels, dtype=acc)
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
    y = mixed_sum(terms, weights).to(dtype)
    return y, torch.stack(means), torch.stack(variances)


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


# --- path sampling

_MASK = 0xFFFFFFFF
_UNIT = 1 << 24


def philox4x32(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox-4x32 with 10 rounds (Salmon et al., SC 2011) on int64 tensors that hold 32-bit words.

    Args:
        counter: ``(..., 4)``, words in 0 .. 2^32 - 1.
        key: two words.

    Returns:
        Four random words for each counter, ``(..., 4)``.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key
    for _ in range(10):
        # The product of two 32-bit words wraps in int64, but its bits are those of the unsigned
        # product.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        high0, low0 = (product0 >> 32) & _MASK, product0 & _MASK
        high1, low1 = (product1 >> 32) & _MASK, product1 & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack([c0, c1, c2, c3], -1)


def _path_mass(logits: Tensor, counts: Tensor | None) -> Tensor:
    """Integers in proportion to ``softmax(logits)``: an edge's largest is 2^24, a live one >= 1.

    Sums and comparisons of integers are exact, so devices that agree on these agree on every draw.
    """
    edges, width = logits.shape
    x = logits.to(torch.float64)
    column = torch.arange(width, device=logits.device)
    live = ~(torch.isnan(x) | torch.isneginf(x))
    if counts is not None:
        live = live & (column < counts.unsqueeze(1))
    x = x.masked_fill(~live, -torch.inf)
    top = x.amax(1, keepdim=True) if width else x.new_zeros(edges, 1)
    relative = torch.where(x == top, torch.zeros_like(x), x - top)
    mass = torch.round(torch.exp(relative) * _UNIT).to(torch.int64).clamp_(min=1)
    return mass.masked_fill(~live, 0)


def _draw(mass: Tensor, word: Tensor) -> Tensor:
    """Index drawn in proportion to ``mass`` (E, K) by a 32-bit ``word`` (E,); -1 if all is 0."""
    cumulative = mass.cumsum(1)
    total = cumulative[:, -1:]
    # K <= 64 keeps total <= 2^30, so the product stays within 62 bits.
    threshold = (word.unsqueeze(1) * total) >> 32
    index = (cumulative <= threshold).sum(1)
    return torch.where(total.squeeze(1) > 0, index, torch.full_like(index, -1))


def sample_path_indices(
    logits: Tensor, counts: Tensor | None, seed: int, step: int, two: bool
) -> tuple[Tensor, Tensor]:
    """The draws of :func:`fastnas.ops.sample_paths`: active and inactive candidates, -1: none."""
    edges = logits.shape[0]
    counter = torch.zeros(edges, 4, dtype=torch.int64, device=logits.device)
    counter[:, 0] = torch.arange(edges, device=logits.device)
    counter[:, 2], counter[:, 3] = step & _MASK, (step >> 32) & _MASK
    words = philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))
    mass = _path_mass(logits, counts)
    first = _draw(mass, words[:, 0])
    if not two:
        return first, torch.full_like(first, -1)
    row = torch.arange(edges, device=logits.device)
    rest = mass.clone()
    rest[row, first.clamp(min=0)] = 0
    second = _draw(rest, words[:, 1])
    first_mass = mass[row, first.clamp(min=0)]
    second_mass = torch.where(second >= 0, mass[row, second.clamp(min=0)], torch.zeros_like(first))
    swap = ((words[:, 2] * (first_mass + second_mass)) >> 32) >= first_mass
    swap = swap & (second >= 0)
    return torch.where(swap, second, first), torch.where(swap, first, second)


def _softmax(x: Tensor, empty: Tensor) -> Tensor:
    """Softmax of each row, the limits for infinite entries, 0 for NaN; of ``empty`` ones anything.

    ``empty`` ``(E,)`` marks the rows without any entry above -inf.
    """
    x = x.masked_fill(torch.isnan(x), -torch.inf)
    # +inf is the limit of a growing logit: those that have it share everything.
    infinite = torch.isposinf(x)
    x = x.masked_fill(infinite.any(1, keepdim=True) & ~infinite, -torch.inf)
    x = x.masked_fill(infinite, 0.0)
    # Equal logits keep NaN out of the gradient of a row that has none.
    return torch.softmax(x.masked_fill(empty.unsqueeze(1), 0.0), 1)


def path_softmax(
    logits: Tensor, counts: Tensor | None, active: Tensor, inactive: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over all live candidates of an edge, or over its pair where two were drawn.

    Returns:
        The probabilities, and where the active and the inactive candidate are; ``(E, K)`` each.
    """
    x = logits.to(accumulate_dtype(logits.dtype))
    column = torch.arange(logits.shape[1], device=logits.device)
    if counts is not None:
        x = x.masked_fill(column >= counts.unsqueeze(1), -torch.inf)
    chosen = column == active.unsqueeze(1)
    other = column == inactive.unsqueeze(1)
    paired = (inactive >= 0).unsqueeze(1)
    kept = torch.where(paired, chosen | other, torch.ones_like(chosen))
    # An edge without live candidates chooses nothing.
    return _softmax(x.masked_fill(~kept, -torch.inf), active < 0), chosen, other


def path_probabilities(
    logits: Tensor, counts: Tensor | None, active: Tensor, inactive: Tensor
) -> Tensor:
    """Probabilities that go with sampled paths, differentiable in ``logits``.

    Returns:
        ``(E, 2)``: the softmax probability of the active candidate and 0 where nothing is inactive,
        else the probabilities of the pair, renormalised to sum to 1 (two-path mode of
        ProxylessNAS).
    """
    p, chosen, other = path_softmax(logits, counts, active, inactive)
    return torch.stack([(p * chosen).sum(1), (p * other).sum(1)], 1).to(logits.dtype)


# --- sparse connections


def sparse_connections(
    alpha: Tensor,
    beta: Tensor,
    in_degrees: Sequence[int],
    tau: float,
    node_norm: bool,
    detach_max: bool,
) -> Tensor:
    """Weights of the connections of a cell, exactly 0 below a threshold (arXiv 2101.11342).

    Args:
        alpha: ``(E, K)`` logits of all edges, those of one node behind each other.
        beta: ``(n,)``, one per node.
        in_degrees: the number of edges of each node.
        tau: temperature of the softmax.
        node_norm: whether the weights of a node sum to 1, or those of each of its live edges.
        detach_max: whether the largest probability of a node counts as a constant.

    Returns:
        ``(E, K)`` in the dtype of ``alpha``.
    """
    acc = accumulate_dtype(torch.promote_types(alpha.dtype, beta.dtype))
    dead = torch.isnan(alpha) | torch.isneginf(alpha)
    p = _softmax(alpha.to(acc) / tau, dead.all(1)).masked_fill(dead, 0.0)
    # 1 - sigmoid(beta), bounded: were it 0, nothing would be left of the node.
    gaps = torch.sigmoid(-beta.to(acc).clamp(max=60.0))
    weights = []
    for probs, gap in zip(p.split(list(in_degrees)), gaps, strict=True):
        flat = probs.flatten()
        largest = flat[flat.argmax()]  # the first of equal ones
        if detach_max:
            largest = largest.detach()
        ratio = probs / torch.where(largest > 0, largest, 1.0)
        q = F.relu(ratio - 1 + gap)
        total = q.sum() if node_norm else q.sum(1, keepdim=True)
        weights.append(q / torch.where(total == 0, 1.0, total))
    return torch.cat(weights or [p]).to(alpha.dtype)
