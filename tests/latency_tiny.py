# SPDX-License-Identifier: Apache-2.0
"""Latency tables small enough to measure in a second."""

from __future__ import annotations

from fastnas.latency import BlockTime, Conditions, LatencyTable, MeasureConfig, here
from fastnas.latency.table import Procedure
from fastnas.spaces import get_space
from fastnas.spaces.darts import DartsShape

SHAPE = DartsShape(image_size=8, C=2, layers=3)
RULES = get_space("darts").blocks
KEYS = tuple(RULES.plan(SHAPE).blocks)


def config(**fields: object) -> MeasureConfig:
    """One thread, three rounds, unless ``fields`` say otherwise."""
    values: dict[str, object] = {"threads": 1, "warmup": 1, "repeats": 3, "device": "cpu"}
    return MeasureConfig(shape=SHAPE, **{**values, **fields})


def table(conditions: Conditions | None = None, **fields: object) -> LatencyTable:
    """A complete table of made-up times: the n-th block takes n + 1 hundredths of a ms."""
    values: dict[str, object] = {
        "space": "darts",
        "shape": SHAPE,
        "conditions": conditions or here("cpu", 1, 1, "float32", "auto"),
        "procedure": Procedure(1, 3, 0),
        "date": "2026-01-02T03:04:05+00:00",
        "blocks": {
            key: BlockTime.of([(number + spread) / 100 for spread in (1.2, 0.9, 1.0)])
            for number, key in enumerate(KEYS)
        },
    }
    return LatencyTable(**{**values, **fields})
