# SPDX-License-Identifier: Apache-2.0
"""``--processes N``: a command in several processes of this machine, without ``torchrun``."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

from fastnas.cli import SAID
from fastnas.cli.terminal import error_console

__all__ = ["PROCESSES_HELP", "in_processes", "run_in_processes"]

PROCESSES_HELP = (
    "Processes of this machine that share every batch, each on a GPU of its own or a part of the "
    "CPU. Gradients are averaged, so that it stays one run; BatchNorm sees the share of a process. "
    "On several machines, torchrun starts them."
)

_GRACE = 30.0
"""Seconds that the others have for their end when one process ends with an error."""


def in_processes(argv: Sequence[str]) -> tuple[int, list[str]]:
    """How many processes a command is to run in, and the words for each of them.

    Args:
        argv: the words of the command line, parsed before.

    Raises:
        ValueError: less than one, or torchrun has started processes already.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--processes", type=int, default=1)
    known, rest = parser.parse_known_args(list(argv))
    number: int = known.processes
    if number < 1:
        raise ValueError(f"processes: expected 1 or more, but got {number}")
    if number > 1 and dist.is_available() and dist.is_torchelastic_launched():
        raise ValueError(
            f"processes: expected 1 under torchrun, which starts them itself, but got {number}"
        )
    return number, rest


def run_in_processes(number: int, words: list[str]) -> int:
    """Run ``fastnas WORDS`` in so many processes and wait for them.

    Signals are handed on, once each: a process that also got a Ctrl-C from the terminal would take
    it for the second one, which is obeyed at once.

    Returns:
        The exit code of the first process that ended with an error, else 0.
    """
    threads = max(1, torch.get_num_threads() // number)
    values = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    with tempfile.TemporaryDirectory(prefix="fastnas-") as said:
        with _environment(**values, **{SAID: said}):
            context: Any = start_processes(
                _child,
                (number, _free_port(), words),
                nprocs=number,
                join=False,
                start_method="spawn",
            )
        return _wait_for(context)


def _wait_for(context: Any) -> int:
    """Wait for processes that were started; the exit code of the first that failed, or 0."""
    with _handed_on(context.pids()):
        try:
            while not context.join(grace_period=_GRACE):
                pass
        except ProcessExitedException as end:
            if end.exit_code > 0:  # it has said why
                return int(end.exit_code)
            error_console().print(
                f"process {end.error_index} was ended by {end.signal_name}", style="bold red"
            )
            return 128 - int(end.exit_code)
    return 0


def _child(rank: int, number: int, port: int, words: list[str]) -> None:
    """One of the processes; they meet as those of torchrun do."""
    os.setsid()  # signals of the terminal reach the parent alone
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(number),
        WORLD_SIZE=str(number),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="fastnas",
    )
    from fastnas.cli import main

    sys.exit(main(words))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _handed_on(pids: Sequence[int]) -> Iterator[None]:
    """Within the block, signals that end a command go to its processes."""

    def hand_on(sent: int, frame: object) -> None:
        for pid in pids:
            try:
                os.kill(pid, sent)
            except ProcessLookupError:
                pass  # it is over

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, hand_on)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
