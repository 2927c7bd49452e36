# SPDX-License-Identifier: Apache-2.0
"""The schedules by which DA2S lets its losses in."""

from __future__ import annotations

import math

import pytest

from fastnas.methods.continuation import continuation

# Epochs 1, 8, 9, 15, 25, 40, 49, 50 of 50.
SCHEDULES = {
    "linear": (0, 0.142857, 0.163265, 0.285714, 0.489796, 0.795918, 0.979592, 1),
    "delayed-log": (0, 0, 0.185449, 0.556347, 0.773309, 0.935478, 1.0, 1.006295),
    "const": (1,) * 8,
    "delayed-const": (0, 0, 1, 1, 1, 1, 1, 1),
    "delayed-linear": tuple(max(0, e - 8) / 42 for e in (1, 8, 9, 15, 25, 40, 49, 50)),
    "log": tuple(math.log(e) / math.log(50) for e in (1, 8, 9, 15, 25, 40, 49, 50)),
    "exp": tuple(2 ** (e / 5) / 2**10 for e in (1, 8, 9, 15, 25, 40, 49, 50)),
    "delayed-exp": (0, 0, *(2 ** ((e - 8) / 5 - 8.4) for e in (9, 15, 25, 40, 49, 50))),
    "step": (0, 0, 0, 1 / 3, 1 / 3, 1, 1, 1),
    "delayed-step": (0, 0, 0, 0, 1 / 3, 2 / 3, 1, 1),
    "sigmoid": tuple(1 / (1 + math.exp(-(e / 5 - 5))) for e in (1, 8, 9, 15, 25, 40, 49, 50)),
    "delayed-sigmoid": (
        *(0, 0),
        *(1 / (1 + math.exp(-((e - 8) / 4 - 42 / 8))) for e in (9, 15, 25, 40, 49, 50)),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule(name: str) -> None:
    values = [continuation(name, e, 50, 8) for e in (1, 8, 9, 15, 25, 40, 49, 50)]
    assert values == pytest.approx(SCHEDULES[name], abs=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("epochs", "delay"), [(1, 0), (1, 8), (2, 1), (4, 1), (7, 6), (100, 10)])
def test_schedules_of_other_lengths_grow_from_0_to_1(name: str, epochs: int, delay: int) -> None:
    values = [continuation(name, e, epochs, delay) for e in range(1, epochs + 1)]
    assert values == sorted(values) and values[0] >= 0
    if delay < epochs or not name.startswith("delayed"):
        # Fewer than four epochs have no four quarters.
        assert (0 if name.endswith("step") and epochs - delay < 4 else 0.99) <= values[-1] <= 1.3
    else:
        assert set(values) == {0.0}


def test_the_product_of_the_released_schedules() -> None:
    products = [0, 0, 0.030277, 0.158956, 0.378763, 0.744564, 0.979592, 1.006295]
    for epoch, product in zip((1, 8, 9, 15, 25, 40, 49, 50), products, strict=True):
        value = continuation("linear", epoch, 50) * continuation("delayed-log", epoch, 50)
        assert value == pytest.approx(product, abs=1e-6)


def test_schedule_errors() -> None:
    with pytest.raises(ValueError, match=r"continuation: expected one of const, .*got 'cubic'"):
        continuation("cubic", 1, 50)
    with pytest.raises(ValueError, match="epoch from 1 to 50, but got 51"):
        continuation("linear", 51, 50)
