# SPDX-License-Identifier: Apache-2.0
"""From scores to an architecture of the MBConv space."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastnas.spaces.base import CellSpec, CellWeights
from fastnas.spaces.mbconv.genotype import Genotype
from fastnas.spaces.mbconv.supernet import KIND, ChainSpec

__all__ = ["derive", "one_hot"]


def derive(scores: Mapping[str, Tensor], specs: Mapping[str, CellSpec]) -> Genotype:
    """The candidate with the highest score in every block.

    Args:
        scores: under ``block``, ``[B, K]``; columns that a block does not have are not looked at.
        specs: ``supernet.cell_specs``.

    Raises:
        TypeError: the specs are those of another space.
        ValueError: scores of another shape.
    """
    spec = _chain(specs)
    table = scores[KIND]
    wanted = (spec.edges, len(spec.primitives))
    if tuple(table.shape) != wanted:
        raise ValueError(f"scores[{KIND!r}]: shape {tuple(table.shape)}, wanted {wanted}")
    rows = zip(table.tolist(), spec.candidates, strict=True)
    chosen = [max(range(count), key=row.__getitem__) for row, count in rows]
    return Genotype.build(spec.layout, [spec.primitives[k] for k in chosen])


def one_hot(genotype: Genotype, specs: Mapping[str, CellSpec]) -> dict[str, CellWeights]:
    """The weights of the supernet that is pruned to a genotype.

    Args:
        genotype: an architecture of the supernet's layout.
        specs: ``supernet.cell_specs``.

    Returns:
        Under ``block`` ``ops`` ``[B, K]``, float32 on the CPU: 1 for the candidate of each block.

    Raises:
        TypeError: the specs are those of another space.
        ValueError: an architecture of another layout.
    """
    spec = _chain(specs)
    try:
        fits = Genotype.build(spec.layout, genotype.ops) == genotype
    except ValueError:  # blocks that no such supernet has
        fits = False
    if not fits:
        widest = Genotype.build(spec.layout, [place.candidates[0] for place in spec.layout.places])
        raise ValueError(
            f"one_hot: expected an architecture of the supernet, like {widest}, but got {genotype}"
        )
    ops = torch.zeros(spec.edges, len(spec.primitives))
    for row, op in zip(ops, genotype.ops, strict=True):
        row[spec.primitives.index(op)] = 1
    return {KIND: CellWeights(ops)}


def _chain(specs: Mapping[str, CellSpec]) -> ChainSpec:
    spec = specs.get(KIND)
    if not isinstance(spec, ChainSpec):
        raise TypeError(f"specs[{KIND!r}]: wanted a ChainSpec, got {type(spec).__name__}")
    return spec
