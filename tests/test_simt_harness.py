# SPDX-License-Identifier: Apache-2.0
"""The harness that runs CUDA kernels on the host finds each planted fault, and only those."""

from __future__ import annotations

import pytest
import torch
from simt import harness

pytestmark = [
    pytest.mark.skipif(harness.compiler() is None, reason="no g++"),
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # compiles
]


@pytest.fixture(scope="module")
def simt():
    return harness.build()


@pytest.fixture
def guarded(simt):
    simt.guard(True)
    yield simt
    simt.guard(False)
    simt.take_damage()


def test_a_sound_kernel_passes_whatever_the_order(guarded):
    for seed in range(20):
        guarded.set_seed(seed)
        assert guarded.run_fault("none") == ("", 1520.0)


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("barrier_not_reached", "never reaches the barrier"),
        ("barriers_apart", "waits at the barrier of line"),
        ("shuffle_outside_mask", "has mask 0000ffff without this lane"),
        ("shuffle_not_reached", "in the mask ffffffff of the shuffle"),
        ("shuffle_from_outside", "which is not in its mask 0000ffff"),
        ("shared_not_written", "element 5 of shared array shared is read, but was never written"),
        ("shared_out_of_bounds", "shared array shared has 63 elements, but element 63"),
        ("shared_written_twice", "is written here and by thread"),
        ("shared_without_barrier", "with no barrier between"),
        ("shared_reused_without_barrier", "with no barrier between"),
        ("read_past_the_end", "touched 0 bytes past the end of an allocation of 64"),
        ("write_past_the_end", "touched 0 bytes past the end of an allocation of 64"),
    ],
)
def test_finds(fault, found, guarded):
    for seed in range(5):
        guarded.set_seed(seed)
        said, _ = guarded.run_fault(fault)
        assert found in said and said.startswith("faults.cu block (0, 0, 0) thread "), said
    assert guarded.run_fault("none")[0] == ""  # and is ready for the next kernel


def test_finds_writes_before_the_start(guarded):
    assert guarded.run_fault("write_before_the_start")[0] == ""
    assert "64 bytes was overrun at byte -4" in guarded.take_damage()
    assert guarded.take_damage() == ""


def test_memory_starts_out_as_nan(guarded):
    assert all(torch.empty(5, dtype=d).isnan().all() for d in (torch.float32, torch.bfloat16))
