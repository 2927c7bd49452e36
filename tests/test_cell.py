# SPDX-License-Identifier: Apache-2.0
"""A cell run node by node returns, and leaves behind, what its edges one by one do."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from side_by_side import RELATIVE, assert_same, randomise_statistics
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastnas import MixedOp
from fastnas.nn import carriers
from fastnas.nn.cell import joins_edges, run_nodes
from fastnas.nn.partial import PartialMixedOp
from fastnas.spaces.base import CellWeights
from fastnas.spaces.darts import Supernet


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(carriers, "_CARRIED_ELEMENTS", 1)  # as larger cells do


def make_cell(k: int = 1, reduction: bool = False, C: int = 8):
    """The first cell of its kind in a small supernet, and the channels of its two inputs."""
    cell = Supernet(C, 3, partial_channels=k).cells[1 if reduction else 0]
    return randomise_statistics(cell), cell.preprocess0.op[1].in_channels


def edge_by_edge(cell: nn.Module) -> nn.Module:
    """A copy of ``cell`` whose edges have to be called, for somebody listens."""
    other = copy.deepcopy(cell)
    other._ops[3].register_forward_hook(lambda *_: None)
    assert not joins_edges(list(other._ops)) and joins_edges(list(cell._ops))
    return other


def observe(cell, inputs, weights: CellWeights, amp=None) -> dict[str, Tensor]:
    """Output, all gradients, and all buffers afterwards."""
    inputs = [x.detach().clone(memory_format=torch.preserve_format) for x in inputs]
    leaves = [t.detach().clone() if t is not None else None for t in weights]
    named = dict(zip(("s0", "s1", "ops", "edges"), (*inputs, *leaves), strict=True))
    named = {n: t.requires_grad_() for n, t in named.items() if t is not None}
    with torch.autocast("cpu", amp or torch.bfloat16, enabled=amp is not None):
        y = cell(*inputs, CellWeights(*leaves))
    named.update(cell.named_parameters())
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    grads = torch.autograd.grad(y, list(named.values()), grad)
    seen = {"y": y.detach(), **{f"grad {n}": g for n, g in zip(named, grads, strict=True)}}
    return seen | {f"buffer {n}": b.clone() for n, b in cell.named_buffers()}


def make_weights(edges: bool, dtype=torch.float64) -> CellWeights:
    ops = torch.randn(14, 8, dtype=dtype)
    return CellWeights(ops, torch.randn(14, dtype=dtype) if edges else None)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("edges", [False, True])
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("reduction", [False, True])
def test_node_by_node_is_edge_by_edge(reduction, k, edges, layout, training):
    cell, channels = make_cell(k, reduction)
    cell = cell.double().train(training)
    widths = (channels, cell.preprocess1.op[1].in_channels)
    inputs = [torch.randn(2, c, 8, 8, dtype=torch.float64) for c in widths]
    inputs = [x.contiguous(memory_format=layout) for x in inputs]
    weights = make_weights(edges)
    expected = observe(edge_by_edge(cell), inputs, weights)
    found = observe(cell, inputs, weights)
    assert_same(found, expected, 50 * RELATIVE[torch.float64])
    assert found["y"].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("k", [1, 2])
def test_second_derivatives_are_those_of_edge_by_edge(k):
    cell, channels = make_cell(k)
    cell = cell.double()
    inputs = [torch.randn(2, channels, 4, 4, dtype=torch.float64) for _ in range(2)]
    weights = make_weights(edges=k > 1)

    def second_order(cell):
        leaves = [t.clone().requires_grad_() for t in (*inputs, *weights) if t is not None]
        wanted = [*leaves, cell._ops[5]._ops[4].op[1].weight]
        s0, s1, *others = leaves
        loss = cell(s0, s1, CellWeights(*others)).pow(3).mean()
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), wanted)

    theirs = second_order(edge_by_edge(cell))
    for ours, other in zip(second_order(cell), theirs, strict=True):
        assert (ours - other).abs().max() <= 50 * RELATIVE[torch.float64] * other.abs().max()


@pytest.mark.parametrize("k", [1, 2])
def test_under_autocast(k):
    """Candidates of two dtypes meet in one sum; `none` would have widened it."""
    cell, channels = make_cell(k)
    inputs = [torch.randn(4, channels, 8, 8) for _ in range(2)]
    weights = make_weights(k == 2, torch.float32)
    expected = observe(edge_by_edge(cell), inputs, weights, torch.bfloat16)
    found = observe(cell, inputs, weights, torch.bfloat16)
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in expected.items()}
    error = (found["y"].double() - expected["y"].double()).norm() / expected["y"].double().norm()
    assert error < 3e-2


def test_edges_that_change_their_input_in_place_are_called_in_order():
    cell, _ = make_cell()
    for edge in cell._ops:
        edge._ops[4].op[0].inplace = True
        edge.train()
    assert not joins_edges(list(cell._ops))


def test_edges_that_share_a_norm_inside_are_called_in_order():
    """Its running statistics depend on the order of its batches; last norms keep theirs."""
    cell, _ = make_cell()
    first, second = (cell._ops[i]._ops[4] for i in (1, 2))
    second.op[7] = first.op[7]
    cell.train()
    assert joins_edges(list(cell._ops))
    second.op[3] = first.op[3]
    cell.train()
    assert not joins_edges(list(cell._ops))


def test_candidates_of_one_norm_and_of_nested_layers():
    """The one has no layer before its norm; the other hides what it does to its input."""
    cell, _ = make_cell()
    cell._ops[3]._ops[2] = nn.BatchNorm2d(8)
    cell.train()
    assert joins_edges(list(cell._ops))
    inner = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1))
    for candidate in (nn.Sequential(inner, nn.BatchNorm2d(8)), inner):
        cell._ops[3]._ops[2] = candidate
        cell.train()
        assert not joins_edges(list(cell._ops))


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func.overloadpacket).partition(".")[2]] += 1
        return func(*args, **(kwargs or {}))


def test_what_candidates_share_is_computed_once_a_source():
    cell, channels = make_cell()
    inputs, weights = [torch.randn(2, channels, 8, 8) for _ in range(2)], make_weights(False)
    weights = CellWeights(weights.ops.float())
    with torch.no_grad(), Calls() as calls:
        cell(*inputs, weights)
    sources, nodes = 5, 4
    assert calls.counts["pool_pair"] == sources
    assert not {"max_pool2d_with_indices", "avg_pool2d"} & calls.counts.keys()
    assert calls.counts["mixed_batch_norm"] == nodes
    with torch.no_grad(), Calls() as calls:
        edge_by_edge(cell)(*inputs, weights)
    assert calls.counts["pool_pair"] == calls.counts["mixed_batch_norm"] == 14


def test_two_inputs_of_different_sizes_are_refused():
    edges = [MixedOp(4, 1) for _ in range(2)]
    states = [torch.randn(2, 4, 8, 8), torch.randn(2, 4, 4, 4)]
    with pytest.raises(ValueError, match="expected all inputs of one shape"):
        run_nodes(states, edges, torch.rand(2, 8))
    with pytest.raises(ValueError, match=r"MixedOp: expected x of shape \(N, 4, H, W\)"):
        run_nodes([states[0], states[0][:, :3]], edges, torch.rand(2, 8))


class Mine(MixedOp):
    pass


def test_edges_that_have_to_be_called():
    def edges():
        return [MixedOp(4, 1) for _ in range(5)]

    assert joins_edges(edges())
    assert joins_edges([PartialMixedOp(4, 1, 2) for _ in range(5)])
    assert not joins_edges([])
    for other in (
        Mine(4, 1),
        MixedOp(4, 1, skip_zero=True),
        PartialMixedOp(4, 1, 2),
        nn.Identity(),
        MixedOp(4, 1, ["none", "none"]),
    ):
        assert not joins_edges([*edges()[:4], other]), other
    pooled = PartialMixedOp(4, 2, 2)
    pooled.mp = nn.MaxPool2d(2, 2, ceil_mode=True)
    assert not joins_edges([pooled])
    many = [MixedOp(4, 1, ["skip_connect"] * 13) for _ in range(14)]
    assert joins_edges(many[:9]) and not joins_edges(many)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not joins_edges(edges())
    finally:
        handle.remove()
    patched = edges()
    patched[2].forward = lambda x, w: x
    assert not joins_edges(patched)


@pytest.mark.parametrize("name", ["hook of an edge", "hook of a convolution", "hook of a pool"])
def test_hooks_fire_as_often_as_edge_by_edge(name):
    cell, channels = make_cell()
    inputs, calls = [torch.randn(2, channels, 8, 8) for _ in range(2)], []
    edge = cell._ops[2]
    module = {"edge": edge, "convolution": edge._ops[6].op[1], "pool": edge._ops[1][0]}
    module[name.rpartition(" ")[2]].register_forward_hook(lambda m, *_: calls.append(m))
    plain = copy.deepcopy(cell)
    for m in plain.modules():
        m._forward_hooks.clear()
    weights = CellWeights(make_weights(False).ops.float())
    torch.testing.assert_close(cell(*inputs, weights), plain(*inputs, weights))
    assert len(calls) == 1
