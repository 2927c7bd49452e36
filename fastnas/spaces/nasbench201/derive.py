# SPDX-License-Identifier: Apache-2.0
"""From scores to a cell of the NAS-Bench-201 space: one operation on every edge."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fastnas.spaces.base import CellSpec, CellWeights
from fastnas.spaces.nasbench201.genotype import Genotype
from fastnas.spaces.nasbench201.supernet import KIND, TopologySpec

__all__ = ["derive", "one_hot"]


def derive(
    scores: Mapping[str, Tensor],
    specs: Mapping[str, CellSpec],
    edges: Mapping[str, Tensor] | None = None,
) -> Genotype:
    """On every edge the candidate of the highest score, ``none`` among them if the spec says so.

    Ties go to the lower candidate index.

    Args:
        scores: under ``normal``, ``[E, K]``. Any device and dtype.
        specs: ``supernet.cell_specs``.
        edges: under ``normal`` ``[E]``, bool: the edges that stay. Or ``[E, K]``, bool: the
            connections that stay; of several on one edge, of which a cell of this space has no more
            than one, the best. An edge without any gets ``none``.

    Raises:
        ValueError: a kind is missing, a shape differs from its spec, or a score is NaN.
    """
    for name, mapping in (("scores", scores), ("specs", specs), ("edges", edges)):
        if mapping is not None and KIND not in mapping:
            raise ValueError(f"{name}: the kind {KIND!r} is missing, got {sorted(mapping)}")
    spec = specs[KIND]
    wanted = (spec.edges, len(spec.primitives))
    if tuple(scores[KIND].shape) != wanted:
        raise ValueError(f"scores[{KIND!r}]: shape {tuple(scores[KIND].shape)}, wanted {wanted}")
    rows = scores[KIND].detach().tolist()
    if any(math.isnan(score) for row in rows for score in row):
        raise ValueError(f"scores[{KIND!r}]: contains NaN")
    stay = torch.ones(wanted, dtype=torch.bool) if edges is None else edges[KIND].cpu()
    if tuple(stay.shape) not in (wanted, wanted[:1]):
        raise ValueError(
            f"edges[{KIND!r}]: shape {tuple(stay.shape)}, wanted {wanted[:1]} or {wanted}"
        )
    derive_none = not isinstance(spec, TopologySpec) or spec.derive_none
    left_out = None if derive_none else spec.zeros[0]
    flags = (stay if stay.dim() == 2 else stay.unsqueeze(1).expand(wanted)).tolist()
    ops = []
    for row, allowed in zip(rows, flags, strict=True):
        kept = [k for k, flag in enumerate(allowed) if flag and k != left_out]
        # max() keeps the first of equals, which is the rule for ties.
        ops.append(spec.primitives[max(kept, key=row.__getitem__)] if kept else "none")
    return Genotype.from_ops(ops)


def one_hot(genotype: Genotype, specs: Mapping[str, CellSpec]) -> dict[str, CellWeights]:
    """The weights of the supernet that is pruned to a cell.

    Args:
        genotype: the cell.
        specs: ``supernet.cell_specs``.

    Returns:
        Under ``normal`` ``ops`` ``[E, K]`` and ``edges`` ``[E]``, float32 on the CPU. An edge with
        ``none`` stays where that is a candidate, and is gone where it is not.

    Raises:
        ValueError: a cell of other nodes.
    """
    spec, names = specs[KIND], genotype.ops
    if len(names) != spec.edges:
        raise ValueError(
            f"one_hot: expected a cell of {len(spec.inputs_per_node) + 1} nodes, "
            f"but got {len(genotype.nodes) + 1}"
        )
    ops = torch.zeros(spec.edges, len(spec.primitives))
    for row, op in zip(ops, names, strict=True):
        if op in spec.primitives:
            row[spec.primitives.index(op)] = 1
    return {KIND: CellWeights(ops, (ops.sum(1) > 0).float())}
