# SPDX-License-Identifier: Apache-2.0
"""``fastnas search``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from fastnas.cli.options import begun_with, choices, parse
from fastnas.cli.progress import search_progress
from fastnas.methods import METHODS
from fastnas.search import PRESETS, RunDirectory, Search, SearchConfig, preset_config
from fastnas.spaces import SPACES

__all__ = ["main"]

_DESCRIPTION = "\n\n".join(
    (  # paragraphs of one line: the parser does not wrap them
        "Search an architecture; without options a cell, by PC-DARTS on images in the package.",
        f"Methods: {', '.join(METHODS)}. Spaces: {', '.join(SPACES)}.",
        "Writes config.json, metrics.jsonl, checkpoint.pt and genotype.json into --out.",
    )
)


def main(argv: Sequence[str]) -> int:
    """Run the command with the words after ``fastnas search``."""
    Search(_config(argv), progress=search_progress()).run()
    return 0


def _config(argv: Sequence[str]) -> SearchConfig:
    chosen = choices(argv, preset="demo", method="pc_darts", space="darts")
    given = choices(argv, method=None, space=None, out=None)
    preset = chosen["preset"]
    config = preset_config(preset, method=chosen["method"], space=chosen["space"])
    words = {"prog": "fastnas search", "description": _DESCRIPTION}
    if given["out"] is not None:
        config = dataclasses.replace(config, out=given["out"])
    if "--resume" in argv and not {"-h", "--help"} & set(argv) and config.out is not None:
        # The options that there are depend on the method, and that is the run's.
        begun = begun_with(SearchConfig, RunDirectory(config.out))
        for name in ("method", "space"):
            if given[name] not in (None, found := getattr(begun, name)):
                raise ValueError(
                    f"{config.out} was begun with {name}={found!r}, not {given[name]!r}: continue "
                    "it with the same options, or start another run with another --out"
                )
        config = begun
    return parse(config, argv, preset=preset, presets=PRESETS, **words)
