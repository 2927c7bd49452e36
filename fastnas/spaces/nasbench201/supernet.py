# SPDX-License-Identifier: Apache-2.0
"""The supernet of the NAS-Bench-201 space: every edge of the cell carries all five candidates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import add

from torch import Tensor, nn

from fastnas.nn.candidates import build_candidate
from fastnas.nn.cell import join_states, joins_edges, run_nodes
from fastnas.nn.connections import run_connections
from fastnas.nn.gated import run_gate
from fastnas.nn.mixed_op import MixedOp
from fastnas.nn.partial import PartialMixedOp
from fastnas.nn.recompute import MEMORY, Memory
from fastnas.spaces.base import (
    CellGates,
    CellRoles,
    CellSelection,
    CellSpec,
    CellWeights,
    SpaceOptions,
    Weighting,
    check_positive,
    check_weights,
)
from fastnas.spaces.darts.supernet import node_sum
from fastnas.spaces.engine_cells import EngineCells, find_engine_cells
from fastnas.spaces.nasbench201.backbone import Backbone
from fastnas.spaces.nasbench201.genotype import PRIMITIVES, check_nodes

__all__ = ["KIND", "Cell", "NASBench201Options", "Supernet", "TopologySpec"]

KIND = "normal"
"""Key of the cells' weights; there is one kind, which halves nothing."""


@dataclass(frozen=True)
class NASBench201Options(SpaceOptions):
    """What can be chosen of the space ``nasbench201``, beside width and number of cells.

    Raises:
        ValueError: a number out of its range.
    """

    nodes: int = 4
    """Nodes of the cell, its input among them: 4 in the benchmark (15,625 cells), 3 for a space of
    125 cells."""
    derive_none: bool = True
    """Whether an edge may get the operation none. If not, it is a candidate in the search alone, as
    DARTS has it (section 2.4); da2s, entrannas and entrannas_dst have it in neither."""

    def __post_init__(self) -> None:
        """Check the number."""
        check_nodes(self.nodes)


@dataclass(frozen=True)
class TopologySpec(CellSpec):
    """The choices in a cell of this space.

    Attributes:
        derive_none: whether an edge of a derived cell may get ``none`` for its score.
    """

    derive_none: bool = field(default=True, kw_only=True)


class Cell(nn.Module):
    """A cell of the supernet: one input, an edge from every node to every later one.

    In a cell that shares, all edges that leave a node have the same mixed op, so ``_ops`` has one a
    node; the last node feeds none. Pools have no BatchNorm here, and convolutions have a bias.
    """

    def __init__(
        self,
        C: int,
        nodes: int,
        primitives: tuple[str, ...],
        partial_channels: int = 1,
        memory: Memory = "default",
        share: bool = False,
    ) -> None:
        """Build for C channels; BatchNorms are not affine in search."""
        super().__init__()
        self.memory = memory
        self.share = share
        self._steps = nodes - 1
        sources = [source for node in range(1, nodes) for source in range(node)]
        self._ops = nn.ModuleList(
            _build_edge(C, primitives, partial_channels)
            for _ in range(nodes - 1 if share else len(sources))
        )
        self._edge_ops = sources if share else list(range(len(sources)))

    def forward(self, x: Tensor, weights: CellWeights | CellSelection | CellGates) -> Tensor:
        """Map ``(N, C, H, W)`` to the last node, ``(N, C, H, W)``."""
        ops = [self._ops[number] for number in self._edge_ops]
        if isinstance(weights, CellGates):
            return self._run_paths(x, ops, weights)  # type: ignore[arg-type]  # mixed ops
        if isinstance(weights, CellWeights) and self.share:
            everything = (tuple(range(weights.ops.shape[1])),) * len(ops)
            factors = 1 if weights.edges is None else weights.edges.unsqueeze(1)
            weights = CellSelection(everything, weights.ops * factors)
        if isinstance(weights, CellSelection):
            connections = weights.connections
            return run_connections([x], ops, connections, weights.ops, self.memory)[-1]  # type: ignore[arg-type]
        if joins_edges(ops, inputs=1):
            return join_states(run_nodes([x], ops, weights.ops, weights.edges, self.memory)[-1:])
        states, start, rows = [x], 0, weights.ops.unbind(0)
        for _ in range(self._steps):
            stop = start + len(states)
            edges = None if weights.edges is None else weights.edges[start:stop]
            states.append(node_sum(states, ops[start:stop], rows[start:stop], edges))
            start = stop
        return states[-1]

    def _run_paths(self, x: Tensor, ops: list[MixedOp], gates: CellGates) -> Tensor:
        """One candidate an edge."""
        states, left = [x], iter(zip(ops, gates.edges, strict=True))
        for _ in range(self._steps):
            node = []
            for state in states:
                edge, gate = next(left)
                node.append(run_gate(edge._ops, state, gate))
            states.append(reduce(add, node))
        return states[-1]


def _build_edge(C: int, primitives: tuple[str, ...], partial_channels: int) -> MixedOp:
    # Not by their names: a mixed op would follow the pool by a BatchNorm.
    candidates = [build_candidate(name, C // partial_channels, 1) for name in primitives]
    if partial_channels == 1:
        return MixedOp.from_candidates(candidates)
    return PartialMixedOp.from_candidates(candidates, k=partial_channels)


class Supernet(Backbone):
    """Stem, three stages of cells with a residual block between two, and a linear classifier.

    The architecture weights come with every call and are no part of the module.

    Attributes:
        cell_specs: for the one kind ``normal``, the edges and candidates of a cell.
        engine_cells: numbers of the Engine-cells; all, unless something else was said.
    """

    def __init__(
        self,
        C: int = 16,
        layers: int = 15,
        num_classes: int = 10,
        in_channels: int = 3,
        nodes: int = 4,
        derive_none: bool = True,
        partial_channels: int = 1,
        none: bool = True,
        memory: Memory = "default",
        engine_cells: EngineCells = "all",
        share: bool = False,
    ) -> None:
        """Build with PyTorch's default initialisation.

        Args:
            C: channels of the first stage; the others have 2 C and 4 C.
            layers: number of cells, a third in each stage.
            num_classes: width of the classifier.
            in_channels: channels of the images.
            nodes: nodes of a cell, its input among them.
            derive_none: whether an edge of a derived cell may get ``none`` for its score.
            partial_channels: k of PC-DARTS: the candidates see one in k channels.
            none: False leaves the candidate ``none`` out.
            memory: as of ``fastnas.spaces.darts.Supernet``.
            engine_cells: numbers of the cells that get the weights of ``CellRoles.engine``, or
                ``last``: the last one. The others are Transit-cells. Needs all channels, and
                candidates without ``none``.
            share: a candidate that leaves a node is the same, and computed once, for all later
                nodes. Needs the same.

        Raises:
            ValueError: a number out of its range, C not divisible by ``partial_channels``, unknown
                ``memory``; Engine-cells that do not exist.
        """
        check_nodes(nodes)
        check_positive(C=C, partial_channels=partial_channels)
        if memory not in MEMORY:
            raise ValueError(f"memory must be one of {', '.join(MEMORY)}, got {memory!r}")
        if C % partial_channels:
            raise ValueError(
                f"C must be a multiple of partial_channels, got {C} and {partial_channels}"
            )
        if (share or engine_cells != "all") and (partial_channels > 1 or none):
            raise ValueError(
                "engine_cells and share: wanted partial_channels of 1 and none=False, "
                f"got {partial_channels} and none={none}"
            )
        primitives = tuple(name for name in PRIMITIVES if none or name != "none")
        spec = TopologySpec(
            tuple(range(1, nodes)), primitives, zero="none", derive_none=derive_none
        )
        super().__init__(
            C,
            layers,
            num_classes,
            in_channels,
            lambda width: Cell(width, nodes, primitives, partial_channels, memory, share),
        )
        self.cell_specs: dict[str, CellSpec] = {KIND: spec}
        self.engine_cells = find_engine_cells(engine_cells, {KIND: range(layers)})
        self._selects = partial_channels == 1 and not none
        self._gated = partial_channels == 1 and not share

    def uniform_weights(self) -> dict[str, CellWeights]:
        """Return equal weights that sum to 1 on each edge, as before any search."""
        spec, weight = self.cell_specs[KIND], self.classifier.weight
        shape = (spec.edges, len(spec.primitives))
        return {KIND: CellWeights(weight.new_full(shape, 1 / shape[1]))}

    def forward(self, x: Tensor, weights: Mapping[str, Weighting]) -> Tensor:
        """Map images ``(N, in_channels, H, W)`` to logits ``(N, num_classes)``.

        Args:
            x: images, floating point, of the parameters' device; height and width multiples of 4.
            weights: under ``normal``, for all cells alike: ``CellWeights`` with ``ops`` ``[E, K]``
                and ``edges`` ``[E]`` or None; ``CellGates``, one path (with all channels); or
                without ``none`` a ``CellSelection``, or ``CellRoles``, which say it for Engine-
                and Transit-cells apart.

        Raises:
            ValueError: wrong shape of ``x`` or of the weights, or a missing kind.
            TypeError: a value of ``weights`` is none of these.
        """
        given = weights.get(KIND)
        if isinstance(given, CellGates) and self._gated:
            edges = self.cell_specs[KIND].edges
            if len(given.edges) != edges:
                raise ValueError(
                    f"weights[{KIND!r}].edges: {len(given.edges)} gates, wanted {edges}"
                )
        else:
            check_weights(weights, self.cell_specs, self._selects)

        def call(index: int, cell: nn.Module, h: Tensor) -> Tensor:
            if isinstance(given, CellRoles):
                return cell(h, given.engine if index in self.engine_cells else given.transit)
            return cell(h, given)

        return self.run(x, call)
