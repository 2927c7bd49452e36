# SPDX-License-Identifier: Apache-2.0
"""``fastnas search``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import fields

from fastnas.cli.options import (
    begun_with,
    choices,
    given_options,
    parse,
    refuse_idle_options,
)
from fastnas.cli.processes import in_processes, run_in_processes
from fastnas.cli.progress import search_progress
from fastnas.methods import METHODS
from fastnas.parallel import joined
from fastnas.search import PRESETS, RunDirectory, Search, SearchConfig, preset_config
from fastnas.search.idle import idle_options
from fastnas.spaces import SPACES

__all__ = ["main"]

_DESCRIPTION = "\n\n".join(
    (  # paragraphs of one line: the parser does not wrap them
        "Search an architecture; without options a cell, by PC-DARTS on images in the package.",
        f"Methods: {', '.join(METHODS)}. Spaces: {', '.join(SPACES)}. Some have options of their "
        "own: --help after --method NAME or --space NAME shows them.",
        "Writes config.json, metrics.jsonl, checkpoint.pt and genotype.json into --out.",
    )
)


def main(argv: Sequence[str]) -> int:
    """Run the command with the words after ``fastnas search``."""
    config = _config(argv)
    number, words = in_processes(argv)
    if number > 1:
        return run_in_processes(number, ["search", *words], config.batch_size)
    with joined() as group:
        Search(config, progress=search_progress(), group=group).run()
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
    _refuse_foreign_options(config, argv)
    parsed = parse(config, argv, preset=preset, presets=PRESETS, **words)
    refuse_idle_options(argv, idle_options(parsed))
    return parsed


def _refuse_foreign_options(config: SearchConfig, argv: Sequence[str]) -> None:
    """Say whose an option is that this method or space does not have.

    Raises:
        ValueError: there is such an option; it names them.
    """
    own = {f.name for part in (config, config.options, config.network) for f in fields(part)}
    owners: dict[str, list[str]] = {}
    for word, kinds in (
        ("--method", {name: method.Options for name, method in METHODS.items()}),
        ("--space", {name: space.options for name, space in SPACES.items()}),
    ):
        for name, kind in kinds.items():
            for field in fields(kind):
                owners.setdefault(field.name, []).append(f"{word} {name}")
    for name, option in given_options(argv).items():
        if name not in own and name in owners:
            raise ValueError(
                f"{option}: an option of {', '.join(owners[name])}, and this is a search by "
                f"--method {config.method} in --space {config.space}"
            )
