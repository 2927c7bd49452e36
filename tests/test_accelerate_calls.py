# SPDX-License-Identifier: Apache-2.0
"""accelerate() and code that calls its parts with further arguments."""

from __future__ import annotations

import copy
import functools
import inspect

import pytest
import stock
import torch
from foreign import Edges
from foreign_cells import Cells, kinds
from side_by_side import assert_same, randomise_statistics
from test_accelerate_cells import arguments_of, joined_calls  # noqa: F401  # a fixture
from test_accelerate_names import Switched, both_cells, saved
from torch import nn

import fastnas

SMALL = ("none", "max_pool_3x3", "skip_connect", "dil_conv_3x3")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def drop_path(x, probability):
    """Drop whole images, in place, as published; nothing that a proof could read."""
    kept = 1 - probability
    mask = torch.empty(len(x), 1, 1, 1, dtype=x.dtype).bernoulli_(kept)
    return x.div_(kept).mul_(mask)


class Selecting(stock.MixedOp):
    """Runs one candidate alone where it is told which."""

    def __init__(self):
        super().__init__(4, 1, SMALL)
        self.label = "by an instance"

    def label(self):
        return "by the class"

    def forward(self, x, weights, selected=None, flip=False):
        if flip:
            x = x.flip(2)
        if selected is not None:
            self.last = selected
        if selected is None:
            return sum(w * op(x) for w, op in zip(weights, self._ops, strict=True))
        return self._ops[selected](x)


def test_a_mixed_op_that_may_run_one_alone():
    model = randomise_statistics(Edges(Selecting())).double()
    original = copy.deepcopy(model)
    report = fastnas.accelerate(model)
    assert kinds(report) == ["MixedOp"], str(report)
    x, weights = torch.randn(3, 4, 6, 6).double(), torch.randn(4).double()
    for net in (model, copy.deepcopy(model), saved(model)):
        ours, theirs = net.ops[0], copy.deepcopy(original).ops[0]
        assert ours.label == "by an instance"
        for training in (True, False):
            for op in (ours, theirs):
                op.train(training)
            for args, kwargs in (
                ((x, weights), {}),
                ((x, weights, None), {}),
                ((x, weights, None, False), {}),
                ((x, weights), {"selected": None}),
                ((x, None, 3), {}),
                ((x, None), {"selected": 1}),
                ((x, weights), {"flip": True}),
                ((x, weights, None, True), {}),
            ):
                a, b = ours(*args, **kwargs), theirs(*args, **kwargs)
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        assert_same(dict(ours.named_buffers()), dict(theirs.named_buffers()), 1e-10)
        for args, kwargs in (((x, weights, None, False, 1), {}), ((x, weights), {"other": 1})):
            with pytest.raises(TypeError):
                ours(*args, **kwargs)
        with pytest.raises(TypeError):
            ours(x, weights, None, selected=None)


def test_the_other_way_sees_what_was_given_to_ours():
    model = Edges(Selecting()).eval()
    fastnas.accelerate(model)
    x = torch.randn(2, 4, 6, 6)
    model.ops[0].last = None
    model.ops[0]._ops[2] = nn.Tanh()
    torch.testing.assert_close(model.ops[0](x, None, 2), x.tanh())
    assert model.ops[0].last == 2
    assert not vars(model.ops[0]._original).get("last")
    model.ops[0]._ops = nn.ModuleList([nn.Sigmoid()])
    torch.testing.assert_close(model.ops[0](x, None, 0), x.sigmoid())


def test_a_class_may_get_another_forward_later():
    cls = type("MixedOp", (Counting,), {"forward": Selecting.forward})
    x, weights = torch.randn(2, 4, 6, 6), torch.randn(4)
    first = Edges(cls()).eval()
    assert kinds(fastnas.accelerate(first)) == ["MixedOp"]

    def other(self, x, weights, selected=-1):
        if selected == -1:
            return sum(w * op(x) for w, op in zip(weights, self._ops, strict=True))
        return 2 * x

    cls.forward = other
    second = Edges(cls()).eval()
    assert kinds(fastnas.accelerate(second)) == ["MixedOp"]
    torch.testing.assert_close(second.ops[0](x, weights, None), 2 * x)
    mixed = second.ops[0]._original
    torch.testing.assert_close(
        second.ops[0](x, weights, -1), mixed.forward(x, weights), rtol=1e-4, atol=1e-5
    )


class Changing(stock.MixedOp):
    """Where it is told to, it becomes another."""

    def __init__(self):
        super().__init__(4, 1, SMALL)
        self.left = 1

    def forward(self, x, weights, change=False):
        if change:
            self.eval()
            del self.left
            self._ops = nn.ModuleList([nn.Tanh()])
            raise ValueError("as told")
        return sum(w * op(x) for w, op in zip(weights, self._ops, strict=True))


def test_what_the_other_way_changes_is_changed():
    model = Edges(Changing())
    assert kinds(fastnas.accelerate(model)) == ["MixedOp"]
    x, mixed = torch.randn(2, 4, 6, 6), model.ops[0]
    with pytest.raises(ValueError, match="as told"):
        mixed(x, torch.ones(4), True)
    assert not mixed.training
    assert not hasattr(mixed, "left")
    torch.testing.assert_close(mixed(x, torch.ones(1)), x.tanh())


class Counting(stock.MixedOp):
    def __init__(self):
        super().__init__(4, 1, SMALL)


def _twice_by_default(self, x, weights, selected=None):
    return 2 * sum(w * op(x) for w, op in zip(weights, self._ops, strict=True))


def _clamped_by_default(self, x, weights, limit=1e9):
    y = sum(w * op(x) for w, op in zip(weights, self._ops, strict=True))
    return y.clamp(-1e6, 1e6) if limit < 1e10 else y


def _limited(self, x, weights, limit=1e9):
    y = sum(w * op(x) for w, op in zip(weights, self._ops, strict=True))
    return y if x[0, 0, 0, 0] < limit else 2 * y


def _another_limit(self, x, weights, limit=1e9):
    limit = len(x)
    y = sum(w * op(x) for w, op in zip(weights, self._ops, strict=True))
    return y if limit < 100 else 2 * y


def _again(self, x, weights, again=False):
    if again:
        self.count = len(x)
        return sum(w * op(x) for w, op in zip(weights, self._ops, strict=True))
    return self.forward(x, weights, True)


def _in_a_generator(self, x, weights, p=None):
    def terms():
        if not p:
            yield from (w * op(x) for w, op in zip(weights, self._ops, strict=True))
        yield (0 * x).clamp(-1e6, 1e6)

    return sum(terms())


@functools.wraps(_twice_by_default)
def _wrapping(self, x, weights, selected=7):
    y = sum(w * op(x) for w, op in zip(weights, self._ops, strict=True))
    return y if selected == 7 else 2 * y


_wrapping.__signature__ = inspect.signature(_twice_by_default)


def _list_of_more(self, x, weights, more=()):
    return sum(w * op(x) for w, op in zip(weights, self._ops, strict=True))


def _keywords(self, x, weights, **more):
    return sum(w * op(x) for w, op in zip(weights, self._ops, strict=True))


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (_twice_by_default, "computes something else"),
        (_clamped_by_default, "clamp"),
        (_limited, "more than the weighted sum: lt"),
        (_another_limit, "a branch that no run of the proof takes"),
        (_again, "no run of the proof takes (where arguments have other values than"),
        (_in_a_generator, "clamp"),
        (_wrapping, "without a plain default: selected"),
        (_list_of_more, "without a plain default: more"),
        (_keywords, "without a plain default: more"),
    ],
)
def test_what_does_more_by_default(forward, reason):
    model = Edges(type("MixedOp", (Counting,), {"forward": forward})())
    (left,) = fastnas.accelerate(model).left
    assert reason in left.reason


class Dropping(stock.Cell):
    """A cell as in R-DARTS: drops paths where it is told to."""

    def __init__(self):
        super().__init__(2, 2, 6, 8, 4, False, False)

    def forward(self, s0, s1, weights, drop_prob=0.0):
        states, offset = [self.preprocess0(s0), self.preprocess1(s1)], 0
        for _ in range(self._steps):
            if drop_prob > 0.0 and self.training:
                s = sum(
                    drop_path(self._ops[offset + j](h, weights[offset + j]), drop_prob)
                    for j, h in enumerate(states)
                )
            else:
                s = sum(self._ops[offset + j](h, weights[offset + j]) for j, h in enumerate(states))
            offset += len(states)
            states.append(s)
        return torch.cat(states[-self._multiplier :], dim=1)


class DroppingByEdge(Dropping):
    """With weights of edges, too, and the condition in the middle of a sum."""

    def forward(self, s0, s1, weights, weights2=None, drop_prob=0.0, scale="none"):
        states, offset = [self.preprocess0(s0), self.preprocess1(s1)], 0
        for _ in range(self._steps):
            outputs = [self._ops[offset + j](h, weights[offset + j]) for j, h in enumerate(states)]
            outputs = [drop_path(y, drop_prob) if drop_prob else y for y in outputs]
            if weights2 is not None:
                outputs = [weights2[offset + j] * y for j, y in enumerate(outputs)]
            if not scale == "none":
                outputs = [y.clamp(-1, 1) for y in outputs]
            offset += len(states)
            states.append(sum(outputs))
        return torch.cat(states[-self._multiplier :], dim=1)


def test_a_cell_that_may_drop_paths(joined_calls):  # noqa: F811
    model = randomise_statistics(Cells(Dropping())).double()
    original = copy.deepcopy(model)
    report = fastnas.accelerate(model)
    assert kinds(report)[-1] == "Cell", str(report)
    assert not report.left
    given = arguments_of(model.cells[0])
    ours, theirs = model.cells[0], original.cells[0]

    def check(nodes, training, *args, **kwargs):
        joined_calls.clear()
        seen = []
        for cell in (ours.train(training), theirs.train(training)):
            torch.manual_seed(3)
            seen.append(cell(*given, *args, **kwargs))
        torch.testing.assert_close(*seen, rtol=1e-10, atol=1e-10)
        assert len(joined_calls) == nodes

    for training in (True, False):
        check(1, training)
        check(1, training, 0.0)
        check(1, training, 0)
        check(1, training, drop_prob=0.0)
        check(0, training, 0.3)
        check(0, training, drop_prob=0.3)
        check(0, training, torch.tensor(0.0))
    assert_same(dict(model.named_buffers()), dict(original.named_buffers()), 1e-10)
    for args, kwargs in (((0.0, 0.0), {}), ((0.0,), {"drop_prob": 0.0}), ((), {"other": 0.0})):
        with pytest.raises(TypeError):
            ours(*given, *args, **kwargs)
    both_cells(model, original, given)


def test_a_cell_that_may_drop_paths_of_weighted_edges(joined_calls):  # noqa: F811
    model = randomise_statistics(Cells(DroppingByEdge())).double()
    original = copy.deepcopy(model)
    report = fastnas.accelerate(model)
    assert kinds(report)[-1] == "Cell", str(report)
    *given, edges = arguments_of(model.cells[0], edges=True)
    ways = [
        ((), {}, 1),
        ((edges,), {}, 1),
        ((None, 0.0, "none"), {}, 1),
        ((edges,), {"drop_prob": 0.0, "scale": "none"}, 1),
        ((), {"weights2": edges, "drop_prob": 0.0}, 1),
        ((edges, 0.5), {}, 0),
        ((edges,), {"scale": "some"}, 0),
    ]
    for args, kwargs, nodes in ways:
        joined_calls.clear()
        seen = []
        for net in (model, original):
            torch.manual_seed(4)
            seen.append(net.cells[0](*given, *args, **kwargs))
        torch.testing.assert_close(*seen, rtol=1e-10, atol=1e-10)
        assert len(joined_calls) == nodes


@pytest.mark.slow
def test_compiles_into_one_graph():
    x, weights = torch.randn(3, 4, 8, 8), torch.randn(4)
    for mixed in (Switched(4, 1), Selecting()):
        model = nn.ModuleList([mixed]).eval()
        expected = mixed(x, weights)
        assert kinds(fastnas.accelerate(model)) == ["MixedOp"]
        compiled = torch.compile(model[0], fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, weights), expected, rtol=1e-4, atol=1e-4)
    cell = Dropping().eval()
    given = arguments_of(cell, dtype=torch.float32)
    expected = cell(*given, 0.0)
    assert "Cell" in kinds(fastnas.accelerate(Cells(cell)))
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given, 0.0), expected, rtol=1e-4, atol=1e-4)
