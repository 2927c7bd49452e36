# SPDX-License-Identifier: Apache-2.0
"""Learning rates at the epochs for which their values are known."""

from __future__ import annotations

import pytest

from fastnas.search import learning_rate


@pytest.mark.parametrize(
    ("epoch", "rate"), [(0, 0.025), (1, 0.024976), (10, 0.022708), (25, 0.013), (49, 0.001024)]
)
def test_cosine_of_darts(epoch: int, rate: float) -> None:
    assert learning_rate(epoch, 50, 0.025, 0.001) == pytest.approx(rate, abs=5e-7)


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [(5, 0.489796), (100, 0.295918), (244, 0.002041), (245, 0.002041), (249, 0.000408)],
)
def test_linear_of_pc_darts(epoch: int, rate: float) -> None:
    found = learning_rate(epoch, 250, 0.5, schedule="linear", warmup_epochs=5)
    assert found == pytest.approx(rate, abs=5e-7)


def test_warmup_in_the_middle_of_an_epoch() -> None:
    rates = [learning_rate(e, 50, 0.5, warmup_epochs=2) for e in (0, 0.9, 1, 1.9, 2)]
    assert rates[:4] == [0.25, 0.25, 0.5, 0.5] and rates[4] < 0.5


def test_warmup_does_not_shift_the_schedule() -> None:
    rates = [learning_rate(e, 50, 0.5, warmup_epochs=5) for e in range(6)]
    assert rates[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert rates[5] == learning_rate(5, 50, 0.5)


def test_exponential_and_constant() -> None:
    assert learning_rate(2, 250, 0.1, schedule="exponential") == pytest.approx(0.1 * 0.97**2)
    assert learning_rate(9, 10, 0.1, schedule="constant") == 0.1


def test_linear_in_few_epochs_falls_to_a_positive_rate() -> None:
    rates = [learning_rate(e, 4, 0.4, schedule="linear") for e in range(4)]
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 0.1), "epochs of at least 1, but got 0"),
        ((-1, 5, 0.1), "epoch of at least 0, but got -1"),
    ],
)
def test_wrong_epochs(arguments: tuple[int, int, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learning_rate(*arguments)


def test_unknown_schedule() -> None:
    with pytest.raises(ValueError, match="cosine, linear, exponential, constant, but got 'step'"):
        learning_rate(0, 5, 0.1, schedule="step")
