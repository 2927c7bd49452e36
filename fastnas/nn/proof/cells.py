# SPDX-License-Identifier: Apache-2.0
"""Whether somebody's cell may run node by node, once its mixed ops are ours.

That edges one by one and nodes as a whole compute the same is known of our own mixed ops
(``fastnas.nn.cell``). What has to be proved is that the ``forward`` of the cell does with its edges
what DARTS does, and nothing more: so it runs on random maps in the place of its parts, watched,
beside that formula (``cell_formula``); and in each mode with its real parts, beside ``run_cell``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from fastnas.nn.batch_norm import has_global_hook
from fastnas.nn.cell import join_states, node_starts, run_nodes
from fastnas.nn.proof.cell_formula import (
    Fault,
    Shapes,
    differs,
    fault_around_parts,
    narrow,
    observe_cell,
)
from fastnas.nn.proof.cell_parts import (
    INPUTS,
    Way,
    arguments_of,
    input_parts,
    mixed_ops,
    named_edges,
    named_parts,
)
from fastnas.nn.proof.observation import Random, clean_copy, first_difference, one_line
from fastnas.nn.proof.reading import Reading, read
from fastnas.nn.proof.signature import Defaults, list_name
from fastnas.nn.proof.verdict import channels_of, device_of, dtypes_of, form_of, plain_mode

__all__ = ["CellJudge", "CellVerdict", "Joined", "run_cell"]

_BATCH = 2
# Not square, as for mixed ops, and small: a cell has all candidates of all its edges. Some want
# more pixels, to pad with or to pool.
_SIZES = ((8, 4), (32, 24))
_RANDOM = "it draws random numbers, which would come in another order"


class Joined(NamedTuple):
    """What was proved of a cell."""

    #: The names of its parts, in the order in which they are used.
    parts: tuple[str, ...]
    #: Its output is the concatenation of so many of its last states.
    last: int
    #: The names of its arguments: inputs, weights and, if there is a fourth, those of edges.
    arguments: tuple[str, ...]
    #: Whether the fourth may be None or left out, which then stands for ones.
    optional: bool
    #: What its forward reads that is fixed when it is built, and should stay so.
    settings: tuple[tuple[str, object], ...]
    #: Further arguments, after these, and the values that they had.
    extra: Defaults = ()
    #: Whether the weights come as a list, with a matrix for each node.
    by_node: bool = False


@dataclass(frozen=True)
class CellVerdict:
    """Whether, and how, a form of cell may run node by node.

    Attributes:
        reason: why it may not; None if it may.
        difference: the relative difference of what is named, when that is the reason.
        joined: what was proved; None where there is a reason.
    """

    reason: str | None = None
    difference: float | None = None
    joined: Joined | None = None


def run_cell(
    cell: nn.Module,
    s0: Tensor,
    s1: Tensor,
    weights: Tensor,
    edge_weights: Tensor | None,
    last: int,
) -> Tensor:
    """The ``forward`` of a DARTS cell whose mixed ops are ours, node by node.

    Args:
        cell: has two ``input_parts``, and mixed ops that ``joins_edges``.
        s0: what the first of these takes, ``(N, C0, H, W)``.
        s1: what the second one takes, ``(N, C1, H', W')``.
        weights: ``[E, K]``.
        edge_weights: ``[E]``; None for ones.
        last: how many of the last states are concatenated.
    """
    first, second = (cell._modules[name] for name in input_parts(cell) or ())
    states: list[Tensor] = [first(s0), second(s1)]  # type: ignore[misc]  # modules
    if edge_weights is not None:
        # Edge by edge the two are never multiplied with each other, in whatever dtype they have.
        dtype = torch.promote_types(weights.dtype, states[0].dtype)
        weights, edge_weights = weights.to(dtype), edge_weights.to(dtype)
    return join_states(run_nodes(states, mixed_ops(cell), weights, edge_weights)[-last:])


class CellJudge:
    """Judges cells, each distinct form and what is around the parts of it once."""

    def __init__(self) -> None:
        self._verdicts: dict[object, CellVerdict] = {}
        self._faults: dict[Hashable, Fault | None] = {}

    def __call__(self, cell: nn.Module) -> CellVerdict:
        """Compare ``cell``, whose mixed ops are ours, with ``run_cell``, in copies of both."""
        form = form_of(cell)
        if form not in self._verdicts:
            self._verdicts[form] = self._judge(cell)
        return self._verdicts[form]

    def _judge(self, cell: nn.Module) -> CellVerdict:
        if has_global_hook():
            return CellVerdict("hooks for every module are registered, which the nodes would skip")
        reading = read(cell, dict(arguments_of(cell)[1] or ()))
        if settings := _changing_settings(cell, reading):
            return CellVerdict(f"its forward reads settings that may change: {', '.join(settings)}")
        if reading.fault is not None:
            return CellVerdict(reading.fault)
        if any(isinstance(module, _DropoutNd) for module in cell.modules()):
            return CellVerdict(_RANDOM)
        device = device_of(cell)
        if device.type == "meta":
            return CellVerdict("its parameters hold no numbers yet")
        with plain_mode(device):
            return self._run(cell, reading, device)

    def _run(self, cell: nn.Module, reading: Reading, device: torch.device) -> CellVerdict:
        """Judge by the first kind of random data that ``cell`` runs on."""
        verdict = CellVerdict("no Conv2d or BatchNorm2d says what preprocess0 and preprocess1 take")
        for dtype in dtypes_of(cell):
            try:
                twin = clean_copy(cell, dtype)
            except Exception as error:  # somebody else's code may raise anything
                return CellVerdict(f"it cannot be copied for the proof: {one_line(error)}")
            random = Random(device, dtype)
            # The first input may come from before a reduction cell.
            for by_node, size, scale in product((False, True), _SIZES, (1, 2)):
                given = _make_inputs(cell, size, scale, random)
                if given is None:
                    return verdict
                subject = _Subject(cell, twin, given, random, reading, by_node)
                try:
                    passage = subject.pass_through()
                except Exception as error:
                    if not by_node:
                        verdict = CellVerdict(f"it does not run on random data: {one_line(error)}")
                    continue
                return self._prove(subject, passage)
        return verdict

    def _prove(self, subject: _Subject, passage: _Passage) -> CellVerdict:
        cell, shapes = subject.cell, passage.shapes
        if passage.draws:
            return CellVerdict(_RANDOM)
        idle = [name for name, _ in named_parts(cell) if name not in shapes]
        if idle:
            return CellVerdict(f"its forward does not call {idle[0]}")
        edges = [name for name, _ in named_edges(cell)]
        width = shapes[edges[-1]][1][0]
        last, rest = divmod(passage.channels, width)
        if rest or not 0 < last <= INPUTS + len(node_starts(INPUTS, len(edges))):
            return CellVerdict("its output is not the concatenation of its last states")
        fault = self._around_parts(subject, shapes, last) or subject.fault_of_nodes(last)
        if fault is not None:
            return CellVerdict(*fault)
        arguments, extra = arguments_of(cell)
        names = tuple(p.name for p in arguments)
        joined = Joined(
            tuple(name for name, _ in named_parts(cell)),
            last,
            names,
            subject.optional,
            subject.settings,
            extra or (),
            subject.by_node,
        )
        return CellVerdict(None, None, joined)

    def _around_parts(self, subject: _Subject, shapes: Shapes, last: int) -> Fault | None:
        cell, random, few = subject.cell, subject.random, narrow(shapes)
        count, ways = len(mixed_ops(cell)[0]._ops), subject.ways
        settings = tuple((name, repr(value)) for name, value in subject.settings)
        kind = random.device, random.dtype
        key = type(cell), settings, tuple(few.items()), count, last, ways, kind
        if key not in self._faults:
            kinds = [random]
            if random.dtype is torch.float64:
                # A cast to double precision does nothing there.
                kinds.append(Random(random.device, torch.float32))
            faults = (
                fault_around_parts(cell, few, count, last, ways, subject.reading, kind)
                for kind in kinds
            )
            self._faults[key] = next(filter(None, faults), None)
        return self._faults[key]


def _fixed_settings(cell: nn.Module, reading: Reading) -> dict[str, object]:
    """What the forward reads that can be seen to be the same at a later call, as numbers of nodes.

    A list would be the same object after it changed, and what a property returns may change in the
    middle; a float is a factor, and those are made to change.
    """
    names = sorted(reading.settings - _read_of_parts(cell))
    found = {n: inspect.getattr_static(cell, n, ...) for n in names}
    return {n: v for n, v in found.items() if isinstance(v, (bool, int, str, type(None)))}


def _changing_settings(cell: nn.Module, reading: Reading) -> list[str]:
    """What the forward reads that may be another at a later call."""
    known = _read_of_parts(cell) | _fixed_settings(cell, reading).keys()
    return sorted(reading.settings - known)


def _read_of_parts(cell: nn.Module) -> set[str | None]:
    """What a forward may read besides settings."""
    return {list_name(cell), "training", *(input_parts(cell) or ())}


def _make_inputs(
    cell: nn.Module, size: tuple[int, int], scale: int, random: Random
) -> dict[str, Tensor] | None:
    """Arguments of a cell whose first input is ``scale`` times as high and wide as the second."""
    given = {}
    parts = input_parts(cell)
    assert parts is not None  # seen before anything is run
    for name, part, times in zip(("s0", "s1"), parts, (scale, 1), strict=True):
        channels = channels_of(cell.get_submodule(part))
        if channels is None:
            return None
        given[name] = random.normal(_BATCH, channels, *(times * pixels for pixels in size))
    edges = mixed_ops(cell)
    weights = random.normal(len(edges), len(edges[0]._ops))
    weights[:, ::3] = 0
    return {**given, "weights": weights, "edge weights": random.normal(len(edges))}


class _Passage(NamedTuple):
    """What was seen when a cell ran."""

    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    channels: int
    #: Whether it drew random numbers.
    draws: bool


def _generator_state(random: Random) -> Tensor:
    if random.device.type == "cuda":
        return torch.cuda.get_rng_state(random.device)
    return torch.get_rng_state()


class _Subject:
    """A cell that is judged, a copy of it, and what to run that on."""

    def __init__(
        self,
        cell: nn.Module,
        twin: nn.Module,
        given: dict[str, Tensor],
        random: Random,
        reading: Reading,
        by_node: bool,
    ) -> None:
        self.cell, self.random, self.reading, self.by_node = cell, random, reading, by_node
        self._twin, self._given = twin, given
        parameters, _ = arguments_of(cell)
        self.optional = len(parameters) > 3 and parameters[3].default is None
        self.ways = tuple(self._find_ways(len(parameters)))
        self.settings = tuple(_fixed_settings(cell, reading).items())

    def _find_ways(self, arguments: int) -> Iterator[Way]:
        three = ("s0", "s1", "weights")
        if arguments > 3:
            yield Way("with weights of edges", (*three, "edge weights"), (), self.by_node)
        if arguments == 3 or self.optional:
            yield Way("", three, (), self.by_node)
        if self.optional:
            yield Way("with None for weights of edges", three, (None,), self.by_node)

    def pass_through(self) -> _Passage:
        """Run the copy once, which may raise whatever it raises."""
        shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}

        def note(name: str) -> Callable[..., None]:
            def hook(part: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
                shapes[name] = tuple(inputs[0].shape[1:]), tuple(y.shape[1:])

            return hook

        twin, random, way = self._twin, self.random, self.ways[0]
        handles = [part.register_forward_hook(note(name)) for name, part in named_parts(twin)]
        random.seed()
        before = _generator_state(random)
        try:
            with torch.no_grad():
                y = way.of(twin.train())(*(self._given[name] for name in way.arguments))
        finally:
            for handle in handles:
                handle.remove()
        # In the order of the parts, whatever that of the calls.
        shapes = {name: shapes[name] for name, _ in named_parts(twin) if name in shapes}
        return _Passage(shapes, y.shape[1], not torch.equal(before, _generator_state(random)))

    def fault_of_nodes(self, last: int) -> Fault | None:
        """Compare the cell with ``run_cell``, with its real parts."""
        twin, given, random = self._twin, self._given, self.random

        def nodes(
            s0: Tensor, s1: Tensor, weights: Tensor, edge_weights: Tensor | None = None
        ) -> Tensor:
            return run_cell(twin, s0, s1, weights, edge_weights, last)

        for training, way in ((True, self.ways[0]), (False, self.ways[-1])):
            before = [buffer.clone() for buffer in twin.buffers()]
            expected = observe_cell(twin, way.of(twin), given, way, training, random)
            for buffer, value in zip(twin.buffers(), before, strict=True):
                buffer.copy_(value)
            try:
                found = observe_cell(twin, nodes, given, way, training, random)
            except Exception as error:
                return f"it does not run node by node: {one_line(error)}", None
            difference = first_difference(found, expected, random.dtype)
            if difference is not None:
                return differs(difference, training, way.name)
        return None
