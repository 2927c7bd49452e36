# SPDX-License-Identifier: Apache-2.0
"""Measuring: interleaved times, saved bytes, peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fastnas._timing import synchronize, timed
from fastnas.bench.machine import Work

__all__ = [
    "Interleaved",
    "SavedBytes",
    "evictor",
    "flusher",
    "interleave",
    "peak_memory",
    "relative_error",
    "resident_memory",
    "return_memory",
    "saved_bytes",
]

#: Between two GPU measurements this much is read, so that none finds its operands in L2. It is not
#: written: lines that wait to be written back would be on the account of what is measured.
_FLUSH_BYTES = 256 << 20
_FLUSH = 50_000_000


def flusher(device: torch.device, work: Work | None) -> Callable[[], None]:
    """What to call before each measurement: empties a GPU's L2 of operands that would fit it.

    In a search an operand has left the L2 by the time it is used again.
    """
    if device.type != "cuda" or work is None or work.bytes > _FLUSH:
        return lambda: None
    return evictor(device)


def evictor(device: torch.device, size: int = _FLUSH_BYTES) -> Callable[[], None]:
    """What reads ``size`` bytes of memory of its own whenever it is called."""
    buffer = torch.zeros(size // 4, device=device)
    total = torch.zeros((), device=device)

    def evict() -> None:
        torch.sum(buffer, dim=0, out=total)

    return evict


@dataclass
class Interleaved:
    """Seconds of several forms of one computation, measured in turns: round r has one of each."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        """Rounds that are complete."""
        return min(map(len, self.seconds.values()))

    def median(self, form: str) -> float:
        """Seconds of a form."""
        return statistics.median(self.seconds[form])

    def ratio(self, slow: str, fast: str) -> tuple[float, float, float]:
        """How many times faster: ratio of the medians, and quartiles of the rounds' ratios."""
        pairs = zip(self.seconds[slow], self.seconds[fast], strict=False)
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
    result: Interleaved | None = None,
) -> Interleaved:
    """Time ``runs`` as A B C A B C ...: whatever slows the machine down meets all of them.

    Args:
        runs: what to call, by name.
        device: where they run.
        seconds: how long to go on, in rounds; at least ``least`` and at most ``most`` of them.
        before: called before each measurement.
        least: rounds that are made in any case.
        most: rounds that are enough.
        result: filled as it goes, for those who want what there is after an interruption.
    """
    result = Interleaved() if result is None else result
    result.seconds = {name: [] for name in runs}
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


class SavedBytes:
    """Within the block, what autograd keeps for backwards: ``bytes``, each storage once and whole.

    Args:
        exclude: tensors that exist anyway (parameters); their storages do not count.
    """

    def __init__(self, exclude: Iterable[Tensor] = ()) -> None:
        self._anyway = {t.untyped_storage().data_ptr() for t in exclude}
        self._storages: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)

    @property
    def bytes(self) -> int:
        """Of all that was kept so far. No address is used twice while the graph lives."""
        return sum(self._storages.values())

    def __enter__(self) -> SavedBytes:
        """Begin to count."""
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        """End counting; backwards are possible afterwards."""
        self._hooks.__exit__(*error)

    def _pack(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in self._anyway:
            self._storages[storage.data_ptr()] = storage.nbytes()
        # Not t: an output that its own node keeps would keep the node, and so the graph, for ever.
        return t.detach()


def saved_bytes(forward: Callable[[], list[Tensor]], exclude: tuple[Tensor, ...] = ()) -> int:
    """Bytes kept for the backward by one forward: storages, each counted once and whole.

    Args:
        forward: computes outputs that require a gradient.
        exclude: tensors that exist anyway (parameters); their storages do not count.

    Raises:
        ValueError: an output does not require a gradient.
    """
    with SavedBytes(exclude) as saved:
        ys = forward()
    if not all(y.requires_grad for y in ys):
        raise ValueError("saved_bytes: an output of forward does not require a gradient")
    return saved.bytes


def peak_memory(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that one call takes at its peak beyond what was in use before.

    On a CPU this is memory of the process in use (resident), as Linux counts it; None elsewhere.
    """
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return_memory()
    start = resident_memory()
    if device.type != "cpu" or start is None or not _reset_peak():
        run()
        return None
    run()
    peak = resident_memory(peak=True)
    return None if peak is None else max(peak - start, 0)


def resident_memory(peak: bool = False) -> int | None:
    """Bytes of memory that this process has in use, now or at most; None where no one counts."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    name = "VmHWM:" if peak else "VmRSS:"
    found = [line.split()[1] for line in lines if line.startswith(name)]
    return int(found[0]) * 1024 if found else None


def return_memory() -> None:
    """Give memory that was freed back to the system, as far as the C library can."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _reset_peak() -> bool:
    """Begin to count the peak of the process anew, where the kernel can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``|actual - expected| / |expected|`` in the Euclidean norm.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"shape {list(actual.shape)} instead of {list(expected.shape)}")
    expected = expected.float()
    norm = torch.linalg.vector_norm(expected).item()
    error = torch.linalg.vector_norm(actual.float() - expected).item()
    return error / norm if norm else error
