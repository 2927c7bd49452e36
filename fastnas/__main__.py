# SPDX-License-Identifier: Apache-2.0
"""``python -m fastnas``: what is installed here, and which kernels it can use.

With words after it, it is the command line: ``python -m fastnas search`` is ``fastnas search``.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import torch

from fastnas import _extension
from fastnas._version import __version__


def _optional(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cuda_kernels() -> str:
    if not _extension.CUDA_VERSION:
        return f"not built: {_extension.CUDA_MISSING_REASON}"
    archs = _extension.CUDA_ARCHS.replace(";", " ").replace("+", " + ")
    return f"built for CUDA {_extension.CUDA_VERSION}, compute capability {archs}"


def _cuda_devices() -> list[tuple[str, str]]:
    if not torch.cuda.is_available():
        return [("cuda", "no device")]
    rows = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.1f} GiB"
        rows.append((f"cuda:{index}", f"{gpu.name}, {memory}, {gpu.major}.{gpu.minor}"))
    return rows


def describe() -> list[tuple[str, str]]:
    """Rows of (what, what was found): versions, kernels, devices."""
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} cores used"
    return [
        ("fastnas", f"{__version__} ({Path(__file__).resolve().parent})"),
        ("Python", f"{platform.python_version()} ({platform.platform()})"),
        ("torch", torch.__version__),
        ("CUDA of torch", torch.version.cuda or "none"),
        ("torchvision", _optional("torchvision")),
        ("matplotlib", _optional("matplotlib")),
        ("CPU kernels", f"built for torch {_extension.TORCH_VERSION}"),
        ("CUDA kernels", _cuda_kernels()),
        ("instruction set", _extension.cpu_instruction_set()),
        ("cpu", threads),
        *_cuda_devices(),
    ]


def main() -> None:
    """Prints one line a row."""
    rows = describe()
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _command() -> int:
    """The command line, where ``info`` is what it does without a word."""
    from fastnas.cli import main as run

    return run(sys.argv[1:] or ["info"])


if __name__ == "__main__":
    sys.exit(_command())
