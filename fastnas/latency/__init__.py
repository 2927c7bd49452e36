# SPDX-License-Identifier: Apache-2.0
"""Latency on the user's own device: a table of block times, how well it predicts, its cost."""

from __future__ import annotations

from fastnas.latency.conditions import Conditions, here
from fastnas.latency.measure import MeasureConfig, Measurement
from fastnas.latency.table import BlockTime, Calibration, LatencyTable

__all__ = [
    "BlockTime",
    "Calibration",
    "Conditions",
    "LatencyTable",
    "MeasureConfig",
    "Measurement",
    "here",
]
