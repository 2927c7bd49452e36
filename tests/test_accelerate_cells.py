# SPDX-License-Identifier: Apache-2.0
"""accelerate() on cells: those of DARTS run node by node, whatever does more stays as it is."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import stock
import torch
from foreign_cells import (
    PROVED,
    REFUSED,
    Cells,
    darts,
    kinds,
    make_cell,
    of_ours,
    pc_darts,
    states_of,
)
from side_by_side import assert_same, randomise_statistics
from torch import nn

import fastnas
from fastnas.nn.proof import cells as proof


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def joined_calls(monkeypatch):
    """How many calls went node by node."""
    calls = []

    def counted(*arguments):
        calls.append(1)
        return run_nodes(*arguments)

    run_nodes = proof.run_nodes
    monkeypatch.setattr(proof, "run_nodes", counted)
    return calls


def arguments_of(cell, edges=False, dtype=torch.float64):
    """Inputs, weights of any sign with zeros among them, and weights of the edges."""
    larger = 2 if isinstance(cell.preprocess0, stock.FactorizedReduce) else 1
    sizes = ((3, 6, 8 * larger, 8 * larger), (3, 8, 8, 8), (len(cell._ops), 8))
    given = [torch.randn(size, dtype=dtype) for size in sizes]
    given[2][::2, 3:6] = 0
    return [*given, torch.randn(len(cell._ops), dtype=dtype)] if edges else given


def observe(cell, given):
    """Output, all gradients, and all buffers afterwards."""
    leaves = [x.detach().clone().requires_grad_() for x in given]
    y = cell(*leaves)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    named = {**{f"argument {n}": x for n, x in enumerate(leaves)}, **dict(cell.named_parameters())}
    grads = torch.autograd.grad(y, list(named.values()), grad)
    seen = {"y": y.detach(), **{f"grad {n}": g for n, g in zip(named, grads, strict=True)}}
    return seen | {f"buffer {name}": b.clone() for name, b in cell.named_buffers()}


def swap(cell):
    """Accelerate ``cell``, which must not be left; give back what it was."""
    original = copy.deepcopy(randomise_statistics(cell))
    report = fastnas.accelerate(Cells(cell))
    assert kinds(report)[-1] == "Cell", str(report)
    assert not report.left
    return original


def both(cell, original, given, rtol=1e-10):
    for training in (True, False):
        expected = observe(original.train(training), given)
        assert_same(observe(cell.train(training), given), expected, rtol)


# What is swapped --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "k", "layout"),
    [
        ("darts", 1, {}),
        ("darts", 1, {"reduction": True}),
        ("darts", 2, {"reduction_prev": True}),
        ("pc_darts", 2, {"reduction": True}),
        ("pc_darts", 1, {"reduction_prev": True}),
        ("edges_may_have_weights", 2, {}),
        ("inputs_too", 1, {}),
    ],
)
def test_a_cell_however_it_is_written(name, k, layout, joined_calls):
    cell = make_cell(PROVED[name], k, **layout)
    original = swap(cell)
    cell.double(), original.double()
    ways = {"darts": [False], "inputs_too": [False], "pc_darts": [True]}.get(name, [False, True])
    joined_calls.clear()
    for edges in ways:
        both(cell, original, arguments_of(cell, edges))
    assert len(joined_calls) == 2 * len(ways)


def test_double_backward():
    cell = make_cell(pc_darts, 2)
    original = swap(cell)
    results = []
    for each in (cell.double(), original.double()):
        torch.manual_seed(1)
        given = [x.requires_grad_() for x in arguments_of(each, True)]
        first = torch.autograd.grad(each(*given).square().sum(), given, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), given)
        results.append({f"argument {n}": g for n, g in enumerate(second)})
    assert_same(*results, 1e-9)


def test_weights_of_another_dtype_are_not_multiplied_with_each_other():
    cell = make_cell(pc_darts)
    original = swap(cell)
    s0, s1, weights, edges = arguments_of(cell, True, torch.float32)
    given = s0, s1, weights.bfloat16(), edges.bfloat16()
    torch.testing.assert_close(cell(*given), original(*given), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [1, 2])
def test_under_autocast(k):
    cell = make_cell(pc_darts, k)
    original = swap(cell)
    given = arguments_of(cell, True, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = cell(*given), original(*given)
    assert found.dtype == expected.dtype
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error < 3e-2


def test_each_form_is_proved_once(monkeypatch):
    runs = []

    def counted(*arguments):
        runs.append(1)
        return fault(*arguments)

    fault = proof.fault_around_parts
    monkeypatch.setattr(proof, "fault_around_parts", counted)
    copies = []
    monkeypatch.setattr(
        proof, "clean_copy", lambda *a, f=proof.clean_copy: copies.append(1) or f(*a)
    )
    wide = make_cell()
    wider = type(wide)(2, 2, 12, 16, 8, False, False)  # other widths, the same surroundings
    twin = type(wide)(2, 2, 6, 8, 4, False, False)
    report = fastnas.accelerate(Cells(wide, wider, twin))
    assert kinds(report).count("Cell") == 3
    assert (len(runs), len(copies)) == (2, 2)  # on random maps in either precision


def test_mixed_ops_that_were_ours_already():
    assert kinds(fastnas.accelerate(Cells(of_ours()))) == ["Cell"]


def test_cells_may_be_left_out():
    model = Cells(make_cell())
    assert "Cell" not in kinds(fastnas.accelerate(model, cells=False))
    assert kinds(fastnas.accelerate(model)) == ["Cell"]
    assert fastnas.accelerate(model).swapped == ()


def test_cellsof_ours_are_not_looked_at():
    net = fastnas.spaces.darts.Supernet(4, 3)
    assert fastnas.accelerate(net) == fastnas.accelerate(nn.Sequential())


def test_the_report_tells_of_cells():
    model = Cells(make_cell(), make_cell(REFUSED["scaled"][0]))
    lines = str(fastnas.accelerate(model)).split("\n")
    assert lines[0] == "accelerate: 10 mixed ops and 1 cell swapped, 1 left"
    assert lines[2] == "  1 x Cell: 30 of 40 candidates of its mixed ops with a fused BatchNorm"
    assert lines[3].startswith("  left cells.1: it computes something else: the output differs")


# What is left -----------------------------------------------------------------------------------


# What else it is used for -----------------------------------------------------------------------


def test_other_calls_than_those_proved_take_the_original(joined_calls):
    cell = make_cell(pc_darts)
    original = swap(cell)
    given = arguments_of(cell, True, torch.float32)
    s0, s1, weights, edges = given
    expected = original(*given)

    def check(nodes, *arguments, **by_name):
        joined_calls.clear()
        torch.testing.assert_close(
            cell(*arguments, **by_name), original(*arguments, **by_name), rtol=1e-4, atol=1e-4
        )
        assert len(joined_calls) == nodes

    check(1, s0, s1, weights=weights, weights2=edges)
    check(1, weights2=edges, weights=weights, s1=s1, s0=s0)
    check(0, s0, s1, list(weights), edges)
    check(0, s0, s1, weights, edges.tolist())
    check(0, s0, s1, torch.cat([weights, weights]), edges)  # the original reads the first rows
    for arguments in ((s0, s1), (s0, s1, weights), (*given, 1)):
        with pytest.raises(TypeError):
            cell(*arguments)
    with pytest.raises(TypeError):
        cell(*given, drop_prob=0.1)

    calls = []
    handle = cell._ops[3].register_forward_hook(lambda *_: calls.append(1))
    check(0, *given)
    assert calls == [1]
    handle.remove()
    check(1, *given)
    cell._multiplier = original._multiplier = 1
    check(0, *given)
    assert original(*given).shape != expected.shape


def test_settings_of_any_name(joined_calls):
    """Seen to be the same at every call; where one is not, the cell does what it did."""

    def forward(self, s0, s1, weights):
        states, offset = [self.preprocess0(s0), self.preprocess1(s1)], 0
        for _ in range(self.count):
            pairs = zip(self._ops[offset:], states, weights[offset:], strict=False)
            states.append(sum(op(h, w) for op, h, w in pairs))
            offset += len(states) - 1
        return torch.cat(states[-self.mult :], dim=1)

    cell = make_cell(forward, count=2, mult=2).double()
    original = copy.deepcopy(cell)
    assert kinds(fastnas.accelerate(Cells(cell))).count("Cell") == 1
    given = arguments_of(cell)
    joined_calls.clear()
    for nodes, mult in ((1, 2), (1, 3), (2, 2)):
        cell.mult = original.mult = mult
        torch.testing.assert_close(cell(*given), original(*given), rtol=1e-10, atol=1e-10)
        assert len(joined_calls) == nodes
    assert original(*given).shape[1] == 8


def test_the_cell_stays_what_it_was():
    cell = make_cell()
    model, parts = Cells(cell), list(cell.children())
    parameters, cls = list(cell.parameters()), type(cell)
    keys = list(model.state_dict())
    cell.reduction = True
    fastnas.accelerate(model)
    assert model.cells[0] is cell
    assert isinstance(cell, cls)
    assert repr(cell).startswith("Cell(")
    assert cell.reduction
    assert list(cell.children()) == parts
    assert all(a is b for a, b in zip(cell.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    assert fastnas.restore(model) == 6
    assert type(cell) is cls
    assert "_fastnas_joined" not in vars(cell)
    assert fastnas.restore(model) == 0
    assert kinds(fastnas.accelerate(model)).count("Cell") == 1


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved])
def test_copies(make, joined_calls):
    # A class that a pickle can name.
    model = Cells(stock.Cell(2, 2, 6, 8, 4, False, False))
    fastnas.accelerate(model)
    twin = make(model)
    assert twin.cells[0]._ops[0] is not model.cells[0]._ops[0]
    given = arguments_of(model.cells[0], dtype=torch.float32)
    joined_calls.clear()
    assert_same(observe(twin, given), observe(model, given), 0.0)
    assert len(joined_calls) == 2
    assert fastnas.restore(twin) == 6
    assert type(twin.cells[0]) is stock.Cell
    assert type(model.cells[0]) is not stock.Cell
    assert_same(observe(twin, given), observe(model, given), 1e-3)


def test_optimizers_go_on():
    cell = make_cell()
    optimizer = torch.optim.SGD(cell.parameters(), 0.1)
    fastnas.accelerate(Cells(cell))
    before = [p.clone() for p in cell.parameters()]
    s0, s1, weights = arguments_of(cell, dtype=torch.float32)
    cell(s0, s1, torch.rand_like(weights)).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(cell.parameters(), before, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("forward", [darts, pc_darts])
def test_compiles_into_one_graph(forward):
    cell = make_cell(forward)
    fastnas.accelerate(Cells(cell))
    twin = copy.deepcopy(cell)
    given = arguments_of(cell, forward is pc_darts, torch.float32)
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    seen = {name.removeprefix("grad _orig_mod."): t for name, t in observe(compiled, given).items()}
    expected = observe(twin, given)
    torch.testing.assert_close(seen["y"], expected["y"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        seen["grad argument 2"], expected["grad argument 2"], rtol=1e-3, atol=1e-3
    )


@pytest.mark.slow
def test_a_compiled_model_runs_what_was_swapped():
    inner = Cells(make_cell())
    model = torch.compile(inner, backend="eager")
    given = arguments_of(inner.cells[0], dtype=torch.float32)
    expected = model(*given)  # compiled with the original in it
    assert kinds(fastnas.accelerate(model)).count("Cell") == 1
    torch.testing.assert_close(model(*given), expected, rtol=1e-4, atol=1e-4)


def test_states_of_is_the_cell():
    """The helper of the refused forwards is right, so that it is not what is refused."""
    swap(make_cell(lambda self, s0, s1, w: torch.cat(states_of(self, s0, s1, w)[2:], 1)))


def test_another_of_its_class_is_an_ordinary_cell():
    cell = make_cell()
    cls = type(cell)
    fastnas.accelerate(Cells(cell))
    other = type(cell)(2, 2, 6, 8, 4, False, False, 1)
    other.load_state_dict(cell.state_dict())
    given = arguments_of(cell, False, torch.float32)
    torch.testing.assert_close(other(*given), cell(*given), rtol=1e-4, atol=1e-4)
    assert fastnas.restore(Cells(other)) == 1 and type(other) is cls
