# SPDX-License-Identifier: Apache-2.0
"""Sums over the batches of an epoch, kept on the device so that no step waits for a number."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch

from fastnas.methods import Outcome


class BadLoss(NamedTuple):
    """The first loss that was not finite: its step, from 1, and its value."""

    step: int
    value: float


class Meter:
    """Mean loss and accuracy of the outcomes added since the last reset.

    Reading a number waits for the device; adding an outcome does not.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Half a million terms in float32 would lose digits; MPS has no float64.
        self._float = torch.float32 if device.type == "mps" else torch.float64
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.count = 0
        self._loss = torch.zeros((), dtype=self._float, device=self._device)
        self._correct = torch.zeros((), dtype=torch.int64, device=self._device)
        self._bad_step = torch.zeros((), dtype=torch.int64, device=self._device)
        self._bad_loss = torch.zeros((), dtype=self._float, device=self._device)

    def add(self, outcome: Outcome, step: int) -> None:
        """Add the outcome of a batch of iteration ``step``, from 1."""
        loss = outcome.loss.to(self._float)
        self.count += outcome.images
        self._loss += loss * outcome.images
        self._correct += outcome.correct
        new = (self._bad_step == 0) & ~loss.isfinite()
        # Not torch.where, which would copy the number to the device and wait.
        self._bad_step.masked_fill_(new, step)
        self._bad_loss = torch.where(new, loss, self._bad_loss)

    @property
    def loss(self) -> float | None:
        """Mean loss; None without batches, or if it is not finite."""
        if self.count == 0:
            return None
        mean = self._loss.item() / self.count
        return mean if math.isfinite(mean) else None

    @property
    def accuracy(self) -> float | None:
        """Share of images classified rightly, 0 to 1; None without batches."""
        return self._correct.item() / self.count if self.count else None

    @property
    def bad(self) -> BadLoss | None:
        """The first loss that was not finite, None while all are."""
        step = int(self._bad_step.item())
        return BadLoss(step, self._bad_loss.item()) if step else None

    def state_dict(self) -> dict[str, Any]:
        """The sums."""
        return {"count": self.count, "loss": self._loss.cpu(), "correct": self._correct.cpu()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the sums of :meth:`state_dict`, which are of finite losses."""
        self.reset()
        self.count = state["count"]
        self._loss += state["loss"].to(self._device)
        self._correct += state["correct"].to(self._device)


Kind = Literal["plain", "architecture", "test", "hessian"]
"""Iterations without and with an architecture step, batches of a test, looks at the Hessian."""


class Pace:
    """Seconds that the parts of a run take, by kind, as measured so far."""

    # What an iteration with an architecture step costs, as a multiple of one without, until
    # one was seen: it makes two forward and backward passes.
    _GUESS = 2.0

    def __init__(self) -> None:
        self._seconds: dict[Kind, float] = defaultdict(float)
        self._counts: dict[Kind, int] = defaultdict(int)

    def add(self, kind: Kind, seconds: float, count: int = 1) -> None:
        """Note so many of a kind, which took so long together."""
        self._seconds[kind] += seconds
        self._counts[kind] += count

    def seconds(
        self, *, plain: int = 0, architecture: int = 0, test: int = 0, hessian: int = 0
    ) -> float | None:
        """Estimate for so many of each kind; None before the first iteration.

        Iterations of one kind are guessed from the other until one was seen; tests and Hessians
        count for nothing until then.
        """
        with_it, without = self._mean("architecture"), self._mean("plain")
        if with_it is None and without is None:
            return None
        if with_it is None:
            with_it = self._GUESS * (without or 0.0)
        if without is None:
            without = with_it / self._GUESS
        ends = test * (self._mean("test") or 0.0) + hessian * (self._mean("hessian") or 0.0)
        return plain * without + architecture * with_it + ends

    def _mean(self, kind: Kind) -> float | None:
        count = self._counts[kind]
        return self._seconds[kind] / count if count else None
