# SPDX-License-Identifier: Apache-2.0
"""From scores to a genotype: the discretization rule of DARTS (ICLR 2019, section 2.4)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fastnas.spaces.base import CellSpec, CellWeights, Connections
from fastnas.spaces.connections import best_candidates, strongest_edges
from fastnas.spaces.darts.genotype import Genotype
from fastnas.spaces.darts.reading import Pair

__all__ = ["EDGES_PER_NODE", "derive", "one_hot"]

EDGES_PER_NODE = 2
"""Edges that every node keeps where nothing else is said."""

_KINDS = ("normal", "reduce")


def derive(
    scores: Mapping[str, Tensor],
    specs: Mapping[str, CellSpec],
    edges: Mapping[str, Tensor] | None = None,
) -> Genotype:
    """Keep, at each node, the two edges with the best candidate, and that candidate on each.

    ``none`` competes neither for an edge nor on it. Ties go to the lower source and the lower
    candidate index. A node's pairs come in order of decreasing score.

    Args:
        scores: for the kinds ``normal`` and ``reduce``, ``[E, K]``: softmax(alpha) in DARTS,
            softmax(alpha) times the edge's softmax(beta) in PC-DARTS. Any device and dtype.
        specs: the kinds' cells, as ``Supernet.cell_specs`` gives them.
        edges: for each kind ``[E]``, bool: the edges that stay, at least one at each node, instead
            of the two best. Or ``[E, K]``, bool: the connections that stay, any number of them on
            an edge, instead of the best candidate of each.

    Raises:
        ValueError: a kind is missing, a shape differs from its spec, a score is NaN, or a node is
            to keep no edge.
    """
    cells = {}
    for kind in _KINDS:
        for name, mapping in (("scores", scores), ("specs", specs), ("edges", edges)):
            if mapping is not None and kind not in mapping:
                raise ValueError(f"{name}: the kind {kind!r} is missing, got {sorted(mapping)}")
        stay = None if edges is None else edges[kind]
        cells[kind] = _derive_cell(kind, scores[kind], specs[kind], stay)
    concat = {kind: tuple(range(2, 2 + len(specs[kind].inputs_per_node))) for kind in cells}
    return Genotype.from_nodes(cells["normal"], concat["normal"], cells["reduce"], concat["reduce"])


def one_hot(genotype: Genotype, specs: Mapping[str, CellSpec]) -> dict[str, CellWeights]:
    """The weights of the supernet that is pruned to a genotype.

    Args:
        genotype: the architecture. A pair that occurs twice in a node counts twice.
        specs: the kinds' cells, as ``Supernet.cell_specs`` gives them.

    Returns:
        For each kind ``ops`` ``[E, K]`` and ``edges`` ``[E]``, float32 on the CPU.

    Raises:
        ValueError: the cells have other nodes, or no such candidate.
    """
    weights = {}
    for kind in _KINDS:
        spec, nodes = specs[kind], genotype.nodes(kind)
        if len(nodes) != len(spec.inputs_per_node):
            raise ValueError(
                f"one_hot: expected a {kind} cell of {len(spec.inputs_per_node)} nodes, "
                f"but got {len(nodes)}"
            )
        ops = torch.zeros(spec.edges, len(spec.primitives))
        for rows, node in zip(spec.node_slices, nodes, strict=True):
            for op, source in node:
                if op not in spec.primitives:
                    raise ValueError(
                        f"one_hot: expected the candidates {', '.join(spec.primitives)}, "
                        f"but got {op} in the {kind} cell"
                    )
                ops[rows.start + source, spec.primitives.index(op)] += 1
        weights[kind] = CellWeights(ops, (ops.sum(1) > 0).float())
    return weights


def _derive_cell(
    kind: str, scores: Tensor, spec: CellSpec, stay: Tensor | None
) -> list[tuple[Pair, ...]]:
    wanted = (spec.edges, len(spec.primitives))
    if tuple(scores.shape) != wanted:
        raise ValueError(f"scores[{kind!r}]: shape {tuple(scores.shape)}, wanted {wanted}")
    rows = scores.detach().tolist()
    if any(math.isnan(score) for row in rows for score in row):
        raise ValueError(f"scores[{kind!r}]: contains NaN")
    if stay is None:
        kept = strongest_edges(rows, spec, EDGES_PER_NODE)
    else:
        kept = _connections_that_stay(kind, stay, rows, spec)
    nodes = []
    for edges in spec.node_slices:
        pairs = [(j, k) for j, ks in enumerate(kept[edges]) for k in ks]
        pairs.sort(key=lambda pair: -rows[edges.start + pair[0]][pair[1]])
        nodes.append(tuple((spec.primitives[k], j) for j, k in pairs))
    return nodes


def _connections_that_stay(
    kind: str, stay: Tensor, rows: list[list[float]], spec: CellSpec
) -> Connections:
    shapes = (spec.edges,), (spec.edges, len(spec.primitives))
    if tuple(stay.shape) not in shapes:
        raise ValueError(
            f"edges[{kind!r}]: shape {tuple(stay.shape)}, wanted {shapes[0]} or {shapes[1]}"
        )
    flags = stay.tolist()
    if stay.dim() == 1:
        best = best_candidates(rows, spec)
        kept: Connections = tuple((k,) * bool(flag) for k, flag in zip(best, flags, strict=True))
    else:
        kept = tuple(tuple(k for k, flag in enumerate(row) if flag) for row in flags)
    if not all(any(kept[edges]) for edges in spec.node_slices):
        raise ValueError(f"edges[{kind!r}]: wanted at least one edge at each node, got {flags}")
    return kept
