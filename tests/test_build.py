# SPDX-License-Identifier: Apache-2.0
"""The build: what setup.py decides, what the sources may include, what the binary contains."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fastnas import _extension

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("fastnas_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def clean(monkeypatch, tmp_path):
    """No toolkit in the environment and an empty folder as the only PATH."""
    for name in ("CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "FASTNAS_CUDA", "FORCE_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def fake_torch(cuda: str | None, flags: str = "sm_80 sm_90 sm_120", gpus=()) -> SimpleNamespace:
    return SimpleNamespace(
        __version__="2.13.0" + ("+cpu" if cuda is None else "+cu" + cuda.replace(".", "")),
        version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(
            device_count=lambda: len(gpus), get_device_capability=lambda i: gpus[i]
        ),
        _C=SimpleNamespace(_cuda_getArchFlags=lambda: flags),
    )


def fake_nvcc(folder: Path, release: str, top: Path) -> Path:
    """An nvcc that answers the three questions setup.py asks."""
    folder.mkdir(parents=True, exist_ok=True)
    nvcc = folder / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        f'--version) echo "Cuda compilation tools, release {release}, V{release}.88" ;;\n'
        '--list-gpu-code) for sm in 75 80 90 100; do echo "sm_$sm"; done ;;\n'
        f"--dryrun) echo '#$ _SPACE_= '; echo '#$ TOP={top}/bin/..' >&2 ;;\n"
        "esac\n"
    )
    nvcc.chmod(0o755)
    return nvcc


def without_default_toolkit(setup_py, monkeypatch) -> None:
    access = os.access
    monkeypatch.setattr(
        setup_py.os,
        "access",
        lambda path, mode: "/usr/local/cuda" not in str(path) and access(path, mode),
    )


def test_cpu_torch_gets_cpu_kernels_even_beside_a_toolkit(setup_py, clean):
    fake_nvcc(clean, "13.0", clean)
    cuda = setup_py.find_cuda(fake_torch(None))
    assert (cuda.home, cuda.missing) == ("", "torch 2.13.0+cpu was built without CUDA")


def test_cuda_is_left_out_on_request(setup_py, clean, monkeypatch):
    fake_nvcc(clean, "13.0", clean)
    monkeypatch.setenv("FASTNAS_CUDA", "0")
    cuda = setup_py.find_cuda(fake_torch("13.0"))
    assert cuda.home == "" and "FASTNAS_CUDA=0" in cuda.missing


def test_no_nvcc_is_said(setup_py, clean, monkeypatch):
    without_default_toolkit(setup_py, monkeypatch)
    cuda = setup_py.find_cuda(fake_torch("13.0"))
    assert cuda.home == ""
    assert cuda.missing == (
        "torch 2.13.0+cu130 has CUDA 13.0 but no nvcc was found (PATH, CUDA_HOME, /usr/local/cuda)"
    )


@pytest.mark.parametrize("variable", ["FASTNAS_CUDA", "FORCE_CUDA"])
def test_missing_cuda_is_an_error_on_request(setup_py, clean, monkeypatch, variable):
    torch_ = fake_torch(None)
    setup_py.announce(torch_, setup_py.find_cuda(torch_))
    monkeypatch.setenv(variable, "1")
    with pytest.raises(SystemExit, match=r"were demanded, but torch .* was built without CUDA"):
        setup_py.announce(torch_, setup_py.find_cuda(torch_))


def test_another_major_of_nvcc_is_not_used(setup_py, clean):
    fake_nvcc(clean, "12.8", clean)
    cuda = setup_py.find_cuda(fake_torch("13.0"))
    assert cuda.home == ""
    assert cuda.missing == (
        "nvcc is 12.8 but torch was built for CUDA 13.0: point CUDA_HOME at a 13.x toolkit"
    )


def test_an_editable_install_builds_again_only_what_has_changed(setup_py):
    """In the folder of other builds, where setuptools would take a temporary one."""
    from setuptools import Distribution

    folders = []
    for editable in (False, True):
        command = setup_py.build_ext_command()(Distribution())
        command.editable_mode = editable
        if editable:
            command.build_temp = "somewhere"
        command.finalize_options()
        folders.append(command.build_temp)
    assert folders[0] == folders[1]


def test_toolkit_is_where_nvcc_says_not_where_it_was_found(setup_py, clean):
    toolkit = clean / "toolkit"
    (toolkit / "bin").mkdir(parents=True)
    fake_nvcc(clean, "13.1", toolkit)  # on PATH, outside of the toolkit
    cuda = setup_py.find_cuda(fake_torch("13.0"))
    assert cuda.missing == "" and cuda.version == "13.0"
    assert Path(cuda.home) == toolkit.resolve()


def test_cuda_home_goes_before_path(setup_py, clean, monkeypatch):
    fake_nvcc(clean, "12.8", clean)
    wanted = fake_nvcc(clean / "other" / "bin", "13.0", clean / "other")
    monkeypatch.setenv("CUDA_HOME", str(clean / "other"))
    assert setup_py.find_nvcc() == str(wanted)


def test_architectures(setup_py, clean, monkeypatch):
    nvcc = str(fake_nvcc(clean, "13.0", clean))
    assert setup_py.wanted_archs(fake_torch("13.0"), nvcc) == "8.0;9.0+PTX"
    flags = "sm_75 sm_100 compute_120"
    assert setup_py.wanted_archs(fake_torch("13.0", flags), nvcc) == "7.5;10.0+PTX"
    two_gpus = fake_torch("13.0", gpus=[(9, 0), (8, 0)])
    assert setup_py.wanted_archs(two_gpus, nvcc) == "8.0;9.0+PTX"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert setup_py.wanted_archs(two_gpus, nvcc) == "9.0"


def test_no_common_architecture_is_said(setup_py, clean):
    fake_nvcc(clean, "13.0", clean)
    cuda = setup_py.find_cuda(fake_torch("13.0", flags="sm_50 sm_60"))
    assert cuda.home == "" and "share no GPU architecture" in cuda.missing


@pytest.mark.parametrize(
    ("version", "requirement"),
    [
        ("2.13.0+cpu", "torch==2.13.*"),
        ("2.14.1", "torch==2.14.*"),
        ("2.15.0.dev20261101+cu130", "torch>=2.15.0.dev20261101"),
        ("2.15.0a0+git1234567", "torch>=2.15.0a0"),
    ],
)
def test_wheel_pins_the_release_it_was_built_for(setup_py, version, requirement):
    assert setup_py.torch_requirement(version) == requirement


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """An environment without any package."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder


def _backend_requirements(tmp_path: Path, python: Path, torch_site: str = "") -> list[str]:
    """What the build backend asks for, run as pip does: it sees setuptools and nothing else."""
    installed = Path(importlib.util.find_spec("setuptools").origin).parents[1]
    isolated = tmp_path / "isolated"
    isolated.mkdir()
    for pattern in ("setuptools", "setuptools-*", "pkg_resources", "_distutils_hack"):
        for path in installed.glob(pattern):
            (isolated / path.name).symlink_to(path)
    done = subprocess.run(
        [python, "-S", "-c", "import backend; print(backend.get_requires_for_build_wheel())"],
        env={
            "PYTHONPATH": f"{isolated}:{ROOT / 'build_support'}",
            "PYTHONNOUSERSITE": "1",
            "PATH": os.environ["PATH"],
            "FASTNAS_TORCH_SITE": torch_site,
        },
        cwd=_sources_only(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return re.findall(r"'([^']+)'", done.stdout.splitlines()[-1])


def _sources_only(tmp_path: Path) -> Path:
    """A copy of what the hooks read, because they leave an egg-info folder where they run."""
    folder = tmp_path / "sources"
    (folder / "fastnas").mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "fastnas/_version.py"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_backend_asks_for_torch_where_there_is_none(tmp_path, setup_py, bare):
    assert "torch>=2.11" in _backend_requirements(tmp_path, bare / "bin/python")


@pytest.mark.parametrize("where", ["installed", "on a .pth file", "named"])
def test_backend_builds_for_the_torch_that_is_there(tmp_path, setup_py, bare, where):
    site = str(Path(torch.__file__).parents[1])
    python = Path(sys.executable) if where == "installed" else bare / "bin/python"
    link = next(bare.glob("lib/python*/site-packages")) / "link.pth"
    try:
        if where == "on a .pth file":  # as in environments that show the system's packages
            link.write_text(site + "\n")
        named = f"{tmp_path}:{site}" if where == "named" else ""
        required = _backend_requirements(tmp_path, python, named)
    finally:
        link.unlink(missing_ok=True)
    assert "ninja" in required
    assert [line for line in required if line.startswith("torch")] == []


def _sources(*suffixes: str) -> list[Path]:
    found = [path for path in sorted(CSRC.rglob("*")) if path.name.endswith(suffixes)]
    assert found, f"no {suffixes} under {CSRC}"
    return found


def _includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.M)


def test_hosts_include_no_heavy_header():
    banned = ("torch/extension.h", "torch/all.h", "torch/torch.h", "ATen/ATen.h", "ATen/cuda/")
    found = [
        (path.name, header)
        for path in _sources(".cpp", ".h")
        for header in _includes(path)
        if header.startswith(banned)
    ]
    assert found == []


def test_kernels_know_no_torch():
    known = ("ATen", "c10", "torch", "pybind11", "caffe2")
    found = [
        (path.name, header)
        for path in _sources(".inc.h") + [p for p in CSRC.rglob("*.cu*") if p.is_file()]
        for header in _includes(path)
        if header.split("/")[0] in known
    ]
    assert found == []


def test_no_flag_that_changes_results_or_portability():
    text = (ROOT / "setup.py").read_text()
    found = re.findall(r"-march|-mtune|-std|-ffast-math|use_fast_math|-Ofast|-mavx\w*", text)
    assert found == []
    assert text.count('"-fopenmp"') == 2, (
        "without it in compile and link at::parallel_for is serial"
    )


def _binary() -> str:
    return _extension.load().__file__


@pytest.mark.skipif(not _extension.CUDA_VERSION, reason="built without CUDA kernels")
def test_every_op_has_a_cuda_kernel():
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastnas::")]
    assert names
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    # Nothing is carried there.
    cpu_only = {"fastnas::pool_pair_carried_backward"}
    assert {n for n in names if not has(n, "CUDA")} == cpu_only


def test_every_op_has_a_cpu_kernel():
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastnas::")]
    assert names
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert [name for name in names if not has(name, "CPU")] == []


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
def test_wide_registers_stay_in_their_namespaces():
    """A baseline function with AVX code in it would be an illegal instruction on an older CPU."""
    command = ["objdump", "-d", "--no-show-raw-insn", "--demangle", _binary()]
    symbol, leaks, seen = "", set(), set()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as disassembly:
        for line in disassembly.stdout:
            if line.endswith(">:\n"):
                symbol = line.split("<", 1)[1]
                continue
            for register, namespaces in (
                ("%zmm", ("fastnas::avx512::",)),
                ("%ymm", ("fastnas::avx512::", "fastnas::avx2::")),
            ):
                if register in line:
                    seen.add(register)
                    if not any(namespace in symbol for namespace in namespaces):
                        leaks.add((register, symbol.strip()))
    assert sorted(leaks) == []
    if os.uname().machine == "x86_64":
        assert seen == {"%ymm", "%zmm"}
