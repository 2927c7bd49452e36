# SPDX-License-Identifier: Apache-2.0
"""Which cells of a supernet are Engine-cells (EnTranNAS, see ``fastnas.methods.entrannas``)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

__all__ = ["EngineCells", "find_engine_cells"]

EngineCells = Sequence[int] | Literal["last", "all"]
"""Numbers of cells; ``last`` is the last cell of each kind."""


def find_engine_cells(
    engine_cells: EngineCells, kinds: Mapping[str, Collection[int]]
) -> tuple[int, ...]:
    """The numbers of the Engine-cells, ascending.

    Args:
        engine_cells: what was asked for.
        kinds: for each kind of cell the numbers of its cells.

    Raises:
        ValueError: cells that do not exist, or none of a kind.
    """
    layers = sum(map(len, kinds.values()))
    if engine_cells == "all":
        return tuple(range(layers))
    if engine_cells == "last":
        return tuple(sorted(map(max, kinds.values())))
    numbers = tuple(engine_cells)
    if any(isinstance(n, bool) or not isinstance(n, int) for n in numbers):
        raise ValueError(f"engine_cells: wanted numbers of cells, got {engine_cells!r}")
    if len(set(numbers)) != len(numbers) or not all(0 <= n < layers for n in numbers):
        raise ValueError(
            f"engine_cells: wanted different numbers from 0 to {layers - 1}, got {engine_cells}"
        )
    for kind, cells in kinds.items():
        if not set(numbers) & set(cells):
            raise ValueError(
                f"engine_cells: wanted a {kind} cell among them "
                f"({', '.join(map(str, sorted(cells)))}), or nothing would be learnt of it, "
                f"got {engine_cells}"
            )
    return tuple(sorted(numbers))
