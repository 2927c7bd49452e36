# SPDX-License-Identifier: Apache-2.0
"""How benchmarks measure: bytes that are kept, memory at its peak, forms in turns."""

from __future__ import annotations

import weakref

import pytest
import torch

from fastnas.bench.machine import Machine, Work
from fastnas.bench.measure import (
    Interleaved,
    SavedBytes,
    interleave,
    peak_memory,
    relative_error,
    resident_memory,
    return_memory,
    saved_bytes,
)

CPU = torch.device("cpu")


def test_saved_bytes():
    x, w = torch.ones(100, requires_grad=True), torch.ones(100, requires_grad=True)
    assert saved_bytes(lambda: [x * w]) == 800
    assert saved_bytes(lambda: [x * w], (w,)) == 400
    # A view counts as the whole storage that it keeps, and one storage once.
    assert saved_bytes(lambda: [x[:10] * w[:10] + (x[:5] * w[:5]).sum()]) == 800
    with pytest.raises(ValueError, match="does not require a gradient"):
        saved_bytes(lambda: [x.detach()])


def test_counting_keeps_no_graph():
    """A node that saves its own output (ReLU) would keep itself: a graph lost at every call."""
    x, seen = torch.ones(10, requires_grad=True), []

    class Hook:
        """Held by the graph alone."""

        def __call__(self, gradient: torch.Tensor) -> None:
            pass

    def forward() -> list[torch.Tensor]:
        y = torch.relu(torch.relu(x * 2))
        y.register_hook(hook := Hook())
        seen.append(weakref.ref(hook))
        return [y]

    assert saved_bytes(forward, (x,)) == 2 * 40
    assert seen[0]() is None


def test_a_backward_is_possible_after_counting():
    x = torch.tensor([1.0, -1.0, 2.0], requires_grad=True)
    with SavedBytes() as saved:
        y = torch.relu(x) * x
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.tolist() == [2.0, 0.0, 4.0]
    assert saved.bytes == 24


@pytest.mark.skipif(resident_memory() is None, reason="no /proc/self/status")
def test_peak_memory():
    size = 64 << 20

    def run() -> None:
        torch.ones(size // 4)
        torch.ones(size // 8)

    for _ in range(2):  # what the first call left behind is no part of the second's peak
        peak = peak_memory(run, CPU)
        assert 0.9 * size < peak < 1.2 * size
    before = resident_memory()
    kept = torch.ones(size // 4)
    assert resident_memory() - before > 0.9 * size
    del kept
    return_memory()
    assert resident_memory() - before < 0.2 * size


def test_what_cannot_be_measured_is_none(monkeypatch):
    monkeypatch.setattr("fastnas.bench.measure.Path", lambda path: _Absent())
    assert resident_memory() is None
    calls = []
    assert peak_memory(lambda: calls.append(1), CPU) is None
    assert calls == [1]


class _Absent:
    def read_text(self) -> str:
        raise FileNotFoundError

    write_text = read_text


def test_forms_take_turns():
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = interleave(runs, CPU, seconds=0, before=lambda: calls.append("-"), least=2)
    assert "".join(calls) == "ab-a-b-a-b"
    assert times.rounds == 2


def test_ratio():
    times = Interleaved({"slow": [4.0, 6.0, 8.0], "fast": [2.0, 2.0, 4.0]})
    assert times.median("slow") == 6
    assert times.ratio("slow", "fast") == (3.0, 2.0, 3.0)


def test_floor():
    facts = dict.fromkeys(("name", "device", "torch", "fastnas", "cpu_capability", "python"), "")
    machine = Machine(
        **facts, threads=1, date="", load_average=0.0, copy_bandwidth=100.0, gemm_rate=10.0
    )
    assert machine.floor(Work(200, 10)) == 2.0
    assert machine.floor(Work(200, 50)) == 5.0


def test_relative_error():
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == 0.1
    with pytest.raises(ValueError, match=r"shape \[1\] instead of \[2\]"):
        relative_error(torch.zeros(1), torch.zeros(2))
