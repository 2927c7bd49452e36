# SPDX-License-Identifier: Apache-2.0
"""What share of the copy bandwidth each op reaches: by shape, direction, memory format, precision.

On a GPU a direction is recorded into a graph a few times, each after the L2 was emptied of its
operands, and replayed; what a graph of the emptying alone takes is subtracted. So it is the kernels
that are timed, and neither Python nor the launch of a graph. On a CPU (a rehearsal) it is called as
it is, on small images. The folders benchmarks and tests have to be on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from cases import BOTH, FORWARD, Call, Case, Setting
from phase import write
from torch import Tensor

from fastnas import ops
from fastnas._timing import synchronize, timed
from fastnas.bench.machine import describe_machine
from fastnas.bench.measure import evictor

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = (torch.float32, torch.bfloat16)
MOST, LEAST, SECONDS = 40, 10, 0.06
REPEATS = 4  # in one graph

Run = Callable[[], object]


def cases() -> Iterator[Case]:
    """Those of the ops on images; a whole module spends its time in PyTorch's convolutions."""
    for file in sorted(BENCHMARKS.glob("bench_*.py")):
        for case in import_module(file.stem).CASES:
            if case.images and case.work is not None and hasattr(ops, case.op):
                yield case


def rows(device: torch.device, keep: Callable[[dict[str, Any]], None], bandwidth: float) -> None:
    """Measure every row and hand it to ``keep``."""
    for case in cases():
        for dtype in DTYPES:
            for layout, memory_format in FORMATS.items():
                shape = case.shape if device.type == "cuda" else reduced(case.shape)
                setting = Setting(shape, dtype, device, memory_format)
                for direction, seconds, moved in measure(case, setting):
                    keep(
                        {
                            "op": case.op,
                            "size": case.size,
                            "dtype": str(dtype).removeprefix("torch."),
                            "format": layout,
                            "direction": direction,
                            "seconds": seconds,
                            "bytes": moved,
                            "share": moved / seconds / bandwidth,
                        }
                    )


def results(call: Call) -> list[Tensor]:
    y = call.function(*call.args)
    return [y] if isinstance(y, Tensor) else list(y)


def reduced(shape: tuple[int, ...]) -> tuple[int, ...]:
    n, channels, h, w = shape
    return (min(n, 2), channels, max(h // 2, 4), max(w // 2, 4))


def measure(case: Case, setting: Setting) -> list[tuple[str, float, int]]:
    """(direction, median seconds, bytes that it cannot do without) of one setting."""
    assert case.work is not None
    work = case.work(setting)
    torch.manual_seed(0)
    call = case.build("fastnas", setting)
    directions: dict[str, tuple[Callable[[], Run], int]] = {
        "forward": (lambda: lambda: results(call), work[FORWARD].bytes)
    }
    if BOTH in work:

        def backward() -> Run:
            ys = results(call)
            grads = [torch.randn_like(y) for y in ys]
            return lambda: torch.autograd.grad(ys, call.wrt, grads, retain_graph=True)

        directions["backward"] = (backward, work[BOTH].bytes - work[FORWARD].bytes)
    device = setting.device
    found = []
    for name, (prepare, moved) in directions.items():
        timer = on_gpu if device.type == "cuda" else on_cpu
        seconds = timer(prepare, device)
        found.append((name, seconds, moved))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def on_cpu(prepare: Callable[[], Run], device: torch.device) -> float:
    run = prepare()
    run()
    return statistics.median(timed(run, device) for _ in range(LEAST))


def on_gpu(prepare: Callable[[], Run], device: torch.device) -> float:
    """Seconds of one run among others, by the GPU's own clock."""
    stream, evict = torch.cuda.Stream(device), evictor(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    # A backward runs on the stream of its forward, which has to be the one that is recorded.
    with torch.cuda.stream(stream):
        run = prepare()
        for _ in range(3):
            run()
            evict()

    def both() -> None:
        evict()
        run()

    long, short = (
        statistics.median(replays(record(work, stream, device), device)) for work in (both, evict)
    )
    return max((long - short) / REPEATS, 1e-9)


def record(work: Run, stream: torch.cuda.Stream, device: torch.device) -> torch.cuda.CUDAGraph:
    synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(REPEATS):
            work()
    return graph


def replays(graph: torch.cuda.CUDAGraph, device: torch.device) -> list[float]:
    pairs = []
    stop = time.perf_counter() + SECONDS
    while len(pairs) < LEAST or (len(pairs) < MOST and time.perf_counter() < stop):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        pairs.append((start, end))
    synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device = torch.device(options.device)
    machine = describe_machine(device, 0.0)
    found: dict[str, Any] = {"machine": machine.as_dict(), "rows": [], "complete": False}

    def keep(row: dict[str, Any]) -> None:
        found["rows"].append(row)
        write(options.out, found)

    rows(device, keep, machine.copy_bandwidth)
    found["complete"] = True
    write(options.out, found)
    print(f"{len(found['rows'])} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
