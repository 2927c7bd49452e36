# SPDX-License-Identifier: Apache-2.0
"""Gradients of gates, full and of two paths, against the formulas (ProxylessNAS, section 3.2)."""

from __future__ import annotations

import itertools

import pytest
import torch
from gated_cases import logits, rest
from torch import nn

from fastnas.nn.gated import GatedMixedOp
from fastnas.nn.gates import Gate, draw_gates, pair_importance

G = (1.0, -2.0, 0.5)
FULL = (0.32287587, -0.51107400, 0.18819813)
PAIRS = {
    (0, 1): (0.24003336, 0.73337494),
    (0, 2): (0.44699062, 0.12375829),
    (1, 2): (0.31297602, -0.58750928),
}


class Times(nn.Module):
    """``c x``; with x = 1 and dL/dy = 1 its gate has the gradient c."""

    def __init__(self, c: float) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.tensor(c, dtype=torch.float64))

    def forward(self, x):
        return self.c * x


def gradient(alpha, active, others, numbers=G, loss=torch.sum, scale=None):
    """dL/dalpha as the op finds it, on one number as the image."""
    op = GatedMixedOp(Times(c) for c in numbers)
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    y = op(x, Gate(active, tuple(others), alpha, scale))
    (found,) = torch.autograd.grad(loss(y), alpha)
    return found


@pytest.mark.parametrize("active", range(3))
def test_full_gradient(active):
    found = gradient(logits(), active, rest(active))
    torch.testing.assert_close(found, torch.tensor(FULL, dtype=torch.float64), atol=1e-8, rtol=0)
    assert abs(found.sum().item()) < 1e-15


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("swap", [False, True])
def test_two_path_gradient(pair, swap):
    a, b = reversed(pair) if swap else pair
    found = gradient(logits(), a, [b])
    lower = PAIRS[pair][1]
    assert found[pair[0]].item() == pytest.approx(lower, abs=1e-8)
    assert found[pair[1]].item() == pytest.approx(-lower, abs=1e-8)
    (other,) = set(range(3)) - set(pair)
    assert found[other].item() == 0.0


def chance(p, a, b):
    return p[a] * p[b] * (1 / (1 - p[a]) + 1 / (1 - p[b]))


def test_expectation_of_two_paths_is_not_the_full_gradient():
    p = torch.softmax(logits().detach(), 0).tolist()
    assert p == pytest.approx((0.33758454, 0.25008878, 0.41232669), abs=1e-8)
    total = torch.zeros(3, dtype=torch.float64)
    for pair, (probability, _) in PAIRS.items():
        assert chance(p, *pair) == pytest.approx(probability, abs=1e-8)
        total += probability * gradient(logits(), pair[0], [pair[1]])
    wanted = torch.tensor((0.23135324, -0.35991076, 0.12855752), dtype=torch.float64)
    torch.testing.assert_close(total, wanted, atol=2e-8, rtol=0)


def test_importance_restores_the_full_gradient():
    alpha = logits()
    p = torch.softmax(alpha.detach(), 0).tolist()
    total = torch.zeros(3, dtype=torch.float64)
    for a, b in PAIRS:
        scale = pair_importance(alpha[None], torch.tensor([a]), torch.tensor([b]))[0]
        assert scale.item() == pytest.approx((p[a] + p[b]) ** 2 / chance(p, a, b))
        total += chance(p, a, b) * gradient(alpha, a, [b], scale=scale)
    torch.testing.assert_close(total, gradient(alpha, 0, [1, 2]), rtol=1e-14, atol=1e-15)


def test_two_paths_of_two_candidates_are_the_full_gradient():
    alpha = logits((0.3, -0.6))
    for active in (0, 1):
        found = gradient(alpha, active, [1 - active], (2.0, -1.5))
        drawn = draw_gates(alpha[None], 0, active, paths="two").edges[0]
        assert {drawn.active, *drawn.others} == {0, 1}
        p, q = torch.softmax(alpha, 0).tolist()
        assert found.tolist() == pytest.approx([p * q * 3.5, -p * q * 3.5])
    one = pair_importance(alpha[None], torch.tensor([0]), torch.tensor([1]))
    assert one.item() == pytest.approx(1.0)


@pytest.mark.parametrize("n", [2, 3, 6, 7])
def test_ratio_of_two_paths_to_full_at_uniform_probabilities(n):
    numbers = torch.randn(n, dtype=torch.float64).tolist()
    alpha = logits((0.0,) * n)
    full = gradient(alpha, 0, rest(0, n), numbers)
    pairs = list(itertools.combinations(range(n), 2))
    mean = sum(gradient(alpha, a, [b], numbers) for a, b in pairs) / len(pairs)
    torch.testing.assert_close(mean, full * n / (2 * (n - 1)))


def expected_full(alpha, numbers, loss):
    p = torch.softmax(alpha.detach(), 0)
    found = [gradient(alpha, s, rest(s, len(numbers)), numbers, loss) for s in range(len(numbers))]
    return sum(p[s] * g for s, g in enumerate(found))


def test_unbiased_where_the_loss_is_affine():
    numbers, alpha = (1.5, -0.3, 0.7, 2.0), logits((0.1, -0.4, 0.8, 0.0))
    outputs = torch.tensor(numbers, dtype=torch.float64)

    def loss(y):
        return 3 * y.sum() - 1

    (wanted,) = torch.autograd.grad((torch.softmax(alpha, 0) * (3 * outputs - 1)).sum(), alpha)
    found = expected_full(alpha, numbers, loss)
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-15)


def test_gradient_of_darts_where_the_loss_is_quadratic():
    numbers, alpha = (1.5, -0.3, 0.7, 2.0), logits((0.1, -0.4, 0.8, 0.0))
    outputs = torch.tensor(numbers, dtype=torch.float64)

    def loss(y):
        return (y**2).sum() + 0.5 * y.sum()

    (wanted,) = torch.autograd.grad(loss((torch.softmax(alpha, 0) * outputs).sum()), alpha)
    found = expected_full(alpha, numbers, loss)
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-15)
    p = torch.softmax(alpha, 0)
    (other,) = torch.autograd.grad((p * torch.stack([loss(o) for o in outputs])).sum(), alpha)
    assert (found - other).abs().max() > 0.01
