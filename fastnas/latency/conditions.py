# SPDX-License-Identifier: Apache-2.0
"""Where and how something is timed: what must agree for a time to be believed."""

from __future__ import annotations

import dataclasses
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fastnas import _extension
from fastnas.search.fields import check_range
from fastnas.search.runtime import memory_layout, resolve_device

__all__ = ["Conditions", "Precision", "here"]

Precision = Literal["float32", "bfloat16", "float16"]

_MAX_TEXT = 200
"""Characters of a name in a table."""


@dataclass(frozen=True)
class Conditions:
    """What a time depends on beside the network.

    Attributes:
        machine: model of the processor; on a GPU, its name and the processor that feeds it.
        device: ``cpu``, ``cuda``.
        instruction_set: of the CPU kernels, ``AVX2`` or another.
        threads: of the CPU.
        batch: images in one pass.
        dtype: of weights and images.
        memory_format: of weights and images, ``contiguous`` or ``channels_last``.
        torch: its version.

    Raises:
        ValueError: a number below 1, or a text of more than 200 characters.
    """

    machine: str
    device: str
    instruction_set: str
    threads: int
    batch: int
    dtype: Precision
    memory_format: Literal["contiguous", "channels_last"]
    torch: str

    def __post_init__(self) -> None:
        """Check the numbers, and that a file brings no text without end."""
        check_range("threads", self.threads, 1)
        check_range("batch", self.batch, 1)
        for name in ("machine", "device", "instruction_set", "torch"):
            if len(getattr(self, name)) > _MAX_TEXT:
                raise ValueError(f"{name}: expected at most {_MAX_TEXT} characters")

    def differences(self, other: Conditions) -> list[str]:
        """What differs in ``other``, as ``threads 2, not 4`` with the own value first."""
        names = [field.name for field in dataclasses.fields(self)]
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        return [f"{name} {mine}, not {its}" for name, mine, its in pairs if mine != its]


def here(device: str, threads: int, batch: int, dtype: Precision, memory_format: str) -> Conditions:
    """The conditions on this machine.

    Args:
        device: ``auto``, ``cpu``, ``cuda``, ...
        threads: of the CPU; 0 for as many as PyTorch takes now.
        batch: images in one pass.
        dtype: of weights and images.
        memory_format: ``auto``, ``contiguous`` or ``channels_last``.

    Raises:
        ValueError: there is no such device, or a value is out of its range.
    """
    found = resolve_device(device)
    layout = memory_layout(memory_format, found)
    return Conditions(
        machine=_machine(found),
        device=found.type,
        instruction_set=_extension.cpu_instruction_set(),
        threads=threads or torch.get_num_threads(),
        batch=batch,
        dtype=dtype,
        memory_format="channels_last" if layout is torch.channels_last else "contiguous",
        torch=torch.__version__,
    )


def _machine(device: torch.device) -> str:
    if device.type != "cuda":
        return _processor()
    return f"{torch.cuda.get_device_name(device)} on {_processor()}"[:_MAX_TEXT]


def _processor() -> str:
    """Model, family and number of cores; clouds call many models the same."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:  # not Linux
        text = ""
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    first = {name.strip(): value.strip() for name, _, value in pairs}
    name = first.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in first and "model" in first:
        name += f" (family {first['cpu family']}, model {first['model']})"
    return f"{name}, {os.cpu_count()} cores"[:_MAX_TEXT]
