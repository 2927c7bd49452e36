# SPDX-License-Identifier: Apache-2.0
"""What the recorder asks of PyTorch, without a GPU: streams, pools, warnings, failures."""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch

from fastnas.methods.recorder import CudaRecorder


class Stream:
    def __init__(self, device=None) -> None:
        self.waits: list[Stream] = []

    def wait_stream(self, other) -> None:
        self.waits.append(other)


class Graph:
    def pool(self) -> object:
        return self.used


class Cuda:
    """The part of ``torch.cuda`` that the recorder uses."""

    def __init__(self, monkeypatch) -> None:
        self.main = self.current = Stream()
        self.mode, self.modes, self.pools = 0, [], []
        for name in ("current_stream", "set_stream", "get_sync_debug_mode", "set_sync_debug_mode"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        self.recorder = CudaRecorder(torch.device("cpu"))

    def current_stream(self, device=None) -> Stream:
        return self.current

    def set_stream(self, stream) -> None:
        self.current = stream

    def get_sync_debug_mode(self) -> int:
        return self.mode

    def set_sync_debug_mode(self, mode) -> None:
        self.mode = mode
        self.modes.append(mode)

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        graph.used = object() if pool is None else pool
        self.pools.append(pool)
        before, self.current = self.current, stream
        yield  # as PyTorch's, it leaves its stream the current one after an error
        self.current = before


@pytest.fixture
def cuda(monkeypatch) -> Cuda:
    return Cuda(monkeypatch)


def test_a_warm_up_runs_on_the_stream_of_the_recordings(cuda):
    seen = []
    assert cuda.recorder.warm_up(lambda: seen.append(cuda.current)) is None
    cuda.recorder.record(lambda: seen.append(cuda.current))
    assert seen[0] is seen[1] is not cuda.main
    assert cuda.current is cuda.main
    assert seen[0].waits == [cuda.main] and cuda.main.waits == [seen[0]]


@pytest.mark.parametrize("mode", [0, 2])
def test_a_warm_up_listens_for_waiting(cuda, mode):
    cuda.mode = mode

    def wait() -> None:
        assert cuda.mode == "warn"
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "the host waits" in cuda.recorder.warm_up(wait)
    assert cuda.modes == ["warn", mode]
    with pytest.warns(FutureWarning, match="of the step's own"):
        found = cuda.recorder.warm_up(
            lambda: warnings.warn("of the step's own", FutureWarning, stacklevel=1)
        )
    assert found is None
    with pytest.raises(ZeroDivisionError):
        cuda.recorder.warm_up(lambda: 1 / 0)
    assert cuda.mode == mode


def test_recordings_that_live_share_their_memory(cuda):
    first = cuda.recorder.record(lambda: None)
    second = cuda.recorder.record(lambda: None)
    assert cuda.pools == [None, first.pool()] and second.pool() is first.pool()
    del first, second
    cuda.recorder.record(lambda: None)
    # Memory of a pool without recordings is gone, and its name with it.
    assert cuda.pools[-1] is None


def test_a_recording_that_fails(cuda):
    def fail() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        cuda.recorder.record(fail)
    assert cuda.current is cuda.main
    assert cuda.pools == [None, None]  # one more, of nothing, ended what was left of it
    cuda.recorder.record(lambda: None)
    assert cuda.pools[-1] is None


def test_a_copy_is_another_one(cuda):
    cuda.recorder.warm_up(lambda: None)
    first = cuda.recorder.record(lambda: None)
    other = copy.deepcopy(cuda.recorder)
    assert other._side() is not cuda.recorder._side()
    other.record(lambda: None)
    assert cuda.pools[-1] is None and first is not None
