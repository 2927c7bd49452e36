# SPDX-License-Identifier: Apache-2.0
"""The console script ``fastnas``.

It stands outside of the package because importing that loads PyTorch: what happens in these
seconds, a Ctrl-C or kernels that do not load, ends in one sentence like everything after them.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def main() -> int:
    """Run the command line of :mod:`fastnas.cli`; returns the exit code."""
    before = signal.signal(signal.SIGINT, _leave)
    try:
        from fastnas.cli import main as run
    except ImportError as error:
        if os.environ.get("FASTNAS_DEBUG", "") not in ("", "0"):
            raise
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        return run()
    except KeyboardInterrupt:  # a second one, while the first was told
        return 128 + signal.SIGINT
    finally:
        # Nothing is left to interrupt; Python would only complain about it while it ends.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _leave(number: int, frame: FrameType | None) -> None:
    """End at once: a KeyboardInterrupt can get lost while PyTorch and numpy are imported."""
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(128 + number)
