# SPDX-License-Identifier: Apache-2.0
"""Everything that only a GPU can show, by one command, in under nine minutes.

    python tools/gpu_check --out gpu.json

Needs a CUDA build of PyTorch, nvcc of the same major version, a GPU, pytest and setuptools, and no
network. Each phase has a time box and seconds that earlier ones left; one that fails is recorded
and the others go on. The record is written after every phase; benchmarks/report.py turns it into
docs/performance.md. The exit status is 0 if every phase has passed.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import Any

from phase import PASSED, Phase, run, skipped, write
from phases import ROOT, make_phases

FORMAT = 1


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    options = parse(given)
    work = ROOT / "build" / "gpu_check"
    work.mkdir(parents=True, exist_ok=True)
    phases = make_phases(options.device, work)
    if options.phases is not None:
        names = [phase.name for phase in phases]
        if unknown := [name for name in options.phases if name not in names]:
            print(f"no phase {', '.join(unknown)}: there are {', '.join(names)}", file=sys.stderr)
            return 2
        phases = [phase for phase in phases if phase.name in options.phases]
    record: dict[str, Any] = {
        "format": FORMAT,
        "command": command(options),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": options.device,
        "phases": [],
    }
    try:
        run_all(phases, record, options, work)
    except KeyboardInterrupt:
        print(f"\ninterrupted; what has ended is in {options.out}", file=sys.stderr)
        return 130
    failed = [entry["name"] for entry in record["phases"] if entry["status"] != PASSED]
    print(f"{options.out}: " + (f"not passed: {', '.join(failed)}" if failed else "all passed"))
    return 1 if failed else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    listed = "\n".join(
        f"  {p.name:<10} {p.seconds:>4.0f} s  {p.about}" for p in make_phases("cuda", ROOT)
    )
    parser = argparse.ArgumentParser(
        prog="python tools/gpu_check",
        description=__doc__.partition("\n\n")[2],
        epilog=f"phases, in this order:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="the record (gpu.json)")
    parser.add_argument(
        "--phases",
        type=lambda text: text.split(","),
        help="only these, with commas between; without build, what was built last or is installed",
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu rehearses on the CPU what can be: the sanitizers are left out",
    )
    parser.add_argument("--patience", type=float, default=1.0, help="multiplies every time box (1)")
    options = parser.parse_args(arguments)
    options.out = options.out.resolve()
    if not options.out.parent.is_dir():
        parser.error(f"--out: there is no folder {options.out.parent}")
    return options


def command(options: argparse.Namespace) -> str:
    """What was measured with, without where it went."""
    words = ["python", "tools/gpu_check"]
    words += ["--phases", ",".join(options.phases)] if options.phases else []
    words += ["--device", options.device] if options.device != "cuda" else []
    words += ["--patience", f"{options.patience:g}"] if options.patience != 1 else []
    return shlex.join(words)


def run_all(
    phases: list[Phase], record: dict[str, Any], options: argparse.Namespace, work: Path
) -> None:
    """Run the phases, group by group, and keep the record on disk up to date."""
    write(options.out, record)
    start, boxes = time.monotonic(), 0.0
    for _, members in groupby(phases, key=lambda phase: phase.group or phase.name):
        together = list(members)
        box = options.patience * max(phase.seconds for phase in together)
        boxes += box
        left = boxes - (time.monotonic() - start)  # with what earlier phases did not use
        entries = run_together(together, max(left, box), record["phases"], work)
        for entry in entries:
            print(
                f"{entry['name']:<10} {entry['status']:<9} {entry['seconds']:6.1f} s  "
                f"{entry['summary']}",
                flush=True,
            )
        record["phases"] += entries
        record["seconds"] = round(time.monotonic() - start, 1)
        write(options.out, record)


def run_together(
    phases: list[Phase], limit: float, before: Iterable[dict[str, Any]], work: Path
) -> list[dict[str, Any]]:
    """Run the phases of one group at the same time; those that tell nothing are skipped."""
    stop = threading.Event()
    lost = {entry["name"]: entry["status"] for entry in before if entry["status"] != PASSED}

    def one(phase: Phase) -> dict[str, Any]:
        if causes := [name for name in phase.after if name in lost]:
            return skipped(phase, f"{causes[0]} {lost[causes[0]]}")
        return run(phase, limit, work, stop)

    with ThreadPoolExecutor(len(phases)) as pool:
        running = [pool.submit(one, phase) for phase in phases]
        try:
            return [future.result() for future in running]
        except KeyboardInterrupt:
            stop.set()
            raise


if __name__ == "__main__":
    sys.exit(main())
