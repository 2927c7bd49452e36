# SPDX-License-Identifier: Apache-2.0
"""accelerate() and code that names its parts otherwise, or has its weights by node."""

from __future__ import annotations

import copy
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

SMALL = ("none", "max_pool_3x3", "skip_connect", "dil_conv_3x3")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


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


def test_a_cell_whose_parts_change_places_does_what_it_did(joined_calls):  # noqa: F811
    def check(change, nodes):
        model = randomise_statistics(Cells(Dag())).double()
        original = copy.deepcopy(model)
        assert kinds(fastnas.accelerate(model))[-1] == "Cell"
        for net in (model, original):
            torch.manual_seed(5)
            change(net.cells[0])
        given = [torch.randn(3, 6, 16, 16).double(), torch.randn(3, 8, 8, 8).double()]
        weights = [torch.randn(n, 4).double() for n in (2, 3)]
        joined_calls.clear()
        ours, theirs = (net.cells[0](*given, weights) for net in (model, original))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        assert len(joined_calls) == nodes

    def assign_again(cell):
        part = cell.preproc0
        del cell.preproc0
        cell.preproc0 = part

    def observe_it(cell):
        cell.observer = nn.Identity()

    def rename(cell):
        cell.dag = nn.ModuleList(nn.ModuleList(list(node)) for node in cell.dag)

    check(lambda cell: None, 1)
    check(rename, 1)
    check(assign_again, 0)
    check(observe_it, 0)


class Consuming(Dag):
    def forward(self, s0, s1, w_dag):
        y = super().forward(s0, s1, w_dag)
        del w_dag[0]
        return y


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (Consuming, "does not run on random data"),
        (lambda: _with_empty_lists(Dag()), "does not run on random data"),
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


def _with_empty_lists(cell):
    cell.dag = nn.ModuleList([nn.ModuleList(), nn.ModuleList(), *cell.dag])
    return cell


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
