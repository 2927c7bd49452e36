# SPDX-License-Identifier: Apache-2.0
"""Early stopping by the largest eigenvalue of the alphas' Hessian, as R-DARTS does it.

It is a function of the records of the epochs, so that a search that goes on from its checkpoint
decides as the uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["FIRST_EPOCH", "LEAST_MEASUREMENTS", "Record", "Rise", "find_rise"]

WINDOW = 5
"""Measurements that are averaged."""
DISTANCE = 4
"""The average is compared with that so many measurements before."""
FACTOR = 1.3
"""It has risen when it is more than so many times that one."""
FIRST_EPOCH = 10
"""No rise counts before."""
LEAST_MEASUREMENTS = WINDOW + DISTANCE

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Rise:
    """The eigenvalue has risen as R-DARTS takes it for a sign of overfitted alphas.

    Attributes:
        epoch: the epoch before the rise, the centre of the earlier average; from 1.
        before: the average then.
        after: the average now.
    """

    epoch: int
    before: float
    after: float


def find_rise(records: Sequence[Record], weight_decay: float = 0.0, rested: int = 0) -> Rise | None:
    """Whether the last measured eigenvalue completes a rise.

    The rule of R-DARTS (Zela et al., ICLR 2020, released code): the mean of the last 5 measurements
    against the mean of the 5 that ended 4 measurements before, from epoch 10 on. The Hessian there
    includes the decay of the alphas, which adds ``weight_decay`` to every eigenvalue.

    Args:
        records: of the epochs so far, with ``epoch`` and ``eigenvalue``, None where not measured.
        weight_decay: L2 factor of the alphas.
        rested: first epochs, in which the alphas did not move; what is measured in them does not
            count, for a rise there tells of the weights.
    """
    if not records or records[-1].get("eigenvalue") is None:
        return None
    measured = [r for r in records if r.get("eigenvalue") is not None and r["epoch"] > rested]
    if len(measured) < LEAST_MEASUREMENTS or records[-1]["epoch"] < FIRST_EPOCH:
        return None
    values = [r["eigenvalue"] + weight_decay for r in measured[-LEAST_MEASUREMENTS:]]
    before, after = sum(values[:WINDOW]) / WINDOW, sum(values[-WINDOW:]) / WINDOW
    # Where there was no curvature, a quotient says nothing.
    if before <= 0 or after <= FACTOR * before:
        return None
    return Rise(measured[-LEAST_MEASUREMENTS + WINDOW // 2]["epoch"], before, after)
