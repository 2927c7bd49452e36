# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled kernels (fastnas._C), or says in one sentence why that is not possible.

Importing this module registers torch.ops.fastnas.*; every other module of the package relies on it.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
import warnings
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch

__all__ = [
    "CUDA_ARCHS",
    "CUDA_MISSING_REASON",
    "CUDA_VERSION",
    "TORCH_VERSION",
    "cpu_instruction_set",
    "has_kernels",
    "load",
]

_REBUILD = "rebuild with: pip install --force-reinstall --no-deps ."


def _release(version: str) -> str:
    """The part of a torch version that a binary is bound to: "2.13" of "2.13.0+cpu"."""
    return ".".join(version.split(".")[:2])


def _pinned_release() -> str | None:
    """The torch release that the installed distribution was built for, by its own metadata."""
    try:
        requirements = importlib.metadata.requires("fastnas") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    pins = (re.match(r"torch\s*==\s*(\d+\.\d+)", line) for line in requirements)
    return next((pin[1] for pin in pins if pin), None)


def _wrong_torch(built_for: str) -> str:
    return (
        f"fastnas was built for torch {built_for}, but torch {torch.__version__} is installed; "
        f"{_REBUILD}"
    )


def _explain(package: Path, error: ImportError) -> str:
    """One sentence on why ``package``'s extension did not load."""
    binaries = sorted(package.glob("_C.*"))
    usable = [p for p in binaries if p.name[len("_C") :] in EXTENSION_SUFFIXES]
    if binaries and not usable:
        tag = re.match(r"_C\.(?:cpython-|cp)(\d)(\d+)", binaries[0].name)
        other = f"Python {tag[1]}.{tag[2]}" if tag else f"another Python ({binaries[0].name})"
        running = f"{sys.version_info[0]}.{sys.version_info[1]}"
        return f"fastnas was built for {other}, but this is Python {running}; {_REBUILD}"
    if not usable and (package.parent / "setup.py").exists():
        return (
            f"fastnas was imported from its source tree ({package.parent}), which holds no "
            "compiled kernels; run Python from another folder, or build in place with: "
            "pip install -e ."
        )
    if not usable:
        return (
            f"fastnas is installed in {package} without its compiled kernels; "
            "reinstall it with: pip install --force-reinstall --no-deps ."
        )
    pinned = _pinned_release()
    if pinned is not None and pinned != _release(torch.__version__):
        return _wrong_torch(pinned)
    return f"the compiled kernels of fastnas do not load ({error}); {_REBUILD}"


def load() -> ModuleType:
    """Imports ``fastnas._C`` and checks that it was built for the torch that runs it.

    The loader alone does not notice every mismatch: a binary of one torch release may load in
    another and fail later.

    Returns:
        The extension module; its attributes tell what it was built with.

    Raises:
        ImportError: with the cause and the remedy in one sentence.
    """
    try:
        extension = import_module("fastnas._C")
    except ImportError as error:
        raise ImportError(_explain(Path(__file__).resolve().parent, error)) from error
    if _release(extension.torch_version) != _release(torch.__version__):
        raise ImportError(_wrong_torch(_release(extension.torch_version)))
    return extension


_C = load()

#: torch the kernels were built for, e.g. "2.13.0+cpu".
TORCH_VERSION: str = _C.torch_version
#: CUDA release the kernels were built for, "" when there are only CPU kernels.
CUDA_VERSION: str = _C.cuda_version
#: GPU architectures they were compiled for, as in TORCH_CUDA_ARCH_LIST: "8.0;9.0+PTX".
CUDA_ARCHS: str = _C.cuda_archs
#: Why there are no CUDA kernels, "" when there are.
CUDA_MISSING_REASON: str = _C.cuda_missing_reason

_DEVICES = frozenset({"cpu", "cuda"} if CUDA_VERSION else {"cpu"})
_warned: set[str] = set()


def has_kernels(device_type: str) -> bool:
    """Whether ``torch.ops.fastnas`` serves tensors of this device; if not, reference.py does.

    The first call for CUDA tensors in a build without CUDA kernels warns.

    Args:
        device_type: ``tensor.device.type``, e.g. ``"cpu"``.

    Raises:
        RuntimeError: instead of the warning, when FASTNAS_STRICT=1 is set.
    """
    return device_type in _DEVICES or _falls_back(device_type)


def _falls_back(device_type: str) -> bool:
    if device_type != "cuda" or device_type in _warned:
        return False
    text = f"fastnas was built without CUDA kernels ({CUDA_MISSING_REASON})"
    if os.environ.get("FASTNAS_STRICT") == "1":
        raise RuntimeError(f"{text}, and FASTNAS_STRICT=1 forbids the PyTorch fallback")
    if not torch.compiler.is_compiling():  # a trace runs once and may be thrown away
        _warned.add(device_type)
        major = (torch.version.cuda or "").split(".")[0]
        toolkit = f"a CUDA {major} toolkit" if major else "a CUDA toolkit"
        warnings.warn(
            f"{text}; using the PyTorch fallback. Install {toolkit} and reinstall fastnas to get "
            "them.",
            RuntimeWarning,
            stacklevel=3,
        )
    return False


def cpu_instruction_set() -> str:
    """The CPU instruction set that torch and the kernels run with, e.g. ``"AVX512"``.

    The environment variable ATEN_CPU_CAPABILITY (default, avx2, avx512) lowers it.
    """
    return str(_C.cpu_capability())
