# SPDX-License-Identifier: Apache-2.0
"""``fastnas bench``."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from fastnas.bench.config import BenchConfig
from fastnas.bench.session import Comparison, Session
from fastnas.cli.terminal import console, error_console
from fastnas.search.files import write_json
from fastnas.search.interrupts import RunInterrupted

__all__ = ["main"]

_DESCRIPTION = "\n\n".join(
    (  # paragraphs of one line: the parser does not wrap them
        "Compare a search step of fastnas with the plain formula, on this machine, in two minutes.",
        "Each step is a forward and a backward with the gradients of weights and architecture.",
        "Ctrl-C ends it with what is measured so far.",
    )
)
_WIDE = 110
_TITLES = {"darts": "DARTS", "pc_darts": "PC-DARTS, one in four channels"}


def main(argv: Sequence[str]) -> int:
    """Run the command with the words after ``fastnas bench``."""
    config = tyro.cli(BenchConfig, prog="fastnas bench", description=_DESCRIPTION, args=list(argv))
    if config.json is not None and not Path(config.json).absolute().parent.is_dir():
        raise ValueError(f"json: there is no folder {Path(config.json).parent}")
    target, status = console(), error_console()
    # Status on a terminal moves; elsewhere each word of it is a line.
    with status.status("starting") as shown:

        def tell(text: str) -> None:
            shown.update(text) if status.is_terminal else status.print(text)

        session = Session(config, tell)
        try:
            with _obeying_sigterm():
                session.run()
        finally:
            shown.stop()
            if any(comparison.measured() for comparison in session.comparisons):
                show(session, target)
                if config.json is not None:
                    write_json(config.json, session.to_dict())
            elif session.comparisons:
                status.print("Stopped before anything was measured.", style="yellow")
    return 0


@contextlib.contextmanager
def _obeying_sigterm() -> Iterator[None]:
    """Let SIGTERM end it as Ctrl-C does; signals are the main thread's alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise RunInterrupted("stopped by SIGTERM", number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def show(session: Session, target: Console) -> None:
    """Print the tables of what is measured."""
    machine = session.machine
    if machine is None:
        return
    if not target.is_terminal:  # a file has room
        target.width = max(target.width, _WIDE)
    target.print(
        f"{machine.name}, {machine.device}, {machine.threads} threads, torch {machine.torch}, "
        f"fastnas {machine.fastnas}; copies {machine.copy_bandwidth / 1e9:.1f} GB/s, matrix "
        f"products {machine.gemm_rate / 1e9:.0f} GFLOP/s"
    )
    if machine.load_average > 0.5:
        target.print(
            f"Load average {machine.load_average:.1f} before: not alone on this machine, "
            "times mean little.",
            style="yellow",
        )
    if session.memory_limit is not None:
        target.print(
            f"Step: median of the rounds. Largest batch: in {_size(session.memory_limit)}, "
            "estimated from the peak. Floor: share of what copies and matrix products allow."
        )
    for comparison in session.comparisons:
        target.print()
        target.print(_table(session, comparison))
        for name, reason in comparison.left_out.items():
            target.print(f"Not measured: {name}: {reason}.", markup=False)
    if not session.finished:
        target.print("\nStopped: this is what was measured until then.", style="yellow")


def _table(session: Session, comparison: Comparison) -> Table:
    config = session.config
    rounds = comparison.times.rounds if comparison.times.seconds else 0
    table = Table(
        title=f"{_TITLES[comparison.method]}: C {config.channels}, {config.layers} cells, batch "
        f"{comparison.batch_size}, {config.image_size}x{config.image_size}, {rounds} rounds",
        title_justify="left",
    )
    table.add_column("form")  # where there is little room this wraps, and no figure is cut
    for title in ("step", "against\nbest stock", "peak", "saved", "largest\nbatch", "floor"):
        table.add_column(title, justify="right", no_wrap=True)
    best = comparison.best_stock()
    for form in comparison.measured():
        seconds = comparison.times.median(form.name)
        ratio = None if best is None else comparison.times.median(best.name) / seconds
        batch = session.largest_batch(comparison, form)
        table.add_row(
            form.name,
            f"{seconds * 1e3:.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.2f} ms",
            "-" if ratio is None else f"{ratio:.2f}x",
            "-" if form.peak is None else _size(form.peak),
            "-" if form.saved is None else _size(form.saved),
            "-" if batch is None else str(batch),
            f"{session.share_of_floor(comparison, form):.0%}",
            style="" if form.stock else "bold",
        )
    return table


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
