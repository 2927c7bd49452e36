# SPDX-License-Identifier: Apache-2.0
"""How an evaluation tells what it is doing: subclass :class:`Progress`, or take lines of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

from fastnas.search.progress import Lines, StepReport

if TYPE_CHECKING:
    from fastnas.evaluate.result import EvaluationResult
    from fastnas.evaluate.train import Evaluation

__all__ = ["Progress", "StepReport", "TextProgress"]


class Progress:
    """Receives what happens; the methods of this class do nothing."""

    def start(self, evaluation: Evaluation) -> None:
        """The training begins, or goes on (``evaluation.epoch``, ``evaluation.step`` say where)."""

    def note(self, text: str) -> None:
        """The training has decided something about itself, such as its memory format."""

    def step(self, report: StepReport) -> None:
        """Some more batches are done (``config.log_every``, and at the end of a phase)."""

    def epoch(self, record: Mapping[str, Any]) -> None:
        """An epoch is over: its line of ``metrics.jsonl``."""

    def end(self, result: EvaluationResult) -> None:
        """The training is over."""

    def stop(self, reason: BaseException) -> None:
        """The training stops early, through a signal or an error, which is raised afterwards."""


class TextProgress(Progress):
    """One line of text for the start, each epoch, and the end, and one a minute in long epochs.

    Args:
        stream: where to write; standard output by default.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._lines = Lines(stream)
        self._write = self._lines.write
        self._evaluation: Evaluation | None = None

    def step(self, report: StepReport) -> None:
        """A line where the last one was a minute ago."""
        self._lines.step(report)

    def start(self, evaluation: Evaluation) -> None:
        """Say what is trained."""
        self._evaluation = e = evaluation
        where = "" if e.path is None else f", {e.path}"
        begun = f", continued after epoch {e.epoch}" if e.resumed else ""
        self._write(
            f"evaluation: {e.source.label} on {e.data.name}, {e.size()}{e.parameters:,} "
            f"parameters, {e.device}{where}{begun}"
        )

    def note(self, text: str) -> None:
        """What the training has decided."""
        self._write(text)

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Losses and accuracies."""
        parts = [
            f"epoch {record['epoch']}",
            f"loss {record['train_loss']:.4f}",
            f"accuracy {record['train_accuracy']:.1%}",
            f"test loss {record['test_loss']:.4f}",
            f"test accuracy {record['test_accuracy']:.1%}",
            f"lr {record['lr']:.4g}",
            f"{record['seconds']:.1f} s",
        ]
        left = None if self._evaluation is None else self._evaluation.seconds_left
        self._write(", ".join([*parts, *self._lines.left(left)]))

    def end(self, result: EvaluationResult) -> None:
        """Accuracy, parameters and multiply-accumulates."""
        for name, value in result.summary():
            self._write(f"{name}: {value}")
