# SPDX-License-Identifier: Apache-2.0
"""The nodes of a cell from some of its connections: only these candidates are executed.

A node is the sum over its connections (edge e, candidate k) of ``w_ek o_ek(x)``, with weights or
without. Edges that leave the same state may share their candidates, as in EnTranNAS: then
``o_ek`` is computed once, however many nodes read it, and with weights its BatchNorm as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnas import ops
from fastnas.nn.batch_norm import Route
from fastnas.nn.cell import node_starts
from fastnas.nn.mixed_op import MixedOp, select_weights
from fastnas.nn.recompute import Memory, Recompute
from fastnas.nn.repeat import BatchStatistics
from fastnas.nn.source import call, evaluate_source

__all__ = ["run_connections"]


class _Feature(NamedTuple):
    """What a connection brings to its node."""

    x: Tensor
    norm: Any


def run_connections(
    states: Sequence[Tensor],
    edges: Sequence[MixedOp],
    connections: Sequence[Sequence[int]],
    op_weights: Tensor | None = None,
    memory: Memory = "default",
) -> list[Tensor]:
    """Compute the nodes of a cell whose every node has an edge from every state before it.

    The mixed ops only hold the candidates: hooks on these fire, hooks on the mixed ops do not. The
    running statistics of a shared BatchNorm move once.

    Args:
        states: the cell's inputs, ``(N, C, H, W)``.
        edges: the mixed op of each edge, node by node and within a node by source; none of their
            candidates returns zeros. Edges that leave the same state may have the same one.
        connections: for each edge the candidates that are executed, ascending; at least one at
            each node.
        op_weights: ``[E, K]``, 0 for all other connections; None for ones.
        memory: as for ``fastnas.nn.cell.run_nodes``.

    Returns:
        ``states`` and the nodes after them.
    """
    states, inputs = list(states), len(states)
    starts = node_starts(inputs, len(edges))
    routes = {id(edge): edge._routes() for edge in edges}
    again = Recompute() if memory == "low" and Recompute.is_possible() else None
    run: Any = call if again is None else again.run
    mix: Any = call if again is None else again.mix
    arrivals: list[list[_Feature]] = [[] for _ in starts]
    sums: list[list[Tensor]] = [[] for _ in starts]
    joined = op_weights is not None and len(routes) < len(edges)

    def leave(source: int) -> None:
        nodes = range(max(source - inputs + 1, 0), len(starts))
        live = [(n, e) for n in nodes if connections[e := starts[n] + source]]
        rows = [[routes[id(edges[e])][k] for k in connections[e]] for _, e in live]
        outputs = _evaluate(states[source], rows, run)
        if joined and live:
            assert op_weights is not None
            weights = torch.stack([op_weights[e] for _, e in live])
            held = routes[id(edges[live[0][1]])]
            xs, norms = [outputs.get(id(r)) for r in held], [r.norm for r in held]
            for (node, _), y in zip(
                live, mix(ops.multi_target_sum, xs, weights, norms), strict=True
            ):
                sums[node].append(y)
            return
        seen: set[int] = set()
        for (node, _), row in zip(live, rows, strict=True):
            for route in row:
                norm = _silent(route.norm) if id(route) in seen else route.norm
                arrivals[node].append(_Feature(outputs[id(route)], norm))
                seen.add(id(route))

    for source in range(inputs):
        leave(source)
    for node, start in enumerate(starts):
        # Dropped here, so that nothing of it outlives its last use.
        arrived, arrivals[node] = arrivals[node], []
        parts, sums[node] = sums[node], []
        if parts:
            states.append(reduce(add, parts))
        else:
            rows = slice(start, start + inputs + node)
            row = None if op_weights is None else _chosen(op_weights[rows], connections[rows])
            states.append(_mix(arrived, row, mix))
        if node + 1 < len(starts):
            leave(inputs + node)
    return states


def _evaluate(x: Tensor, rows: Sequence[Sequence[Route]], run: Any) -> dict[int, Tensor]:
    """What the candidates of all edges that leave ``x`` return, each run once, by their routes."""
    distinct = {id(route): route for row in rows for route in row}
    (outputs,) = evaluate_source(x, [[route.recipe for route in distinct.values()]], run)
    return dict(zip(distinct, outputs, strict=True))


def _chosen(weights: Tensor, connections: Sequence[Sequence[int]]) -> Tensor:
    """The weights of the connections of a node, ``weights`` being those of its edges."""
    width = weights.shape[1]
    used = [edge * width + k for edge, ks in enumerate(connections) for k in ks]
    return select_weights(weights.reshape(-1), used)  # type: ignore[return-value]  # of a tensor


def _mix(arrived: Sequence[_Feature], weights: Tensor | None, mix: Any) -> Tensor:
    """The sum over all that arrives at a node."""
    xs, norms = [feature.x for feature in arrived], [feature.norm for feature in arrived]
    if weights is None:
        # Made where they are used: numbers from the host would have to be waited for.
        weights = torch.ones(len(xs), device=xs[0].device)
    return mix(ops.mixed_batch_norm, xs, weights, norms)


def _silent(norm: Any) -> Any:
    """The same normalisation, without a trace in the running statistics."""
    if norm is None or not norm.training or norm.running_mean is None:
        return norm
    return BatchStatistics(norm.eps, norm.weight, norm.bias)
