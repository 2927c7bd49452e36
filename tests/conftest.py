# SPDX-License-Identifier: Apache-2.0
"""What every test shares: devices, tolerances, seeds."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Before torch loads OpenMP: threads that wait in a loop starve the working one where others share
# the cores. It changes no result.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch


class Tolerance(NamedTuple):
    """Arguments for torch.testing.assert_close."""

    rtol: float
    atol: float


# Results of fused kernels against the same formula in plain PyTorch: the order of additions
# differs, so a few units in the last place of the storage type are allowed.
TOLERANCES = {
    torch.float64: Tolerance(1e-10, 1e-11),
    torch.float32: Tolerance(1e-5, 1e-5),
    torch.bfloat16: Tolerance(1.6e-2, 1.6e-2),
    torch.float16: Tolerance(2e-3, 2e-3),
}


def _devices() -> list[str]:
    if chosen := os.environ.get("FASTNAS_TEST_DEVICE"):
        return chosen.split(",")
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def pytest_configure(config: pytest.Config) -> None:
    # Started in the background or under nohup, a process inherits that these are ignored.
    for number, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
    # Two threads are what the smallest machine has: results that depend on their number show up,
    # and timings do not.
    torch.set_num_threads(2)
    # What is compared to the last digits on a CPU is so on a GPU: no convolution in TF32.
    torch.backends.cudnn.allow_tf32 = False


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        marks = {"cuda": [pytest.mark.gpu]}
        values = [pytest.param(d, marks=marks.get(d.split(":")[0], [])) for d in _devices()]
        metafunc.parametrize("device", values, indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device at hand; FASTNAS_TEST_DEVICE=cuda (or cpu,cuda) overrides the choice."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def tolerances() -> dict[torch.dtype, Tolerance]:
    """rtol and atol per storage type: ``assert_close(a, b, **tolerances[a.dtype]._asdict())``."""
    return TOLERANCES


@pytest.fixture(scope="session", autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs the tests outside of the source tree, and processes they start with the same fastnas.

    In the root of the repository a started interpreter would import the package from there, which
    holds no kernels unless it was built in place.
    """
    package = Path(importlib.util.find_spec("fastnas").origin).parent
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    os.environ["PYTHONPATH"] = str(package.parent)
    yield
    os.chdir(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """At small sizes threads have nothing to do but to wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
