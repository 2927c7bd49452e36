# SPDX-License-Identifier: Apache-2.0
"""A phase: a command with a time box, and what is made of its end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

PASSED, FAILED, TIMED_OUT, SKIPPED = "passed", "failed", "timed out", "skipped"
_LOG = 6000  # characters kept of a command's output, its last ones


class Finished(NamedTuple):
    """How a command ended."""

    returncode: int | None  # None: its time was up
    output: str
    result: Any  # what it left in its result file; None if nothing that can be read


class Verdict(NamedTuple):
    """What a phase found: ``summary`` is a sentence, ``data`` whatever JSON holds."""

    passed: bool
    summary: str
    data: Any = None


@dataclass(frozen=True)
class Phase:
    """One entry of the record.

    Attributes:
        name: as --phases takes it.
        about: what it does, for --help.
        seconds: its time box.
        command: arguments of a process; empty if it cannot be run, which ``missing`` explains.
        judge: makes a verdict of how that ended, also of one whose time was up.
        environment: variables beside the inherited ones.
        result: a file that the command writes, as JSON.
        after: phases without which this one tells nothing; if one has not passed, it is skipped.
        group: phases of one group run side by side.
    """

    name: str
    about: str
    seconds: float
    command: tuple[str, ...]
    judge: Callable[[Finished], Verdict]
    environment: dict[str, str] = field(default_factory=dict)
    result: Path | None = None
    after: tuple[str, ...] = ()
    group: str = ""
    missing: str = ""


def skipped(phase: Phase, reason: str) -> dict[str, Any]:
    return _entry(phase, SKIPPED, 0.0, reason)


def run(phase: Phase, limit: float, cwd: Path, stop: threading.Event) -> dict[str, Any]:
    """Run a phase for at most ``limit`` seconds, or until ``stop``; its entry of the record."""
    if not phase.command:
        return _entry(phase, FAILED, 0.0, phase.missing)
    if phase.result is not None:
        phase.result.unlink(missing_ok=True)
    start = time.monotonic()
    returncode, output = _call(phase, limit, cwd, stop)
    seconds = time.monotonic() - start
    finished = Finished(returncode, output, _read(phase.result))
    try:
        verdict = phase.judge(finished)
    except Exception as error:  # a surprise in the output must not end the other phases
        verdict = Verdict(False, f"its output was not understood ({type(error).__name__}: {error})")
    status = TIMED_OUT if returncode is None else PASSED if verdict.passed else FAILED
    summary = verdict.summary
    if returncode is None:
        summary = f"stopped after {limit:.0f} s" + (f"; until then: {summary}" if summary else "")
    return _entry(phase, status, seconds, summary, limit, verdict.data, output)


def _entry(
    phase: Phase,
    status: str,
    seconds: float,
    summary: str,
    limit: float | None = None,
    data: Any = None,
    output: str = "",
) -> dict[str, Any]:
    return {
        "name": phase.name,
        "status": status,
        "summary": summary,
        "seconds": round(seconds, 1),
        "limit": round(phase.seconds if limit is None else limit, 1),
        "data": data,
        # The output of what passed says nothing more.
        "log": "" if status in (PASSED, SKIPPED) else output[-_LOG:],
    }


def _call(phase: Phase, limit: float, cwd: Path, stop: threading.Event) -> tuple[int | None, str]:
    """Exit status (None: time was up) and output of the command; whatever it started is ended."""
    log = cwd / f"{phase.name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            phase.command,
            cwd=cwd,
            env={**os.environ, **phase.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            returncode = _wait(process, time.monotonic() + limit, stop)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return returncode, log.read_text(errors="replace")


def _wait(process: subprocess.Popen[bytes], end: float, stop: threading.Event) -> int | None:
    while (left := end - time.monotonic()) > 0 and not stop.is_set():
        try:
            return process.wait(min(left, 0.5))
        except subprocess.TimeoutExpired:
            continue
    return None


def _read(path: Path | None) -> Any:
    if path is None or not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


def write(path: Path, content: Any) -> None:
    """Replace a JSON file at once, so that it can be read at any moment."""
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
