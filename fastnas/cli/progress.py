# SPDX-License-Identifier: Apache-2.0
"""Progress of searches and evaluations: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from fastnas import evaluate, search
from fastnas.cli.terminal import console, genotype_table
from fastnas.search.progress import StepReport, against_target, clock, conclusions, signs

if TYPE_CHECKING:
    from fastnas.evaluate import Evaluation, EvaluationResult
    from fastnas.search import Search, SearchResult

__all__ = ["evaluation_progress", "search_progress"]


def search_progress(target: Console | None = None) -> search.Progress:
    """What shows a search on ``target``, standard output by default."""
    target = console() if target is None else target
    return _SearchDisplay(target) if _live(target) else _SearchText()


def evaluation_progress(target: Console | None = None) -> evaluate.Progress:
    """What shows an evaluation on ``target``, standard output by default."""
    target = console() if target is None else target
    return _EvaluationDisplay(target) if _live(target) else _EvaluationText()


def _live(target: Console) -> bool:
    return target.is_terminal and not target.is_dumb_terminal


class _Bar:
    """A bar over the whole run, with what is under it; gone when the run is over."""

    def __init__(self, target: Console) -> None:
        self._console = target
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[left]}", style="cyan"),
            console=target,
        )
        self._task = self._bar.add_task("starting", total=None, left="")
        # On a line of their own, so that a narrow terminal cuts off the last of them only.
        self._numbers = Text(no_wrap=True, overflow="ellipsis")
        self._below: RenderableType | None = None
        self._display = Live(console=target, transient=True, refresh_per_second=5)

    def start(self) -> None:
        self._display.start()
        self._show()

    def stop(self) -> None:
        self._display.stop()

    def below(self, content: RenderableType) -> None:
        self._below = Padding(content, (1, 0, 0, 2))
        self._show()

    def step(self, report: StepReport) -> None:
        testing = report.phase == "validation"
        done = report.epoch if testing else report.epoch - 1 + report.step / report.steps
        numbers = f"testing {report.step}/{report.steps}  " if testing else ""
        self._numbers.plain = numbers + _numbers(report)
        self._bar.update(
            self._task,
            description=f"epoch {report.epoch}/{report.epochs}",
            completed=done,
            total=report.epochs,
            left="" if report.seconds_left is None else f"{clock(report.seconds_left)} left",
        )
        self._show()

    def _show(self) -> None:
        parts: list[RenderableType] = [self._bar.get_renderable(), self._numbers]
        if self._below is not None:
            parts.append(self._below)
        self._display.update(Group(*parts))


class _SearchText(search.TextProgress):
    """Plain lines, and at the end what to do next."""

    def end(self, result: SearchResult) -> None:
        """The genotype and what comes next."""
        super().end(result)
        for hint in _after_search(result):
            self._write(hint)


class _SearchDisplay(search.Progress):
    """A bar with the current genotype under it, and a line for each epoch above."""

    def __init__(self, target: Console) -> None:
        self._console = target
        self._bar = _Bar(target)
        self._epochs = 0

    def start(self, search: Search) -> None:
        """Say what is searched and show the bar."""
        c = search.config
        self._epochs = c.epochs
        self._console.print(
            _headline(f"Searching {c.space} by {c.method}", c.data, search.device, search.path)
        )
        if search.resumed:
            self._console.print(_continued(search.epoch, search.step))
        self._console.print(_header(_SEARCH_COLUMNS))
        self._bar.start()
        self._bar.below(genotype_table(search.genotype()))

    def note(self, text: str) -> None:
        """Leave a line above the bar."""
        self._console.print(text, style="dim", markup=False)

    def step(self, report: StepReport) -> None:
        """Move the bar."""
        self._bar.step(report)

    def epoch(self, record: Mapping[str, Any], genotype: Any) -> None:
        """Leave a line above the bar and show the new genotype."""
        self._console.print(_row(record, self._epochs, _SEARCH_COLUMNS))
        self._bar.below(Group(genotype_table(genotype), Text(", ".join(signs(record)), "dim")))

    def warning(self, text: str) -> None:
        """Leave it above the bar."""
        self._console.print(f"warning: {text}", style="yellow", markup=False)

    def end(self, result: SearchResult) -> None:
        """Show what was found."""
        self._bar.stop()
        self._console.print("\nWhat was found:", style="bold")
        for line in conclusions(result):
            self._console.print(line, markup=False)
        self._console.print(Padding(genotype_table(result.genotype), (0, 0, 1, 2)))
        for line in against_target(result.history[-1]):
            self._console.print(line)
        for hint in _after_search(result):
            self._console.print(hint)

    def stop(self, reason: BaseException) -> None:
        """Give the terminal back."""
        self._bar.stop()


class _EvaluationText(evaluate.TextProgress):
    """Plain lines, and at the end what to do next."""

    def end(self, result: EvaluationResult) -> None:
        """The figures and what comes next."""
        super().end(result)
        for hint in _after_evaluation(result):
            self._write(hint)


class _EvaluationDisplay(evaluate.Progress):
    """A bar, and a line for each epoch above it."""

    def __init__(self, target: Console) -> None:
        self._console = target
        self._bar = _Bar(target)
        self._epochs = 0

    def start(self, evaluation: Evaluation) -> None:
        """Say what is trained and show the bar."""
        e = evaluation
        self._epochs = e.config.epochs
        self._console.print(
            _headline(f"Training {e.source.label}", e.data.name, e.device, e.path),
            genotype_table(e.source.genotype),
            f"{e.size()}{e.parameters:,} parameters, {e.operations.macs:,} MACs per image\n",
            sep="\n",
        )
        if e.resumed:
            self._console.print(_continued(e.epoch, e.step))
        self._console.print(_header(_EVALUATION_COLUMNS))
        self._bar.start()

    def note(self, text: str) -> None:
        """Leave a line above the bar."""
        self._console.print(text, style="dim", markup=False)

    def step(self, report: StepReport) -> None:
        """Move the bar."""
        self._bar.step(report)

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Leave a line above the bar."""
        self._console.print(_row(record, self._epochs, _EVALUATION_COLUMNS))

    def end(self, result: EvaluationResult) -> None:
        """Show the figures."""
        self._bar.stop()
        self._console.print()
        rows = result.summary()
        width = max(len(name) for name, _ in rows)
        for number, (name, value) in enumerate(rows):
            self._console.print(f"  {name:<{width}}  {value}", style="" if number else "bold")
        for hint in _after_evaluation(result):
            self._console.print(f"\n{hint}", markup=False)

    def stop(self, reason: BaseException) -> None:
        """Give the terminal back."""
        self._bar.stop()


def _headline(what: str, data: str, device: Any, path: Any) -> Text:
    where = "" if path is None else f", into {path}"
    return Text(what, style="bold").append(f" on {data} ({device}){where}", style="not bold")


def _continued(epoch: int, step: int) -> str:
    return f"Going on after epoch {epoch}, step {step}."


# Title in the list of epochs -> prefix of the fields in a record.
_SEARCH_COLUMNS = {"training": "train", "architecture": "arch", "validation": "val"}
_EVALUATION_COLUMNS = {"training": "train", "test": "test"}


def _header(columns: Mapping[str, str]) -> Text:
    titles = "".join(f"  {title:^15}" for title in columns)
    names = "".join(f"  {'loss':>6} {'accuracy':>8}" for _ in columns)
    return Text(f"{'':>9}{titles}\n{'epoch':>9}{names}  {'time':>8}", style="dim")


def _row(record: Mapping[str, Any], epochs: int, columns: Mapping[str, str]) -> str:
    """One line an epoch, under :func:`_header`."""
    cells = [f"{record['epoch']}/{epochs}".rjust(9)]
    for prefix in columns.values():
        loss, accuracy = record[f"{prefix}_loss"], record[f"{prefix}_accuracy"]
        shown = "" if loss is None else f"{loss:.3f}"
        cells.append(f"{shown:>6} {'' if accuracy is None else f'{accuracy:.1%}':>8}")
    return "  ".join([*cells, f"{record['seconds']:.1f} s".rjust(8)])


def _numbers(report: StepReport) -> str:
    parts = []
    if report.loss is not None:
        parts.append(f"loss {report.loss:.3f}")
    if report.accuracy is not None:
        parts.append(f"accuracy {report.accuracy:.1%}")
    if report.arch_loss is not None:
        parts.append(f"arch loss {report.arch_loss:.3f}")
    return "  ".join(parts)


def _after_search(result: SearchResult) -> list[str]:
    """What to tell the user when a search is over."""
    hints = []
    if result.path is not None:
        hints.append(f"Written to {result.path}. Train it with: fastnas eval {result.path}")
    return hints


def _after_evaluation(result: EvaluationResult) -> list[str]:
    """What to tell the user when an evaluation is over."""
    if result.path is None:
        return []
    advice = f"As a file that needs no fastnas: fastnas export {result.path}"
    return [f"Written to {result.path}. {advice}"]
