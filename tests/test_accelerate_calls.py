# SPDX-License-Identifier: Apache-2.0
"""accelerate() and code that names its parts otherwise, or calls them with further arguments."""

from __future__ import annotations

import copy
import dis
import io
import pickle

import pytest
import stock
import torch
from foreign import Edges
from foreign_cells import Cells, kinds
from side_by_side import assert_same, randomise_statistics
from test_accelerate_cells import arguments_of, joined_calls  # noqa: F401  # a fixture
from test_accelerate_cells import observe as observe_cell
from torch import nn

import fastnas
from fastnas.nn.proof.settled import idle_instructions, nested_codes

SMALL = ("none", "max_pool_3x3", "skip_connect", "dil_conv_3x3")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def drop_path(x, probability):
    """Drop whole images, in place, as published; nothing that a proof could read."""
    kept = 1 - probability
    mask = torch.empty(len(x), 1, 1, 1, dtype=x.dtype).bernoulli_(kept)
    return x.div_(kept).mul_(mask)


# Other names ------------------------------------------------------------------------------------


class Switched(nn.Module):
    """A mixed op as in P-DARTS: its candidates are ``m_ops``, and their dropout may change."""

    def __init__(self, C, stride, p=0.0):
        super().__init__()
        self.m_ops = stock.candidates(C, stride, SMALL)
        self.p = p
        if p > 0:
            self.m_ops[2] = nn.Sequential(self.m_ops[2], nn.Dropout(p))

    def update_p(self):
        for op in self.m_ops:
            if isinstance(op, nn.Sequential) and isinstance(op[1], nn.Dropout):
                op[1].p = self.p

    def forward(self, x, weights):
        return sum(w * op(x) for w, op in zip(weights, self.m_ops, strict=True))


class SwitchedCell(stock.Cell):
    """Has its mixed ops in ``cell_ops``."""

    def __init__(self, p=0.0):
        super().__init__(2, 2, 6, 8, 4, False, False)
        del self._ops
        self.cell_ops = nn.ModuleList(Switched(4, 1, p) for _ in range(5))
        self.p = p

    def update_p(self):
        for op in self.cell_ops:
            op.p = self.p
            op.update_p()

    def forward(self, s0, s1, weights):
        states, offset = [self.preprocess0(s0), self.preprocess1(s1)], 0
        for _ in range(self._steps):
            s = sum(self.cell_ops[offset + j](h, weights[offset + j]) for j, h in enumerate(states))
            offset += len(states)
            states.append(s)
        return torch.cat(states[-self._multiplier :], dim=1)


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def cell_inputs():
    sizes = ((3, 6, 8, 8), (3, 8, 8, 8), (5, 4))
    return [torch.randn(size, dtype=torch.float64) for size in sizes]


def both_cells(model, original, given):
    for training in (True, False):
        torch.manual_seed(1)
        expected = observe_cell(original.train(training), given)
        torch.manual_seed(1)
        assert_same(observe_cell(model.train(training), given), expected, 1e-10)


COPIES = [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved]


@pytest.mark.parametrize("make", COPIES, ids=["itself", "deepcopy", "pickle", "saved"])
def test_lists_of_other_names(make, joined_calls):  # noqa: F811
    model = randomise_statistics(Cells(SwitchedCell())).double()
    original = copy.deepcopy(model)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    report = fastnas.accelerate(model)
    assert kinds(report) == ["MixedOp"] * 5 + ["Cell"], str(report)
    assert report.swapped[0].name == "cells.0.cell_ops.0"
    assert not report.left
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    model = make(model)
    assert isinstance(model.cells[0].cell_ops[0], fastnas.MixedOp)
    given = cell_inputs()
    joined_calls.clear()
    both_cells(model, original, given)
    assert len(joined_calls) == 2

    # Another list of candidates is the one that runs.
    for net in (model, original):
        torch.manual_seed(2)
        net.cells[0].cell_ops[1].m_ops = stock.candidates(4, 1, SMALL[::-1]).double()
    both_cells(model, original, given)
    assert fastnas.restore(model) == 6
    assert type(model.cells[0].cell_ops[0]) is Switched
    assert list(model.state_dict()) == list(original.state_dict())
    both_cells(model, original, given)


class Dag(nn.Module):
    """A cell as in pt.darts: a list of edges and a matrix of weights for each node."""

    def __init__(self):
        super().__init__()
        self.steps = 2
        self.dag = nn.ModuleList()
        self.preproc0 = stock.FactorizedReduce(6, 4, affine=False)
        self.preproc1 = stock.ReLUConvBN(8, 4, 1, 1, 0, affine=False)
        for i in range(self.steps):
            self.dag.append(nn.ModuleList())
            for _ in range(2 + i):
                self.dag[i].append(stock.MixedOp(4, 1, SMALL))

    def forward(self, s0, s1, w_dag):
        states = [self.preproc0(s0), self.preproc1(s1)]
        for edges, w_list in zip(self.dag, w_dag, strict=True):
            s = sum(edges[i](s, w) for i, (s, w) in enumerate(zip(states, w_list, strict=True)))
            states.append(s)
        return torch.cat(states[2:], dim=1)


class OtherWay(Dag):
    """Takes its inputs the other way round."""

    def forward(self, s0, s1, w_dag):
        return super().forward(s1, s0, w_dag)


class ByNode(stock.Cell):
    """Has its edges in one list, and its weights by node."""

    def forward(self, s0, s1, weights):
        states, edge = [self.preprocess0(s0), self.preprocess1(s1)], 0
        for w in weights:
            edges = [self._ops[edge + j](h, w[j]) for j, h in enumerate(states)]
            edge += len(edges)
            states.append(sum(edges))
        return torch.cat(states[2:], dim=1)


@pytest.mark.parametrize("make", COPIES, ids=["itself", "deepcopy", "pickle", "saved"])
@pytest.mark.parametrize(
    ("build", "count"), [(Dag, 4), (lambda: ByNode(2, 2, 6, 8, 4, False, True), 8)]
)
def test_weights_by_node(build, count, make, joined_calls):  # noqa: F811
    model = randomise_statistics(Cells(build())).double()
    original, keys = copy.deepcopy(model), list(model.state_dict())
    report = fastnas.accelerate(model)
    assert kinds(report) == ["MixedOp"] * 5 + ["Cell"], str(report)
    assert not report.left
    assert list(model.state_dict()) == keys
    model = make(model)
    s0, s1 = torch.randn(3, 6, 16, 16).double(), torch.randn(3, 8, 8, 8).double()
    first, second = torch.randn(2, count).double(), torch.randn(3, count).double()

    def seen(net, weights):
        leaves = [x.clone().requires_grad_() for x in (s0, s1, first, second)]
        y = net.cells[0](*leaves[:2], weights(*leaves[2:]))
        named = [*leaves, *net.parameters()]
        grads = torch.autograd.grad(y.square().sum(), named, allow_unused=True)
        return {str(n): g for n, g in enumerate((y.detach(), *grads)) if g is not None} | dict(
            net.named_buffers()
        )

    for weights, nodes in (
        (lambda a, b: [a, b], 1),
        (lambda a, b: (a, b), 1),
        (lambda a, b: [a, list(b)], 0),
        (lambda a, b: [list(a), b], 0),
    ):
        for training in (True, False):
            joined_calls.clear()
            ours, theirs = (seen(net.train(training), weights) for net in (model, original))
            assert_same(ours, theirs, 1e-10)
            assert len(joined_calls) == nodes
    with pytest.raises((ValueError, IndexError)):  # the original's own
        model.cells[0](s0, s1, [first[:1], second])
    assert fastnas.restore(model) == 6


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (OtherWay, "does not run on random data"),
        (lambda: _with_more(Dag()), "nor just two parts besides its mixed ops"),
        (lambda: _with_one_for_both(Dag()), "its preproc0 and preproc1 are one module"),
        (lambda: _with_an_edge_more(Dag()), "6 mixed ops are not one from every state"),
    ],
)
def test_cells_of_other_names_that_are_more(build, reason):
    report = fastnas.accelerate(Cells(build()))
    assert "Cell" not in kinds(report)
    (left,) = [item for item in report.left if item.name == "cells.0"]
    assert reason in left.reason


def _with_more(cell):
    cell.more = nn.ReLU()
    return cell


def _with_one_for_both(cell):
    cell.preproc0 = cell.preproc1
    return cell


def _with_an_edge_more(cell):
    cell.dag[1].append(stock.MixedOp(4, 1, SMALL))
    return cell


def test_dropout_inside_keeps_the_cell_edge_by_edge():
    model = randomise_statistics(Cells(SwitchedCell(0.4))).double()
    original = copy.deepcopy(model)
    report = fastnas.accelerate(model)
    assert kinds(report) == ["MixedOp"] * 5, str(report)
    assert "draws random numbers" in report.left[0].reason
    given = cell_inputs()
    both_cells(model, original, given)
    for net in (model, original):
        net.cells[0].p = 0.9
        net.cells[0].update_p()
    assert model.cells[0].cell_ops[0].m_ops[2][1].p == 0.9
    both_cells(model, original, given)


def test_lists_of_something_else_are_not_spoken_of():
    """Of modules that take more than x, as the edges of a cell; and of nothing."""
    for inner in (nn.Bilinear(2, 2, 2), Switched(4, 1)):
        report = fastnas.accelerate(nn.Sequential(Edges(inner)))
        assert not [left for left in report.left if left.name == "0"]
    assert not fastnas.accelerate(nn.Sequential(nn.MultiheadAttention(4, 2), Edges())).left


# Further arguments ------------------------------------------------------------------------------


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


# What does not run ------------------------------------------------------------------------------


def _settled(x, p=0.0):
    if p > 0 and x.a:
        return x.b
    return x.c


def _settled_by_none(x, p=None):
    if p is not None:
        x.a()
    y = x.b if p is None else x.c
    while p:
        y.d()
    return y


def _settled_inside(x, p=0):
    return [y.a if p else y.b for y in x] + [y.c for y in x if not p]


def _reassigned(x, p=0.0):
    for _ in x:
        if p > 0:
            return x.a
        p = p + 1
    return x.b


def _reassigned_inside(x, p=0.0):
    def change():
        nonlocal p
        p = x.c

    change()
    return x.a if p else x.b


def _another_inside(x, p=0.0):
    return (lambda p: [y.a if p else y.b for y in x])(x.c)


def _decided_by_more(x, p=0.0):
    if (x.a if x.b else p) > 0:
        return x.c
    if 0 <= p < x.d:
        return x.e
    return x.f


def _in_a_try(x, p=0.0):
    try:
        if p:
            return x.a
        return x.b
    except ValueError:
        return x.c


@pytest.mark.parametrize(
    ("function", "value", "names"),
    [
        (_settled, 0.0, "c"),
        (_settled, 1.0, "abc"),
        (_settled, torch.ones(()), "abc"),
        (_settled_by_none, None, "b"),
        (_settled_by_none, 0, "ac"),
        (_settled_inside, 0, "bc"),
        (_settled_inside, 1, "a"),
        (_reassigned, 0.0, "ab"),
        (_reassigned_inside, 0.0, "abc"),
        (_another_inside, 0.0, "abc"),
        (_decided_by_more, 0.0, "abcdef"),
        (_in_a_try, 0.0, "bc"),
    ],
)
def test_what_does_not_run_with_a_default(function, value, names):
    idle = idle_instructions(function.__code__, {"p": value})
    left = {
        i.argval
        for code in nested_codes(function.__code__)
        for i in dis.get_instructions(code)
        if (id(code), i.offset) not in idle and i.opname in ("LOAD_ATTR", "LOAD_METHOD")
    }
    assert left == set(names)
