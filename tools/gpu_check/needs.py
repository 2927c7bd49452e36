# SPDX-License-Identifier: Apache-2.0
"""Looks what the other phases need: fails with a sentence for each thing that is missing.

What only some tests need is no failure; they are left out, and the record says so.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from phase import write

ROOT = Path(__file__).resolve().parents[2]

REQUIRED = ("numpy", "pip", "pytest", "setuptools")
#: module: what is left out, or how it goes without it.
OPTIONAL = {
    "ninja": "the build compiles one file after the other",
    "pytest_timeout": "tests have no time limit of their own",
    "pytest_benchmark": "options of the benchmarks are stood in for",
    "xdist": "tests run in one process",
    "hypothesis": "test files that import it are left out",
    "tyro": "tests of searches, evaluations and commands are left out",
    "rich": "tests of the commands are left out",
    "torchvision": "tests of its data sets are left out",
}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    missing, machine = look(options.device)
    absent = {name: effect for name, effect in OPTIONAL.items() if find_spec(name) is None}
    write(options.out, {"missing": missing, "absent": absent, "machine": machine})
    for sentence in missing:
        print(sentence)
    return 1 if missing else 0


def look(device: str) -> tuple[list[str], dict[str, Any]]:
    """Sentences on what is missing, and facts on what is here."""
    missing = [f"{n} is not installed: pip install {n}" for n in REQUIRED if not version(n)]
    machine: dict[str, Any] = {"python": platform.python_version()}
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        missing.append("there is no C++ compiler (g++, or what CXX names)")
    if find_spec("torch") is None:
        return [*missing, "torch is not installed: pip install torch"], machine
    import torch

    machine |= {"torch": torch.__version__, "cuda": torch.version.cuda}
    if setuptools := version("setuptools"):
        if int(setuptools.split(".")[0]) < 77:
            missing.append("setuptools is older than 77: pip install -U setuptools")
        setup = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
        if device == "cuda":
            cuda = setup["find_cuda"](torch)
            machine["nvcc"] = nvcc_release(setup["find_nvcc"]())
            missing += [cuda.missing] if cuda.missing else []
    if device != "cuda":
        return missing, machine
    if not torch.cuda.is_available():
        missing.append("PyTorch finds no CUDA device (nvidia-smi shows those of the driver)")
        return missing, machine
    free, total = torch.cuda.mem_get_info()
    machine |= {
        "gpu": torch.cuda.get_device_name(),
        "gpus": torch.cuda.device_count(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "memory": total,
        "free_memory": free,
        "driver": driver(),
    }
    return missing, machine


def version(name: str) -> str:
    """Of a distribution, "" if there is none; to look for the module pip disturbs setuptools."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def nvcc_release(nvcc: str | None) -> str:
    if nvcc is None:
        return ""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\S+),", said)
    return found[1] if found else ""


def driver() -> str:
    """The version of the driver, "" where nvidia-smi does not tell."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True)
    return said.stdout.split("\n")[0].strip() if said.returncode == 0 else ""


if __name__ == "__main__":
    sys.exit(main())
