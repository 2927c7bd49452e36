# SPDX-License-Identifier: Apache-2.0
"""How many edges a search is to keep: the target configuration of a cell."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from fastnas.spaces.base import CellSpec

__all__ = ["EdgeGroup", "EdgeTarget"]


@dataclass(frozen=True)
class EdgeGroup:
    """Edges that compete with each other, and how many of them stay.

    Attributes:
        rows: the edges, as numbered in the cell.
        keep: m, how many stay.
    """

    rows: slice
    keep: int

    @property
    def count(self) -> int:
        """n, the number of edges."""
        return self.rows.stop - self.rows.start

    @property
    def free(self) -> bool:
        """Whether there is anything to decide."""
        return self.keep < self.count


@dataclass(frozen=True)
class EdgeTarget:
    """Edges to keep: so many at each node, or so many in the cell wherever they are.

    Attributes:
        per_node: edges of each node; of one number, the same for all nodes, or all that a node
            has.
        total: edges of the cell, None where ``per_node`` holds.
    """

    per_node: tuple[int, ...] = (2,)
    total: int | None = None

    @classmethod
    def parse(cls, text: str) -> EdgeTarget:
        """Read ``2`` (every node keeps two), ``1,2,2,3`` (node by node) or ``total:8``.

        Raises:
            ValueError: anything else, or a number that is not positive.
        """
        found = re.fullmatch(r"(total:)?(\d{1,4}(?:,\d{1,4})*)", text.replace(" ", ""), re.ASCII)
        numbers = tuple(map(int, found[2].split(","))) if found else ()
        if not found or min(numbers) < 1 or (found[1] and len(numbers) > 1):
            raise ValueError(
                "keep: expected the edges of every node (2), of each node (1,2,2,3) or of the cell "
                f"(total:8), at least one a node, but got {text!r}"
            )
        return cls((), numbers[0]) if found[1] else cls(numbers)

    def groups(self, spec: CellSpec) -> tuple[EdgeGroup, ...]:
        """The groups of edges in a cell: its nodes, or with a total the whole cell.

        Raises:
            ValueError: the cell cannot meet the target.
        """
        inputs, first = spec.inputs_per_node, spec.inputs_per_node[0]
        if self.total is not None:
            if not len(inputs) <= self.total <= spec.edges:
                raise ValueError(
                    f"keep: expected a total of {len(inputs)} (one a node) to {spec.edges} (all "
                    f"edges), but got {self.total}"
                )
            return (EdgeGroup(slice(0, spec.edges), self.total),)
        keep = self.per_node
        if len(keep) == 1 and keep[0] <= max(inputs):
            keep = tuple(min(keep[0], most) for most in inputs)
        elif len(keep) == 1:
            keep *= len(inputs)
        if len(keep) != len(inputs):
            raise ValueError(
                f"keep: expected one number or {len(inputs)}, one for each node, "
                f"but got {len(keep)}"
            )
        for node, (most, count) in enumerate(zip(inputs, keep, strict=True), first):
            if count > most:
                raise ValueError(
                    f"keep: expected at most {most} at node {node}, which has no more edges, "
                    f"but got {count}"
                )
        return tuple(map(EdgeGroup, spec.node_slices, keep))

    def choose(self, strength: Tensor, spec: CellSpec) -> Tensor:
        """The edges that stay, exactly as many as the target says and at least one at each node.

        Args:
            strength: ``[E]``; the strongest edges stay, of equals the one of the lower number.
            spec: the cell.

        Returns:
            ``[E]``, bool, on the CPU.
        """
        values = strength.detach().tolist()
        kept: set[int] = set()

        def best(rows: range) -> list[int]:
            return sorted(rows, key=lambda e: -values[e])

        if self.total is not None:
            # A node without edges would have no value, so every node's best one goes first.
            kept.update(best(range(rows.start, rows.stop))[0] for rows in spec.node_slices)
        for group in self.groups(spec):
            for edge in best(range(group.rows.start, group.rows.stop)):
                if len(kept & set(range(group.rows.start, group.rows.stop))) < group.keep:
                    kept.add(edge)
        return torch.tensor([edge in kept for edge in range(spec.edges)])
