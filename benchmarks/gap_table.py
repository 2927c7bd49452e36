# SPDX-License-Identifier: Apache-2.0
"""The discretization gap of every method, over seeds, on the embedded images.

    python benchmarks/gap_table.py --out runs/gaps

runs `fastnas search` for each method and seed, and prints accuracies of the supernet, of the pruned
one and of that with new BatchNorm statistics: mean and standard deviation over the seeds, in
percent. Started again with the same --out it goes on where it was stopped; 21 searches take 20
minutes on two cores.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from runs import search

KEYS = ("supernet", "pruned", "pruned_bn")
#: What is compared: a name for the folder, and the words of the command.
SEARCHES = {
    "darts": ("--method", "darts"),
    "pc_darts": ("--method", "pc_darts"),
    "da2s": ("--method", "da2s"),
    "da2s-1223": ("--method", "da2s", "--keep", "1,2,2,3"),
    "entrannas": ("--method", "entrannas"),
    "entrannas_dst": ("--method", "entrannas_dst", "--keep-weights"),
    "proxyless": ("--space", "mbconv", "--method", "proxyless"),
}


def row(words: tuple[str, ...], gaps: list[dict[str, float]]) -> str:
    """A line of the table: accuracies, then what pruning loses, with and without new statistics."""
    columns = [[gap[key] for gap in gaps] for key in KEYS]
    columns += [[gap["supernet"] - gap[key] for gap in gaps] for key in KEYS[1:]]
    cells = [f"{statistics.mean(c):.1f} ± {statistics.stdev(c):.1f}" for c in columns]
    return f"| `{' '.join(words)}` | " + " | ".join(cells) + " |"


def main() -> int:
    """Make what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gaps"), help="folder of the searches"
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on (at least 2)")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error(f"--seeds: {options.seeds} give no deviation, at least 2 do")
    options.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, words in SEARCHES.items():
        gaps = []
        for seed in range(options.seeds):
            print(f"{name}, seed {seed} ...", file=sys.stderr, flush=True)
            found = search([*words, "--seed", str(seed)], options.out / f"{name}-{seed}")
            gaps.append(found["gap"])
        lines.append(row(words, gaps))
    print("| search | supernet | pruned | new statistics | lost | lost with new statistics |")
    print("| --- | --- | --- | --- | --- | --- |")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
