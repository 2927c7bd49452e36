# SPDX-License-Identifier: Apache-2.0
"""tools/compile_cuda.py: what it reads off the compiler, and when it fails."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

#: As ptxas -v says it, names demangled.
LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'void fastnas::cuda::(anonymous namespace)::\
dots_kernel<float, 4, true>(fastnas::cuda::Plan, fastnas::cuda::Dots)' for 'sm_75'
ptxas info    : Function properties for void fastnas::cuda::(anonymous namespace)::\
dots_kernel<float, 4, true>(fastnas::cuda::Plan, fastnas::cuda::Dots)
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 9216 bytes smem, 1024 bytes cmem[0]
ptxas info    : Compiling entry function 'void fastnas::cuda::(anonymous namespace)::\
dots_kernel<float, 4, true>(fastnas::cuda::Plan, fastnas::cuda::Dots)' for 'sm_120'
    8 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 8 bytes cumulative stack size, 9216 bytes smem
ptxas info    : Compiling entry function 'void fastnas::cuda::(anonymous namespace)::\
fold_kernel<double, float>(float const*, long, double*)' for 'sm_120'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 0 barriers, 388 bytes cmem[0]
"""


@pytest.fixture
def tool(monkeypatch):
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("compile_cuda", ROOT / "tools/compile_cuda.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "compile_cuda", module)
    spec.loader.exec_module(module)
    return module


def compiler(folder: Path, tool, monkeypatch, log: str, status: int = 0) -> None:
    """An nvcc that knows two architectures and says the same of every source."""
    said = folder / "log"
    said.write_text(log)
    nvcc = folder / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = --list-gpu-code ]; then echo sm_75; echo sm_120; exit; fi\n'
        f"cat {said}; exit {status}\n"
    )
    nvcc.chmod(0o755)
    monkeypatch.setitem(tool.SETUP, "find_nvcc", lambda: str(nvcc))
    monkeypatch.setattr(tool, "demangle", lambda text: text)


def test_reads_the_usage_of_every_kernel(tool):
    assert tool.usages(LOG) == [
        ("dots_kernel<float, 4, true>", 75, 96, 0, 9216),
        ("dots_kernel<float, 4, true>", 120, 128, 12, 9216),
        ("fold_kernel<double, float>", 120, 24, 0, 0),
    ]


def test_prints_the_largest_of_each_kernel(tool):
    lines = [line.split() for line in tool.largest(tool.usages(LOG)).splitlines()]
    assert lines == [
        ["kernel", "variants", "registers", "on", "spilled", "shared"],
        ["dots_kernel", "1", "128", "sm_120", "12", "9216"],
        ["fold_kernel", "1", "24", "sm_120", "0", "0"],
    ]


def test_fails_where_registers_are_spilled(tool, tmp_path, monkeypatch, capsys):
    compiler(tmp_path, tool, monkeypatch, LOG)
    assert tool.main(["--out", str(tmp_path / "out")]) == 1
    out = capsys.readouterr()
    assert "dots_kernel<float, 4, true> on sm_120 spills 12 bytes" in out.err
    assert "nvcc does not know sm_80 sm_86 sm_90 sm_100" in out.err
    assert len((tmp_path / "out/kernels.txt").read_text().splitlines()) > 3

    compiler(tmp_path, tool, monkeypatch, LOG.replace("8 bytes spill", "0 bytes spill"))
    assert tool.main(["--out", str(tmp_path / "out")]) == 1  # 12 bytes are still loaded
    compiler(tmp_path, tool, monkeypatch, LOG.partition("ptxas info    : Compiling entry")[0])
    assert tool.main(["--out", str(tmp_path / "out")]) == 0


def test_fails_where_a_source_does_not_compile(tool, tmp_path, monkeypatch, capsys):
    compiler(tmp_path, tool, monkeypatch, "error: expected a ;", status=2)
    assert tool.main(["--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "expected a ;" in said and "not compiled: combine.cu, " in said


def test_fails_without_nvcc(tool, monkeypatch, capsys):
    monkeypatch.setitem(tool.SETUP, "find_nvcc", lambda: None)
    assert tool.main([]) == 1
    assert "there is no nvcc" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt")
def test_demangles(tool):
    mangled = "'_ZN7fastnas4cuda12_GLOBAL__N_116gradients_kernelI6__halfLi8ELb0EEEvNS0_4PlanEl'"
    name = tool.demangle(mangled).strip("'")
    assert tool.short(name) == "gradients_kernel<__half, 8, false>"


@pytest.mark.skipif(torch.version.cuda is None, reason="torch was built without CUDA")
def test_compiles_for_all_that_torch_and_the_toolkit_share(tool):
    nvcc = tool.SETUP["find_nvcc"]()
    if nvcc is None:
        pytest.skip("no nvcc")
    flags = torch._C._cuda_getArchFlags().split()
    listed = tool.SETUP["output"](nvcc, "--list-gpu-code").split()
    shared = {int(flag.removeprefix("sm_")) for flag in flags if flag in listed}
    assert shared <= set(tool.ARCHS)
