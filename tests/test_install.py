# SPDX-License-Identifier: Apache-2.0
"""What a user meets on import: the five ways it can fail, the fallback's warning, the diagnosis."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import fastnas
from fastnas import _extension

PACKAGE = Path(fastnas.__file__).resolve().parent
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
REBUILD = "rebuild with: pip install --force-reinstall --no-deps ."


@pytest.fixture
def copy(tmp_path):
    """The package without its binary, beside a torch that is nothing but a version number."""
    (tmp_path / "fastnas").mkdir()
    for name in ("__init__.py", "_extension.py", "_version.py"):
        shutil.copy(PACKAGE / name, tmp_path / "fastnas")
    (tmp_path / "torch.py").write_text(f"__version__ = '{torch.__version__}'\n")
    return tmp_path


def import_error(folder: Path) -> str:
    """The message with which ``import fastnas`` fails in a folder."""
    done = subprocess.run(
        [sys.executable, "-c", "import fastnas"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: "), done.stderr
    return last.removeprefix("ImportError: ")


def test_source_tree(copy):
    (copy / "setup.py").touch()
    assert import_error(copy) == (
        f"fastnas was imported from its source tree ({copy}), which holds no compiled kernels; "
        "run Python from another folder, or build in place with: pip install -e ."
    )


def test_extension_missing(copy):
    assert import_error(copy) == (
        f"fastnas is installed in {copy / 'fastnas'} without its compiled kernels; "
        "reinstall it with: pip install --force-reinstall --no-deps ."
    )


def test_other_torch_that_the_loader_rejects(copy):
    (copy / "fastnas" / f"_C{EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    metadata = copy / "fastnas-0.1.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(
        "Metadata-Version: 2.1\nName: fastnas\nVersion: 0.1.0\n"
        "Requires-Dist: numpy\nRequires-Dist: torch==2.10.*\n"
    )
    assert import_error(copy) == (
        f"fastnas was built for torch 2.10, but torch {torch.__version__} is installed; {REBUILD}"
    )


def test_other_torch_that_the_loader_does_not_notice(copy):
    (copy / "fastnas" / "_C.py").write_text("torch_version = '2.10.1'\n")
    assert import_error(copy) == (
        f"fastnas was built for torch 2.10, but torch {torch.__version__} is installed; {REBUILD}"
    )


def test_other_python(copy):
    (copy / "setup.py").touch()
    (copy / "fastnas" / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    assert import_error(copy) == (
        f"fastnas was built for Python 3.9, but this is Python {PYTHON}; {REBUILD}"
    )


def test_any_other_cause_is_quoted(copy):
    (copy / "fastnas" / f"_C{EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    text = import_error(copy)
    assert text.startswith("the compiled kernels of fastnas do not load (")
    assert "_C" in text and text.endswith(REBUILD)


@pytest.fixture
def cpu_only(monkeypatch):
    monkeypatch.setattr(_extension, "_DEVICES", frozenset({"cpu"}))
    monkeypatch.setattr(_extension, "_warned", set())
    monkeypatch.setattr(_extension, "CUDA_MISSING_REASON", "no nvcc was found")
    monkeypatch.delenv("FASTNAS_STRICT", raising=False)


def test_cuda_tensors_in_a_cpu_build_warn_once(cpu_only):
    text = r"built without CUDA kernels \(no nvcc was found\); using the PyTorch fallback"
    with pytest.warns(RuntimeWarning, match=text):
        assert not _extension.has_kernels("cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _extension.has_kernels("cuda")
        assert _extension.has_kernels("cpu")
        assert not _extension.has_kernels("mps")


def test_cuda_tensors_in_a_cpu_build_fail_when_strict(cpu_only, monkeypatch):
    monkeypatch.setenv("FASTNAS_STRICT", "1")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"no nvcc was found.*FASTNAS_STRICT"):
            _extension.has_kernels("cuda")
    assert _extension.has_kernels("cpu")


def test_diagnosis():
    environment = {
        **os.environ,
        "ATEN_CPU_CAPABILITY": "default",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "fastnas"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    rows = {name: value.strip() for name, value in rows.items()}
    assert rows["fastnas"].startswith(fastnas.__version__)
    assert rows["torch"] == torch.__version__
    assert rows["CUDA of torch"] == (torch.version.cuda or "none")
    assert rows["CPU kernels"] == f"built for torch {_extension.TORCH_VERSION}"
    if _extension.CUDA_VERSION:
        assert rows["CUDA kernels"].startswith(f"built for CUDA {_extension.CUDA_VERSION}, ")
    else:
        assert rows["CUDA kernels"] == f"not built: {_extension.CUDA_MISSING_REASON}"
    assert "AVX" not in rows["instruction set"].replace("NO AVX", "")
    assert rows["cpu"].startswith("1 of ")


def _distribution() -> importlib.metadata.Distribution:
    try:
        found = importlib.metadata.distribution("fastnas")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("built in place, not installed")
    return found


def test_installed_metadata_names_the_torch_release():
    found = _distribution()
    release = ".".join(_extension.TORCH_VERSION.split(".")[:2])
    assert f"torch=={release}.*" in found.requires
    assert found.version == fastnas.__version__
    assert any(entry.name == "fastnas" for entry in found.entry_points)
