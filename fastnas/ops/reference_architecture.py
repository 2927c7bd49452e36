# SPDX-License-Identifier: Apache-2.0
"""The ops on architecture parameters in plain PyTorch: what reference.py has of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnas.ops._dtypes import accumulate_dtype

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
