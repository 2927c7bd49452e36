# SPDX-License-Identifier: Apache-2.0
"""Builds fastnas._C for the torch found here: CPU kernels always, CUDA kernels if possible.

CUDA kernels need a torch that has CUDA and an nvcc of the same major version, but no GPU.
Environment: FASTNAS_CUDA=0 leaves them out, FASTNAS_CUDA=1 makes their absence an error,
CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS mean what they mean to torch, DEBUG=1 builds for gdb.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
REQUIRES = ["numpy", "rich", "tyro"]
NO_TORCH = """fastnas needs torch to build its kernels: pip install torch, then run this again \
(or drop --no-build-isolation)"""
NVCC_FLAGS = ["-O3", "--expt-relaxed-constexpr"]
BUILDS = {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"}


class Cuda(NamedTuple):
    """The toolkit to build with, or why there is none."""

    version: str = ""  # of torch: "13.0"
    home: str = ""
    archs: str = ""  # as in TORCH_CUDA_ARCH_LIST: "7.5;8.0;12.0+PTX"
    missing: str = ""


def output(*command: str) -> str:
    """What a command that succeeds prints on either stream; "" if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout if done.returncode == 0 else ""


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    places = [home and f"{home}/bin/nvcc", shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((path for path in places if path and os.access(path, os.X_OK)), None)


def wanted_archs(torch: Any, nvcc: str) -> str:
    """The user's choice, else the visible GPUs, else all that torch and the toolkit share."""
    if chosen := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return chosen
    if count := torch.cuda.device_count():
        archs = {"{}{}".format(*torch.cuda.get_device_capability(i)) for i in range(count)}
    else:  # torch.cuda.get_arch_list() would be empty on some releases when there is no GPU
        archs = set(re.findall(r"sm_(\d+)\b", torch._C._cuda_getArchFlags() or ""))
    known = set(re.findall(r"sm_(\d+)\b", output(nvcc, "--list-gpu-code")))
    ordered = sorted(archs & known, key=int)
    return ";".join(f"{arch[:-1]}.{arch[-1]}" for arch in ordered) + "+PTX" if ordered else ""


def find_cuda(torch: Any) -> Cuda:
    """Decides on CUDA by what torch was built for and which toolkit is here, never by a GPU."""
    version = torch.version.cuda
    if version is None:
        return Cuda(missing=f"torch {torch.__version__} was built without CUDA")
    if os.environ.get("FASTNAS_CUDA") == "0":
        return Cuda(missing="FASTNAS_CUDA=0 was set when it was installed")
    nvcc = find_nvcc()
    if nvcc is None:
        has = f"torch {torch.__version__} has CUDA {version}"
        return Cuda(missing=f"{has} but no nvcc was found (PATH, CUDA_HOME, /usr/local/cuda)")
    release = re.search(r"release (\d+)\.(\d+)", output(nvcc, "--version"))
    # nvcc on PATH may be a script that calls another one: nvcc itself knows where its toolkit is
    top = re.search(r"^#\$ TOP=(.+)$", output(nvcc, "--dryrun", "-c", "-x", "cu", os.devnull), re.M)
    if release is None or top is None:
        return Cuda(missing=f"{nvcc} does not run")
    if release[1] != version.split(".")[0]:
        found = f"nvcc is {release[1]}.{release[2]} but torch was built for CUDA {version}"
        return Cuda(missing=f"{found}: point CUDA_HOME at a {version.split('.')[0]}.x toolkit")
    archs = wanted_archs(torch, nvcc)
    if not archs:
        return Cuda(missing=f"torch {torch.__version__} and {nvcc} share no GPU architecture")
    return Cuda(version, str(Path(top[1]).resolve()), archs)


def announce(torch: Any, cuda: Cuda) -> None:
    demanded = "1" in (os.environ.get("FASTNAS_CUDA"), os.environ.get("FORCE_CUDA"))
    if cuda.missing and demanded:
        sys.exit(f"fastnas: CUDA kernels were demanded, but {cuda.missing}")
    built = f"torch {torch.__version__}, CUDA {cuda.version} at {cuda.home}, sm {cuda.archs}"
    missing = f"building CPU kernels only: {cuda.missing}"
    print(f"fastnas: {missing if cuda.missing else built}", file=sys.stderr)


def toolkit_includes(torch: Any, cuda: Cuda) -> list[str]:
    """-isystem flags for the headers that a bare toolkit lacks and torch's own wheels bring."""
    if not cuda.home or Path(cuda.home, "include", "cusparse.h").exists():
        return []
    folders = sorted(Path(torch.__file__).parents[1].glob("nvidia/*/include"))
    return [flag for folder in folders for flag in ("-isystem", str(folder))]


def extension(torch: Any, cuda: Cuda) -> Extension:
    sources = glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")
    if cuda.home:
        sources += glob("csrc/cuda/*.cpp") + glob("csrc/cuda/*.cu")
        # torch reads these when cpp_extension is imported
        os.environ.update(CUDA_HOME=cuda.home, TORCH_CUDA_ARCH_LIST=cuda.archs)
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    debug = os.environ.get("DEBUG", "0") not in ("", "0")
    optimise = ["-O0", "-g"] if debug else ["-O3", "-g0"]
    includes = toolkit_includes(torch, cuda)
    facts = {"VERSION": cuda.version, "ARCHS": cuda.archs, "MISSING_REASON": cuda.missing}
    macros = [(f"FASTNAS_CUDA_{name}", f'"{value}"') for name, value in facts.items()]
    result = (CUDAExtension if cuda.home else CppExtension)(
        "fastnas._C",
        sources=sorted(sources),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("FASTNAS_TORCH_VERSION", f'"{torch.__version__}"'), *macros],
        extra_compile_args={
            "cxx": [*optimise, "-fopenmp", "-fvisibility=hidden", "-Wall", *includes],
            "nvcc": [*NVCC_FLAGS, "-t", "2", *includes],
        },
        # Without -fopenmp here and above, at::parallel_for quietly runs on one thread. The C++
        # library is named because some compilers are set to link one of their own into what they
        # make: beside torch's, every error would be a crash.
        extra_link_args=["-fopenmp", *(["-l:libstdc++.so.6"] if sys.platform == "linux" else [])],
    )
    if cuda.home and not any(Path(cuda.home).glob("lib*/libcudart.so")):
        # a toolkit from wheels has only libcudart.so.N, which libc10_cuda brings along
        result.libraries = [name for name in result.libraries if name != "cudart"]
    return result


def build_ext_command() -> type:
    from torch.utils.cpp_extension import BuildExtension

    class BuildExt(BuildExtension):
        """Keeps x.cpp and x.cu apart, which both would be compiled to x.o."""

        def finalize_options(self) -> None:
            super().finalize_options()
            if self.editable_mode:
                # Not a temporary folder: what has not changed is not built again.
                self.build_temp = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"

        def build_extensions(self) -> None:
            names = self.compiler.object_filenames
            self.compiler.object_filenames = lambda sources, *args, **kwargs: [
                f"{Path(name).with_suffix('')}{Path(source).suffix}.o"
                for name, source in zip(names(sources, *args, **kwargs), sources, strict=True)
            ]
            super().build_extensions()

    return BuildExt


def torch_requirement(version: str) -> str:
    """The releases a binary built beside this one serves: its minor, for a development build >=."""
    version = version.split("+")[0]
    release = re.fullmatch(r"(\d+\.\d+)\.\d+", version)
    return f"torch=={release[1]}.*" if release else f"torch>={version}"


def main() -> None:
    os.chdir(ROOT)
    for stale in ROOT.glob("build/lib*"):  # else modules deleted since would go into the wheel
        shutil.rmtree(stale)
    if importlib.util.find_spec("torch") is None:
        if BUILDS & set(sys.argv):
            sys.exit(NO_TORCH)
        setup(install_requires=["torch>=2.11", *REQUIRES])
        return
    import torch

    cuda = find_cuda(torch)
    announce(torch, cuda)
    setup(
        install_requires=[torch_requirement(torch.__version__), *REQUIRES],
        ext_modules=[extension(torch, cuda)],
        cmdclass={"build_ext": build_ext_command()},
        # setuptools would reuse a binary made for another torch; ninja sees that flags have changed
        options={"build_ext": {"force": True}},
    )


if __name__ == "__main__":
    main()
