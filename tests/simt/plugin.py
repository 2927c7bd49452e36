# SPDX-License-Identifier: Apache-2.0
"""pytest -p simt.plugin: every test runs with the ops served by the CUDA kernels on the host.

What of a test file makes no sense there (instruction sets, threads of the CPU) is deselected by
the caller with -k or --deselect.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import pytest
import torch
from simt import harness

_module = harness.build()


def pytest_sessionstart() -> None:
    """The small operations of the oracle gain nothing from threads."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _cuda_kernels_on_the_host(request: pytest.FixtureRequest) -> Iterator[None]:
    names = [n for op in harness.OPS for n in (op, f"{op}_backward")]
    names = [n for n in names if hasattr(torch.ops.fastnas, n)]
    _module.set_seed(zlib.crc32(request.node.nodeid.encode()))
    with harness.kernels(_module, names):
        yield
