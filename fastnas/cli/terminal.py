# SPDX-License-Identifier: Apache-2.0
"""Where the command line writes, and how a genotype looks there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["console", "error_console", "genotype_table"]


def console() -> Console:
    """Standard output. Lines are not broken when it goes to a file or a pipe."""
    return Console(highlight=False, soft_wrap=True)


def error_console() -> Console:
    """Standard error."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def genotype_table(genotype: Any) -> Table:
    """The cells of a DARTS genotype, one row a node: ``sep_conv_3x3(0) + skip_connect(1)``.

    Sources are the papers' states: 0 and 1 are the two cells before, 2 and up the nodes.
    """
    table = Table(box=None, pad_edge=False, show_header=True, header_style="dim")
    table.add_column("node", justify="right", no_wrap=True)
    columns = (("normal cell", genotype.normal), ("reduction cell", genotype.reduce))
    for title, _ in columns:
        table.add_column(title, overflow="fold")  # on a narrow terminal in two lines, not cut off
    for node in range(max(len(pairs) // 2 for _, pairs in columns)):
        cells = [_node(pairs[2 * node : 2 * node + 2]) for _, pairs in columns]
        table.add_row(str(node + 2), *cells)
    return table


def _node(pairs: Iterable[tuple[str, int]]) -> Text:
    text = Text(" + ").join(Text(op, style="cyan") + Text(f"({source})") for op, source in pairs)
    return text
