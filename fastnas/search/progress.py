# SPDX-License-Identifier: Apache-2.0
"""How a search tells what it is doing: subclass :class:`Progress`, or take the lines of text."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TextIO

if TYPE_CHECKING:
    from fastnas.search.loop import Search
    from fastnas.search.result import SearchResult


@dataclass(frozen=True)
class StepReport:
    """State of the current epoch.

    Attributes:
        phase: training, or the test of the supernet after it.
        epoch: number of the epoch, from 1.
        epochs: how many there are.
        step: batches done in this phase.
        steps: how many there are.
        loss: mean loss of the weights' batches of this epoch; in validation, of the batches so far.
            None where it is not finite.
        accuracy: share of them classified rightly.
        arch_loss: mean loss of the architecture's batches, None while it is frozen.
        lr: learning rate of the weights.
        seconds_left: estimate for the rest of the search, None before there is one.
    """

    phase: Literal["train", "validation"]
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float | None
    accuracy: float | None
    arch_loss: float | None
    lr: float
    seconds_left: float | None


class Progress:
    """Receives what happens; the methods of this class do nothing."""

    def start(self, search: Search) -> None:
        """The search begins, or goes on (``search.epoch``, ``search.step`` say where)."""

    def note(self, text: str) -> None:
        """The search has decided something about itself, such as its memory format."""

    def step(self, report: StepReport) -> None:
        """Some more iterations are done (``config.log_every``, and at the end of a phase)."""

    def epoch(self, record: Mapping[str, Any], genotype: Any) -> None:
        """An epoch is over: its line of ``metrics.jsonl``, and the genotype as of now."""

    def warning(self, text: str) -> None:
        """Something to worry about, and which option may help.

        It was seen in the epoch that is over, or is known before the first one.
        """

    def end(self, result: SearchResult) -> None:
        """The search is over."""

    def stop(self, reason: BaseException) -> None:
        """The search stops early, through a signal or an error, which is raised afterwards."""


class Lines:
    """Lines of text on a stream: also for those who read a log, with the time that is left.

    Args:
        stream: where to write; standard output by default.
        every: seconds without a line after which a report of steps makes one.
    """

    def __init__(self, stream: TextIO | None = None, every: float = 60.0) -> None:
        self._stream = stream
        self._every = every
        self._last = time.monotonic()

    def step(self, report: StepReport) -> None:
        """A line now and then, where epochs are long."""
        if time.monotonic() - self._last < self._every:
            return
        parts = [f"epoch {report.epoch}/{report.epochs}", f"step {report.step}/{report.steps}"]
        if report.phase == "validation":
            parts[1] = f"test {parts[1]}"
        if report.loss is not None and report.accuracy is not None:
            parts += [f"loss {report.loss:.4f}", f"accuracy {report.accuracy:.1%}"]
        self.write(", ".join([*parts, *self.left(report.seconds_left)]))

    @staticmethod
    def left(seconds: float | None) -> list[str]:
        """The time that is left, where there is an estimate and something to do."""
        return [f"{clock(seconds)} left"] if seconds else []

    def write(self, line: str) -> None:
        """Write one line at once."""
        self._last = time.monotonic()
        print(line, file=self._stream or sys.stdout, flush=True)


def clock(seconds: float) -> str:
    """A duration as minutes and seconds, with hours where there are any: ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def against_target(record: Mapping[str, Any]) -> list[str]:
    """What the record of an epoch says of the target, in words; nothing where there is none.

    ``macs 98.1M of 100M`` is the predicted cost of the genotype; where a genotype's cost is
    not the sum of its choices, ``expected macs`` is that of the supernet.
    """
    lines = []
    for name in ("macs", "params", "latency"):
        if name in record:
            facts = record[name]
            derived = facts.get("derived")
            words = name if derived is not None else f"expected {name}"
            value = facts["expected"] if derived is None else derived
            lines.append(f"{words} {_amount(value, name)} of {_amount(facts['target'], name)}")
    return lines


def _amount(value: float, name: str) -> str:
    if name == "latency":
        return f"{value:.4g} ms"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def signs(record: Mapping[str, Any]) -> list[str]:
    """What an epoch's record has of the signs of a collapse: entropy, skip connections, Hessian."""
    parts = []
    if record["entropy"]:
        parts.append(f"entropy {sum(record['entropy'].values()) / len(record['entropy']):.3f}")
    if record["skip_connects"] is not None:
        counts = [f"{skips} of {kept}" for skips, kept in record["skip_connects"].values()]
        parts.append(f"skip connections {' + '.join(counts)}")
    if record["eigenvalue"] is not None:
        parts.append(f"Hessian {record['eigenvalue']:.4g}")
    return parts


def conclusions(result: SearchResult) -> list[str]:
    """How a search ended, where there is more to say than its genotype."""
    lines = []
    if result.stopped is not None:
        lines.append(
            f"stopped after epoch {len(result.history)}, where the eigenvalue of the Hessian had "
            f"risen; the genotype is of epoch {result.stopped}"
        )
    if result.gap is not None:
        lines.append(f"discretization gap (validation accuracy): {result.gap}")
    return lines


class TextProgress(Progress):
    """One line of text for the start, each epoch, and the end, and one a minute in long epochs.

    Args:
        stream: where to write; standard output by default.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._lines = Lines(stream)
        self._write = self._lines.write
        self._search: Search | None = None

    def step(self, report: StepReport) -> None:
        """A line where the last one was a minute ago."""
        self._lines.step(report)

    def start(self, search: Search) -> None:
        """Say what is searched."""
        self._search = search
        c = search.config
        where = f", {c.out}" if c.out else ""
        begun = f", continued after epoch {search.epoch}" if search.resumed else ""
        self._write(f"search: {c.space} by {c.method} on {c.data}, {search.device}{where}{begun}")

    def note(self, text: str) -> None:
        """What the search has decided."""
        self._write(text)

    def epoch(self, record: Mapping[str, Any], genotype: Any) -> None:
        """Losses and accuracies."""
        parts = [
            f"epoch {record['epoch']}",
            f"loss {record['train_loss']:.4f}",
            f"accuracy {record['train_accuracy']:.1%}",
        ]
        if record["arch_loss"] is not None:
            parts.append(f"architecture loss {record['arch_loss']:.4f}")
        if record["val_loss"] is not None:
            parts.append(f"validation loss {record['val_loss']:.4f}")
            parts.append(f"validation accuracy {record['val_accuracy']:.1%}")
        parts += against_target(record)
        parts.append(f"lr {record['lr']:.4g}")
        parts += signs(record)
        parts.append(f"{record['seconds']:.1f} s")
        left = None if self._search is None else self._search.seconds_left
        self._write(", ".join([*parts, *self._lines.left(left)]))

    def warning(self, text: str) -> None:
        """A line that begins with ``warning:``."""
        self._write(f"warning: {text}")

    def end(self, result: SearchResult) -> None:
        """What the search ended with, and the genotype."""
        for line in conclusions(result):
            self._write(line)
        self._write(str(result.genotype))
        for line in against_target(result.history[-1]):
            self._write(line)
