# SPDX-License-Identifier: Apache-2.0
"""A tabular benchmark small enough to be complete: every 3-node cell of NAS-Bench-201, trained.

    python benchmarks/tabular.py --out runs/tabular

trains the 125 architectures from scratch on the embedded images, with three seeds each and the
recipe below, one network a process and thread, and writes ``benchmarks/results/tabular.json`` after
each seed. Stopped, and started again with the same --out, it goes on where it was. A training takes
ten seconds of a core, the whole half an hour on two that do nothing else.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastnas
from fastnas.data import Augment
from fastnas.evaluate import EvaluateConfig, Evaluation, Progress, preset_config
from fastnas.search.files import append_jsonl, read_json, read_jsonl, write_json, write_text
from fastnas.spaces.nasbench201 import Genotype

RESULTS = Path(__file__).resolve().parent / "results" / "tabular.json"
NODES = 3
#: What differs from ``fastnas eval``: narrow networks of three cells, in which a cell matters, and
#: few epochs, of which images that are not augmented make more.
RECIPE: dict[str, Any] = {
    "C": 4,
    "layers": 3,
    "epochs": 4,
    "batch_size": 32,
    "lr": 0.05,
    "augment": Augment(),
}


class Task(NamedTuple):
    """One training."""

    cell: str
    seed: int


def recipe(seed: int) -> EvaluateConfig:
    """The configuration of a training."""
    return preset_config(
        "demo", source="a cell", data="fashion-mnist-mini", out=None, threads=1, seed=seed, **RECIPE
    )


def train(task: Task) -> dict[str, Any] | None:
    """Train one architecture; None where it was interrupted."""
    try:
        evaluation = Evaluation(
            recipe(task.seed), genotype=Genotype.parse(task.cell), progress=Progress()
        )
        result = evaluation.run()
    except KeyboardInterrupt:  # of the whole group: the parent ends this process
        return None
    return {
        **task._asdict(),
        "accuracy": result.accuracy,
        "parameters": result.parameters,
        "macs": result.macs,
        "seconds": result.seconds,
    }


def run(tasks: Sequence[Task], workers: int) -> Iterator[dict[str, Any]]:
    """Results as they come."""
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for record in pool.imap_unordered(train, tasks):
            if record is not None:
                yield record


def begin(out: Path) -> list[dict[str, Any]]:
    """The folder of the trainings, and the records of those that are done.

    Raises:
        ValueError: the trainings there are of another recipe.
    """
    out.mkdir(parents=True, exist_ok=True)
    whole = recipe(0).to_dict()
    # Not all of it: later versions may have more fields.
    config = {"nodes": NODES, **{key: whole[key] for key in ("data", *RECIPE)}}
    if (out / "config.json").exists():
        if read_json(out / "config.json") != config:
            raise ValueError(f"{out}: its trainings are of another recipe: choose another --out")
    else:
        write_json(out / "config.json", config)
    log = out / "trainings.jsonl"
    records = read_jsonl(log) if log.exists() else []
    # What a kill has left half written would spoil the next line.
    write_text(log, "".join(json.dumps(record) + "\n" for record in records))
    return records


def table(records: Sequence[Mapping[str, Any]], seeds: int) -> dict[str, Any]:
    """The benchmark: accuracies of every architecture with the seeds below ``seeds``."""
    found = {(record["cell"], record["seed"]): record for record in records}
    cells = {}
    for genotype in Genotype.all(NODES):
        mine = [found[str(genotype), seed] for seed in range(seeds)]
        cells[str(genotype)] = {
            "accuracy": [record["accuracy"] for record in mine],
            "parameters": mine[0]["parameters"],
            "macs": mine[0]["macs"],
        }
    config = recipe(0).to_dict()
    left_out = {"source", "out", "resume", "seed", "device", "threads", "log_every"}
    return {
        "format": "fastnas.tabular",
        "version": 1,
        "space": "nasbench201",
        "nodes": NODES,
        "seeds": list(range(seeds)),
        "recipe": {key: value for key, value in config.items() if key not in left_out},
        "versions": {"fastnas": fastnas.__version__, "torch": torch.__version__},
        "cells": cells,
    }


def write(content: Mapping[str, Any], path: Path) -> None:
    """Write a table, one architecture a line."""
    head = {key: value for key, value in content.items() if key != "cells"}
    lines = [f"    {json.dumps(cell)}: {json.dumps(row)}" for cell, row in content["cells"].items()]
    body = ",\n".join(lines)
    text = (
        json.dumps(head, indent=2).removesuffix("\n}") + ',\n  "cells": {\n' + body + "\n  }\n}\n"
    )
    write_text(path, text)


def summary(content: Mapping[str, Any]) -> str:
    """What spreads how far, and the ends of the table."""
    cells = {cell: row["accuracy"] for cell, row in content["cells"].items()}
    means = {cell: 100 * statistics.mean(values) for cell, values in cells.items()}
    order = sorted(means, key=means.__getitem__)
    lines = [
        f"{len(means)} architectures, {len(content['seeds'])} seeds: mean "
        f"{statistics.mean(means.values()):.2f}, standard deviation between architectures "
        f"{statistics.stdev(means.values()):.2f}"
    ]
    if len(content["seeds"]) > 1:
        within = statistics.mean(statistics.variance(values) for values in cells.values()) ** 0.5
        lines[0] += f", between seeds {100 * within:.2f}"
    lines += [f"{means[cell]:6.2f}  {cell}" for cell in (*order[:3], *order[-5:])]
    return "\n".join(lines)


def main() -> int:
    """Train what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("runs/tabular"), help="folder of the trainings"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the table")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each architecture")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    options = parser.parse_args()
    if options.seeds < 1 or options.workers < 1:
        parser.error("--seeds and --workers: expected at least 1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    records = begin(options.out)
    done = {Task(record["cell"], record["seed"]) for record in records}
    cells = [str(genotype) for genotype in Genotype.all(NODES)]
    start = time.perf_counter()
    for seed in range(options.seeds):
        # Seed by seed, so that an unfinished benchmark is one of fewer seeds.
        tasks = [task for cell in cells if (task := Task(cell, seed)) not in done]
        left = len(tasks) + sum(
            Task(cell, later) not in done
            for cell in cells
            for later in range(seed + 1, options.seeds)
        )
        made = 0
        for record in run(tasks, options.workers) if tasks else ():
            append_jsonl(options.out / "trainings.jsonl", record)
            records.append(record)
            made += 1
            begun = time.perf_counter() - start
            rest = begun / (len(records) - len(done)) * (left - made)
            print(
                f"seed {seed}, {made} of {len(tasks)}: {record['cell']} "
                f"{record['accuracy']:.1%}, {rest / 60:.0f} min to go",
                file=sys.stderr,
                flush=True,
            )
        write(table(records, seed + 1), options.results)
    print(summary(table(records, options.seeds)))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped: the same command goes on")
    except ValueError as error:
        sys.exit(str(error))
