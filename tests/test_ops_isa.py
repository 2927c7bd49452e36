# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels for every instruction set, and what threads do to them."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import ops_cases as cases
import ops_worker
import pytest
import torch
from ops_cases import assert_bitwise, assert_near

import fastnas
from fastnas._extension import cpu_instruction_set

# As ATEN_CPU_CAPABILITY calls them, from narrow to wide; and as torch does.
SETS = {"default": "DEFAULT", "avx2": "AVX2", "avx512": "AVX512"}


def available():
    """The instruction sets up to the one this process runs with."""
    names = list(SETS)
    here = next((k for k, name in enumerate(SETS.values()) if name == cpu_instruction_set()), 0)
    return names[: here + 1]


def run_worker(*arguments, **environment):
    command = [sys.executable, str(Path(ops_worker.__file__).resolve()), *map(str, arguments)]
    path = os.pathsep.join(p for p in sys.path if p)
    env = {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def by_set(tmp_path_factory):
    """Results of each instruction set, each from a process of its own."""
    folder = tmp_path_factory.mktemp("isa")
    found = {}
    for name in available():
        file = folder / f"{name}.pt"
        run_worker("results", file, ATEN_CPU_CAPABILITY=name)
        saved = torch.load(file, weights_only=True)
        file.unlink()
        assert saved["isa"] == SETS[name]
        found[name] = saved["results"]
    return found


@pytest.fixture(scope="module")
def here():
    """Results of this process, whose kernels the other tests compare with the reference."""
    return ops_worker.results()


def test_every_instruction_set_gives_the_same_within_rounding(by_set, here, tolerances):
    for name, results in by_set.items():
        assert results.keys() == here.keys()
        for case, tensors in results.items():
            for k, (a, e) in enumerate(zip(tensors, here[case], strict=True)):
                assert a.dtype == e.dtype and a.stride() == e.stride()
                if not case.startswith("rounding") and not a.equal(e):
                    assert_near(a, e, tolerances, f"{name} {case} {k}")


def test_every_instruction_set_reads_and_rounds_halves_alike(by_set, here):
    """The narrowest converts in software, the others by instructions."""
    cases_of_rounding = [case for case in here if case.startswith("rounding")]
    assert len(cases_of_rounding) == 10
    for name, results in by_set.items():
        for case in cases_of_rounding:
            assert_bitwise(results[case][0], here[case][0], f"{name} {case}")


def test_another_process_gives_the_same_bits(by_set, here):
    for case, tensors in by_set[available()[-1]].items():
        for a, e in zip(tensors, here[case], strict=True):
            assert_bitwise(a, e, case)


@pytest.mark.skipif(len(available()) == 1, reason="there is but one instruction set here")
def test_each_instruction_set_runs_kernels_of_its_own(by_set):
    """Vectors of another width add in another order, so the last bits of long sums differ."""
    names = list(by_set)
    for a, b in itertools.pairwise(names):
        pairs = [
            (x, y)
            for case in by_set[a]
            if "-float32-" in case
            for x, y in zip(by_set[a][case], by_set[b][case], strict=True)
        ]
        assert any(not x.equal(y) for x, y in pairs), f"{a} and {b} ran the same code"


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_wide_registers_stay_in_the_kernels_that_were_chosen_for_them():
    """A wide instruction anywhere else would crash an older processor."""
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", fastnas._extension._C.__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    allowed = {"%ymm": ("fastnas::avx2::", "fastnas::avx512::"), "%zmm": ("fastnas::avx512::",)}
    symbol, seen, strays = "", set(), set()
    for line in listing.splitlines():
        if label := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            symbol = label[1]
            continue
        for register, places in allowed.items():
            if register in line:
                if any(place in symbol for place in places):
                    seen.add(register)
                else:
                    strays.add(f"{register} in {symbol}")
    if "DEFAULT" not in listing and not seen and not strays:
        pytest.skip("no symbols, or no wide instructions for this architecture")
    assert not strays
    assert seen == set(allowed)


# --- threads


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.ids)
def test_results_do_not_depend_on_the_number_of_threads(dtype, layout, threads):
    for count, shape in ((3, (7, 12, 31, 33)), (2, (70, 40, 7, 7)), (2, (2, 3, 190, 100))):
        runs = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            run = []
            for _, y, leaves in ops_worker.mixing_calls(count, shape, dtype, layout):
                grads = torch.autograd.grad(y, leaves, cases.like_output(y)) if leaves else ()
                run += [y.detach(), *grads]
            runs.append(run)
        for other in runs[1:]:
            for a, b in zip(runs[0], other, strict=True):
                assert_bitwise(a, b)


@pytest.mark.skipif(
    not Path("/proc/self/schedstat").exists(), reason="needs the kernel's account of threads"
)
def test_two_threads_share_the_work():
    """at::parallel_for without OpenMP would quietly leave it all to one."""
    report = json.loads(run_worker("threads", OMP_WAIT_POLICY="passive"))
    assert len(report) == 42
    for name, shares in report.items():
        assert shares["2"][1] > 0.1, f"{name}: {shares['2']}"
        assert shares["1"][0] > 0.95, f"{name}: {shares['1']}"
