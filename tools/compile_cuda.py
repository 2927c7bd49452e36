# SPDX-License-Identifier: Apache-2.0
"""Compiles every CUDA source with the bare toolkit and tells what its kernels take.

    python tools/compile_cuda.py [--out build/cuda] [--jobs 2]

The sources know no PyTorch, so this needs nvcc and setuptools, which setup.py imports. Each is
compiled once for all architectures, with warnings as errors. Registers, spills and shared memory of
every kernel on every architecture go to OUT/kernels.txt; what is printed has one line a kernel, the
largest of its variants and architectures. Fails if a source does not compile or a kernel spills.
"""

from __future__ import annotations

import argparse
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
#: Those of PyTorch's wheels for CUDA 13; of the newest one the PTX is kept as well.
ARCHS = (75, 80, 86, 90, 100, 120)
STRICT = ("-Werror", "all-warnings", "-Xptxas", "-v")


class Usage(NamedTuple):
    """What a kernel takes on an architecture; bytes of shared memory are a block's."""

    kernel: str
    arch: int
    registers: int
    spilled: int  # bytes, stored or loaded
    shared: int


def known_archs(nvcc: str) -> list[int]:
    """Those of ARCHS that this nvcc compiles for."""
    listed = SETUP["output"](nvcc, "--list-gpu-code")
    known = {int(arch) for arch in re.findall(r"sm_(\d+)\b", listed)}
    return [arch for arch in ARCHS if arch in known]


def command(nvcc: str, source: Path, archs: list[int], made: Path) -> list[str]:
    codes = [f"arch=compute_{a},code=sm_{a}" for a in archs]
    codes.append(f"arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    targets = [part for code in codes for part in ("-gencode", code)]
    flags = [*SETUP["NVCC_FLAGS"], *STRICT, "-I", str(ROOT / "csrc"), *targets]
    return [nvcc, "-c", *flags, str(source), "-o", str(made)]


def demangle(text: str) -> str:
    """C++ names instead of linker symbols, where a tool that knows them is there."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return text
    return subprocess.run([tool], input=text, capture_output=True, text=True, check=True).stdout


def usages(log: str) -> list[Usage]:
    """What ptxas -v says, after demangling."""
    found, name, arch, spilled = [], "", 0, 0
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(.+)' for 'sm_(\d+)'", line):
            name, arch, spilled = short(entry[1]), int(entry[2]), 0
        elif spill := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled = max(spilled, int(spill[1]), int(spill[2]))
        elif used := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            found.append(Usage(name, arch, int(used[1]), spilled, int(shared[1]) if shared else 0))
    return found


def short(name: str) -> str:
    """``dots_kernel<float, 4, true>`` of its full signature."""
    name = re.sub(r"^void ", "", name).replace("(anonymous namespace)::", "")
    return re.sub(r"^(\w+::)+", "", name.partition("(")[0])


def table(head: list[str], rows: Iterable[Iterable[object]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    cells = [head, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    aligned = (
        [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        for row in cells
    )
    return "\n".join("  ".join(row) for row in aligned)


def every_usage(found: list[Usage]) -> str:
    rows = ((u.kernel, f"sm_{u.arch}", u.registers, u.spilled, u.shared) for u in sorted(found))
    return table(["kernel", "arch", "registers", "spilled", "shared"], rows)


def largest(found: list[Usage]) -> str:
    """One line a kernel, over its variants and all architectures."""
    kernels: dict[str, list[Usage]] = {}
    for usage in found:
        kernels.setdefault(usage.kernel.partition("<")[0], []).append(usage)
    rows = []
    for kernel, group in sorted(kernels.items()):
        most = max(group, key=lambda u: u.registers)
        variants = len({u.kernel for u in group})
        spilled, shared = (max(getattr(u, name) for u in group) for name in ("spilled", "shared"))
        rows.append((kernel, variants, most.registers, f"sm_{most.arch}", spilled, shared))
    return table(["kernel", "variants", "registers", "on", "spilled", "shared"], rows)


def compile_all(nvcc: str, archs: list[int], out: Path, jobs: int) -> list[Usage] | None:
    """The usages of all kernels; None, after printing why, if a source does not compile."""
    sources = sorted((ROOT / "csrc").rglob("*.cu"))
    if not sources:
        sys.exit(f"no CUDA source under {ROOT / 'csrc'}")

    def run(source: Path) -> subprocess.CompletedProcess[str]:
        made = command(nvcc, source, archs, out / f"{source.name}.o")
        return subprocess.run(made, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    with ThreadPoolExecutor(jobs) as pool:
        done = list(pool.map(run, sources))
    failed = [source.name for source, d in zip(sources, done, strict=True) if d.returncode]
    for source, d in zip(sources, done, strict=True):
        if d.returncode:
            print(f"--- {source.name}\n{d.stdout}", file=sys.stderr)
    if failed:
        print(f"not compiled: {', '.join(failed)}", file=sys.stderr)
        return None
    names = " ".join(f"sm_{arch}" for arch in archs)
    print(f"compiled {len(sources)} CUDA sources for {names} and as PTX")
    return [usage for d in done for usage in usages(demangle(d.stdout))]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/cuda"), help="for objects, table")
    parser.add_argument("--jobs", type=int, default=2, help="compilations at a time (2)")
    options = parser.parse_args(arguments)
    nvcc = SETUP["find_nvcc"]()
    if nvcc is None:
        print("there is no nvcc (CUDA_HOME, PATH, /usr/local/cuda)", file=sys.stderr)
        return 1
    archs = known_archs(nvcc)
    if missing := set(ARCHS) - set(archs):
        names = " ".join(f"sm_{arch}" for arch in sorted(missing))
        print(f"{nvcc} does not know {names}", file=sys.stderr)
        if not archs:
            return 1
    options.out.mkdir(parents=True, exist_ok=True)
    found = compile_all(nvcc, archs, options.out, options.jobs)
    if found is None:
        return 1
    full = options.out / "kernels.txt"
    full.write_text(every_usage(found) + "\n")
    print(f"largest of all variants and architectures (each in {full}):\n{largest(found)}")
    spilling = [usage for usage in found if usage.spilled]
    for usage in spilling:
        print(f"{usage.kernel} on sm_{usage.arch} spills {usage.spilled} bytes", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
