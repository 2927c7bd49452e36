# SPDX-License-Identifier: Apache-2.0
"""Signals that wait for the end of the current iteration, so that a checkpoint can be written."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

_NAMES = {
    signal.SIGINT: "Ctrl-C",
    signal.SIGTERM: "SIGTERM",
    signal.SIGHUP: "a closed terminal",
    signal.SIGPIPE: "a closed output",
}

# Python ignores SIGPIPE and raises BrokenPipeError: it is noted by hand.
_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_REPEATED = 1.0
"""Seconds in which a process of several may get one signal again, from who started it."""


class RunInterrupted(KeyboardInterrupt):
    """The run was stopped by a signal after writing its checkpoint.

    Attributes:
        signal: number of the signal; a shell's exit status is 128 + this.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


class Interrupts:
    """Within the block, SIGINT and SIGTERM are noted instead of obeyed; a second one is obeyed.

    Where several processes make a run, one signal may come twice: to each of them, and handed on
    by the process that started them. There a second one counts from a second after the first on.

    SIGHUP is noted however often it comes, since a terminal that is closed may send it twice; where
    it was ignored before (``nohup``), it still is. Outside the main thread Python delivers no
    signals; there the block changes nothing.

    Attributes:
        received: number of the signal that came, None while none did.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}
        self._first: float | None = None

    @property
    def name(self) -> str:
        """What the signal is called."""
        return "nothing" if self.received is None else _NAMES[signal.Signals(self.received)]

    def __enter__(self) -> Interrupts:
        """Take over the signals."""
        if threading.current_thread() is threading.main_thread():
            for number in _HANDLED:
                before = signal.getsignal(number)
                if number != signal.SIGHUP or before != signal.SIG_IGN:
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Put the former handlers back; a signal that nobody looked at is delivered to them."""
        self._release(*self._before)
        if error is None and self.received is not None:
            signal.raise_signal(self.received)

    def note(self, number: int) -> None:
        """Take it that this signal came, unless another one was first."""
        if self.received is None:
            self.received = number

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.note(number)
        if number == signal.SIGHUP:
            return
        now = time.monotonic()
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            self._release(signal.SIGINT, signal.SIGTERM)
        elif self._first is None:
            self._first = now
        elif now - self._first > _REPEATED:
            self._release(signal.SIGINT, signal.SIGTERM)
            signal.raise_signal(number)

    def _release(self, *numbers: int) -> None:
        for number in numbers:
            if number in self._before:
                handler = self._before.pop(number)
                # None: a handler that was not installed from Python, which cannot be put back.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
