# SPDX-License-Identifier: Apache-2.0
"""What a cell does around its parts, proved with random maps in their place.

As for mixed ops (``stand_ins``): with nothing but products, sums and rearrangements around them,
and no branch untaken, agreement with the formula on random maps is agreement on all data.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from itertools import product
from operator import add

import torch
from torch import Tensor, nn

from fastnas.nn.cell import node_starts
from fastnas.nn.proof.cell_parts import INPUTS, Way, input_parts, named_parts
from fastnas.nn.proof.observation import Random, first_difference, one_line, record
from fastnas.nn.proof.reading import Reading
from fastnas.nn.proof.stand_ins import StandIn
from fastnas.nn.proof.watch import Watch

__all__ = [
    "Fault",
    "Shapes",
    "differs",
    "fault_around_parts",
    "narrow",
    "observe_cell",
]

Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
"""For each part of a cell, by name, the shapes of an image before and after it."""

Fault = tuple[str, float | None]
"""A reason, and the relative difference that belongs to it."""


class _EdgeByEdge(nn.Module):
    """The formula of a DARTS cell, as the papers have it."""

    def __init__(self, parts: Mapping[str, nn.Module | None], last: int) -> None:
        super().__init__()
        self._modules.update(parts)
        self._last = last

    def forward(
        self, s0: Tensor, s1: Tensor, weights: Tensor, edge_weights: Tensor | None = None
    ) -> Tensor:
        """Add up the edges of every node."""
        first, second, *edges = (part for _, part in named_parts(self))
        states = [first(s0), second(s1)]
        for start in node_starts(INPUTS, len(edges)):
            numbers = range(start, start + len(states))
            outputs = [edges[e](x, weights[e]) for e, x in zip(numbers, states, strict=True)]
            if edge_weights is not None:
                outputs = [edge_weights[e] * y for e, y in zip(numbers, outputs, strict=True)]
            states.append(reduce(add, outputs))
        return torch.cat(states[-self._last :], 1)


class _EdgeStandIn(StandIn):
    """Takes a mixed op's place: a random map, times a random form of the weights."""

    def __init__(self, x: tuple[int, ...], y: tuple[int, ...], count: int, random: Random) -> None:
        super().__init__(x, y, random)
        self.form = nn.Parameter(random.normal(count))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        """Map a batch of images."""
        return super().forward(x) * (weights * self.form).sum() + self.shift


def narrow(shapes: Shapes) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """The same shapes with 2, 3, ... channels, equal where they were equal."""
    widths: dict[int, int] = {}

    def change(shape: tuple[int, ...]) -> tuple[int, ...]:
        return widths.setdefault(shape[0], 2 + len(widths)), *shape[1:]

    return {name: (change(x), change(y)) for name, (x, y) in shapes.items()}


def fault_around_parts(
    cell: nn.Module,
    shapes: Shapes,
    candidates: int,
    last: int,
    ways: Sequence[Way],
    reading: Reading,
    random: Random,
) -> Fault | None:
    """Find what ``cell`` does other than the formula.

    Args:
        cell: somebody's cell; its parts are not run.
        shapes: of what ``named_parts`` of it are.
        candidates: how many weights an edge has.
        last: how many of its last states it should concatenate.
        ways: all in which it may be called.
        reading: what its forward is made of.
        random: the source of everything.
    """
    watch = Watch(reading)
    random.seed()
    for batch, tall in ((1, 1), (5, 2)):
        parts = _stand_ins(shapes, candidates, tall, random)
        theirs = copy.copy(cell)
        vars(theirs).update(_modules=parts, _parameters={}, _buffers={})
        formula = _EdgeByEdge(copy.deepcopy(parts), last)
        edges = sum("." in name for name in shapes)
        inputs = input_parts(cell) or ()
        sizes = {f"s{n}": shapes[name][0] for n, name in enumerate(inputs)}
        given = {n: random.normal(batch, c, tall * h, w) for n, (c, h, w) in sizes.items()}
        given |= {"weights": random.normal(edges, candidates), "edge weights": random.normal(edges)}
        for training, way in product((True, False), ways):
            for stand_in in (*theirs.modules(), *formula.modules()):
                if isinstance(stand_in, StandIn):
                    stand_in.calls.zero_()
            where = f"random maps, batch of {batch}"
            expected = observe_cell(formula, formula, given, way, training, random)
            try:
                found = observe_cell(theirs, way.of(theirs), given, way, training, random, watch)
            except Exception as error:  # somebody else's code
                words = " ".join(filter(None, ("it does not run", way.name, "on", where)))
                return f"{words}: {one_line(error)}", None
            difference = first_difference(found, expected, random.dtype)
            if difference is not None:
                return differs(difference, training, where, way.name)
            watch.keep()
    fault = watch.fault()
    return None if fault is None else (fault, None)


def _stand_ins(
    shapes: Shapes, candidates: int, tall: int, random: Random
) -> dict[str, nn.Module | None]:
    """Random maps for all parts, of images ``tall`` times as high."""

    def higher(shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[0], tall * shape[1], shape[2]

    parts: dict[str, nn.Module | None] = {}
    for name, (x, y) in shapes.items():
        if "." in name:
            first, *between, _ = name.split(".")
            edges = parts.setdefault(first, nn.ModuleList())
            for number in between:  # of the list of a node
                assert isinstance(edges, nn.ModuleList)
                while len(edges) <= int(number):
                    edges.append(nn.ModuleList())
                edges = edges[int(number)]
            assert isinstance(edges, nn.ModuleList)
            edges.append(_EdgeStandIn(higher(x), higher(y), candidates, random))
        else:
            parts[name] = StandIn(higher(x), higher(y), random)
    return parts


def differs(difference: tuple[str, float], training: bool, *where: str) -> Fault:
    """The reason that something differs."""
    what, number = difference
    words = ", ".join(filter(None, ("training" if training else "evaluation", *where)))
    return f"it computes something else: {what} differs ({words})", number


def observe_cell(
    module: nn.Module,
    call: Callable[..., Tensor],
    given: Mapping[str, Tensor],
    way: Way,
    training: bool,
    random: Random,
    watch: Watch | None = None,
) -> dict[str, Tensor]:
    """Everything a step takes from ``call``, which runs ``module``; may raise what that raises."""
    module.train(training)
    chosen = {name: given[name] for name in way.arguments}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in chosen.items()}
    return record(module, chosen, leaves, lambda: call(*leaves.values(), *way.more), random, watch)
