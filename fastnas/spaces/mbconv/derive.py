# SPDX-License-Identifier: Apache-2.0
"""From scores to an architecture of the MBConv space."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fastnas.spaces.base import CellSpec
from fastnas.spaces.mbconv.genotype import Genotype
from fastnas.spaces.mbconv.supernet import KIND, ChainSpec

__all__ = ["derive"]


def derive(scores: Mapping[str, Tensor], specs: Mapping[str, CellSpec]) -> Genotype:
    """The candidate with the highest score in every block.

    Args:
        scores: under ``block``, ``[B, K]``; columns that a block does not have are not looked at.
        specs: ``supernet.cell_specs``.

    Raises:
        TypeError: the specs are those of another space.
        ValueError: scores of another shape.
    """
    spec = specs.get(KIND)
    if not isinstance(spec, ChainSpec):
        raise TypeError(f"specs[{KIND!r}]: wanted a ChainSpec, got {type(spec).__name__}")
    table = scores[KIND]
    wanted = (spec.edges, len(spec.primitives))
    if tuple(table.shape) != wanted:
        raise ValueError(f"scores[{KIND!r}]: shape {tuple(table.shape)}, wanted {wanted}")
    rows = zip(table.tolist(), spec.candidates, strict=True)
    chosen = [max(range(count), key=row.__getitem__) for row, count in rows]
    return Genotype.build(spec.layout, [spec.primitives[k] for k in chosen])
