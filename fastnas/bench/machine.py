# SPDX-License-Identifier: Apache-2.0
"""What a machine can do at best, and what a computation cannot do without."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastnas._timing import timed
from fastnas._version import __version__

__all__ = ["Machine", "Work", "copy_bandwidth", "describe_machine", "device_name", "gemm_rate"]


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
        """The facts as JSON can hold them."""
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
        fastnas=__version__,
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
