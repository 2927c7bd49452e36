# SPDX-License-Identifier: Apache-2.0
"""Measuring: interleaved times, saved bytes, what the machine can do at best."""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastnas

#: Between two GPU measurements this much is overwritten, so that none finds its operands in L2.
_FLUSH_BYTES = 256 << 20
_FLUSH = 50_000_000


class Work(NamedTuple):
    """What a computation cannot do without: bytes through memory, floating-point operations."""

    bytes: int
    flops: int = 0


@dataclass(frozen=True)
class Machine:
    """Where figures come from. Bandwidth and rate are measured, with the threads of the session."""

    name: str
    device: str
    threads: int
    torch: str
    fastnas: str
    cpu_capability: str
    python: str
    date: str
    #: Of the last minute before the session; well above 0, others ran beside it.
    load_average: float
    #: Bytes read and written per second by one large out-of-place copy.
    copy_bandwidth: float
    #: Floating-point operations per second of one large float32 matrix product.
    gemm_rate: float

    def floor(self, work: Work) -> float:
        """Seconds below which ``work`` cannot be done with its operands in memory."""
        return max(work.bytes / self.copy_bandwidth, work.flops / self.gemm_rate)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def device_name(device: torch.device) -> str:
    """The model of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if (info := Path("/proc/cpuinfo")).exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe_machine(device: torch.device, load_average: float) -> Machine:
    """The facts that figures are quoted with; takes about a second."""
    return Machine(
        name=device_name(device),
        device=device.type,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        fastnas=fastnas.__version__,
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        python=platform.python_version(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        load_average=load_average,
        copy_bandwidth=copy_bandwidth(device),
        gemm_rate=gemm_rate(device),
    )


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of the best of a few copies too large for any cache."""
    source = torch.ones((1 << 30 if device.type == "cuda" else 1 << 28) // 4, device=device)
    target = torch.empty_like(source)
    seconds = min(timed(lambda: target.copy_(source), device) for _ in range(7))
    return 2 * source.numel() * source.element_size() / seconds


def gemm_rate(device: torch.device) -> float:
    """Floating-point operations per second of the best of a few float32 matrix products."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.ones(n, n, device=device)
    seconds = min(timed(lambda: a @ a, device) for _ in range(7))
    return 2 * n**3 / seconds


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def flusher(device: torch.device, work: Work | None) -> Callable[[], None]:
    """What to call before each measurement: empties a GPU's L2 of operands that would fit it.

    In a search an operand has left the L2 by the time it is used again.
    """
    if device.type != "cuda" or work is None or work.bytes > _FLUSH:
        return lambda: None
    return overwriter(torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device))


def overwriter(buffer: Tensor) -> Callable[[], None]:
    """What writes all of ``buffer`` whenever it is called."""

    def overwrite() -> None:
        buffer.zero_()

    return overwrite


@dataclass
class Interleaved:
    """Seconds of several forms of one computation, measured in turns: round r has one of each."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        return min(map(len, self.seconds.values()))

    def median(self, form: str) -> float:
        return statistics.median(self.seconds[form])

    def ratio(self, slow: str, fast: str) -> tuple[float, float, float]:
        """How many times faster: ratio of the medians, and quartiles of the rounds' ratios."""
        pairs = zip(self.seconds[slow], self.seconds[fast], strict=True)
        rounds = [a / b for a, b in pairs]
        low, _, high = statistics.quantiles(rounds, n=4) if len(rounds) > 1 else rounds * 3
        return self.median(slow) / self.median(fast), low, high


def interleave(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    before: Callable[[], None] = lambda: None,
    least: int = 5,
    most: int = 200,
) -> Interleaved:
    """Time ``runs`` as A B C A B C ...: whatever slows the machine down meets all of them.

    Args:
        runs: what to call, by name.
        device: where they run.
        seconds: how long to go on, in rounds; at least ``least`` and at most ``most`` of them.
        before: called before each measurement.
        least: rounds that are made in any case.
        most: rounds that are enough.
    """
    result = Interleaved({name: [] for name in runs})
    collecting = gc.isenabled()
    gc.disable()
    try:
        for run in runs.values():  # warm-up
            run()
        stop = time.perf_counter() + seconds
        for done in range(most):
            if done >= least and time.perf_counter() > stop:
                break
            for name, run in runs.items():
                before()
                result.seconds[name].append(timed(run, device))
    finally:
        if collecting:
            gc.enable()
    return result


def saved_bytes(forward: Callable[[], list[Tensor]], exclude: tuple[Tensor, ...] = ()) -> int:
    """Bytes kept for the backward by one forward: storages, each counted once and whole.

    Args:
        forward: computes outputs that require a gradient.
        exclude: tensors that exist anyway (parameters); their storages do not count.
    """
    anyway = {t.untyped_storage().data_ptr() for t in exclude}
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in anyway:
            storages[storage.data_ptr()] = storage.nbytes()
        return t  # held by the graph: no address is used twice while ys live

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ys = forward()
    if not all(y.requires_grad for y in ys):
        raise ValueError("saved_bytes: an output of forward does not require a gradient")
    return sum(storages.values())


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Bytes of GPU memory that one call takes at its peak beyond what was allocated before."""
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``|actual - expected| / |expected|`` in the Euclidean norm."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {list(actual.shape)} instead of {list(expected.shape)}")
    expected = expected.float()
    norm = torch.linalg.vector_norm(expected).item()
    error = torch.linalg.vector_norm(actual.float() - expected).item()
    return error / norm if norm else error


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table, columns aligned: text to the left, the rest to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    number = [all(row[i][:1] in "0123456789-" for row in rows) for i in range(len(head))]
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, number, strict=True)
        ).rstrip()
        for row in [head, ["-" * width for width in widths], *rows]
    ]
