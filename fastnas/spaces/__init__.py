# SPDX-License-Identifier: Apache-2.0
"""Search spaces: what is searched. A new space is a package beside ``darts`` and a row here."""

from __future__ import annotations

from fastnas.spaces import darts, mbconv, nasbench201
from fastnas.spaces.base import (
    CellGates,
    CellRoles,
    CellSelection,
    CellSpec,
    CellWeights,
    Connections,
    Space,
    SpaceOptions,
)
from fastnas.spaces.blocks import Block, BlockPlan, BlockRules, MixedEdge, NetworkShape
from fastnas.spaces.counting import (
    OperationCounts,
    count_macs,
    count_operations,
    count_parameters,
)

__all__ = [
    "SPACES",
    "Block",
    "BlockPlan",
    "BlockRules",
    "CellGates",
    "CellRoles",
    "CellSelection",
    "CellSpec",
    "CellWeights",
    "Connections",
    "MixedEdge",
    "NetworkShape",
    "OperationCounts",
    "Space",
    "SpaceOptions",
    "count_macs",
    "count_operations",
    "count_parameters",
    "get_space",
]

SPACES: dict[str, Space] = {
    space.name: space for space in (darts.SPACE, mbconv.SPACE, nasbench201.SPACE)
}
"""All spaces by name."""


def get_space(name: str) -> Space:
    """Return the space called ``name``.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in SPACES:
        raise ValueError(f"space: unknown name {name!r}, known are {', '.join(SPACES)}")
    return SPACES[name]
