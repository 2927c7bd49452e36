# SPDX-License-Identifier: Apache-2.0
"""What a search leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastnas.search.gap import Gap

__all__ = ["SearchResult"]


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        genotype: the derived architecture, an instance of the space's genotype class.
        history: one record an epoch, as in ``metrics.jsonl``.
        path: the run's folder, None when nothing was written.
        stopped: where the search was stopped early, the epoch the genotype is of; else None.
        gap: what pruning the supernet to the genotype costs; None where it was not measured.
    """

    genotype: Any
    history: list[dict[str, Any]]
    path: Path | None
    stopped: int | None = None
    gap: Gap | None = None
