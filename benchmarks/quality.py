# SPDX-License-Identifier: Apache-2.0
"""How good what the methods find is, against a benchmark that knows every architecture.

    python benchmarks/quality.py --out runs/quality

searches the 3-node cell of NAS-Bench-201 with every method and five seeds, looks up what was
found in ``benchmarks/results/tabular.json`` (``tabular.py`` makes it), and prints the table of
``docs/quality.md``. Stopped, and started again with the same --out, it goes on where it was.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runs import search

from fastnas.search.files import read_json
from fastnas.spaces.nasbench201 import Genotype

RESULTS = Path(__file__).resolve().parent / "results" / "tabular.json"
_MIXED = ("--epochs", "6", "--arch-warmup-epochs", "2")
#: What is compared: a name for row and folder, and words of the command; the rest is the demo of
#: the method. DARTS mixes ``none``, but never derives it.
SEARCHES: dict[str, tuple[str, ...]] = {
    "darts": ("--method", "darts", *_MIXED, "--no-derive-none"),
    "pc_darts": ("--method", "pc_darts", *_MIXED, "--no-derive-none"),
    "da2s": ("--method", "da2s", *_MIXED),
    "entrannas": ("--method", "entrannas", *_MIXED),
    "entrannas_dst": ("--method", "entrannas_dst", *_MIXED, "--beta-init", "0"),
    "proxyless": (
        *("--method", "proxyless", "--epochs", "20"),
        *("--arch-warmup-epochs", "10", "--arch-lr", "0.05"),
    ),
    "darts-none": ("--method", "darts", *_MIXED),
}
#: The words that all of them have.
WORDS = (
    *("--space", "nasbench201", "--nodes", "3", "--C", "4", "--layers", "3"),
    *("--weight-share", "0.5", "--arch-share", "0.5", "--threads", "1"),
)


class Table:
    """The benchmark: mean accuracies of all architectures, in percent."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        """Take the content of the file that ``tabular.py`` writes."""
        self.means = {
            cell: 100 * statistics.mean(row["accuracy"]) for cell, row in content["cells"].items()
        }
        self.best = max(self.means, key=self.means.__getitem__)
        self.seeds = len(content["seeds"])

    def percentile(self, cell: str) -> float:
        """The share of the other architectures that are worse, in percent; equals count half."""
        mine = self.means[cell]
        others = [mean for other, mean in self.means.items() if other != cell]
        worse = sum(mean < mine for mean in others) + 0.5 * sum(mean == mine for mean in others)
        return 100 * worse / len(others)

    def regret(self, cell: str) -> float:
        """How many points of accuracy the best architecture is better."""
        return self.means[self.best] - self.means[cell]

    def row(self, name: str, cells: Sequence[str]) -> str:
        """A line about architectures: means, the worst of them, and which they are."""
        percentiles = [self.percentile(cell) for cell in cells]
        regrets = [self.regret(cell) for cell in cells]
        accuracy = statistics.mean(self.means[cell] for cell in cells)
        return (
            f"| {name} | {statistics.mean(percentiles):.1f} | {min(percentiles):.1f} | "
            f"{statistics.mean(regrets):.2f} | {accuracy:.2f} | {counts(cells)} |"
        )


def counts(cells: Sequence[str]) -> str:
    """How often each operation stands on an edge of these cells: ``nor_conv_3x3 9, none 1``."""
    found = Counter(op for cell in cells for op in Genotype.parse(cell).ops)
    return ", ".join(f"{op} {count}" for op, count in found.most_common())


def main() -> int:
    """Search what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("runs/quality"), help="folder of the searches"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the benchmark")
    parser.add_argument("--seeds", type=int, default=5, help="searches of each kind")
    parser.add_argument("--first-seed", type=int, default=10, help="seed of the first of them")
    parser.add_argument("--searches", nargs="+", default=list(SEARCHES), choices=list(SEARCHES))
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error("--seeds: expected at least 1")
    options.out.mkdir(parents=True, exist_ok=True)
    table = Table(read_json(options.results))
    lines = []
    for name in options.searches:
        cells = []
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            words = [*SEARCHES[name], *WORDS, "--seed", str(seed)]
            found = search(words, options.out / f"{name}-{seed}")
            cells.append(str(Genotype.from_dict(found["genotype"])))
            print(
                f"{name}, seed {seed}: {cells[-1]}, percentile {table.percentile(cells[-1]):.1f}",
                file=sys.stderr,
                flush=True,
            )
        lines.append(table.row(f"`{name}`", cells))
    print(
        "| search | percentile | the worst | regret | accuracy | operations found |\n"
        "| --- | --- | --- | --- | --- | --- |"
    )
    print("\n".join(lines))
    print(table.row("random choice, expected", list(table.means)))
    print(table.row("the best", [table.best]))
    print(f"\nThe best is `{table.best}`; accuracies are means over {table.seeds} trainings.")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
