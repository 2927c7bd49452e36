# SPDX-License-Identifier: Apache-2.0
"""The search: a bilevel loop that joins a space, a method and data.

result = Search(preset_config("demo", epochs=5, out=None)).run()
print(result.genotype)
"""

from __future__ import annotations

from fastnas.search.checkpoint import (
    CheckpointError,
    RandomState,
    load_checkpoint,
    save_checkpoint,
)
from fastnas.search.config import PRESETS, SearchConfig, preset_config
from fastnas.search.files import RunDirectory
from fastnas.search.gap import Gap
from fastnas.search.interrupts import RunInterrupted
from fastnas.search.loop import Search
from fastnas.search.progress import Progress, StepReport, TextProgress
from fastnas.search.result import SearchResult
from fastnas.search.resumable import NonFiniteLossError
from fastnas.search.schedule import learning_rate

__all__ = [
    "PRESETS",
    "CheckpointError",
    "Gap",
    "NonFiniteLossError",
    "Progress",
    "RandomState",
    "RunDirectory",
    "RunInterrupted",
    "Search",
    "SearchConfig",
    "SearchResult",
    "StepReport",
    "TextProgress",
    "learning_rate",
    "load_checkpoint",
    "preset_config",
    "save_checkpoint",
]
