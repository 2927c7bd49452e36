# SPDX-License-Identifier: Apache-2.0
"""The best network under a limit: one choice on each edge, as probable as can be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fastnas.spaces.base import CellSpec

__all__ = ["cheapest", "choose_within", "is_chain", "within_budget"]

_RESOLUTION = 20_000
"""Steps into which what may be spent is divided; costs are rounded up to whole steps."""


def is_chain(specs: Mapping[str, CellSpec]) -> bool:
    """Whether a derived network has every edge, so that its cost is the sum of its choices."""
    return all(set(spec.inputs_per_node) == {1} for spec in specs.values())


def cheapest(values: Mapping[str, Tensor], specs: Mapping[str, CellSpec]) -> float:
    """What the cheapest choices cost together, without what is fixed."""
    return sum(min(row) for row in _rows(values, specs))


def within_budget(
    scores: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    specs: Mapping[str, CellSpec],
    budget: float,
) -> dict[str, Tensor]:
    """Scores of which only one candidate an edge is left: the best choice within a budget.

    The sum of the logarithms of the probabilities is largest. Where an edge may be skipped, all its
    other candidates together stand against the skip, and then the best of them is worth as much as
    they are together: a block is not lost because six candidates share what speaks for it.

    Args:
        scores: by kind ``[E, K]``, probabilities.
        values: by kind ``[E, K]``, what each candidate costs.
        specs: the choices, a chain (:func:`is_chain`).
        budget: what the choices may cost together.

    Raises:
        ValueError: nothing costs so little.
    """
    zeros = [zero for spec in specs.values() for zero in spec.zeros]
    rows = zip(_rows(scores, specs), zeros, strict=True)
    gains = [_gains(row, zero) for row, zero in rows]
    chosen = iter(choose_within(gains, _rows(values, specs), budget))
    kept = {}
    for kind, table in scores.items():
        kept[kind] = torch.zeros_like(table)
        for row in kept[kind]:
            row[next(chosen)] = 1.0
    return kept


def _gains(row: Sequence[float], zero: int | None) -> list[float]:
    """What each candidate of an edge is worth; ``zero`` is the one that skips it."""
    log_p = [math.log(max(p, 1e-300)) for p in row]
    if zero is None or len(row) == 1:
        return log_p
    others = sum(p for k, p in enumerate(row) if k != zero)
    best = max(p for k, p in enumerate(log_p) if k != zero)
    together = math.log(max(others, 1e-300)) - best
    return [p if k == zero else p + together for k, p in enumerate(log_p)]


def choose_within(
    gains: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float
) -> list[int]:
    """Choose one of each row so that the gains' sum is largest and the costs' within a budget.

    The multiple-choice knapsack, by dynamic programming over the budget in 20,000 steps. Costs are
    rounded up, so the budget is kept; a choice within one step a row of it may be missed.

    Args:
        gains: for each row what its members bring.
        costs: the same for what they cost, at least 0.
        budget: what may be spent.

    Raises:
        ValueError: nothing costs so little.
    """
    least = [min(range(len(row)), key=row.__getitem__) for row in costs]
    lowest = sum(row[k] for row, k in zip(costs, least, strict=True))
    if lowest > budget:
        raise ValueError(f"budget: expected at least {lowest:g}, but got {budget:g}")
    if budget <= 0:
        return least
    step = budget / _RESOLUTION
    best = np.zeros(_RESOLUTION + 1)
    taken = []
    for row_gains, row_costs in zip(gains, costs, strict=True):
        options = np.full((len(row_gains), _RESOLUTION + 1), -np.inf)
        for option, gain, cost in zip(options, row_gains, row_costs, strict=True):
            steps = math.ceil(cost / step - 1e-9)
            if steps <= _RESOLUTION:
                option[steps:] = best[: _RESOLUTION + 1 - steps] + gain
        taken.append(options.argmax(axis=0))
        best = options.max(axis=0)
    if best[-1] == -np.inf:  # the cheapest fits, but not in whole steps
        return least
    chosen, left = [], _RESOLUTION
    for row_costs, picks in zip(reversed(costs), reversed(taken), strict=True):
        k = int(picks[left])
        chosen.append(k)
        left -= math.ceil(row_costs[k] / step - 1e-9)
    return chosen[::-1]


def _rows(tables: Mapping[str, Tensor], specs: Mapping[str, CellSpec]) -> list[list[float]]:
    """Rows of all kinds, each with the candidates its edge has."""
    return [
        row[:count]
        for kind, spec in specs.items()
        for row, count in zip(tables[kind].tolist(), spec.candidates, strict=True)
    ]
