# SPDX-License-Identifier: Apache-2.0
"""``fastnas info``: what ``python -m fastnas`` prints."""

from __future__ import annotations

from collections.abc import Sequence

import tyro

from fastnas import __main__ as diagnosis

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Run the command with the words after ``fastnas info``."""
    tyro.cli(
        diagnosis.main,
        prog="fastnas info",
        description="Print versions, devices and the kernels that were built.",
        args=list(argv),
    )
    return 0
