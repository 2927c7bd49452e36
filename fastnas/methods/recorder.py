# SPDX-License-Identifier: Apache-2.0
"""Recordings of what a function does on a device; tests put a recorder of their own in."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch

__all__ = ["CudaRecorder", "Recorder", "Recording"]


class Recorder(Protocol):
    """Makes and replays recordings of what a function does on a device."""

    def warm_up(self, run: Callable[[], None]) -> str | None:
        """Run as a recording would; says what in it stands in the way of one, None for nothing."""

    def is_short(self) -> bool:
        """Whether recordings may hold memory that eager steps need."""

    def record(self, run: Callable[[], None]) -> Recording:
        """Record, without doing what is recorded."""


class Recording(Protocol):
    """What was recorded."""

    def replay(self) -> object:
        """Do it."""


class CudaRecorder:
    """Records CUDA graphs on a device. Its recordings share their memory: one is replayed a time.

    Args:
        device: the CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._alive: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def __deepcopy__(self, memo: dict[int, Any]) -> CudaRecorder:
        """Another one: streams and graphs have no copies."""
        return CudaRecorder(self._device)

    def warm_up(self, run: Callable[[], None]) -> str | None:
        """Run on the stream of the recordings, and see whether the host waits for the device."""
        before, stream = torch.cuda.current_stream(self._device), self._side()
        mode = torch.cuda.get_sync_debug_mode()
        stream.wait_stream(before)
        with torch.cuda.stream(stream), warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
                before.wait_stream(stream)  # also where the step failed: others read the weights
        waits = False
        for one in heard:
            text = str(one.message)
            if "synchronizing CUDA operation" in text:
                waits = True
            elif not text.startswith("Synchronization debug mode"):
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        return "the host waits for the device in every step" if waits else None

    def is_short(self) -> bool:
        """Whether more than half of the device's memory is taken by this process."""
        if not self._alive:
            return False
        total = torch.cuda.get_device_properties(self._device).total_memory
        return 2 * torch.cuda.memory_reserved(self._device) > total

    def record(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Record a graph.

        Raises:
            RuntimeError: something in ``run`` cannot be recorded, or the memory is not enough.
        """
        others = list(self._alive)
        try:
            graph = self._graph(run, others[0].pool() if others else None)
        except Exception:
            # What the driver gave up leaves the random generators in a recording: one more ends it.
            with contextlib.suppress(RuntimeError):
                self._graph(lambda: torch.zeros(1, device=self._device), None)
            raise
        self._alive.add(graph)
        return graph

    def _graph(self, run: Callable[[], object], pool: Any) -> torch.cuda.CUDAGraph:
        graph, stream = torch.cuda.CUDAGraph(), self._side()
        with torch.cuda.device(self._device):
            before = torch.cuda.current_stream()
            try:
                # Other threads load images meanwhile, which is no concern of the recording's.
                with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                    run()
            finally:
                # A recording that fails leaves its own stream the current one.
                torch.cuda.set_stream(before)
        return graph

    def _side(self) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        return self._stream
