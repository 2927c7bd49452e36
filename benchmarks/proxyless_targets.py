# SPDX-License-Identifier: Apache-2.0
"""Networks for 40, 60 and 80 % of the largest one's time on this machine: searched, timed, trained.

    python benchmarks/proxyless_targets.py --out runs/targets

measures the latency of every block of the space `mbconv` (preset demo), calibrates the table by
whole networks, searches with `--method proxyless --target latency=...`, times the derived networks
as a whole, trains them with `fastnas eval`, and prints a table. Started again with the same --out
it goes on where it was stopped. It takes about 15 minutes on two cores, on which nothing else
should run: times are measured in the first minutes and again at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch
from runs import evaluate, fastnas, search

from fastnas.latency import LatencyTable
from fastnas.latency.check import time_networks
from fastnas.latency.cost import latency_cost
from fastnas.latency.pace import Pace
from fastnas.latency.table import block_rules, quartiles
from fastnas.spaces.mbconv import Genotype

SHARES = (0.4, 0.6, 0.8)
WORDS = ("--space", "mbconv", "--preset", "demo")


def measured_table(out: Path, threads: int) -> LatencyTable:
    """The calibrated table of this machine, which is made or finished if it is not there."""
    path = out / "latency.json"
    if not path.exists():
        fastnas("latency", "measure", *WORDS, "--threads", str(threads), "--out", str(path))
    try:
        LatencyTable.load(path).check_complete(str(path))
    except ValueError:  # it was stopped
        fastnas("latency", "measure", "--resume", "--out", str(path))
    if LatencyTable.load(path).calibration is None:
        fastnas("latency", "check", "--calibrate", "--seed", "0", "--table", str(path))
    return LatencyTable.load(path)


def targets(table: LatencyTable) -> list[str]:
    """The shares of the largest network's predicted time, as ``--target`` takes them."""
    cost = latency_cost(table)
    largest = cost.fixed + sum(float(v.amax(dim=1).sum()) for v in cost.values.values())
    return [f"latency={share * largest:.3f}ms" for share in SHARES]


def timed(table: LatencyTable, genotypes: list[Genotype]) -> list[float]:
    """Milliseconds of whole networks, at the pace that the machine had for the table."""
    rules, c = block_rules(table.space), table.conditions
    shape, device = table.shape, torch.device(c.device)
    pace, paces = Pace(table, device), list[float]()
    found = time_networks(
        [partial(rules.network, genotype, shape) for genotype in genotypes],
        (shape.in_channels, shape.image_size, shape.image_size),
        c,
        device,
        between=lambda: paces.append(pace.now()),
    )
    return [ms / quartiles(paces)[1] for ms in found]


def main() -> int:
    """Make what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/targets"), help="folder of it all")
    parser.add_argument("--threads", type=int, default=2, help="of the timed networks")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    table = measured_table(options.out, options.threads)
    found = []
    for target in targets(table):
        print(f"{target} ...", file=sys.stderr, flush=True)
        run = options.out / target.partition("=")[2]
        words = [*WORDS, "--method", "proxyless", "--target", target]
        words += ["--latency-table", str(options.out / "latency.json")]
        found.append((target, search(words, run)["latency"]["derived"], run))
    times = timed(table, [Genotype.load(run / "genotype.json") for _, _, run in found])
    print("| `--target` | predicted | timed | blocks | parameters | multiply-adds | accuracy |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for (target, predicted, run), ms in zip(found, times, strict=True):
        print(f"{run} ...", file=sys.stderr, flush=True)
        result = evaluate(run)
        blocks = json.loads((run / "genotype.json").read_text())["blocks"]
        kept = sum(b["mobile_inverted_conv"]["name"] != "ZeroLayer" for b in blocks[1:])
        print(
            f"| `{target}` | {predicted:.3f} ms | {ms:.3f} ms | {kept} "
            f"| {result['parameters']:,} | {result['macs']:,} | {100 * result['accuracy']:.1f} % |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
