# SPDX-License-Identifier: Apache-2.0
"""The proof behind accelerate(): every way to write the sum passes, whatever does more does not."""

from __future__ import annotations

import copy
import sys

import pytest
import stock
import torch
import torch.nn.functional as F
from foreign import Edges
from foreign_forms import PROVED, REFUSED, mixed_op, weighted_sum
from side_by_side import assert_same, observe, randomise_statistics
from torch import nn

import fastnas


@pytest.mark.parametrize("name", PROVED)
def test_the_sum_however_it_is_written(name):
    model = Edges(mixed_op(PROVED[name]))
    original = copy.deepcopy(randomise_statistics(model))
    report = fastnas.accelerate(model)
    assert [s.name for s in report.swapped] == ["ops.0"], str(report)
    x = torch.randn(2, 4, 6, 6)
    for weights in (torch.randn(3), torch.tensor([0.0, 0.5, 0.0])):
        assert_same(observe(model, x, weights), observe(original, x, weights), 1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_more_than_the_sum(name):
    forward, reason = REFUSED[name]
    mixed = mixed_op(forward)
    model = Edges(mixed)
    (left,) = fastnas.accelerate(model).left
    assert model.ops[0] is mixed
    assert reason in left.reason
    assert "\n" not in left.reason


def test_a_branch_for_other_edges_of_the_supernet_has_to_be_right():
    class Doubled(stock.PartialMixedOp):
        """The pooled bypass, which only the edges of stride 2 take, counts twice."""

        def forward(self, x, weights):
            c = x.shape[1] // self.k
            mixed = weighted_sum(self, x[:, :c], weights)
            rest = x[:, c:]
            if mixed.shape[2] != x.shape[2]:
                rest = 2 * self.mp(rest)
            return F.channel_shuffle(torch.cat([mixed, rest], 1), self.k)

    one, two = fastnas.accelerate(Edges(Doubled(8, 1), Doubled(8, 2))).left
    assert "a branch that no run of the proof takes" in one.reason
    assert "computes something else: the output" in two.reason


@pytest.mark.parametrize("stride", [1, 2])
def test_k_may_be_a_number_in_the_forward(stride):
    class Quarter(stock.PartialMixedOp):
        """PC-DARTS as it was published for ImageNet, but for the number."""

        def __init__(self):
            super().__init__(16, stride)
            del self.k

        def forward(self, x, weights):
            mixed, rest = x[:, : x.shape[1] // 4], x[:, x.shape[1] // 4 :]
            mixed = weighted_sum(self, mixed, weights)
            rest = rest if mixed.shape[2] == x.shape[2] else self.mp(rest)
            return stock.channel_shuffle(torch.cat([mixed, rest], 1), 4)

    model = Edges(Quarter())
    original = copy.deepcopy(model)
    report = fastnas.accelerate(model)
    assert [s.kind for s in report.swapped] == ["PartialMixedOp"], str(report)
    x, weights = torch.randn(2, 16, 6, 6), torch.randn(8)
    assert_same(observe(model, x, weights), observe(original, x, weights), 1e-4)
    assert fastnas.restore(model) == 1
    assert "k" not in vars(model.ops[0])
    assert len(fastnas.accelerate(model).swapped) == 1


def test_what_a_candidate_hides_on_the_data_of_the_proof():
    class Rare(nn.Module):
        def forward(self, x):
            return F.threshold(x, 1e3, 0.0)

    def squaring(self, x, weights):
        y = weighted_sum(self, x, weights)
        rare = self._ops[3](x)
        return y + rare * rare

    mixed = mixed_op(squaring)
    mixed._ops.append(Rare())
    (left,) = fastnas.accelerate(Edges(mixed)).left
    assert "computes something else" in left.reason
    assert left.difference > 1e-3


class SepConv(nn.Module):
    """The name and the child of the published one."""

    def __init__(self):
        super().__init__()
        self.op = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))

    def forward(self, x):
        return self.op(x)


class Checked(SepConv):
    def forward(self, x):
        if x.dim() != 4:
            raise ValueError("x has four dimensions")
        y = self.op(x)
        return y


class Clamped(SepConv):
    def forward(self, x):
        return self.op(x).clamp(-1e4, 1e4)


class ForFew(SepConv):
    def forward(self, x):
        return self.op(x) if len(x) < 100 else x


class Detached(SepConv):
    def forward(self, x):
        return self.op(x).detach()


class Called(SepConv):
    def __call__(self, x):
        return super().__call__(x).clamp(-1e4, 1e4)


class Zero(nn.Module):
    """The published one, with its branch."""

    def __init__(self, stride=1):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        if self.stride == 1:
            return x.mul(0.0)
        return x[:, :, :: self.stride, :: self.stride].mul(0.0)


def _named_zero(forward):
    return type("Zero", (Zero,), {"forward": forward, "gain": 0.0})


@pytest.mark.parametrize(
    ("cls", "fused", "zero"),
    [
        (SepConv, True, False),
        (Checked, True, False),
        (Clamped, False, False),
        (ForFew, False, False),
        (Detached, False, False),
        (Called, False, False),
        (Zero, False, True),
        (_named_zero(lambda self, x: x * self.gain), False, False),
        (_named_zero(lambda self, x: x if len(x) > 100 else 0 * x), False, False),
        (_named_zero(lambda self, x: 0 * x.clamp(0, 1)), False, False),
    ],
)
def test_a_candidate_is_cut_only_if_it_is_nothing_more(cls, fused, zero):
    mixed = stock.MixedOp(4, 1, ("skip_connect", "dil_conv_3x3"))
    mixed._ops.append(cls())
    model = Edges(mixed)
    original = copy.deepcopy(model)
    assert len(fastnas.accelerate(model).swapped) == 1
    route = model.ops[0]._routes()[2]
    assert (route.norm is not None, route.zero) == (fused, zero)
    x, weights = 1e5 * torch.randn(101, 4, 3, 3), torch.randn(3)
    assert_same(observe(model, x, weights), observe(original, x, weights), 1e-4)


# How it is run ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),
    ],
)
def test_the_callers_modes_do_not_matter(mode):
    model = Edges(mixed_op(weighted_sum))
    with mode():
        assert len(fastnas.accelerate(model).swapped) == 1


def test_a_debugger_gets_its_trace_function_back():
    def trace(*_):
        return None

    def failing(self, x, weights):
        raise KeyError("no")

    former = sys.gettrace()
    try:
        sys.settrace(trace)
        fastnas.accelerate(Edges(mixed_op(weighted_sum), mixed_op(failing)))
        assert sys.gettrace() is trace
    finally:
        sys.settrace(former)
