# SPDX-License-Identifier: Apache-2.0
"""The DARTS supernet: every edge carries all candidates, mixed by weights that a method computes.

DARTS (Liu et al., ICLR 2019), section 2.1 and appendix A.1; with ``partial_channels`` above 1 that
of PC-DARTS (Xu et al., ICLR 2020), section 3. Attribute names are those of the published code, so
that its state dicts load strictly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor, nn

from fastnas.nn.candidates import DARTS_PRIMITIVES
from fastnas.nn.cell import join_states, joins_edges, run_alone, run_nodes
from fastnas.nn.connections import run_connections
from fastnas.nn.mixed_op import MixedOp
from fastnas.nn.partial import PartialMixedOp
from fastnas.nn.recompute import MEMORY, Memory
from fastnas.ops import mixed_sum
from fastnas.spaces.base import CellRoles, CellSelection, CellSpec, CellWeights, check_weights
from fastnas.spaces.darts.backbone import (
    LayerPlan,
    Stemmed,
    check_positive,
    plan_layers,
    preprocess_layers,
    reduction_layers,
)
from fastnas.spaces.engine_cells import EngineCells, find_engine_cells

__all__ = ["Cell", "EngineCells", "Supernet", "node_sum"]

STEPS = 4
"""Intermediate nodes of a cell; all of them make up its output."""

STEM_MULTIPLIER = 3
"""Width of the stem in multiples of C."""


def node_sum(
    states: Sequence[Tensor],
    ops: Sequence[nn.Module],
    op_weights: Sequence[Tensor],
    edge_weights: Tensor | None,
) -> Tensor:
    """Return one intermediate node: ``sum_j edge_weights[j] * ops[j](states[j], op_weights[j])``.

    Args:
        states: the states before the node, each ``(N, C, H, W)``.
        ops: the mixed op of each edge, in the states' order.
        op_weights: ``[K]`` for each edge.
        edge_weights: ``[len(states)]``, or None for a plain sum (DARTS).
    """
    outputs = [op(x, w) for op, x, w in zip(ops, states, op_weights, strict=True)]
    if edge_weights is None:
        # Not mixed_sum: the gradient of a plain sum is one tensor that all edges share.
        return reduce(add, outputs)
    return mixed_sum(outputs, edge_weights)


class Cell(nn.Module):
    """A cell of the supernet: two inputs, four nodes, an edge from every state to every later one.

    In a reduction cell the edges that leave the two inputs have stride 2. In a cell that shares,
    all edges that leave a state have the same mixed op, so ``_ops`` has one a state; the last node
    feeds none.
    """

    def __init__(
        self,
        plan: LayerPlan,
        partial_channels: int,
        primitives: Sequence[str] = DARTS_PRIMITIVES,
        memory: Memory = "default",
        share: bool = False,
    ) -> None:
        """Build for the widths of ``plan``; BatchNorms are not affine in search."""
        super().__init__()
        self.memory = memory
        self.share = share
        self.reduction = plan.reduction
        self._steps = STEPS
        self._multiplier = STEPS
        self.preprocess0, self.preprocess1 = preprocess_layers(plan, affine=False)
        self._ops = nn.ModuleList()
        sources = [source for node in range(STEPS) for source in range(2 + node)]
        for source in range(1 + STEPS) if share else sources:
            stride = 2 if plan.reduction and source < 2 else 1
            self._ops.append(_build_edge(plan.C, stride, partial_channels, primitives))
        self._edge_ops = sources if share else list(range(len(sources)))

    def forward(self, s0: Tensor, s1: Tensor, weights: CellWeights | CellSelection) -> Tensor:
        """Map the outputs of the two cells before to ``(N, 4 C, H', W')``."""
        states = [
            run_alone(layer, x, self.memory)
            for layer, x in ((self.preprocess0, s0), (self.preprocess1, s1))
        ]
        ops = [self._ops[number] for number in self._edge_ops]
        if isinstance(weights, CellWeights) and self.share:
            everything = (tuple(range(weights.ops.shape[1])),) * len(ops)
            factors = 1 if weights.edges is None else weights.edges.unsqueeze(1)
            weights = CellSelection(everything, weights.ops * factors)
        if isinstance(weights, CellSelection):
            states = run_connections(
                states,
                ops,  # type: ignore[arg-type]  # mixed ops
                weights.connections,
                weights.ops,
                self.memory,
            )
            return torch.cat(states[-self._multiplier :], dim=1)
        if joins_edges(ops):
            nodes = run_nodes(states, ops, weights.ops, weights.edges, self.memory)
            return join_states(nodes[-self._multiplier :])
        rows = weights.ops.unbind(0)
        start = 0
        for _ in range(self._steps):
            stop = start + len(states)
            edges = None if weights.edges is None else weights.edges[start:stop]
            states.append(node_sum(states, ops[start:stop], rows[start:stop], edges))
            start = stop
        return torch.cat(states[-self._multiplier :], dim=1)


def _build_edge(C: int, stride: int, partial_channels: int, primitives: Sequence[str]) -> nn.Module:
    if partial_channels == 1:
        return MixedOp(C, stride, primitives)
    return PartialMixedOp(C, stride, k=partial_channels, primitives=primitives)


class Supernet(Stemmed):
    """Stem, a stack of cells, global average pooling and a linear classifier.

    Cells floor(L/3) and floor(2L/3) are reduction cells: they halve the image and double the
    width. The architecture weights come with every call and are no part of the module.

    Attributes:
        cell_specs: for the kinds ``normal`` and ``reduce``, the edges and candidates of a cell.
        engine_cells: numbers of the Engine-cells; all, unless something else was said.
    """

    def __init__(
        self,
        C: int = 16,
        layers: int = 8,
        num_classes: int = 10,
        in_channels: int = 3,
        partial_channels: int = 1,
        stem: str = "cifar",
        primitives: Sequence[str] = DARTS_PRIMITIVES,
        none: bool = True,
        memory: Memory = "default",
        engine_cells: EngineCells = "all",
        share: bool = False,
    ) -> None:
        """Build with PyTorch's default initialisation.

        Args:
            C: channels of the first cell's nodes; the stem has 3 C.
            layers: number of cells, at least 3, so that both kinds of cell occur.
            num_classes: width of the classifier.
            in_channels: channels of the images.
            partial_channels: k of PC-DARTS: the candidates see C / k channels (4 on CIFAR, 2 on
                ImageNet in the paper); 1 is DARTS.
            stem: ``cifar`` (image size kept) or ``imagenet`` (an eighth of it).
            primitives: candidates of every edge.
            none: False leaves the candidate ``none`` out of them.
            memory: ``low`` keeps less of a forward for its backward, which computes again what is
                cheap (``fastnas.nn.recompute``): the same numbers from less memory in more time.
                It has no effect where a compiler decides what is kept, under functional transforms,
                and in cells whose mixed ops have to be called one by one (hooks on them, say).
            engine_cells: numbers of the cells that get the weights of ``CellRoles.engine``, at
                least one of each kind, or ``last``: the last of each kind. The others are
                Transit-cells. Needs all channels, and candidates without ``none``.
            share: a candidate that leaves a state is the same, and computed once, for all later
                nodes. Needs the same.

        Raises:
            ValueError: a number that is not positive, fewer than 3 layers, C not divisible by
                ``partial_channels``, odd C with the ``imagenet`` stem, unknown stem, candidate or
                ``memory``; Engine-cells that do not exist, or none of a kind.
        """
        check_positive(
            C=C,
            layers=layers,
            num_classes=num_classes,
            in_channels=in_channels,
            partial_channels=partial_channels,
        )
        if memory not in MEMORY:
            raise ValueError(f"memory must be one of {', '.join(MEMORY)}, got {memory!r}")
        super().__init__(stem, in_channels, C, STEM_MULTIPLIER, layers)
        if layers < 3:
            raise ValueError(
                f"layers must be at least 3, got {layers}: cells floor(L/3) and floor(2L/3) "
                "reduce, which leaves no normal cell to search"
            )
        if C % partial_channels:
            raise ValueError(
                f"C must be a multiple of partial_channels, got {C} and {partial_channels}"
            )
        primitives = tuple(name for name in primitives if none or name != "none")
        if (share or engine_cells != "all") and (partial_channels > 1 or "none" in primitives):
            raise ValueError(
                "engine_cells and share: wanted partial_channels of 1 and candidates without "
                f"'none', got {partial_channels} and {', '.join(primitives)}"
            )
        reductions = reduction_layers(layers)
        normal = set(range(layers)) - set(reductions)
        self.engine_cells = find_engine_cells(
            engine_cells, {"normal": normal, "reduction": reductions}
        )
        self._selects = partial_channels == 1 and "none" not in primitives
        spec = CellSpec(tuple(range(2, 2 + STEPS)), primitives)
        self.cell_specs: dict[str, CellSpec] = {"normal": spec, "reduce": spec}
        plans = plan_layers(C, layers, STEM_MULTIPLIER * C, stem, (STEPS, STEPS))
        self.cells = nn.ModuleList(
            Cell(plan, partial_channels, primitives, memory, share) for plan in plans
        )
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(STEPS * plans[-1].C, num_classes)

    def uniform_weights(self) -> dict[str, CellWeights]:
        """Return equal weights that sum to 1 on each edge, as before any search."""
        weight = self.classifier.weight
        return {
            kind: CellWeights(
                weight.new_full((spec.edges, len(spec.primitives)), 1 / len(spec.primitives))
            )
            for kind, spec in self.cell_specs.items()
        }

    def forward(
        self, x: Tensor, weights: Mapping[str, CellWeights | CellSelection | CellRoles]
    ) -> Tensor:
        """Map images ``(N, in_channels, H, W)`` to logits ``(N, num_classes)``.

        Args:
            x: images, floating point, of the parameters' device; see ``check_images`` for sizes.
            weights: for each kind in ``cell_specs``, for all its cells alike ``CellWeights`` with
                ``ops`` ``[14, K]`` and ``edges`` ``[14]`` or None, or a ``CellSelection`` (which
                partial channels and ``none`` do not have); or ``CellRoles``, which say it for
                Engine- and Transit-cells apart.

        Raises:
            ValueError: wrong shape of ``x`` or of the weights, or a missing kind.
            TypeError: a value of ``weights`` is none of these.
        """
        check_weights(weights, self.cell_specs, self._selects)
        s0, s1 = self.stem_outputs(x)
        for index, cell in enumerate(self.cells):
            given = weights["reduce" if cell.reduction else "normal"]
            if isinstance(given, CellRoles):
                given = given.engine if index in self.engine_cells else given.transit
            s0, s1 = s1, cell(s0, s1, given)
        return self.classifier(self.global_pooling(s1).flatten(1))
