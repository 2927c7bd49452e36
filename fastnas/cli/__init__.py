# SPDX-License-Identifier: Apache-2.0
"""The command ``fastnas``.

What a command needs is imported when that command runs; ``fastnas --help`` needs none of it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from importlib import import_module

__all__ = ["main"]

# Name, module, what it does.
_COMMANDS = (
    (
        "search",
        "fastnas.cli.search",
        "Search an architecture, by DARTS and its relatives.",
    ),
    ("eval", "fastnas.cli.evaluate", "Train the network of a genotype and test it."),
    ("export", "fastnas.cli.export", "Write a trained network as a file that needs no fastnas."),
    ("gap", "fastnas.cli.gap", "Test a searched supernet before and after it is pruned."),
    ("genotypes", "fastnas.cli.genotypes", "List the published genotypes, or print one."),
    (
        "latency",
        "fastnas.cli.latency",
        "Time the blocks of a space on this machine, and check what they predict.",
    ),
    ("bench", "fastnas.cli.bench", "Compare the speed of a search step with plain PyTorch, here."),
    ("info", "fastnas.cli.info", "Print versions, devices and the kernels that were built."),
)

_PATIENCE = 3.0
"""Seconds that a process waits for the first one, before it says an error of its own."""

_EXIT_USAGE = 2
_EXIT_SIGNAL = 128


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the words after ``fastnas``; default: those of this process.

    Returns:
        The exit code: 0; 2 after a mistake of the user, or a run that cannot go on, told in one
        sentence; 128 and the number of the signal that ended it: 130 after Ctrl-C, 143 after
        SIGTERM, 141 where the reader of the output was gone. With FASTNAS_DEBUG=1 in the
        environment mistakes raise instead, with their traceback.
    """
    _prepare_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(words)
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        # A run that was stopped tells its signal, and how to go on; once, if processes share it.
        if not _process():
            _say_error(str(stop) or "interrupted", style="bold yellow")
        code = _EXIT_SIGNAL + getattr(stop, "signal", signal.SIGINT)
    except BrokenPipeError:  # the reader (`| head`) has seen enough
        code = _EXIT_SIGNAL + signal.SIGPIPE
    except Exception as error:
        if _debugging() or not _is_user_error(error):
            raise
        if not _another_said_why(error):
            number = _process()
            _say_error((f"process {number}: " if number else "") + _sentence(error))
        code = _EXIT_USAGE
    _leave_stdout()
    return code


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if words[0] in ("-V", "--version"):
        from fastnas._version import __version__

        print(f"fastnas {__version__}")
        return 0
    modules = {name: module for name, module, _ in _COMMANDS}
    if words[0] not in modules:
        known = ", ".join(modules)
        _say_error(f"fastnas: expected a command ({known}), but got {words[0]!r}")
        return _EXIT_USAGE
    with _interrupt_afterwards():
        command = import_module(modules[words[0]])
    try:
        return command.main(words[1:])
    except SystemExit as end:  # of the option parser, which has said what it had to say
        return end.code if isinstance(end.code, int) else _EXIT_USAGE


@contextlib.contextmanager
def _interrupt_afterwards() -> Iterator[None]:
    """Hold a Ctrl-C back: modules in C that are being imported can swallow a KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def _prepare_streams() -> None:
    """Make standard output and error take any text, also where they were closed or are ASCII."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _leave_stdout() -> None:
    """Let what standard output did not take go: Python would try again at the end, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _process() -> int:
    """The number of this process, where torchrun has started several; else 0."""
    rank = os.environ.get("RANK", "") if "TORCHELASTIC_RUN_ID" in os.environ else ""
    return int(rank) if rank.isdecimal() else 0


def _another_said_why(error: Exception) -> bool:
    """Whether another process of this run has told its user what happened; if not, note it.

    Most errors are met by all processes, and the first one tells of them; others end one process,
    and that is what the rest then meet.
    """
    from fastnas.parallel import MEETING, ProcessEndedError

    folder = os.environ.get(MEETING)
    if not folder or "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    waits = _process() or isinstance(error, ProcessEndedError)
    end = time.monotonic() + (_PATIENCE if waits else 0)
    note = os.path.join(folder, "said")
    while not os.path.exists(note):
        if time.monotonic() >= end:
            with contextlib.suppress(OSError):  # where the folder is gone, so is who would look
                open(note, "x").close()
            return False
        time.sleep(0.02)
    return True


def _is_user_error(error: Exception) -> bool:
    """Whether it was raised where a user's value, file or environment enters."""
    from fastnas.methods.graphs import GraphError
    from fastnas.parallel import ProcessesError
    from fastnas.search import CheckpointError, NonFiniteLossError

    kinds = (
        ValueError,
        OSError,
        ImportError,
        CheckpointError,
        GraphError,
        NonFiniteLossError,
        ProcessesError,
    )
    return isinstance(error, kinds) or _is_out_of_memory(error)


def _is_out_of_memory(error: Exception) -> bool:
    from fastnas.search.runtime import is_out_of_memory

    return is_out_of_memory(error)


def _sentence(error: Exception) -> str:
    if _is_out_of_memory(error):
        reason = " ".join(str(error).splitlines()[:1])
        return (
            "there is not enough memory; try a smaller --batch-size, --C, --layers or --image-size"
            + (f" ({reason})" if reason else "")
        )
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename is not None else ""
        return f"{place}{error.strerror}"
    text = " ".join(str(error).split()) or type(error).__name__
    if text.startswith("Expected more than 1 value per channel"):  # says BatchNorm of PyTorch
        return f"batch_size: one image is too little for BatchNorm here, take more ({text})"
    return text


def _debugging() -> bool:
    return os.environ.get("FASTNAS_DEBUG", "") not in ("", "0")


def _say_error(text: str, style: str = "bold red") -> None:
    from fastnas.cli.terminal import error_console

    error_console().print(text, style=style, markup=False)


def _help() -> str:
    rows = "\n".join(f"  {name:<10} {what}" for name, _, what in _COMMANDS)
    return (
        "usage: fastnas COMMAND [OPTIONS]\n\n"
        "Fast differentiable neural architecture search.\n\n"
        f"commands:\n{rows}\n\n"
        "options:\n"
        "  -h, --help     Show this text; after a command, the options of that command.\n"
        "  -V, --version  Print the version.\n\n"
        "A first run needs no options: `fastnas search`, then `fastnas eval`."
    )
