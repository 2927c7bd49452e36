# SPDX-License-Identifier: Apache-2.0
"""Which connections of a cell are the strongest: the two hand-made rules of derivation.

A connection is a candidate on an edge. ``none`` never competes. Of equals the one of the lower
source, then of the lower candidate, is the stronger. Scores are plain numbers here, on the host.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastnas.spaces.base import CellSpec, Connections

__all__ = ["best_candidates", "strongest_edges", "strongest_pairs"]

Rows = Sequence[Sequence[float]]


def best_candidates(scores: Rows, spec: CellSpec) -> list[int]:
    """For each edge its best candidate."""
    columns = _columns(spec)
    # max() and sorted() keep the first of equals, which is the rule for ties.
    return [max(columns, key=row.__getitem__) for row in scores]


def strongest_edges(scores: Rows, spec: CellSpec, keep: int = 2) -> Connections:
    """At each node the ``keep`` edges with the best candidate, and that one on each (DARTS).

    Args:
        scores: ``[E][K]``.
        spec: the cell.
        keep: edges of a node; all where it has no more.
    """
    best = best_candidates(scores, spec)
    found: list[tuple[int, ...]] = [()] * spec.edges
    for rows in spec.node_slices:
        edges = sorted(range(rows.start, rows.stop), key=lambda e: -scores[e][best[e]])
        for edge in edges[:keep]:
            found[edge] = (best[edge],)
    return tuple(found)


def strongest_pairs(scores: Rows, spec: CellSpec, keep: int = 2) -> Connections:
    """At each node the ``keep`` best of all its connections, which may stand on one edge."""
    columns, found = _columns(spec), [[] for _ in range(spec.edges)]  # type: ignore[var-annotated]
    for rows in spec.node_slices:
        pairs = [(e, k) for e in range(rows.start, rows.stop) for k in columns]
        for edge, k in sorted(pairs, key=lambda pair: -scores[pair[0]][pair[1]])[:keep]:
            found[edge].append(k)
    return tuple(tuple(sorted(ks)) for ks in found)


def _columns(spec: CellSpec) -> list[int]:
    return [k for k, name in enumerate(spec.primitives) if name != "none"]
