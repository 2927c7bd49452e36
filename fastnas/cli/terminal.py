# SPDX-License-Identifier: Apache-2.0
"""Where the command line writes, and how a genotype looks there."""

from __future__ import annotations

from collections.abc import Iterable
from functools import singledispatch
from itertools import groupby, zip_longest
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastnas.spaces import mbconv, nasbench201

__all__ = ["console", "error_console", "genotype_table"]


def console() -> Console:
    """Standard output. Lines are not broken when it goes to a file or a pipe."""
    return Console(highlight=False, soft_wrap=True)


def error_console() -> Console:
    """Standard error."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


@singledispatch
def genotype_table(genotype: Any) -> Table:
    """A genotype for people.

    The cells of DARTS have one row a node: ``sep_conv_3x3(0) + skip_connect(1)``; sources are the
    papers' states: 0 and 1 are the two cells before, 2 and up the nodes. A network of MBConv blocks
    has one row for each run of blocks of one width. The cell of NAS-Bench-201 has one row a node.
    """
    table = _empty_table("node")
    columns = (("normal cell", "normal"), ("reduction cell", "reduce"))
    for title, _ in columns:
        table.add_column(title, overflow="fold")  # on a narrow terminal in two lines, not cut off
    nodes = [genotype.nodes(cell) for _, cell in columns]
    for number, row in enumerate(zip_longest(*nodes, fillvalue=()), 2):
        table.add_row(str(number), *map(_node, row))
    return table


@genotype_table.register
def _(genotype: mbconv.Genotype) -> Table:
    table = _empty_table("channels")
    table.add_column("stride", justify="right")
    table.add_column("blocks", overflow="fold")
    for _, stage in groupby(genotype.blocks, key=lambda block: block.out_channels):
        blocks = list(stage)
        ops = Text(" ").join(Text(b.op, style="dim" if b.skipped else "cyan") for b in blocks)
        table.add_row(str(blocks[0].out_channels), str(blocks[0].stride), ops)
    return table


@genotype_table.register
def _(genotype: nasbench201.Genotype) -> Table:
    table = _empty_table("node")
    table.add_column("operations (from node)", overflow="fold")
    for number, node in enumerate(genotype.nodes, 1):
        pairs = [(op, source) for source, op in enumerate(node) if op != "none"]
        table.add_row(str(number), _node(pairs) if pairs else Text("none", style="dim"))
    return table


def _empty_table(first: str) -> Table:
    table = Table(box=None, pad_edge=False, show_header=True, header_style="dim")
    table.add_column(first, justify="right", no_wrap=True)
    return table


def _node(pairs: Iterable[tuple[str, int]]) -> Text:
    return Text(" + ").join(Text(op, style="cyan") + Text(f"({source})") for op, source in pairs)
