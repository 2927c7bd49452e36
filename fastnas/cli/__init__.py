# SPDX-License-Identifier: Apache-2.0
"""The command ``fastnas``.

What a command needs is imported when that command runs, so ``fastnas --help`` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

__all__ = ["main"]

# Name, module, what it does.
_COMMANDS = (
    (
        "search",
        "fastnas.cli.search",
        "Search a cell: the bilevel search of DARTS and its relatives.",
    ),
    ("eval", "fastnas.cli.evaluate", "Train the network of a genotype and test it."),
    ("genotypes", "fastnas.cli.genotypes", "List the published genotypes, or print one."),
    ("info", "fastnas.cli.info", "Print versions, devices and the kernels that were built."),
)

_EXIT_USAGE = 2
_EXIT_SIGNAL = 128


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the words after ``fastnas``; default: those of this process.

    Returns:
        The exit code: 0; 2 after a mistake of the user, told in one sentence; 130 after Ctrl-C,
        143 after SIGTERM. With FASTNAS_DEBUG=1 in the environment mistakes raise instead, with
        their traceback.
    """
    words = list(sys.argv[1:] if argv is None else argv)
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
    return _run(modules[words[0]], words[1:])


def _run(module: str, words: list[str]) -> int:
    try:
        return import_module(module).main(words)
    except SystemExit as end:  # of the option parser, which has said what it had to say
        return end.code if isinstance(end.code, int) else _EXIT_USAGE
    except KeyboardInterrupt as stop:
        # A run that was stopped tells its signal, and how to go on.
        number = getattr(stop, "signal", signal.SIGINT)
        _say_error(str(stop) or "interrupted", style="bold yellow")
        return _EXIT_SIGNAL + number
    except BrokenPipeError:  # the reader (`| head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except _user_errors() as error:
        if _debugging():
            raise
        _say_error(_sentence(error))
        return _EXIT_USAGE


def _user_errors() -> tuple[type[Exception], ...]:
    """The errors raised where a user's value, file or environment enters."""
    import torch

    from fastnas.search.checkpoint import CheckpointError

    return (ValueError, OSError, ImportError, CheckpointError, torch.OutOfMemoryError)


def _sentence(error: Exception) -> str:
    if type(error).__name__ == "OutOfMemoryError":
        first = str(error).splitlines()[0]
        return f"the device ran out of memory; try a smaller --batch-size ({first})"
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename is not None else ""
        return f"{place}{error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


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
