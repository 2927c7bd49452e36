# SPDX-License-Identifier: Apache-2.0
"""``fastnas search``."""

from __future__ import annotations

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
    chosen = choices(argv, preset="demo", method="", space="", out="")
    preset, method, space = (chosen[name] for name in ("preset", "method", "space"))
    config = preset_config(preset, method=method or "pc_darts", space=space or "darts")
    words = {"prog": "fastnas search", "description": _DESCRIPTION}
    # The options that there are depend on the method, and that is the run's.
    out = chosen["out"] or config.out
    left_to_parse = {"-h", "--help", "--out=", ""} & set(argv)
    if "--resume" in argv and out is not None and not left_to_parse:
        config = begun_with(SearchConfig, RunDirectory(out))
        for name, given in (("method", method), ("space", space)):
            if given and given != (begun := getattr(config, name)):
                raise ValueError(
                    f"{out} was begun with {name}={begun!r}, not {given!r}: continue it with the "
                    "same options, or start another run with another --out"
                )
    return parse(config, argv, preset=preset, presets=PRESETS, **words)
