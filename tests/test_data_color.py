"""Colour jitter against Python's colorsys and the formulas of blending."""

from __future__ import annotations

import colorsys
from itertools import permutations

import pytest
import torch

from fastnas.data.augment import Augment
from fastnas.data.color import grey, jitter


def pixels() -> torch.Tensor:
    """Random colours and a grid of the colour cube, with greys and ties: [1, 3, 8, 9]."""
    levels = torch.tensor((0.0, 0.5, 1.0))
    corners = torch.cartesian_prod(levels, levels, levels)
    colours = torch.rand(45, 3, generator=torch.Generator().manual_seed(0))
    return torch.cat((corners, colours)).T.reshape(1, 3, 8, 9)


def amounts(brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0) -> torch.Tensor:
    return torch.tensor([[brightness, contrast, saturation, hue]])


@pytest.mark.parametrize("order", list(permutations(range(4)))[::5])
def test_nothing_changes_with_amounts_of_zero(order):
    torch.testing.assert_close(jitter(pixels(), amounts(), order), pixels())


@pytest.mark.parametrize("turn", [-0.5, -0.2, 0.1, 1 / 3, 0.5])
def test_hue_turns_as_colorsys_does(turn):
    found = jitter(pixels(), amounts(hue=turn), (3,))[0].flatten(1).T.tolist()
    for colour, (red, green, blue) in zip(found, pixels()[0].flatten(1).T.tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
        expected = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
        assert colour == pytest.approx(expected, abs=1e-5)


def test_blends():
    images = pixels() * 0.5
    torch.testing.assert_close(jitter(images, amounts(brightness=0.3), (0,)), images * 1.3)
    mean = grey(images).mean()
    expected = mean + 0.6 * (images - mean)
    torch.testing.assert_close(jitter(images, amounts(contrast=-0.4), (1,)), expected)
    expected = grey(images).expand_as(images)
    torch.testing.assert_close(jitter(images, amounts(saturation=-1.0), (2,)), expected)


def test_values_stay_in_range():
    for order in ((0, 1, 2, 3), (3, 2, 1, 0)):
        found = jitter(pixels(), amounts(0.9, 0.9, 0.9, 0.5), order)
        assert found.min() >= 0
        assert found.max() <= 1


def test_draws_have_the_strengths_asked_for():
    augment = Augment(color_jitter=(0.4, 0.0, 0.2, 0.1))
    draws = augment.draw(2000, 4, 4, torch.Generator().manual_seed(0))
    limits = torch.tensor((0.4, 0.0, 0.2, 0.1))
    assert (draws["jitter"].abs().amax(0) <= limits).all()
    assert (draws["jitter"].amin(0) <= -0.95 * limits).all()
    assert (draws["jitter"].amax(0) >= 0.95 * limits).all()
    assert set(draws["jitter_order"].tolist()) == set(range(24))
