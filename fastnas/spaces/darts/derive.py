# SPDX-License-Identifier: Apache-2.0
"""From scores to a genotype: the discretization rule of DARTS (ICLR 2019, section 2.4)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from fastnas.spaces.base import CellSpec
from fastnas.spaces.darts.genotype import Genotype, Pair

__all__ = ["EDGES_PER_NODE", "derive"]

EDGES_PER_NODE = 2
"""Edges that every node keeps."""


def derive(scores: Mapping[str, Tensor], specs: Mapping[str, CellSpec]) -> Genotype:
    """Keep, at each node, the two edges with the best candidate, and that candidate on each.

    ``none`` competes neither for an edge nor on it. Ties go to the lower source and the lower
    candidate index. A node's pairs come in order of decreasing score.

    Args:
        scores: for the kinds ``normal`` and ``reduce``, ``[E, K]``: softmax(alpha) in DARTS,
            softmax(alpha) times the edge's softmax(beta) in PC-DARTS. Any device and dtype.
        specs: the kinds' cells, as ``Supernet.cell_specs`` gives them.

    Raises:
        ValueError: a kind is missing, a shape differs from its spec, or a score is NaN.
    """
    cells = {}
    for kind in ("normal", "reduce"):
        for name, mapping in (("scores", scores), ("specs", specs)):
            if kind not in mapping:
                raise ValueError(f"{name}: the kind {kind!r} is missing, got {sorted(mapping)}")
        cells[kind] = _derive_cell(kind, scores[kind], specs[kind])
    concat = {kind: tuple(range(2, 2 + len(specs[kind].inputs_per_node))) for kind in cells}
    return Genotype(cells["normal"], concat["normal"], cells["reduce"], concat["reduce"])


def _derive_cell(kind: str, scores: Tensor, spec: CellSpec) -> tuple[Pair, ...]:
    wanted = (spec.edges, len(spec.primitives))
    if tuple(scores.shape) != wanted:
        raise ValueError(f"scores[{kind!r}]: shape {tuple(scores.shape)}, wanted {wanted}")
    rows = scores.detach().tolist()
    if any(math.isnan(score) for row in rows for score in row):
        raise ValueError(f"scores[{kind!r}]: contains NaN")
    columns = [k for k, name in enumerate(spec.primitives) if name != "none"]
    pairs: list[Pair] = []
    for edges in spec.node_slices:
        # max() and sorted() keep the first of equals, which is the rule for ties.
        best = [max(columns, key=row.__getitem__) for row in rows[edges]]
        strength = [row[k] for row, k in zip(rows[edges], best, strict=True)]
        kept = sorted(range(len(best)), key=lambda j: -strength[j])[:EDGES_PER_NODE]
        pairs += [(spec.primitives[best[j]], j) for j in kept]
    return tuple(pairs)
