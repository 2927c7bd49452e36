# SPDX-License-Identifier: Apache-2.0
"""Engine- and Transit-cells: only chosen connections, shared features, weights for the Engine."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from side_by_side import assert_same, randomise_statistics
from torch import Tensor, nn

from fastnas.nn.connections import run_connections
from fastnas.nn.mixed_op import MixedOp
from fastnas.spaces import CellRoles, CellSelection, CellSpec, CellWeights, count_parameters
from fastnas.spaces.base import Connections
from fastnas.spaces.connections import strongest_edges, strongest_pairs
from fastnas.spaces.darts import GENOTYPES, Supernet, one_hot

K = 7
OPTIONS = {"C": 4, "layers": 5, "num_classes": 5, "none": False}
EVERYTHING: Connections = (tuple(range(K)),) * 14
# Node 2 has one, node 3 two on one edge, node 5 all kinds of candidates on one edge.
SOME: Connections = (
    *((), (3,)),
    *((0, 2), (), ()),
    *((3,), (), (1, 6), ()),
    *((2,), (), (), (0, 1, 2, 3, 4, 5, 6), (4,)),
)


pytestmark = pytest.mark.usefixtures("one_thread")


def make(share: bool, **options: object) -> Supernet:
    net = Supernet(**{**OPTIONS, "engine_cells": "last", "share": share, **options}).double()
    return randomise_statistics(net)


def images() -> Tensor:
    return torch.randn(3, 3, 8, 8, dtype=torch.float64)


def loss_of(net: nn.Module, weights: object, x: Tensor) -> Tensor:
    return F.cross_entropy(net(x, {"normal": weights, "reduce": weights}), torch.arange(len(x)))


def slow_nodes(states, edges, connections, weights=None):
    """The same by calling every candidate: once a module, as sharing says."""
    states, edge = list(states), 0
    called: dict[int, Tensor] = {}
    for node in range(4):
        total = torch.zeros(())
        for source in range(2 + node):
            for k in connections[edge]:
                module = edges[edge]._ops[k]
                if id(module) not in called:
                    called[id(module)] = module(states[source])
                w = 1 if weights is None else weights[edge, k]
                total = total + w * called[id(module)]
            edge += 1
        states.append(total)
    return states


def mixed_ops(share: bool, stride: int) -> list[MixedOp]:
    names = Supernet(**OPTIONS).cell_specs["normal"].primitives
    sources = [s for node in range(4) for s in range(2 + node)]

    def build(source: int) -> MixedOp:
        return MixedOp(4, stride if source < 2 else 1, names)

    if not share:
        return [build(s) for s in sources]
    held = [build(s) for s in range(5)]
    return [held[s] for s in sources]


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("connections", [EVERYTHING, SOME], ids=["everything", "some"])
@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("share", [True, False])
def test_nodes_by_calling_the_candidates(share, stride, training, memory, connections, weighted):
    edges = mixed_ops(share, stride)
    holder = randomise_statistics(nn.ModuleList(dict.fromkeys(edges)).double()).train(training)
    other = copy.deepcopy(holder)
    places = [list(dict.fromkeys(edges)).index(edge) for edge in edges]
    inputs = [torch.randn(2, 4, 6, 6, dtype=torch.float64) for _ in range(2)]
    chosen = torch.tensor([[k in ks for k in range(K)] for ks in connections])
    ops = torch.randn(14, K, dtype=torch.float64) * chosen

    def observe(module: nn.ModuleList, function) -> dict[str, Tensor]:
        leaves = [t.clone().requires_grad_() for t in (*inputs, ops)]
        states = function(
            leaves[:2], [module[p] for p in places], connections, leaves[2] if weighted else None
        )
        generator = torch.Generator().manual_seed(1)
        sum((s * torch.randn(s.shape, generator=generator)).sum() for s in states[2:]).backward()
        seen = {f"state {i}": s.detach() for i, s in enumerate(states)}
        seen |= {f"grad {i}": torch.zeros_like(t) if t.grad is None else t.grad
                 for i, t in enumerate(leaves)}  # fmt: skip
        # Of connections that are not executed it is nobody's.
        seen["grad 2"] = seen["grad 2"] * chosen
        for name, p in module.named_parameters():
            seen[f"grad {name}"] = torch.zeros_like(p) if p.grad is None else p.grad
        return seen | {f"buffer {n}": b.clone() for n, b in module.named_buffers()}

    found = observe(holder, lambda *a: run_connections(*a, memory=memory))
    assert_same(found, observe(other, slow_nodes), 1e-9)


# --- the checkable facts ------------------------------------------------------------------------


def test_numbers_of_connections() -> None:
    spec = make(True).cell_specs["normal"]
    assert (spec.edges, spec.edges * len(spec.primitives), 5 * len(spec.primitives)) == (14, 98, 35)
    cell, alone = make(True).cells[0], make(False).cells[0]
    assert (sum(len(op._ops) for op in cell._ops), sum(len(op._ops) for op in alone._ops)) == (
        35,
        98,
    )
    assert 98 / 35 == 4 * (4 + 3) / (2 * (4 + 1)) == 2.8


def test_parameters_of_the_published_size() -> None:
    shared = Supernet(16, 8, none=False, engine_cells="last", share=True)
    assert count_parameters(Supernet(16, 8, none=False, engine_cells="last")) == 1_930_618
    assert round(count_parameters(shared) / 1e6, 3) == 0.749


@pytest.mark.parametrize("share", [True, False])
def test_an_engine_of_ones_is_a_transit_cell(share: bool) -> None:
    net, x = make(share).train(), images()
    chosen = strongest_edges(torch.rand(14, K).tolist(), net.cell_specs["normal"])
    ops = torch.zeros(14, K, dtype=torch.float64)
    for edge, ks in enumerate(chosen):
        ops[edge, list(ks)] = 1
    transit = loss_of(net, CellSelection(chosen), x)
    for engine in (CellWeights(ops), CellWeights(ops, torch.ones(14).double()),
                   CellSelection(chosen, ops), CellSelection(EVERYTHING, ops)):  # fmt: skip
        torch.testing.assert_close(loss_of(net, engine, x), transit, rtol=1e-12, atol=1e-12)
    roles = CellRoles(CellWeights(ops), CellSelection(chosen))
    torch.testing.assert_close(loss_of(net, roles, x), transit, rtol=1e-12, atol=1e-12)


def test_edge_factors_count_with_shared_features() -> None:
    net, x = make(True).train(), images()
    ops, edges = torch.rand(14, K).double(), torch.rand(14).double()
    torch.testing.assert_close(
        loss_of(net, CellWeights(ops, edges), x), loss_of(net, CellWeights(ops * edges[:, None]), x)
    )


@pytest.mark.parametrize("engines", ["last", (0, 1), (0, 2, 3, 4), "all"])
def test_the_gradient_of_alpha_is_the_sum_over_the_engine_cells(engines: object) -> None:
    net, x = make(True, engine_cells=engines), images()
    ops = torch.rand(14, K).double().requires_grad_()
    hosted = CellSelection(SOME)
    total = torch.autograd.grad(loss_of(net, CellRoles(CellWeights(ops), hosted), x), ops)[0]
    parts = []
    for index, cell in enumerate(net.cells):
        if index in net.engine_cells:
            leaf = ops.detach().clone().requires_grad_()
            parts.append(leaf)
            cell.register_forward_pre_hook(lambda m, a, leaf=leaf: (*a[:2], CellWeights(leaf)))
    loss_of(net, CellRoles(CellWeights(ops), hosted), x).backward()
    assert ops.grad is None and len(parts) == len(net.engine_cells)
    torch.testing.assert_close(sum(p.grad for p in parts), total, rtol=1e-9, atol=1e-12)
    assert all(p.grad.abs().sum() > 0 for p in parts)


def test_no_engine_no_gradient() -> None:
    net, x = make(True), images()
    net.engine_cells = ()
    ops = torch.rand(14, K).double().requires_grad_()
    loss_of(net, CellRoles(CellWeights(ops), CellSelection(SOME)), x).backward()
    assert ops.grad is None


@pytest.mark.parametrize("share", [True, False])
def test_an_unselected_candidate_gets_no_gradient(share: bool) -> None:
    net = make(share)
    before = copy.deepcopy(net.state_dict())
    loss_of(net, CellSelection(SOME), images()).backward()
    now = net.state_dict()
    for place, cell in enumerate(net.cells):
        used = {(cell._edge_ops[e], k) for e, ks in enumerate(SOME) for k in ks}
        assert len(used) < len(cell._ops) * K
        for number, op in enumerate(cell._ops):
            for k, candidate in enumerate(op._ops):
                grads = [p.grad is not None for p in candidate.parameters()]
                assert set(grads) <= {(number, k) in used}
                names = [f"cells.{place}._ops.{number}._ops.{k}.{n}" for n, _ in
                         candidate.named_buffers()]  # fmt: skip
                moved = [not torch.equal(now[n], before[n]) for n in names]
                assert set(moved) <= {(number, k) in used}


@pytest.mark.parametrize("low", ["default", "low"])
def test_calls_of_shared_candidates(low: str) -> None:
    net, calls = make(True, layers=8, memory=low), Counter()
    for index, cell in enumerate(net.cells):
        for op in cell._ops:
            for candidate in op._ops:
                candidate.register_forward_hook(lambda *_, i=index: calls.update([i]))
    nodes = GENOTYPES["DARTS_V2"]
    hot = one_hot(nodes, net.cell_specs)["normal"].ops
    hosted = tuple(tuple(row.nonzero().flatten().tolist()) for row in hot)
    ops = torch.rand(14, K).double()
    loss_of(net, CellRoles(CellWeights(ops), CellSelection(hosted)), images())
    # DARTS_V2: two convolutions, a skip and a dilated one leave the states, whoever reads them.
    assert calls == {i: 35 if i in (5, 7) else 4 for i in range(8)}


@pytest.mark.parametrize("weights", [EVERYTHING, SOME], ids=["engine", "some"])
def test_shared_and_unshared_agree_for_equal_weights(weights: Connections) -> None:
    shared, apart, x = make(True), make(False), images()
    state = shared.state_dict()
    for cell, other in zip(shared.cells, apart.cells, strict=True):
        for number, op in zip(cell._edge_ops, other._ops, strict=True):
            op.load_state_dict(cell._ops[number].state_dict())
    apart.load_state_dict({n: state.get(n, t) if "_ops" not in n else t
                           for n, t in apart.state_dict().items()})  # fmt: skip
    ops = torch.rand(14, K).double()
    some = ops * torch.tensor([[k in ks for k in range(K)] for ks in weights])
    for given in (CellSelection(weights, some), CellSelection(weights), CellWeights(ops)):
        torch.testing.assert_close(
            loss_of(apart, given, x), loss_of(shared, given, x), rtol=1e-11, atol=1e-11
        )


def test_the_statistics_of_a_shared_candidate_move_once() -> None:
    net = make(True)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [int(m.num_batches_tracked) for m in norms]
    loss_of(net, CellWeights(torch.rand(14, K).double()), images())
    assert [int(m.num_batches_tracked) - b for m, b in zip(norms, before, strict=True)] == [
        1
    ] * len(norms)


# --- what is refused ------------------------------------------------------------------------------


def test_engine_cells() -> None:
    assert Supernet(**{**OPTIONS, "layers": 8}, engine_cells="last").engine_cells == (5, 7)
    assert Supernet(**{**OPTIONS, "layers": 3}, engine_cells="last").engine_cells == (0, 2)
    assert Supernet(**OPTIONS, engine_cells=(3, 0)).engine_cells == (0, 3)
    assert Supernet(**OPTIONS).engine_cells == (0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ((0, 5), r"engine_cells: wanted different numbers from 0 to 4, got \(0, 5\)"),
        ((-1, 1), "different numbers from 0 to 4"),
        ((1, 1), "different numbers from 0 to 4"),
        ((1, 3), r"engine_cells: wanted a normal cell among them \(0, 2, 4\), .* got \(1, 3\)"),
        ((0, 2), r"engine_cells: wanted a reduction cell among them \(1, 3\), .* got \(0, 2\)"),
        ((), "wanted a normal cell"),
        ("first", "wanted numbers of cells, got 'first'"),
        ((True, 1), "wanted numbers of cells"),
    ],
)
def test_engine_cells_that_are_refused(cells: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Supernet(**OPTIONS, engine_cells=cells)


@pytest.mark.parametrize("options", [{"none": True}, {"partial_channels": 2}])
@pytest.mark.parametrize("role", [{"share": True}, {"engine_cells": "last"}])
def test_supernets_that_cannot_choose(options: dict, role: dict) -> None:
    with pytest.raises(ValueError, match="engine_cells and share: wanted partial_channels of 1"):
        Supernet(**{**OPTIONS, **options, **role})
    net = Supernet(**{**OPTIONS, **options})
    with pytest.raises(TypeError, match=r"wanted CellWeights, got CellSelection"):
        net(torch.randn(2, 3, 8, 8), dict.fromkeys(net.cell_specs, CellSelection(EVERYTHING)))


@pytest.mark.parametrize(
    ("connections", "message"),
    [
        (EVERYTHING[1:], "connections: 13 edges, wanted 14"),
        (((7,), *EVERYTHING[1:]), r"connections\[0\]: \(7,\), wanted ascending numbers .* below 7"),
        (((-1, 2), *EVERYTHING[1:]), r"connections\[0\]"),
        (((2, 1), *EVERYTHING[1:]), r"connections\[0\]"),
        (((1, 1), *EVERYTHING[1:]), r"connections\[0\]"),
        (((), (), *EVERYTHING[2:]), "connections: node 2 has none, wanted at least one"),
    ],
)
def test_connections_that_are_refused(connections: Connections, message: str) -> None:
    net = Supernet(**OPTIONS)
    with pytest.raises(ValueError, match=message):
        net(torch.randn(2, 3, 8, 8), dict.fromkeys(net.cell_specs, CellSelection(connections)))


def test_weights_that_are_refused() -> None:
    net, x = Supernet(**OPTIONS), torch.randn(2, 3, 8, 8)
    given = CellRoles(CellSelection(EVERYTHING, torch.rand(14, 8)), CellSelection(EVERYTHING))
    with pytest.raises(ValueError, match=r"weights\['normal'\].ops: shape \(14, 8\), wanted"):
        net(x, dict.fromkeys(net.cell_specs, given))
    with pytest.raises(
        TypeError, match="wanted CellWeights, CellSelection or CellRoles, got Tensor"
    ):
        net(x, dict.fromkeys(net.cell_specs, torch.rand(14, 7)))


# --- the hand-made rules ------------------------------------------------------------------------


def test_rules_of_derivation() -> None:
    spec = CellSpec((2, 3), ("none", "a", "b"))
    scores = [[9, 1, 5], [0, 4, 3], [0, 1, 1], [0, 6, 7], [0, 2, 2]]
    assert strongest_edges(scores, spec) == ((2,), (1,), (), (2,), (1,))
    assert strongest_pairs(scores, spec) == ((2,), (1,), (), (1, 2), ())
    assert strongest_edges(scores, spec, keep=1) == ((2,), (), (), (2,), ())
    assert strongest_pairs(scores, spec, keep=3) == ((2,), (1, 2), (), (1, 2), (1,))
