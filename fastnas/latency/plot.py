# SPDX-License-Identifier: Apache-2.0
"""The picture of a check: measured against predicted times. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastnas.latency.table import LatencyTable

if TYPE_CHECKING:
    from fastnas.latency.check import Agreement

__all__ = ["check_plot", "write_plot"]


def check_plot(path: str) -> None:
    """Raise what would keep :func:`write_plot` from writing to ``path``.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the ending of the name is no format of images.
        FileNotFoundError: there is no such folder.
    """
    formats = _figure().canvas.get_supported_filetypes()
    ending = Path(path).suffix.lstrip(".").lower()
    if ending not in formats:
        raise ValueError(f"plot: expected a name that ends in .png, .svg or .pdf, but got {path!r}")
    if not Path(path).expanduser().resolve().parent.is_dir():
        raise FileNotFoundError(f"plot: there is no folder for {path!r}")


def write_plot(path: str, agreement: Agreement, table: LatencyTable) -> None:
    """Write a scatter plot with the line on which prediction and measurement agree."""
    figure = _figure()
    axes = figure.subplots()
    axes.scatter(agreement.predicted, agreement.measured, s=16)
    ends = [f(*agreement.predicted, *agreement.measured) for f in (min, max)]
    axes.plot(ends, ends, color="grey", linewidth=1)
    c, figures = table.conditions, agreement.figures()
    axes.set_xlabel("predicted by the table, ms")
    axes.set_ylabel("measured, ms")
    axes.set_title(
        f"{len(agreement.measured)} networks of {table.space}, batch {c.batch}, {c.threads} "
        f"threads\n{c.machine}, torch {c.torch}\nSpearman {figures['spearman']:.3f}, "
        f"RMSE {figures['rmse_percent']:.1f} %, bias {figures['bias_percent']:+.1f} %",
        fontsize=9,
    )
    figure.savefig(Path(path).expanduser(), dpi=150)


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'plot: matplotlib is needed; install it with: pip install ".[plot]"'
        ) from error
    return Figure(figsize=(6, 6), layout="constrained")
