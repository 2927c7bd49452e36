# SPDX-License-Identifier: Apache-2.0
"""Which memory format is the faster one here: a few steps in both at the start of a run.

The trial costs a long run about two hundredths of its time and is not made for a short one, which
takes the format that is usually faster on its kind of device.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch

from fastnas._timing import timed
from fastnas.methods import Batch, Learner, Moment
from fastnas.parallel import ALONE
from fastnas.search.runtime import is_out_of_memory, memory_layout

__all__ = ["LEAST_STEPS", "LayoutChoice", "begin_trial", "choose_layout"]

Step = Callable[[], object]

LEAST_STEPS = 400
"""Shorter runs get no trial: two steps of each format would be more than a hundredth of them.

Where steps are recorded and replayed, that many times the steps until then and one more.
"""

_SHARE = 0.02
_ROUNDS = 5
# Steps of one format vary by less than this; a format this much slower need not be timed again.
_CLEAR = 1.3
# First steps pay for what is set up on the way, so they have to differ by more.
_CLEAR_AT_FIRST = 2.0


class LayoutChoice(NamedTuple):
    """A memory format, and in one line what the trial found; None where there was none."""

    name: str
    found: str | None


def begin_trial(
    learner: Learner,
    layout: torch.memory_format,
    make_batch: Callable[[], Batch],
    frozen: bool,
    moment: Moment,
) -> Step:
    """Set up a copy of a learner in a format; what is returned makes one step of it.

    Args:
        learner: what is copied; the copy is one of a single process.
        layout: the format.
        make_batch: gives a batch for the weights, and one for the architecture.
        frozen: the architecture is not trained.
        moment: of each step.
    """
    learner = copy.deepcopy(learner)
    learner.group = ALONE
    learner.lay_out(layout)
    learner.supernet.train()
    train, val = make_batch(), make_batch()
    draw = None if frozen else lambda: val

    def step() -> object:
        return learner.method.iteration(learner, train, draw, moment)

    for _ in range(learner.lead):
        step()
    return step


def choose_layout(
    begin: Callable[[torch.memory_format], Step],
    steps: int,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
    lead: int = 0,
) -> LayoutChoice | None:
    """Choose ``contiguous`` or ``channels_last`` for a run.

    Args:
        begin: sets up a copy of the run in a format; what it returns makes one step of it, which
            takes as long as the later ones.
        steps: steps of the whole run.
        device: where it runs.
        stop: asked between the steps; the trial ends when it says so.
        lead: steps that ``begin`` makes for that.

    Returns:
        The choice; None if ``stop`` ended the trial.
    """
    usual = _name(memory_layout("auto", device))
    if steps < LEAST_STEPS * (1 + lead):
        return LayoutChoice(usual, None)
    other = "contiguous" if usual == "channels_last" else "channels_last"
    trial = _Trial(device, stop)
    try:
        trial.begin(usual, begin)
        # What is left of the allowance goes on until the format is clear.
        allowance = _SHARE * steps * trial.measure(usual)
        trial.begin(other, begin)
        if trial.first[other] < _CLEAR_AT_FIRST * trial.first[usual]:
            trial.measure(other)
            while trial.rounds < _ROUNDS and not trial.clear and trial.next < allowance:
                trial.measure(usual)
                trial.measure(other)
    except _Stopped:
        return None
    except Exception as error:
        # Both at once may be too much where one alone is not.
        if usual in trial.first and other not in trial.first and is_out_of_memory(error):
            return LayoutChoice(usual, f"{usual}: there is no memory to try {other} beside it")
        raise
    best, worst = sorted((usual, other), key=trial.seconds)
    which = "a step" if trial.rounds else "the first step"
    return LayoutChoice(
        best,
        f"{best}, {trial.seconds(best):.3g} s a step against {trial.seconds(worst):.3g} s {which} "
        f"in {worst}",
    )


class _Stopped(Exception):
    """The run is to stop."""


class _Trial:
    """Steps of both formats and how long they took."""

    def __init__(self, device: torch.device, stop: Callable[[], bool]) -> None:
        self._device, self._stop = device, stop
        self._steps: dict[str, Step] = {}
        self._seconds: dict[str, list[float]] = {}
        self._spent = 0.0
        self.first: dict[str, float] = {}

    def begin(self, name: str, begin: Callable[[torch.memory_format], Step]) -> None:
        """Set a format up and make its first step, which pays for allocations and plans."""
        self._steps[name] = begin(memory_layout(name, self._device))
        self._seconds[name] = []
        self.first[name] = self._time(name)

    def measure(self, name: str) -> float:
        """Time one more step."""
        self._seconds[name].append(self._time(name))
        return self._seconds[name][-1]

    def seconds(self, name: str) -> float:
        """Of a step, as far as is known."""
        return statistics.median(self._seconds[name] or [self.first[name]])

    @property
    def rounds(self) -> int:
        """Steps timed of each format."""
        return min(map(len, self._seconds.values()))

    @property
    def clear(self) -> bool:
        """Whether every step of one format was a good deal faster than any of the other."""
        one, two = self._seconds.values()
        return max(one) * _CLEAR < min(two) or max(two) * _CLEAR < min(one)

    @property
    def next(self) -> float:
        """Seconds spent after one more round."""
        return self._spent + sum(map(self.seconds, self._steps))

    def _time(self, name: str) -> float:
        if self._stop():
            raise _Stopped
        seconds = timed(self._steps[name], self._device)
        self._spent += seconds
        return seconds


def _name(layout: torch.memory_format) -> str:
    return "channels_last" if layout == torch.channels_last else "contiguous"
