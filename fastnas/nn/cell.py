# SPDX-License-Identifier: Apache-2.0
"""The nodes of a cell: one run of the candidates a source, one mixing call a node.

Edge by edge, a node is ``sum_e b_e sum_k w_ek BatchNorm_ek(candidate_ek(x_e))``: two sums over the
same kind of terms. Here they are one, over all candidates of all edges that enter the node; and
what leaves a state for several nodes is computed together (``fastnas.nn.source``). PC-DARTS'
channel shuffle commutes with the sum, so it happens once a node as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastnas import ops
from fastnas.nn.batch_norm import has_global_hook, hook_tables, make_route
from fastnas.nn.carriers import Carriers, can_carry
from fastnas.nn.mixed_op import MixedOp, select_weights
from fastnas.nn.partial import PartialMixedOp
from fastnas.nn.recompute import Memory, Recompute
from fastnas.nn.repeat import Packed
from fastnas.nn.source import call, evaluate_source, is_faster
from fastnas.ops._common import MAX_CANDIDATES, memory_format
from fastnas.ops.mixed_batch_norm import mix_apart

if TYPE_CHECKING:
    from typing import TypeGuard

__all__ = ["count_fits", "join_states", "joins_edges", "node_starts", "run_alone", "run_nodes"]

_HALVE = nn.MaxPool2d(2, 2)

#: ``(N, C, H, W)``; or, with partial channels, ``(N, C/k, H, W)`` and the others apart, as the
#: edges read them.
State = tuple[Tensor, ...]


class _Arrival(NamedTuple):
    """What an edge brings to its node."""

    xs: list[Tensor]
    norms: list[Any]
    #: Of the candidates that ``xs`` come from.
    weights: Tensor
    #: The channels that pass by, pooled where the edge halves the size; None without any.
    rest: Tensor | None
    #: What the edge alone would at least have returned.
    dtype: torch.dtype


def joins_edges(edges: Sequence[nn.Module], inputs: int = 2) -> TypeGuard[Sequence[MixedOp]]:
    """Whether ``run_nodes`` computes what calling the edges and adding them up would.

    It does not for mixed ops of another class, for those that leave out candidates by their
    weights, where a node has more candidates than one call takes, where somebody listens to the
    calls of the edges themselves, and where two edges have a module with running statistics in
    common, which takes its batches in the order of the edges.
    """
    kinds = {_kind(edge) for edge in edges}
    if len(kinds) != 1 or None in kinds or has_global_hook():
        return False
    if shares_statistics([edge for edge in edges if isinstance(edge, MixedOp)]):
        return False
    widest = max(len(edge._ops) for edge in edges if isinstance(edge, MixedOp))
    incoming = inputs + len(node_starts(inputs, len(edges))) - 1
    return widest * incoming <= MAX_CANDIDATES


def shares_statistics(edges: Sequence[MixedOp]) -> bool:
    """Whether two edges have a module with buffers in common, but for norms that are fused."""
    stateful = [edge._plan.stateful for edge in edges]
    inner = frozenset().union(*stateful)
    last = frozenset().union(*(edge._plan.last for edge in edges))
    return len(inner) < sum(map(len, stateful)) or not inner.isdisjoint(last)


def _kind(edge: nn.Module) -> int | None:
    """One in how many channels is mixed, in which edges must agree; None: it has to be called."""
    # A class to which methods are lent (fastnas.nn.lent) computes what the one below it does.
    cls = vars(type(edge)).get("_lent_to", type(edge))
    if cls not in (MixedOp, PartialMixedOp) or "forward" in vars(edge):
        return None
    assert isinstance(edge, MixedOp)
    if edge.skip_zero or any(map(bool, hook_tables(edge))):
        return None
    routes = edge._routes()
    # Node by node others would see what is done to an input in place earlier, or not at all.
    if all(route.zero for route in routes) or edge._plan.in_place:
        return None
    if not isinstance(edge, PartialMixedOp):
        return 1
    return edge.k if edge.k == 1 or edge._pool_is_fused() else None


def run_nodes(
    inputs: Sequence[Tensor],
    edges: Sequence[MixedOp],
    op_weights: Tensor,
    edge_weights: Tensor | None = None,
    memory: Memory = "default",
) -> list[State]:
    """Compute the nodes of a cell whose every node has an edge from every state before it.

    Args:
        inputs: of the cell, ``(N, C, H, W)``.
        edges: mixed ops that ``joins_edges``, node by node and within a node by source.
        op_weights: ``[E, K]``, for each edge the weights of its candidates.
        edge_weights: ``[E]``, the factor of each edge in its node's sum; None for ones.
        memory: ``low`` keeps less for the backward, which makes it again
            (``fastnas.nn.recompute``); where that is not possible it has no effect.

    Returns:
        The inputs and the nodes after them, for ``join_states``.
    """
    states: list[State] = [(x,) for x in inputs]
    starts = node_starts(len(inputs), len(edges))
    k = _kind(edges[0])
    assert k is not None
    factors = edge_weights
    if factors is not None:
        op_weights = op_weights * factors.unsqueeze(1)
    elif k > 1:
        factors = op_weights.new_ones(len(edges))
    rows = op_weights.unbind(0)
    carry = memory == "default" and can_carry(edges[0].training)
    carriers = Carriers() if carry else None
    again = Recompute() if memory == "low" and Recompute.is_possible() else None
    arrivals: list[list[_Arrival]] = [[] for _ in starts]

    def leave(source: int) -> None:
        nodes = range(max(source - len(inputs) + 1, 0), len(starts))
        numbers = [starts[node] + source for node in nodes]
        leaving, weights = [edges[e] for e in numbers], [rows[e] for e in numbers]
        found = _leave(states[source], leaving, weights, k, again, carriers)
        for node, arrival in zip(nodes, found, strict=True):
            arrivals[node].append(arrival)

    for source in range(len(inputs)):
        leave(source)
    for node, start in enumerate(starts):
        # An arrival is dropped here, so that nothing of it outlives its use.
        arrived, arrivals[node] = arrivals[node], []
        mine = None if factors is None else factors[start : start + len(arrived)]
        states.append(_mix(arrived, mine, k, again, carriers))
        if node + 1 < len(starts):
            leave(len(inputs) + node)
    return states


def join_states(states: Sequence[State]) -> Tensor:
    """The channels of all ``states``, one after the other, as one tensor."""
    parts = [part for state in states for part in state]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def count_fits(inputs: int, edges: int) -> bool:
    """Whether so many edges are one from every state to every later one."""
    nodes = len(node_starts(inputs, edges))
    return edges == inputs * nodes + nodes * (nodes - 1) // 2


def run_alone(module: nn.Module, x: Tensor, memory: Memory = "default") -> Tensor:
    """``module(x)``, by the ways that its layers have in a cell where it ends in a BatchNorm."""
    route = make_route(module).audible()
    if route.norm is None:
        return module(x)
    run = Recompute().run if memory == "low" and Recompute.is_possible() else call
    ((y,),) = evaluate_source(x, [[route.recipe]], run)
    return route.norm(y)


def node_starts(inputs: int, count: int) -> list[int]:
    """The first edge of every node."""
    starts = [0]
    while starts[-1] + inputs + len(starts) - 1 < count:
        starts.append(starts[-1] + inputs + len(starts) - 1)
    return starts


def _leave(
    state: State,
    edges: Sequence[MixedOp],
    rows: Sequence[Tensor],
    k: int,
    again: Recompute | None,
    carriers: Carriers | None,
) -> Iterator[_Arrival]:
    """Run the candidates of all edges that leave ``state``."""
    run = call if again is None else again.run
    mixed, rest = state if len(state) == 2 else (state[0], None)
    # Of the shape of the whole.
    x = mixed if rest is None else mixed[:, :1].expand(-1, k * mixed.shape[1], -1, -1)
    for edge, row in zip(edges, rows, strict=True):
        edge._check(x, row)
    packed = Packed(memory_format(mixed))
    if k > 1 and rest is None:
        # One split gives autograd one concatenation; slices would cost it a padded gradient each.
        mixed, rest = x.split([x.shape[1] // k, x.shape[1] - x.shape[1] // k], 1)
        if is_faster("parts", x):
            mixed = run(packed, mixed)
    used = [[r for r in enumerate(edge._routes()) if not r[1].zero] for edge in edges]
    recipes = [[route.recipe for _, route in routes] for routes in used]
    outputs = evaluate_source(mixed, recipes, run, carriers)
    bypass: dict[int, Tensor] = {}
    for edge, row, routes, xs in zip(edges, rows, used, outputs, strict=True):
        height = xs[0].shape[2]
        if rest is not None and height not in bypass:
            bypass[height] = (
                # Once for all nodes, each of which would have to copy the slice.
                run(packed, rest) if height == x.shape[2] else run(_HALVE, rest)
            )
        everything = len(routes) == len(edge._ops)
        weights = row if everything else select_weights(row, [i for i, _ in routes])
        assert isinstance(weights, Tensor)
        norms = [route.norm for _, route in routes]
        # `none` would have returned x's dtype, under autocast wider than a convolution's.
        yield _Arrival(
            xs, norms, weights, bypass.get(height), xs[0].dtype if everything else x.dtype
        )


def _mix(
    arrivals: Sequence[_Arrival],
    factors: Tensor | None,
    k: int,
    again: Recompute | None,
    carriers: Carriers | None,
) -> State:
    """The sum over all that arrives at a node."""
    run = call if again is None else again.mix
    xs = [x for arrival in arrivals for x in arrival.xs]
    norms = [norm for arrival in arrivals for norm in arrival.norms]
    weights = torch.cat([arrival.weights for arrival in arrivals])
    rests = [arrival.rest for arrival in arrivals if arrival.rest is not None]
    state: State
    carried = {} if carriers is None else carriers.take(xs)
    if k == 1:
        state = (run(mix_apart, xs, weights, norms, carried),)
    elif is_faster("parts", xs[0]):
        mixed = run(mix_apart, xs, weights, norms, carried)
        state = run(ops.partial_channel_node, mixed, rests, factors, k)
    else:
        rest = run(ops.mixed_sum, rests, factors)
        state = (run(ops.partial_channel_mix, rest, xs, weights, k, norms),)
    dtype = reduce(torch.promote_types, (a.dtype for a in arrivals), state[0].dtype)
    return tuple(part.to(dtype) for part in state)
