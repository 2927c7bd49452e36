# SPDX-License-Identifier: Apache-2.0
"""The nodes of a cell from some of its connections: only these candidates are executed.

A node is the sum over its connections (edge e, candidate k) of ``w_ek o_ek(x)``, with weights or
without. Edges that leave the same state may share their candidates, as in EnTranNAS: then
``o_ek`` is computed once, however many nodes read it.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        op_weights: ``[E, K]``, of which those of the connections are used; None for ones.
        memory: as for ``fastnas.nn.cell.run_nodes``.

    Returns:
        ``states`` and the nodes after them.
    """
    states, inputs = list(states), len(states)
    starts = node_starts(inputs, len(edges))
    routes = {id(edge): edge._routes() for edge in edges}
    again = Recompute() if memory == "low" and Recompute.is_possible() else None
    run, mix = (call, call) if again is None else (again.run, again.mix)
    arrivals: list[list[_Feature]] = [[] for _ in starts]

    def leave(source: int) -> None:
        nodes = range(max(source - inputs + 1, 0), len(starts))
        wanted: list[list[Route]] = []
        for node in nodes:
            edge = starts[node] + source
            wanted.append([routes[id(edges[edge])][k] for k in connections[edge]])
        distinct = list({id(route): route for row in wanted for route in row}.values())
        if not distinct:
            return
        recipes = [route.recipe for route in distinct]
        (outputs,) = evaluate_source(states[source], [recipes], run)
        found = {id(r): _Feature(x, r.norm) for r, x in zip(distinct, outputs, strict=True)}
        for node, row in zip(nodes, wanted, strict=True):
            for route in row:
                feature = found[id(route)]
                arrivals[node].append(feature)
                found[id(route)] = _Feature(feature.x, _silent(feature.norm))

    for source in range(inputs):
        leave(source)
    for node, start in enumerate(starts):
        # Dropped here, so that nothing of it outlives its last use.
        arrived, arrivals[node] = arrivals[node], []
        xs, norms = [feature.x for feature in arrived], [feature.norm for feature in arrived]
        if op_weights is None:
            # Made where they are used: numbers from the host would have to be waited for.
            weights = torch.ones(len(xs), device=xs[0].device)
        else:
            rows = op_weights[start : start + inputs + node]
            width = rows.shape[1]
            chosen = enumerate(connections[start : start + inputs + node])
            used = [e * width + k for e, ks in chosen for k in ks]
            weights = select_weights(rows.reshape(-1), used)  # type: ignore[assignment]  # of a tensor it is one
        states.append(mix(ops.mixed_batch_norm, xs, weights, norms))
        if node + 1 < len(starts):
            leave(inputs + node)
    return states


def _silent(norm: Any) -> Any:
    """The same normalisation, without a trace in the running statistics."""
    if norm is None or not norm.training or norm.running_mean is None:
        return norm
    return BatchStatistics(norm.eps, norm.weight, norm.bias)
