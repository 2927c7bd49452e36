# SPDX-License-Identifier: Apache-2.0
"""Builds csrc/cuda for the host and makes the public ops run it.

The kernels (.cu) are compiled as C++ against the headers in include/, which stand in for CUDA's;
the files that register the ops (.cpp) are compiled as they are, under another dispatch key. What
the tests call is then the package's own functions, on CPU tensors, through the CUDA kernels.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.machinery
import importlib.util
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KERNELS = [*sorted((ROOT / "csrc/cuda").glob("*.cu")), *sorted(HERE.glob("*.cu"))]
# These include PyTorch, whose headers take most of the time: one file includes them all.
HOSTS = [*sorted((ROOT / "csrc/cuda").glob("*.cpp")), HERE / "bindings.cpp"]
OPS = sorted({s.stem for s in (ROOT / "csrc/cuda").glob("*.cpp")})
KEY = "PrivateUse1"


def compiler() -> str | None:
    """The C++ compiler, or None."""
    return shutil.which("g++")


def flags(macros: tuple[str, ...]) -> list[str]:
    """What every file is compiled with."""
    includes = [HERE / "include", ROOT / "csrc"]
    system = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    return [
        *("-O1", "-g0", "-fPIC", "-std=c++20", "-fno-strict-aliasing"),
        *("-Wall", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"),
        *(f"-I{path}" for path in includes),
        *(part for path in system for part in ("-isystem", str(path))),
        f"-DFASTNAS_CUDA_KEY={KEY}",
        "-DTORCH_EXTENSION_NAME=simt_kernels",
        *(f"-D{macro}" for macro in macros),
    ]


# Kernels call memory.cpp at every load and store (not libtsan, which is not linked), and where a
# pointer is misaligned.
WATCHED = (
    *("-fsanitize=thread,alignment", "-fno-sanitize-recover=alignment"),
    *("--param", "tsan-instrument-func-entry-exit=0"),
)


def _object(source: Path, folder: Path, options: list[str]) -> Path:
    language = ["-x", "c++", *WATCHED] if source.suffix == ".cu" else []
    command = [str(compiler()), *options, *language, "-c", str(source)]
    everything = subprocess.run([*command, "-MM"], check=True, capture_output=True, text=True)
    headers = everything.stdout.split(":", 1)[1].replace("\\\n", " ").split()
    digest = hashlib.sha256(" ".join([torch.__version__, *options, *language]).encode())
    for header in sorted(headers):
        digest.update(Path(header).read_bytes())
    made = folder / f"{source.name}.{digest.hexdigest()[:16]}.o"
    if not made.exists():
        for stale in folder.glob(f"{source.name}.*.o"):
            stale.unlink()
        subprocess.run([*command, "-o", f"{made}.new"], check=True)
        Path(f"{made}.new").replace(made)
    return made


def build(name: str = "plain", macros: tuple[str, ...] = ()) -> ModuleType:
    """Compiles what has changed and loads it, which registers the ops.

    The module steers the harness.

    Args:
        name: folder under build/simt; builds with other macros go elsewhere.
        macros: defined for every file, as NAME or NAME=value.
    """
    folder = ROOT / "build" / "simt" / name
    folder.mkdir(parents=True, exist_ok=True)
    options = flags(macros)
    hosts = folder / "hosts.cpp"
    includes = "".join(f'#include "{path}"\n' for path in HOSTS)
    if not hosts.exists() or hosts.read_text() != includes:
        hosts.write_text(includes)
    sources = [hosts, HERE / "simt.cpp", HERE / "memory.cpp", *KERNELS]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda s: _object(s, folder, options), sources))
    library = folder / f"simt_kernels{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    newest = max(o.stat().st_mtime for o in objects)
    if not library.exists() or library.stat().st_mtime < newest:
        libraries = cpp_extension.library_paths()
        paths = [f(p) for p in libraries for f in ("-L{}".format, "-Wl,-rpath,{}".format)]
        torch_libraries = ["-ltorch", "-ltorch_cpu", "-lc10", "-ltorch_python"]
        command = [str(compiler()), "-shared", *map(str, objects), *paths, *torch_libraries]
        subprocess.run([*command, "-o", f"{library}.new"], check=True)
        Path(f"{library}.new").replace(library)
    loader = importlib.machinery.ExtensionFileLoader("simt_kernels", str(library))
    spec = importlib.util.spec_from_file_location("simt_kernels", library, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def redirected(name: str) -> Any:
    """``torch.ops.fastnas.<name>`` as the CUDA kernels have it, on CPU tensors."""
    overload = getattr(torch.ops.fastnas, name).default
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, KEY))
    return lambda *args: overload.redispatch(keys, *args)


@contextlib.contextmanager
def kernels(module: ModuleType, names: list[str], guarded: bool = True) -> Iterator[None]:
    """While it lasts, the ops of those names run the CUDA kernels.

    Args:
        module: what build() returned.
        names: ops as ops.cpp declares them.
        guarded: tensors made inside start out as NaN and end at memory that may not be touched.
    """
    ours = {name: redirected(name) for name in names}
    theirs = {name: getattr(torch.ops.fastnas, name) for name in names}
    for name, op in ours.items():
        setattr(torch.ops.fastnas, name, op)
    module.guard(guarded)
    try:
        yield
    finally:
        module.guard(False)
        for name, op in theirs.items():
            setattr(torch.ops.fastnas, name, op)
    damage = module.take_damage()
    assert not damage, damage
