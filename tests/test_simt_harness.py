# SPDX-License-Identifier: Apache-2.0
"""The harness that runs CUDA kernels on the host finds each planted fault, and only those."""

from __future__ import annotations

import ctypes

import pytest
import torch
from simt import harness

import fastnas  # noqa: F401  (registers the ops)

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


@pytest.mark.parametrize(
    ("kernel", "result"), [("none", 1520.0), ("votes", 1.0), ("read_after_a_barrier", 1.0)]
)
def test_a_sound_kernel_passes_whatever_the_order(kernel, result, guarded):
    for seed in range(20):
        guarded.set_seed(seed)
        assert guarded.run_fault(kernel) == ("", result)


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("barrier_not_reached", "never reaches the barrier"),
        ("barriers_apart", "waits at the barrier of line"),
        ("shuffle_outside_mask", "has mask 0000ffff without this lane"),
        ("shuffle_not_reached", "in the mask ffffffff of the shuffle"),
        ("shuffle_from_outside", "which is not in its mask 0000ffff"),
        ("vote_outside_mask", "has mask 0000ffff without this lane"),
        ("vote_not_reached", "in the mask ffffffff of the shuffle"),
        ("shared_not_written", "element 5 of shared array shared is read, but was never written"),
        ("shared_out_of_bounds", "shared array shared has 63 elements, but element 63"),
        ("shared_written_twice", "is written here and by thread"),
        ("shared_without_barrier", "with no barrier between"),
        ("shared_reused_without_barrier", "with no barrier between"),
        ("read_past_the_end", "byte 64 of an allocation of 64 bytes is read"),
        ("write_past_the_end", "byte 64 of an allocation of 64 bytes is written"),
        ("write_before_the_start", "byte -4 of an allocation of 64 bytes is written"),
        ("read_before_the_start", "byte -4 of an allocation of 64 bytes is read"),
        ("misaligned", "which is no multiple of 16"),
        ("written_twice", "bytes is written here and written by thread"),
        ("written_by_two_blocks", "bytes is written here and written by thread 3 of block"),
        ("read_without_barrier", "with no barrier between"),
    ],
)
def test_finds(fault, found, guarded):
    for seed in range(5):
        guarded.set_seed(seed)
        said, _ = guarded.run_fault(fault)
        assert found in said and said.startswith("faults.cu run_fault block ("), said
        assert ", 0, 0) thread " in said
    assert guarded.run_fault("none")[0] == ""  # and is ready for the next kernel


def test_finds_what_is_freed_and_names_the_launcher_with_its_types(guarded):
    x, weights = torch.ones(2, 8), torch.ones(1)
    memory = (ctypes.c_float * 16).from_address(x.data_ptr())
    alias = torch.frombuffer(memory, dtype=torch.float32).view(2, 8)
    with harness.kernels(guarded, ["mixed_sum"]):
        assert torch.ops.fastnas.mixed_sum([alias], weights).eq(1).all()
        del x
        with pytest.raises(RuntimeError) as error:
            torch.ops.fastnas.mixed_sum([alias], weights)
    said = str(error.value)
    assert "combine.cu launch_combine [Type<float>, Int<4>, Int<0>] block (0, 0, 0)" in said
    assert "global memory that nobody has allocated, or no longer, is read" in said


def test_finds_what_the_host_writes_outside(guarded):
    """A pattern around each allocation is looked at when it is freed."""
    x = torch.empty(10)
    ctypes.memset(x.data_ptr() + 42, 0, 1)
    del x
    assert guarded.take_damage() == "an allocation of 40 bytes was overrun at byte 42"
    assert guarded.take_damage() == ""


def test_memory_starts_out_as_nan(guarded):
    assert all(torch.empty(5, dtype=d).isnan().all() for d in (torch.float32, torch.bfloat16))
