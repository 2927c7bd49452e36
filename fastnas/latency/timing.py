# SPDX-License-Identifier: Apache-2.0
"""Timing of forward passes as they happen in a deployed network.

A block in a loop of its own is faster than in a network: its weights are in the nearest cache, and
so is its input, which nobody had to write. Here blocks take turns in rounds, each in a new random
order, so that between two calls of one block all others have used the cache, as in a network. The
input is written right before the call, as by the block before. What disturbs the machine for a
while hits all alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from fastnas.latency.conditions import Conditions
from fastnas.search.runtime import runtime

__all__ = ["Stopwatch", "deployed", "images", "measuring", "stopwatch"]

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Stopwatch(Protocol):
    """Times calls one after the other; on a GPU the times are known when all are done."""

    def time(self, call: Callable[[], object]) -> None:
        """Time one call."""

    def read(self) -> list[float]:
        """Milliseconds of the calls since the last ``read``."""


class _CpuStopwatch:
    def __init__(self) -> None:
        self._times: list[float] = []

    def time(self, call: Callable[[], object]) -> None:
        begin = time.perf_counter_ns()
        output = call()
        self._times.append((time.perf_counter_ns() - begin) * 1e-6)
        del output  # after the clock was read, as the next block frees its input

    def read(self) -> list[float]:
        times, self._times = self._times, []
        return times


class _CudaStopwatch:
    """Events around each call, read at the end: the GPU is never waited for in between.

    So kernels queue up behind each other as they do in a network, where only the first pays for
    the way to the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def time(self, call: Callable[[], object]) -> None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        self._events.append((begin, end))

    def read(self) -> list[float]:
        torch.cuda.synchronize(self._device)
        times = [begin.elapsed_time(end) for begin, end in self._events]
        self._events = []
        return times


def stopwatch(device: torch.device) -> Stopwatch:
    """The stopwatch for a device."""
    return _CudaStopwatch(device) if device.type == "cuda" else _CpuStopwatch()


@contextmanager
def measuring(conditions: Conditions, device: torch.device) -> Iterator[None]:
    """Threads as the conditions say, no gradients, and the GPU chosen, within the block."""
    with runtime(conditions.threads), torch.inference_mode():
        if device.type != "cuda":
            yield
            return
        with torch.cuda.device(device):
            yield


def deployed(module: nn.Module, conditions: Conditions, device: torch.device) -> nn.Module:
    """The module in eval mode, in the dtype and memory format of the conditions."""
    module = module.eval().requires_grad_(False)
    module.to(device=device, dtype=_DTYPES[conditions.dtype])
    layout = _FORMATS[conditions.memory_format]
    return module.to(memory_format=layout)  # type: ignore[call-overload]


def images(
    shape: Sequence[int], conditions: Conditions, device: torch.device, generator: torch.Generator
) -> Tensor:
    """Standard normal input ``(batch, *shape)``."""
    x = torch.randn((conditions.batch, *shape), generator=generator)
    x = x.to(device=device, dtype=_DTYPES[conditions.dtype])
    return x.to(memory_format=_FORMATS[conditions.memory_format]) if x.dim() == 4 else x
