# SPDX-License-Identifier: Apache-2.0
"""What a mixed op does around its candidates, proved with random maps in their place.

The real candidates show what is done with their outputs only as far as these happen to differ: one
that is zero, or two that agree, hide it. Maps with random coefficients hide nothing, and are cheap
enough for more shapes and weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastnas.nn.lent import lent_methods
from fastnas.nn.mixed_op import MixedOp
from fastnas.nn.proof.observation import (
    Random,
    Trial,
    clean_copy,
    first_difference,
    observe,
    one_line,
)
from fastnas.nn.proof.reading import Reading
from fastnas.nn.proof.signature import list_name, parts_in_list
from fastnas.nn.proof.watch import Watch, opaque

__all__ = ["StandIn", "fault_around_candidates"]


class StandIn(nn.Module):
    """Takes a candidate's place: one random number of every image, times a random pattern."""

    calls: Tensor

    def __init__(self, x: tuple[int, ...], y: tuple[int, ...], random: Random) -> None:
        """Map images of shape ``x`` to images of shape ``y``, both without a batch."""
        super().__init__()
        self.read = nn.Parameter(random.normal(*x) / math.sqrt(math.prod(x)))
        self.write = nn.Parameter(random.normal(*y))
        self.shift = nn.Parameter(random.normal(*y))
        self.register_buffer("calls", torch.zeros((), device=random.device))

    def forward(self, x: Tensor) -> Tensor:
        """Map a batch of images."""
        if torch.is_grad_enabled():  # ours may ask one for its shape, without gradients
            self.calls += 1
        return (x * self.read).sum((1, 2, 3), keepdim=True) * self.write + self.shift


class Setup(NamedTuple):
    """Shapes of one set of stand-ins, and whether the mixed op has to agree with them.

    It has to if its candidates map sizes that way. Others only help to take a branch that is there
    for other edges of the supernet; what does not agree on them counts as not taken.
    """

    batch: int
    size: tuple[int, int]
    out: tuple[int, int]
    required: bool
    #: Another number than that of the mixed op, where its forward reads one.
    k: int | None = None

    def __str__(self) -> str:
        sizes = "{}x{} to {}x{}".format(*self.size, *self.out)
        return f"random maps of {sizes}, batch of {self.batch}" + (f", k = {self.k}" * bool(self.k))


def fault_around_candidates(
    module: nn.Module,
    build: Callable[[nn.Module], nn.Module],
    reading: Reading,
    x: Tensor,
    y: Tensor,
    part: int,
) -> tuple[str, float | None] | None:
    """Find what ``module`` does other than the mixed op that ``build`` makes of it.

    Args:
        module: somebody's mixed op.
        build: makes ours of a module like ``module``.
        reading: what its forward is made of.
        x: an input it was run on with its real candidates, ``(N, C, H, W)``.
        y: what it returned, ``(N, C', H', W')``.
        part: how many channels of ``x`` the candidates see.

    Returns:
        The reason and the relative difference that belongs to it; None if there is no fault.
    """
    watch, random = Watch(reading), Random(x.device, x.dtype)
    agreed = False
    for setup in _setups(module, reading, x, y):
        mixed = part if setup.k is None else x.shape[1] // setup.k
        shapes = (mixed, *setup.size), (y.shape[1] - x.shape[1] + mixed, *setup.out)
        stand_ins = [StandIn(*shapes, random) for _ in parts_in_list(module)]
        theirs, ours = (_dress(module, setup, copy.deepcopy(stand_ins)) for _ in range(2))
        ours = build(ours)
        if setup.k is not None:
            vars(ours)["k"] = setup.k
        if (pool := theirs._modules.get("mp")) is not None:
            opaque(pool)
        for trial in _trials(setup, x.shape[1], len(stand_ins), random):
            for stand_in in [*parts_in_list(theirs), *parts_in_list(ours)]:
                stand_in.calls.zero_()
            try:
                expected = observe(theirs, trial, random, watch)
            except Exception:  # an input that the original refuses
                continue
            fault = _compare(ours, trial, random, expected)
            if fault is None:
                watch.keep()
                agreed |= setup.required
            elif setup.required:
                return fault
    if not agreed:
        return "it does not run on random maps in the place of its candidates", None
    reason = watch.fault()
    return None if reason is None else (reason, None)


def _compare(
    ours: nn.Module, trial: Trial, random: Random, expected: dict[str, Tensor]
) -> tuple[str, float | None] | None:
    try:
        observed = observe(ours, trial, random)
    except Exception as error:
        return f"ours does not run as its forward does: {one_line(error)}", None
    found = first_difference(observed, expected, random.dtype)
    return found and (f"it computes something else: {found[0]} differs", found[1])


def _setups(module: nn.Module, reading: Reading, x: Tensor, y: Tensor) -> Iterator[Setup]:
    """The sizes that the real candidates give, in other batches; then the usual other ones.

    The same with other numbers for ``k``, where that is read: methods of the mixed op may set it.
    """
    (h, w), (a, b) = x.shape[2:], y.shape[2:]
    if "k" in reading.settings and isinstance(k := vars(module).get("k"), int):
        required = bool(lent_methods(type(module), MixedOp))
        for other in {1, 2, x.shape[1]} - {k}:
            if x.shape[1] % other == 0:
                yield Setup(2, (h, w), (a, b), required, other)
    yield Setup(1, (h, w), (a, b), True)
    yield Setup(5, (2 * h, w), (2 * a, b), True)
    for out in ((h, w), (h // 2, w // 2)):
        if out != (a, b):
            yield Setup(2, (h, w), out, False)


def _dress(module: nn.Module, setup: Setup, stand_ins: list[StandIn]) -> nn.Module:
    """``module`` with stand-ins for candidates; its class and settings are the same."""
    twin = copy.copy(module)
    vars(twin)["_modules"] = {list_name(module): nn.ModuleList(stand_ins)}
    if setup.k is not None:
        vars(twin)["k"] = setup.k
    if (pool := module._modules.get("mp")) is not None:
        twin._modules["mp"] = clean_copy(pool, stand_ins[0].read.dtype)
    if not setup.required and isinstance(vars(module).get("stride"), int):
        vars(twin)["stride"] = setup.size[0] // setup.out[0]
    return twin


def _trials(setup: Setup, channels: int, count: int, random: Random) -> Iterator[Trial]:
    """Weights of any sign; with zeros; one only; none at all. In both modes."""
    random.seed()
    x = random.normal(setup.batch, channels, *setup.size)
    weights = random.normal(count)
    odd, first = (torch.arange(count, device=x.device) % 2 == 1), weights.new_zeros(count)
    first[0] = weights[0]
    rows = {
        "any weights": weights,
        "some weights zero": weights * odd,
        "all weights zero but one": first,
        "all weights zero": 0 * weights,
    }
    for training in (True, False):
        mode = "training" if training else "evaluation"
        for name, row in rows.items():
            yield Trial(f"{mode}, {setup}, {name}", x, row, training)
