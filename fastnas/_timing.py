# SPDX-License-Identifier: Apache-2.0
"""The time that work on a device takes; below all floors, since searches and benchmarks need it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

__all__ = ["synchronize", "timed"]


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start
