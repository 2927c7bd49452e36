# SPDX-License-Identifier: Apache-2.0
"""accelerate() and mixed ops whose class has methods besides its forward."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import stock
import torch
from foreign import Edges
from foreign_cells import Cells, kinds, make_cell
from side_by_side import assert_same, observe, randomise_statistics
from torch import nn

import fastnas

SMALL = ("none", "max_pool_3x3", "skip_connect", "dil_conv_3x3")


class Growing(stock.PartialMixedOp):
    """Mixes more of its channels later, by candidates of that width."""

    def __init__(self, C=8, stride=1, k=4):
        super().__init__(C, stride, k, SMALL)
        self.C = C

    def forward(self, x, weights):
        c = x.shape[1] // self.k
        part, rest = x[:, :c], x[:, c:]
        mixed = sum(w * op(part) for w, op in zip(weights, self._ops, strict=True) if w != 0)
        if self.k == 1:
            return mixed
        if mixed.shape[2] != x.shape[2]:
            rest = self.mp(rest)
        return stock.channel_shuffle(torch.cat([mixed, rest], 1), self.k)

    def grow(self, k):
        self.k = k
        self._replace(stock.candidates(self.C // k, 1, SMALL))

    def _replace(self, candidates):
        self._ops = candidates.double()


class Asked(stock.MixedOp):
    """Can be asked for one candidate alone, and for what it costs."""

    def __init__(self, C=4, stride=1):
        super().__init__(C, stride, SMALL)

    def run_one(self, k, x, scale=1):
        return scale * self._chosen(k)(x)

    def _chosen(self, k):
        return self._ops[k]

    @staticmethod
    def cost(weights):
        return 2 * weights.sum()


def swap(mixed):
    """A model with the accelerated mixed op, and what it was."""
    model = randomise_statistics(Edges(mixed)).double()
    original = copy.deepcopy(model)
    report = fastnas.accelerate(model)
    assert not report.left, str(report)
    return model, original


def both(model, original, C):
    x = torch.randn(3, C, 6, 6, dtype=torch.float64)
    for weights in (torch.randn(4), torch.tensor([0.0, 1, 0, 2])):
        a, b = (observe(net, x, weights.double()) for net in (model, original))
        assert_same(a, b, 1e-10)


def test_a_mixed_op_that_grows():
    model, original = swap(Growing())
    assert type(model.ops[0]).__name__ == "PartialMixedOp"
    both(model, original, 8)
    for k in (2, 1):
        for net in (model, original):
            torch.manual_seed(k)
            net.ops[0].grow(k)
        assert model.ops[0].k == k
        both(model, original, 8)
    assert fastnas.restore(model) == 1
    assert (type(model.ops[0]), model.ops[0].k) == (Growing, 1)
    both(model, original, 8)


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "make", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved]
)
def test_methods_run_on_the_replacement(make):
    model, original = swap(Asked())
    model = make(model)
    edge = model.ops[0]
    # What is put in place later is what runs.
    edge._ops[1] = original.ops[0]._ops[1] = nn.AvgPool2d(3, 1, 1)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(edge.run_one(1, x, scale=2), original.ops[0].run_one(1, x, 2))
    assert edge.cost(torch.ones(3)) == Asked.cost(torch.ones(3)) == 6
    both(model, original, 4)
    assert fastnas.restore(model) == 1
    assert type(model.ops[0]) is Asked
    both(model, original, 4)


def test_cells_of_such_mixed_ops_run_node_by_node():
    cell = make_cell()
    for number in range(len(cell._ops)):
        cell._ops[number] = Asked()
    model = Cells(cell)
    original = copy.deepcopy(model)
    assert kinds(fastnas.accelerate(model)) == ["MixedOp"] * 5 + ["Cell"]
    given = torch.randn(2, 6, 8, 8), torch.randn(2, 8, 8, 8), torch.randn(5, 4)
    torch.testing.assert_close(model(*given), original(*given))


class Inheriting(Asked):
    def cost_of_all(self):
        return super().cost(torch.ones(len(self._ops)))


class Valued(Asked):
    @property
    def width(self):
        return len(self._ops)


class Overriding(Asked):
    def train(self, mode=True):
        return super().train(False)


class Clashing(Asked):
    """Has a helper of a name that ours has, too."""

    def _check(self):
        return True

    def is_right(self):
        return self._check()


class Striding(Asked):
    def __init__(self):
        super().__init__()
        self.stride = 1

    def forward(self, x, weights):
        return super().forward(x[:, :, :: self.stride], weights)

    def thin_out(self):
        self.stride = 2


class Fixed(Growing):
    """Its forward does not look at `k`."""

    def forward(self, x, weights):
        mixed = sum(w * op(x[:, :2]) for w, op in zip(weights, self._ops, strict=True))
        return stock.channel_shuffle(torch.cat([mixed, x[:, 2:]], 1), 4)


class Twice(Growing):
    """Computes something else for another `k`."""

    def forward(self, x, weights):
        y = super().forward(x, weights)
        return 2 * y if self.k == 2 else y


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Inheriting, "its class defines what ours lacks: cost_of_all"),
        (Valued, "its class defines what ours lacks: width"),
        (Overriding, "its class defines what ours lacks: train"),
        (Clashing, "its class defines what ours lacks: _check"),
        (Striding, "its forward reads settings that its methods may set: stride"),
        (Fixed, "its methods may set k, which its forward does not read"),
        (Twice, "batch of 2, k = 2, any weights) differs"),
    ],
)
def test_methods_that_ours_could_not_have(make, reason):
    model = Edges(make())
    (left,) = fastnas.accelerate(model).left
    assert reason in left.reason
    assert type(model.ops[0]) is make
