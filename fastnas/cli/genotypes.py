# SPDX-License-Identifier: Apache-2.0
"""``fastnas genotypes``: list the published genotypes, or print one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from fastnas.cli.options import refuse_idle_options
from fastnas.cli.terminal import console, genotype_table
from fastnas.evaluate.source import find_genotype
from fastnas.spaces import SPACES

__all__ = ["main"]


@dataclass(frozen=True)
class Options:
    """What to print."""

    source: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME]")] = None
    """A published name, the folder of a search or a genotype file; without one, all published names
    are listed."""
    format: Literal["json", "text", "table"] = "json"
    """How NAME is printed. json: as fastnas reads and writes it. text: one line, of cells the
    Genotype(...) of DARTS and its relatives. table: for people."""


def main(argv: Sequence[str]) -> int:
    """Run the command with the words after ``fastnas genotypes``."""
    options = tyro.cli(
        Options,
        prog="fastnas genotypes",
        description="List the published genotypes, or print one.",
        args=list(argv),
    )
    if options.source is None:
        refuse_idle_options(argv, {"format": "the NAME of what is to be printed"})
        for space in SPACES.values():
            for name in space.genotypes:
                print(name)
        return 0
    genotype = find_genotype(options.source).genotype
    if options.format == "json":
        print(genotype.to_json(), end="")
    elif options.format == "text":
        print(genotype)
    else:
        console().print(genotype_table(genotype))
    return 0
