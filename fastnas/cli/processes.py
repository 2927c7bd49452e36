# SPDX-License-Identifier: Apache-2.0
"""``--processes N``: a command in several processes of this machine, without ``torchrun``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

from fastnas.cli.terminal import error_console
from fastnas.parallel import MEETING, Group, Share

__all__ = ["PROCESSES_HELP", "in_processes", "run_in_processes"]

PROCESSES_HELP = (
    "Processes of this machine that share every batch, each on a GPU of its own or a part of the "
    "CPU. Gradients are averaged, so that it stays one run; BatchNorm sees the share of a process. "
    "On several machines, torchrun starts them."
)

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

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


def run_in_processes(number: int, words: list[str], batch_size: int) -> int:
    """Run ``fastnas WORDS`` in so many processes and wait for them.

    Signals are handed on, once each: a process that also got a Ctrl-C from the terminal would take
    it for the second one, which is obeyed at once.

    Returns:
        The exit code of the first process that ended with an error, else 0.

    Raises:
        ValueError: the processes cannot share a batch of that size.
    """
    # Seen before they are started, which takes seconds.
    Group(Share(0, number)).batch_size(batch_size, batch_size)
    threads = max(1, torch.get_num_threads() // number)
    pids: list[int] = []
    with (
        tempfile.TemporaryDirectory(prefix="fastnas-") as folder,
        _environment(**{"OMP_NUM_THREADS": str(threads), MEETING: folder}),
        _handed_on(pids),
    ):
        # Which would let signals through again, if it were to be started for the processes.
        resource_tracker.ensure_running()
        # Signals wait: here until there is somebody to hand them on to; in the processes, which
        # inherit this, until they have imported what they need.
        with _held_back():
            context: Any = start_processes(
                _child,
                (number, os.getpid(), words),
                nprocs=number,
                join=False,
                start_method="spawn",
            )
            pids += context.pids()
        return _wait_for(context)


def _wait_for(context: Any) -> int:
    """Wait for processes that were started; the exit code of the first that failed, or 0."""
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


def _child(rank: int, number: int, parent: int, words: list[str]) -> None:
    """One of the processes; they meet as those of torchrun do."""
    if os.getppid() != parent:
        os._exit(1)  # it has ended before this process could ask to be told of that
    os.setsid()  # signals of the terminal reach the parent alone
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(number),
        WORLD_SIZE=str(number),
        TORCHELASTIC_RUN_ID="fastnas",
    )
    from fastnas.cli import main

    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
        code = main(words)
    except KeyboardInterrupt:  # before main could see to it
        if rank == 0:
            error_console().print("interrupted", style="bold yellow")
        code = 128 + signal.SIGINT
    sys.exit(code)


@contextmanager
def _held_back() -> Iterator[None]:
    """Within the block, signals that end a command wait."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
    """Within the block, signals that end a command, or let it wait, go to its processes."""

    def send(number: int) -> None:
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass  # it is over

    def hand_on(number: int, frame: object) -> None:
        send(number)

    def pause(number: int, frame: object) -> None:
        send(signal.SIGSTOP)  # a process group of its own gets no SIGTSTP
        os.kill(os.getpid(), signal.SIGSTOP)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    handlers = dict.fromkeys(
        (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCONT), hand_on
    )
    for number, handler in {**handlers, signal.SIGTSTP: pause}.items():
        # With nohup a closed terminal is to be ignored; a Ctrl-C is not, though a shell without job
        # control starts what is in the background so.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
