# SPDX-License-Identifier: Apache-2.0
"""Learning rates as closed forms of the epoch.

Each value depends on the epoch, whole or a fraction, alone, so a resumed run needs no scheduler
state, and the porting trap of the DARTS scripts (a scheduler stepped at the start of the epoch
skips the first value under recent PyTorch) cannot arise. Epochs count from 0.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

ScheduleName = Literal["cosine", "linear", "exponential", "constant"]


def learning_rate(
    epoch: float,
    epochs: float,
    high: float,
    low: float = 0.0,
    *,
    schedule: str = "cosine",
    warmup_epochs: int = 0,
    decay: float = 0.97,
) -> float:
    """Learning rate of one epoch.

    * ``cosine``: ``low + (high - low) (1 + cos(pi e / T)) / 2`` (DARTS; 0.025 to 0.001 over 50
      epochs gives 0.025, 0.024976, ... 0.013 at e = 25, ... 0.001024).
    * ``linear``: ``high (T - 5 - e) / (T - 5)``, and in the last 5 epochs
      ``high (T - e) / (5 (T - 5))`` (PC-DARTS, training on ImageNet). ``low`` is not used.
    * ``exponential``: ``high decay^e`` (DARTS, training on ImageNet). ``low`` is not used.
    * ``constant``: ``high``.

    In the first ``warmup_epochs`` epochs the rate is ``high (floor(e) + 1) / warmup_epochs``
    instead; the schedule itself is not shifted (PC-DARTS on ImageNet: 5 epochs).

    Args:
        epoch: e, from 0; a fraction where the rate falls within an epoch.
        epochs: T, at least 1.
        high: rate at the start.
        low: rate towards which ``cosine`` falls.
        schedule: one of the names above.
        warmup_epochs: number of epochs of linear warm-up, 0 for none.
        decay: factor of ``exponential`` per epoch.

    Raises:
        ValueError: an argument out of its range, or an unknown schedule.

    Example:
        >>> round(learning_rate(10, 50, 0.025, 0.001), 6)
        0.022708
    """
    if epochs < 1:
        raise ValueError(f"learning_rate: expected epochs of at least 1, but got {epochs}")
    if epoch < 0:
        raise ValueError(f"learning_rate: expected an epoch of at least 0, but got {epoch}")
    if epoch < warmup_epochs:
        return high * (math.floor(epoch) + 1) / warmup_epochs
    if schedule == "cosine":
        return cosine(epoch, epochs, high, low)
    if schedule == "linear":
        return _linear(epoch, epochs, high)
    if schedule == "exponential":
        return high * decay**epoch
    if schedule == "constant":
        return high
    names = ", ".join(get_args(ScheduleName))
    raise ValueError(f"learning_rate: expected one of the schedules {names}, but got {schedule!r}")


def cosine(epoch: float, epochs: float, high: float, low: float = 0.0) -> float:
    """``low + (high - low) (1 + cos(pi epoch / epochs)) / 2``."""
    return low + (high - low) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def _linear(epoch: float, epochs: float, high: float) -> float:
    # The last five epochs share one step of the line, as in the released script. Runs of five
    # epochs or fewer have no room for that tail: they go straight down.
    if epochs <= 5:
        return high * (epochs - epoch) / epochs
    if epochs - epoch > 5:
        return high * (epochs - 5 - epoch) / (epochs - 5)
    return high * (epochs - epoch) / ((epochs - 5) * 5)
