# SPDX-License-Identifier: Apache-2.0
"""accelerate() and candidates whose layers are in parts of other names, or in parts of parts."""

from __future__ import annotations

import copy

import pytest
import torch
from foreign import Edges
from foreign_cells import Cells, kinds, make_cell
from side_by_side import assert_same, observe, randomise_statistics
from stock import Zero
from torch import nn

import fastnas


class Separable(nn.Module):
    """ReLU, depthwise and pointwise convolution, BatchNorm."""

    def __init__(self, C, size=3, stride=1, dilation=1):
        super().__init__()
        padding = dilation * (size // 2)
        self.layers = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(C, C, size, stride, padding, dilation, groups=C, bias=False),
            nn.Conv2d(C, C, 1, bias=False),
            nn.BatchNorm2d(C),
        )

    def forward(self, x):
        return self.layers(x)


class Twice(nn.Module):
    """Parts that have parts themselves."""

    def __init__(self, C, size, stride):
        super().__init__()
        self.both = nn.Sequential(Separable(C, size, stride), Separable(C, size))

    def forward(self, x):
        return self.both(x)


class Pool(nn.Module):
    def __init__(self, C, pool):
        super().__init__()
        self.pool = pool
        self.norm = nn.BatchNorm2d(C)

    def forward(self, x):
        pooled = self.pool(x)
        return self.norm(pooled)


class Reduce(nn.Module):
    """The factorized reduce, its convolutions called otherwise."""

    def __init__(self, C):
        super().__init__()
        self.relu = nn.ReLU()
        self.conv1 = nn.Conv2d(C, C // 2, 1, stride=2, bias=False)
        self.conv2 = nn.Conv2d(C, C // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(C)

    def forward(self, x):
        x = self.relu(x)
        return self.bn(torch.cat([self.conv1(x), self.conv2(x[:, :, 1:, 1:])], 1))


class Mixed(nn.Module):
    def __init__(self, *candidates):
        super().__init__()
        self._ops = nn.ModuleList(candidates)

    def forward(self, x, weights):
        return sum(w * op(x) for w, op in zip(weights, self._ops, strict=True))


def swap(*candidates):
    """The accelerated mixed op of these in a model, that model, and what it was."""
    model = randomise_statistics(Edges(Mixed(*candidates))).double()
    original = copy.deepcopy(model)
    report = fastnas.accelerate(model)
    assert len(report.swapped) == 1, str(report)
    return model.ops[0], model, original


def both(model, original):
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    weights = torch.randn(len(original.ops[0]._ops), dtype=torch.float64)
    for training in (True, False):
        a = observe(model.train(training), x, weights)
        assert_same(a, observe(original.train(training), x, weights), 1e-10)


@pytest.mark.parametrize("stride", [1, 2])
def test_parts_of_any_name_are_fused(stride):
    edge, model, original = swap(
        Zero(stride),
        Pool(4, nn.MaxPool2d(3, stride, 1)),
        Pool(4, nn.AvgPool2d(3, stride, 1, count_include_pad=False)),
        nn.Identity() if stride == 1 else Reduce(4),
        Twice(4, 3, stride),
        Twice(4, 5, stride),
        Separable(4, 3, stride, 2),
    )
    routes = edge._routes()
    fused = [False, True, True, stride == 2, True, True, True]
    assert [route.norm is not None for route in routes] == fused
    assert [route.recipe.key is not None for route in routes[1:3]] == [True, True]
    assert (routes[3].recipe.halves is not None) == (stride == 2)
    # The second half of a convolution is one layer with the norm between them.
    assert [(len(r.layers), len(r.recipe.after)) for r in routes[4:]] == [(7, 1), (7, 1), (3, 0)]
    both(model, original)


class Between(Separable):
    """Does something behind its layers."""

    def forward(self, x):
        return self.layers(x) + x


class Backwards(nn.Module):
    """Its parts are not called in the order in which they were made."""

    def __init__(self, C):
        super().__init__()
        self.last = nn.BatchNorm2d(C)
        self.first = nn.Conv2d(C, C, 1)

    def forward(self, x):
        return self.last(self.first(x))


class EitherWay(nn.Module):
    """One class, whose parts were made in this order or in that one."""

    def __init__(self, C, names):
        super().__init__()
        for name in names:
            self.add_module(name, nn.BatchNorm2d(C) if name == "last" else nn.ReLU())

    def forward(self, x):
        return self.last(self.first(x))


@pytest.mark.parametrize(
    ("candidates", "fused"),
    [
        ([nn.Sequential(Between(4), Separable(4))], [True]),
        ([nn.Sequential(Separable(4), Between(4))], [False]),
        ([Backwards(4)], [False]),
        ([EitherWay(4, ("first", "last"))], [True]),
        ([EitherWay(4, ("first", "last")), EitherWay(4, ("last", "first"))], [False, False]),
    ],
    ids=["before", "behind", "backwards", "one order", "both orders"],
)
def test_parts_that_are_more_stay_whole(candidates, fused):
    edge, model, original = swap(nn.Conv2d(4, 4, 1), *candidates)
    routes = edge._routes()[1:]
    assert [route.norm is not None for route in routes] == fused
    if isinstance(candidates[0], nn.Sequential) and fused[0]:
        assert isinstance(routes[0].layers[0], Between)
    both(model, original)


def test_hooks_on_parts_of_parts_fire():
    edge, model, original = swap(Twice(4, 3, 1), Separable(4))
    calls = []
    for part in (edge._ops[0].both, edge._ops[0].both[0], edge._ops[0].both[0].layers):
        handle = part.register_forward_hook(lambda part, args, y: calls.append(part))
        both(model, original)
        handle.remove()
        assert calls == [part, part]
        calls.clear()


def test_parts_that_are_replaced_are_run():
    edge, model, original = swap(Twice(4, 3, 1), Separable(4))
    for net in (model, original):
        torch.manual_seed(1)
        net.ops[0]._ops[0].both[0] = Between(4).double()
        net.ops[0]._ops[1].layers[2] = nn.Conv2d(4, 4, 1).double()
    assert isinstance(edge._routes()[0].layers[0], Between)
    both(model, original)


def test_candidates_that_need_larger_images():
    """As with a padding that reflects: it has to be narrower than the image."""

    def wide():
        conv = nn.Conv2d(4, 4, 3, padding=8, dilation=8, padding_mode="reflect", bias=False)
        return nn.Sequential(nn.ReLU(), conv)

    cell = make_cell()
    for edge in cell._ops:
        edge._ops[1] = wide()
    model = Cells(cell)
    original = copy.deepcopy(model)
    report = fastnas.accelerate(model)
    assert kinds(report) == ["MixedOp"] * 5 + ["Cell"], str(report)
    s0, s1, weights = torch.randn(2, 6, 16, 12), torch.randn(2, 8, 16, 12), torch.randn(5, 8)
    torch.testing.assert_close(model(s0, s1, weights), original(s0, s1, weights))
