# SPDX-License-Identifier: Apache-2.0
"""``fastnas gap``: what a searched supernet loses when it is pruned to what was derived from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from fastnas.cli.options import begun_with
from fastnas.cli.terminal import console, error_console
from fastnas.search import Progress, RunDirectory, Search, SearchConfig
from fastnas.search.runtime import runtime

__all__ = ["main"]

_DESCRIPTION = "\n\n".join(
    (  # paragraphs of one line: the parser does not wrap them
        "Test the supernet of a search on the images of the architecture: as it is, pruned to the "
        "architecture derived from it, and pruned with BatchNorm statistics estimated anew. The "
        "weights are the same in all three.",
        "Nothing is written.",
    )
)


@dataclass(frozen=True)
class Options:
    """What to test, and where."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[RUN]")] = "runs/demo"
    """Folder of a search, over or not: its last checkpoint is tested."""
    json: bool = False
    """Print one object with the keys supernet, pruned and pruned_bn, in percent."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; by default as the search had it."""
    threads: int | None = None
    """CPU threads; by default as the search had it."""


def main(argv: Sequence[str]) -> int:
    """Run the command with the words after ``fastnas gap``.

    Raises:
        FileNotFoundError: there is no search, or it has not written a checkpoint yet.
        ValueError: a supernet of its space cannot be pruned.
        CheckpointError: the checkpoint is damaged or of another search.
    """
    options = tyro.cli(Options, prog="fastnas gap", description=_DESCRIPTION, args=list(argv))
    run = RunDirectory(options.run)
    if not run.config.is_file():
        raise FileNotFoundError(
            f"{options.run}: expected the folder of a search, but there is no {run.config.name}; a "
            "first search is made by: fastnas search"
        )
    config = begun_with(SearchConfig, run, "the supernet of a search is tested")
    changes = {k: v for k in ("device", "threads") if (v := getattr(options, k)) is not None}
    search = Search(dataclasses.replace(config, resume=True, **changes), progress=Progress())
    if not search.resumed:
        raise FileNotFoundError(
            f"{options.run}: the search there has not written a checkpoint yet; "
            f"continue it with: {search.how_to_go_on()}"
        )
    if not search.over:
        error_console().print(
            f"The search in {options.run} is not over ({config.epochs - search.epoch} epochs to "
            "go): this tests what it would find now.",
            style="yellow",
            markup=False,
        )
    with runtime(search.config.threads, search.config.deterministic), search.random.use():
        gap = search.measure_gap()
    if options.json:
        print(json.dumps(gap.to_dict()))
        return 0
    rows = (
        ("supernet", gap.supernet),
        ("pruned to the genotype", gap.pruned),
        ("with new BatchNorm statistics", gap.pruned_bn),
    )
    for name, value in rows:
        lost = "" if name == "supernet" else f"  ({value - gap.supernet:+.2f})"
        console().print(f"{name:<29}  {value:6.2f} %{lost}", markup=False)
    return 0
