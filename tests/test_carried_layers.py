# SPDX-License-Identifier: Apache-2.0
"""Candidates with layers of their own around fused convolutions: nothing is carried past those."""

from __future__ import annotations

import copy

import ops_cases as cases
import pytest
import stock
import torch
from torch import nn

import fastnas
from fastnas import MixedOp
from fastnas.nn import carriers
from fastnas.nn.candidates import SepConv
from fastnas.nn.cell import joins_edges, run_nodes
from fastnas.spaces.base import CellWeights
from fastnas.spaces.darts import Supernet

F64 = torch.float64


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch):
    """As large tensors are treated."""
    monkeypatch.setattr(carriers, "_CARRIED_ELEMENTS", 1)


class Tap(nn.Module):
    """Returns what it gets, and shows it to others."""

    def forward(self, x):
        self.kept = x
        return x


def make_layer(kind):
    layers = {"tap": Tap, "in place": lambda: nn.ReLU(inplace=True), "relu": nn.ReLU}
    return {**layers, "tanh": nn.Tanh, "dropout": lambda: nn.Dropout(0.0)}[kind]()


def make_candidate(kind, place, k=3, C=4):
    """A separable convolution with one more layer: before its first or its last BatchNorm."""
    layers = list(SepConv(C, C, k, 1, k // 2).op)
    return nn.Sequential(*layers[:place], make_layer(kind), *layers[place:])


def assert_same(found, expected):
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a is None) == (b is None), i
        if a is not None:
            assert (a.double() - b).norm() <= 1e-10 * (b.double().norm() + 1e-3), i


@pytest.mark.parametrize("place", [3, 7])
@pytest.mark.parametrize("kind", ["tap", "in place", "relu", "tanh", "dropout"])
def test_a_mixed_op(kind, place):
    torch.manual_seed(0)
    candidates = nn.ModuleList([make_candidate(kind, place, k) for k in (3, 5, 3)]).double()
    op = MixedOp.from_candidates(copy.deepcopy(candidates))
    x = cases.make((2, 4, 6, 6), F64).requires_grad_()
    weights = torch.tensor([0.3, 0.7, -0.2], dtype=F64, requires_grad=True)
    results = []
    for mine, run in (
        (op._ops, lambda: op(x, weights)),
        (candidates, lambda: sum(w * c(x) for w, c in zip(weights, candidates, strict=True))),
    ):
        y = run()
        seen = [m.kept for m in mine.modules() if isinstance(m, Tap)]
        auxiliary = sum(t.square().mean() for t in seen)
        leaves = [x, weights, *mine.parameters(), *seen]
        results.append(torch.autograd.grad(y.pow(3).sum() + auxiliary, leaves))
    assert_same(*results)


def run_plainly(inputs, edges, rows):
    """Every candidate by itself."""
    states, edges = list(inputs), zip(edges, rows, strict=True)
    for _ in range(4):
        node = [next(edges) for _ in states]
        terms = [
            w * candidate(x)
            for x, (edge, row) in zip(states, node, strict=True)
            for w, candidate in zip(row, edge._ops, strict=True)
        ]
        states.append(sum(terms))
    return states


@pytest.mark.parametrize("place", [3, 7])
@pytest.mark.parametrize("kind", ["tap", "in place", "relu", "tanh"])
def test_a_cell(kind, place):
    torch.manual_seed(0)
    cell = Supernet(4, 3).cells[0]
    for edge in cell._ops:
        for k in (4, 5):
            edge._ops[k] = make_candidate(kind, place)
    cell = cell.double().train()
    other = copy.deepcopy(cell)
    inputs = [cases.make((2, 4, 6, 6), F64, seed=i).requires_grad_() for i in range(2)]
    weights = torch.randn(14, 8, dtype=F64, requires_grad=True)
    assert joins_edges(list(cell._ops))
    results = []
    for mine, states in (
        (cell, [x for (x,) in run_nodes(inputs, list(cell._ops), weights)]),
        (other, run_plainly(inputs, list(other._ops), weights)),
    ):
        seen = [m.kept for m in mine.modules() if isinstance(m, Tap)]
        loss = sum(x.pow(3).sum() for x in states[2:]) + sum(t.square().mean() for t in seen)
        leaves = [*inputs, weights, *mine.parameters(), *seen]
        results.append(torch.autograd.grad(loss, leaves, allow_unused=True))
    assert_same(*results)


@pytest.mark.parametrize("cells", [False, True])
@pytest.mark.parametrize("place", [3, 7])
def test_accelerate_with_a_layer_in_place(place, cells, monkeypatch):
    """A network of others, whose separable convolutions have one ReLU more."""

    class Convolution(stock.SepConv):
        def __init__(self, C, k, stride, affine=True):
            super().__init__(C, k, stride, affine)
            self.op.insert(place, nn.ReLU(inplace=True))

    monkeypatch.setitem(stock.OPS, "sep_conv_3x3", lambda C, s, a: Convolution(C, 3, s, a))
    torch.manual_seed(0)
    plain = stock.Network(C=4, layers=3).double()
    fast = copy.deepcopy(plain)
    fastnas.accelerate(fast, cells=cells)
    images, results = torch.randn(2, 3, 8, 8, dtype=F64), []
    for net in (fast, plain):
        loss = net(images).square().mean()
        results.append(torch.autograd.grad(loss, list(net.parameters()), allow_unused=True))
    assert_same(*results)


@pytest.mark.parametrize("places", [(7, 3), (3, 7), (3, 3)])
def test_a_norm_inside_one_candidate_and_in_another(places):
    """Its statistics take their batches in the order of the candidates, as in PyTorch."""
    torch.manual_seed(0)
    candidates = nn.ModuleList([SepConv(4, 4, k, 1, k // 2) for k in (3, 5, 3)]).double()
    candidates[2].op[places[1]] = candidates[0].op[places[0]]
    op = MixedOp.from_candidates(copy.deepcopy(candidates))
    x, weights = cases.make((2, 4, 6, 6), F64), [0.3, 0.7, 0.2]
    expected = sum(w * c(x) for w, c in zip(weights, candidates, strict=True))
    assert_same([op(x, weights), *op._ops.buffers()], [expected, *candidates.buffers()])


def test_a_norm_that_ends_a_candidate_of_one_edge_and_is_inside_one_of_another():
    edges = Supernet(4, 3).cells[0]._ops
    assert joins_edges(list(edges))
    edges[3]._ops[5].op[3] = edges[0]._ops[4].op[7]
    for edge in edges:
        edge.train()  # looks at the candidates anew
    assert not joins_edges(list(edges))


def test_an_empty_batch():
    op = MixedOp(4, 1)
    x = torch.zeros(0, 4, 6, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(op(x, torch.rand(8)).sum(), x)
    assert gradient.shape == x.shape


@pytest.mark.slow
def test_export_with_any_batch():
    class Exported(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.alphas = Supernet(4, 3), nn.Parameter(torch.randn(14, 8))

        def forward(self, x):
            weights = CellWeights(self.alphas.softmax(-1), None)
            return self.net(x, dict.fromkeys(self.net.cell_specs, weights))

    module = Exported().eval()
    sizes = ({0: torch.export.Dim("n", min=2, max=512)},)
    exported = torch.export.export(
        module, (torch.randn(4, 3, 8, 8),), dynamic_shapes=sizes, strict=False
    )
    images = torch.randn(7, 3, 8, 8)
    assert torch.allclose(exported.module()(images), module(images), rtol=1e-4, atol=1e-5)
