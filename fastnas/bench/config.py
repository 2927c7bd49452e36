# SPDX-License-Identifier: Apache-2.0
"""What ``fastnas bench`` measures, and for how long."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from fastnas.search.fields import check_range, to_dict

__all__ = ["BenchConfig", "parse_bytes"]


@dataclass(frozen=True)
class BenchConfig:
    """Size of the supernet and of the batch, and how long to measure."""

    method: Literal["both", "darts", "pc_darts"] = "both"
    """Whose supernet: darts, pc_darts (one in four channels is mixed), or both."""
    channels: int = 16
    """Channels of the first cell's nodes."""
    layers: int = 8
    """Number of cells."""
    batch_size: int = 0
    """Images in a batch; 0 takes 16 on a CPU and 64 elsewhere."""
    image_size: int = 32
    """Side of the images in pixels."""
    threads: int = 0
    """CPU threads; 0 leaves PyTorch's choice."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes CUDA where there is a device."""
    seconds: float = 120.0
    """How long to go on, about; the memory of every way to compute a step is counted, and its time
    measured three times, in any case. A quarter of it may go into torch.compile."""
    memory_limit: str = "auto"
    """Memory for which the largest batch is estimated, such as 8GB; auto takes all of the device or
    machine."""
    json: str | None = None
    """File for all figures, as JSON."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("channels", "layers", "image_size"):
            check_range(name, getattr(self, name), 1)
        for name in ("batch_size", "threads", "seconds"):
            check_range(name, getattr(self, name), 0)
        if self.batch_size == 1:
            raise ValueError("batch_size: expected at least 2 for BatchNorm, but got 1")
        if self.memory_limit != "auto":
            parse_bytes(self.memory_limit)

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods to measure."""
        return ("darts", "pc_darts") if self.method == "both" else (self.method,)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return to_dict(self)


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(text: str) -> int:
    """The number of bytes that ``8GB``, ``512 MiB`` or ``1e9`` stand for.

    Raises:
        ValueError: it is no amount of memory.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e\d+)?)\s*([KMGT]?)(I?)B?\s*", text.upper(), re.I)
    if found:
        number, unit, binary = found.groups()
        if not binary or unit:
            size = float(number) * (_BINARY if binary else _UNITS)[unit]
            if 1 <= size < 2**63:
                return int(size)
    raise ValueError(f"memory_limit: expected an amount such as 8GB or 512MiB, but got {text!r}")
