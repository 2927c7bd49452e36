# SPDX-License-Identifier: Apache-2.0
"""The pace of the machine, which changes: a hot processor slows down, a shared core is shared.

It changes all times alike, and says nothing of how well a table predicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from fastnas.latency.measure import prepare
from fastnas.latency.table import LatencyTable, block_rules, quartiles
from fastnas.latency.timing import stopwatch

__all__ = ["Pace", "without_pace"]


class Pace:
    """How long blocks take now, as a factor of what a table says.

    Args:
        table: measured on this machine.
        device: the device it was measured on.
    """

    def __init__(self, table: LatencyTable, device: torch.device) -> None:
        plan = block_rules(table.space).plan(table.shape)
        self._device = device
        self._then = {key: table.blocks[key].ms for key in plan.blocks if table.blocks[key].ms}
        self._calls = prepare(plan, table.conditions, device, table.procedure.seed)

    def now(self) -> float:
        """Time every block once and compare; to be called within ``measuring``."""
        watch = stopwatch(self._device)
        times: list[float] = []
        # The first round finds the caches full of something else.
        for _ in range(2):
            for key in self._then:
                x = self._calls[key].fresh_input()
                watch.time(partial(self._calls[key].module, x))
                del x
            times = watch.read()
        ratios = [ms / then for ms, then in zip(times, self._then.values(), strict=True)]
        return quartiles(ratios)[1] if ratios else 1.0


def without_pace(turns: Sequence[Sequence[float]]) -> list[float]:
    """One time for each network from its times in all turns.

    A time is taken as a network's own times that of the turn, and these are told apart by medians
    (Tukey's median polish, one step). At a steady pace it is the median over the turns.

    Args:
        turns: for each turn the times of all networks.
    """
    logs = torch.tensor(turns, dtype=torch.float64).log()
    own = logs.quantile(0.5, dim=0)
    pace = (logs - own).quantile(0.5, dim=1, keepdim=True)
    return (logs - pace).quantile(0.5, dim=0).exp().tolist()
