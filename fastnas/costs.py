# SPDX-License-Identifier: Apache-2.0
"""Differentiable costs of an architecture: what its blocks take, expected under its weights.

ProxylessNAS (Cai et al., ICLR 2019), section 3.3.1: with ``p`` the weights of the candidates of an
edge and ``F`` what each costs, the edge costs ``E = sum_j p_j F_j`` and a network the sum over its
edges and fixed parts. Under a softmax ``dE/dalpha_i = p_i (F_i - E)``, which autograd finds.

The values ``F`` come from a table of measured times (``fastnas.latency``) or from counting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastnas.spaces.base import CellWeights
from fastnas.spaces.blocks import Block, BlockPlan
from fastnas.spaces.counting import count_macs, count_parameters

__all__ = ["Cost", "block_macs", "block_parameters"]

Weights = Mapping[str, "Tensor | CellWeights"]
Choices = Mapping[str, Sequence["int | None"]]


def block_macs(block: Block) -> float:
    """Multiply-accumulates of a block's convolutions and linear layers, for one image."""
    return float(count_macs(block.build(), (1, *block.input_shape)))


def block_parameters(block: Block) -> float:
    """Elements of a block's parameters."""
    return float(count_parameters(block.build()))


@dataclass(frozen=True)
class _Edges:
    """The edges of one kind.

    Attributes:
        values: ``[E, K]``, float64: what a candidate costs, at all its places together.
        kept: ``[E]``, how many edges its node keeps.
        share: ``[E]``, the part of the incoming edges that this is.
    """

    values: Tensor
    kept: Tensor
    share: Tensor


class Cost:
    """What architectures of one space cost, for networks of one shape.

    Args:
        plan: the places where choices are made, and the fixed parts.
        value: what a block costs, by its key.
        name: what is counted: ``latency``, ``macs``, ``params``.
        unit: its unit, for messages.

    Attributes:
        name, unit: as given.
        fixed: what every network costs.

    Raises:
        ValueError: the plan has rows of one kind without a choice, or places of one choice that
            differ in their number of candidates.

    Example:
        >>> from fastnas.spaces import get_space
        >>> rules = get_space("darts").blocks
        >>> cost = Cost.counted("macs", rules.plan(rules.shape()))
        >>> alphas = {kind: torch.zeros(14, 8) for kind in ("normal", "reduce")}
        >>> expected = cost.expected({kind: a.softmax(-1) for kind, a in alphas.items()})
    """

    def __init__(
        self, plan: BlockPlan, value: Callable[[str], float], *, name: str, unit: str
    ) -> None:
        self.name = name
        self.unit = unit
        costs = {key: float(value(key)) for key in plan.blocks}
        self.fixed = sum(costs[key] for key in plan.fixed)
        self._kinds = _gather(plan, costs)

    @classmethod
    def counted(cls, name: str, plan: BlockPlan) -> Cost:
        """The costs that need no measuring.

        Args:
            name: ``macs`` (multiply-accumulates of convolutions and linear layers) or ``params``.
            plan: as the space gives it.

        Raises:
            ValueError: another name.
        """
        counts: dict[str, tuple[Callable[[Block], float], str]] = {
            "macs": (block_macs, "MACs"),
            "params": (block_parameters, "parameters"),
        }
        if name not in counts:
            raise ValueError(f"cost: expected one of {', '.join(counts)}, but got {name!r}")
        count, unit = counts[name]
        return cls(plan, lambda key: count(plan.blocks[key]), name=name, unit=unit)

    @property
    def values(self) -> dict[str, Tensor]:
        """For each kind ``[E, K]``, float64, CPU: what a candidate costs, at all its places."""
        return {kind: edges.values.clone() for kind, edges in self._kinds.items()}

    def expected(self, weights: Weights) -> Tensor:
        """The expected cost of a network drawn by the weights; differentiable in them.

        A derived network of the DARTS space keeps two of the edges that enter a node. Each counts
        by the chance to be kept: as all alike, or by its factor where the weights have ``edges``
        (PC-DARTS), which sum to 1 at a node.

        Args:
            weights: by kind, ``[E, K]`` or ``CellWeights``; rows sum to 1.

        Returns:
            A scalar in the weights' dtype (float32 for half precision), on their device.

        Raises:
            ValueError: a kind is missing or unknown, or a shape differs from the space's.
        """
        self._check_kinds("weights", weights)
        total: Tensor | float = self.fixed
        for kind, edges in self._kinds.items():
            given = weights[kind]
            ops, factors = given if isinstance(given, CellWeights) else (given, None)
            if tuple(ops.shape) != tuple(edges.values.shape):
                raise ValueError(
                    f"weights[{kind!r}]: expected shape {tuple(edges.values.shape)} (edges, "
                    f"candidates), but got {tuple(ops.shape)}"
                )
            if factors is not None and tuple(factors.shape) != tuple(edges.kept.shape):
                raise ValueError(
                    f"weights[{kind!r}].edges: expected shape {tuple(edges.kept.shape)} (edges), "
                    f"but got {tuple(factors.shape)}"
                )
            if ops.dtype in (torch.float16, torch.bfloat16):
                ops = ops.float()
            by_edge = (ops * edges.values.to(ops)).sum(dim=-1)
            chance = edges.kept.to(by_edge) * (
                edges.share.to(by_edge) if factors is None else factors.to(by_edge)
            )
            total = (by_edge * chance).sum() + total
        return torch.as_tensor(total)

    def of(self, choices: Choices) -> float:
        """The cost of one architecture.

        Args:
            choices: by kind, for each edge the number of its candidate; None for an edge that the
                architecture leaves out.

        Raises:
            ValueError: a kind is missing or unknown, or a choice is not among the candidates.
        """
        self._check_kinds("choices", choices)
        total = self.fixed
        for kind, edges in self._kinds.items():
            rows, chosen = edges.values.tolist(), list(choices[kind])
            if len(chosen) != len(rows):
                raise ValueError(
                    f"choices[{kind!r}]: expected {len(rows)} edges, but got {len(chosen)}"
                )
            for number, (row, choice) in enumerate(zip(rows, chosen, strict=True)):
                if choice is None:
                    continue
                if not 0 <= choice < len(row):
                    raise ValueError(
                        f"choices[{kind!r}][{number}]: expected a candidate from 0 to "
                        f"{len(row) - 1}, but got {choice}"
                    )
                total += row[choice]
        return total

    def _check_kinds(self, name: str, given: Mapping[str, Any]) -> None:
        if set(given) != set(self._kinds):
            raise ValueError(
                f"{name}: expected the kinds {', '.join(self._kinds)}, "
                f"but got {', '.join(map(str, given)) or 'none'}"
            )


def _gather(plan: BlockPlan, costs: Mapping[str, float]) -> dict[str, _Edges]:
    """Sum over the places that share a choice."""
    rows: dict[str, dict[int, list[float]]] = {}
    nodes: dict[str, dict[int, tuple[int, int]]] = {}
    for edge in plan.edges:
        mine = [0.0 if key is None else costs[key] for key in edge.candidates]
        before = rows.setdefault(edge.kind, {}).setdefault(edge.row, [0.0] * len(mine))
        if len(before) != len(mine):
            raise ValueError(
                f"plan: {edge.kind} {edge.row} has {len(before)} candidates at one place and "
                f"{len(mine)} at another"
            )
        rows[edge.kind][edge.row] = [a + b for a, b in zip(before, mine, strict=True)]
        nodes.setdefault(edge.kind, {})[edge.row] = (edge.incoming, edge.kept)
    gathered = {}
    for kind, table in rows.items():
        if set(table) != set(range(len(table))):
            raise ValueError(f"plan: the rows of {kind} are {sorted(table)}, some are missing")
        # Edges with fewer candidates than others of their kind: what is not there costs nothing.
        width = max(map(len, table.values()))
        values = [table[row] + [0.0] * (width - len(table[row])) for row in range(len(table))]
        incoming, kept = zip(*(nodes[kind][row] for row in range(len(table))), strict=True)
        gathered[kind] = _Edges(
            torch.tensor(values, dtype=torch.float64),
            torch.tensor(kept, dtype=torch.float64),
            1 / torch.tensor(incoming, dtype=torch.float64),
        )
    return gathered
