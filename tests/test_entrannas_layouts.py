# SPDX-License-Identifier: Apache-2.0
"""What Transit-cells and shared features save: six layouts, evaluation by evaluation."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "benchmarks" / "entrannas_layouts.py"

# Evaluations, millions of multiply-accumulates and of parameters; MiB that plain PyTorch keeps.
TABLE = {
    ("all", False): (784, "300.3", "1.931", 116.3),
    ("all", True): (280, "119.9", "0.749", 44.1),
    ((0, 2), False): (244, "124.0", "1.931", 51.6),
    ((0, 2), True): (94, "59.4", "0.749", 21.2),
    ((7, 5), False): (244, "102.2", "1.931", 26.9),
    ((7, 5), True): (94, "51.8", "0.749", 12.6),
}


@pytest.mark.parametrize(("cells", "share"), TABLE)
def test_layouts(cells: object, share: bool) -> None:
    spec = importlib.util.spec_from_file_location("entrannas_layouts", FILE)
    layouts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(layouts)
    found = layouts.measure(layouts.build(cells, share))
    evaluations, macs, parameters, saved = TABLE[cells, share]
    assert found.evaluations == evaluations
    assert f"{found.macs / 1e6:.1f}" == macs
    assert f"{found.parameters / 1e6:.3f}" == parameters
    # At a batch of 2; what does not grow with it is in there.
    assert found.saved / 2**20 <= saved
    assert layouts.saved(layouts.build(cells, share, "low")) < found.saved
