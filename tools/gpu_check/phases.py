# SPDX-License-Identifier: Apache-2.0
"""The phases: their commands and time boxes. Judgements on their ends are in verdicts.py."""

from __future__ import annotations

import os
import shutil
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import verdicts
from phase import Phase

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

#: Importing PyTorch takes longer than a tool would wait for the first call of CUDA.
_PATIENT = ("--launch-timeout", "0")
#: tool: options. Only the package's kernels are watched, except by initcheck: memory that another
#: kernel has written would seem uninitialised. Its reports are sorted afterwards.
SANITIZERS = {
    "memcheck": ("--report-api-errors", "no", "--kernel-name", "kns=fastnas"),
    "racecheck": ("--kernel-name", "kns=fastnas"),
    "initcheck": (),
    "synccheck": ("--kernel-name", "kns=fastnas"),
}
#: What measures no time runs side by side.
_TOGETHER = "results"
_PYTEST = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"


def make_phases(device: str, work: Path) -> list[Phase]:
    """All phases for a device; without a GPU the sanitizers are left out.

    Args:
        device: "cuda" or "cpu".
        work: an existing folder for the built package, results and logs.
    """
    site = work / "site"
    cuda = device == "cuda"

    def python(script: str, *arguments: str) -> tuple[str, ...]:
        return (sys.executable, str(HERE / script), "--device", device, *arguments)

    def pytest(*arguments: str) -> tuple[str, ...]:
        # Not -m pytest, and not in the repository: its sources would be imported, without kernels.
        plugins = ("-p", "pytest_plugin", "-p", "no:cacheprovider", "-q")
        return (sys.executable, "-c", _PYTEST, *plugins, *arguments)

    folders = [site, HERE, ROOT / "benchmarks", ROOT / "tests"]
    built = {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    strict = {**built, "FASTNAS_STRICT": "1", "FASTNAS_TEST_DEVICE": device}
    tests, paths, bandwidth, ratios, needs = (
        work / f"{name}.json" for name in ("tests", "paths", "bandwidth", "ratios", "needs")
    )
    after = ("needs", "build")
    # A file stays with one process: tests that fill the GPU are in one file. The sanitizers, which
    # run at the same time, keep four cores busy.
    workers = max(2, min(10, (os.cpu_count() or 1) - 4))
    parallel = ("-n", str(workers), "--dist", "loadfile") if find_spec("xdist") else ()
    phases = [
        Phase(
            "needs",
            "what is here, what is missing",
            20,
            python("needs.py", "--out", str(needs)),
            verdicts.needs,
            result=needs,
        ),
        Phase(
            "build",
            "the package, by pip, into a folder of its own",
            80,
            (sys.executable, str(HERE / "build_package.py"), str(site)),
            verdicts.build,
            environment={"FASTNAS_CUDA": "1"} if cuda else {},
            after=("needs",),
        ),
        Phase(
            "paths",
            "the CPU and the GPU choose the same paths for the same seed",
            30,
            python("paths.py", "--out", str(paths)),
            verdicts.paths,
            environment=built,
            result=paths,
            after=after,
            group=_TOGETHER,
        ),
    ]
    if cuda:
        phases += [_sanitizer(tool, python("small_cases.py"), built) for tool in SANITIZERS]
    phases += [
        Phase(
            "tests",
            "the suite on the device, the tests that use it first",
            150,
            pytest(
                *(str(ROOT / "tests"), "-m", "gpu or not slow", "--outcomes", str(tests)),
                *parallel,
            ),
            verdicts.tests,
            environment=strict,
            result=tests,
            after=after,
            group=_TOGETHER,
        ),
        Phase(
            "bandwidth",
            "share of the copy bandwidth of every op: shape, direction, format, precision",
            45,
            python("bandwidth.py", "--out", str(bandwidth)),
            verdicts.bandwidth,
            environment=built,
            result=bandwidth,
            after=after,
        ),
        Phase(
            "benchmarks",
            "ratios to eager, channels_last, torch.compile and CUDA graphs",
            130,
            pytest(
                str(ROOT / "benchmarks"),
                *("-k", "test_ratio", "--bench-device", device, "--bench-seconds", "0.05"),
                *("--compile-seconds", "1", "--ratios-json", str(ratios)),
            ),
            verdicts.benchmarks,
            environment=strict,
            result=ratios,
            after=after,
        ),
    ]
    return phases


def _sanitizer(tool: str, program: tuple[str, ...], built: dict[str, str]) -> Phase:
    found = _compute_sanitizer()
    return Phase(
        tool,
        f"compute-sanitizer --tool {tool} on small cases of every op",
        100,
        (found, "--tool", tool, *_PATIENT, *SANITIZERS[tool], *program) if found else (),
        partial(verdicts.sanitizer, tool),
        # Each tensor an allocation of its own, so that its ends are known.
        environment={**built, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        after=("needs", "build"),
        group=_TOGETHER,
        missing="compute-sanitizer was not found (CUDA_HOME, PATH, /usr/local/cuda)",
    )


def _compute_sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME")
    places = [
        home and f"{home}/bin/compute-sanitizer",
        shutil.which("compute-sanitizer"),
        "/usr/local/cuda/bin/compute-sanitizer",
    ]
    return next((path for path in places if path and os.access(path, os.X_OK)), None)
