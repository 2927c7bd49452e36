# SPDX-License-Identifier: Apache-2.0
"""Latency as a differentiable cost, from a table."""

from __future__ import annotations

import os

from fastnas.costs import Cost
from fastnas.latency.conditions import here
from fastnas.latency.table import LatencyTable, block_rules
from fastnas.spaces import NetworkShape

__all__ = ["latency_cost", "load_latency_cost"]


def latency_cost(table: LatencyTable) -> Cost:
    """The cost that a table gives, in milliseconds, calibrated if the table is.

    Raises:
        ValueError: the table lacks a block.
    """
    plan = block_rules(table.space).plan(table.shape)
    return Cost(plan, table.ms, name="latency", unit="ms")


def load_latency_cost(
    path: str | os.PathLike[str],
    *,
    space: str,
    shape: NetworkShape | None = None,
    allow_foreign: bool = False,
) -> Cost:
    """The cost of the table in a file, for networks that will run on this machine.

    Args:
        path: file of the table.
        space: key of the space that is searched.
        shape: of the networks that are wanted; None: that of the table.
        allow_foreign: take a table of another machine or version of PyTorch, a phone's for example.
            Space and shape have to agree all the same.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no table, not complete, or for something else; one sentence.
    """
    where = os.fspath(path)
    table = LatencyTable.load(where)
    table.check_complete(where)
    table.check_here(where, space=space, shape=shape)
    if not allow_foreign:
        c = table.conditions
        now = here(c.device, c.threads, c.batch, c.dtype, c.memory_format)
        table.check_here(where, conditions=now)
    return latency_cost(table)
