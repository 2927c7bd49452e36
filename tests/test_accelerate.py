# SPDX-License-Identifier: Apache-2.0
"""accelerate(): what it swaps in other people's supernets, what it refuses, how it is undone."""

from __future__ import annotations

import copy
import pickle

import pytest
import stock
import torch
from foreign import (
    Auxiliary,
    AveragePool,
    Detached,
    Edges,
    Extended,
    Fading,
    Failing,
    Indexed,
    InTraining,
    NoK,
    Normalised,
    Shared,
    Skipping,
    Twice,
    Unshuffled,
    WithParts,
)
from side_by_side import assert_same, observe, randomise_statistics
from torch import nn

import fastnas
from fastnas import MixedOp, PartialMixedOp


def both(ours, theirs, C=8):
    randomise_statistics(theirs)
    ours.load_state_dict(theirs.state_dict())
    x, weights = torch.randn(3, C, 8, 8), torch.sigmoid(torch.randn(8))
    for training in (True, False):
        a = observe(ours.train(training), x, weights)
        assert_same(a, observe(theirs.train(training), x, weights), 1e-4)


# What is swapped --------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4])
def test_a_whole_supernet(k):
    torch.manual_seed(0)
    model = stock.Network(C=4, layers=3, k=k)
    original = copy.deepcopy(model)
    keys = list(model.state_dict())
    tensors = {name: t.data_ptr() for name, t in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    report = fastnas.accelerate(model)
    edges, cells = report.swapped[:42], report.swapped[42:]
    assert not report.left
    assert {s.kind for s in edges} == {"MixedOp" if k == 1 else "PartialMixedOp"}
    assert {(s.fused, s.candidates) for s in edges} == {(6, 8), (7, 8)}
    assert [(s.name, s.kind, s.candidates) for s in cells] == [
        (f"cells.{number}", "Cell", 112) for number in range(3)
    ]
    assert all(isinstance(op, MixedOp) for cell in model.cells for op in cell._ops)
    assert list(model.state_dict()) == keys
    assert {name: t.data_ptr() for name, t in model.state_dict().items()} == tensors

    reference = torch.optim.SGD(original.parameters(), 0.1, momentum=0.9)
    x = torch.randn(4, 3, 8, 8)
    for net, steps in ((model, optimizer), (original, reference)):
        for _ in range(2):
            steps.zero_grad()
            net(x).logsumexp(1).sum().backward()
            steps.step()
    seen = [{n: t.detach() for n, t in net.state_dict().items()} for net in (model, original)]
    for net, values in zip((model, original), seen, strict=True):
        values |= {f"alpha {i}": a.grad for i, a in enumerate(net.arch_parameters())}
    assert_same(*seen, 1e-3)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("cls", [stock.MixedOp, Indexed, stock.PartialMixedOp, AveragePool])
def test_one_of_each_form(cls, stride):
    model = Edges(cls(8, stride))
    original = copy.deepcopy(model)
    report = fastnas.accelerate(model)
    assert [s.name for s in report.swapped] == ["ops.0"], str(report)
    both(model, original)


def test_one_that_skips_zero_weights_keeps_skipping():
    model = Edges(Skipping(4, 1))
    original = copy.deepcopy(model)
    assert len(fastnas.accelerate(model).swapped) == 1
    assert model.ops[0].skip_zero
    x, weights = torch.randn(3, 4, 6, 6), torch.tensor([0.0, 0, 1, 2, 0, -1, 0, 3])
    assert_same(observe(model, x, weights), observe(original, x, weights), 1e-4)


def test_candidates_are_cut_only_where_it_is_right():
    class SepConv(nn.Module):
        """The name and the child of the published one, but more in the forward."""

        def __init__(self):
            super().__init__()
            self.op = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))

        def forward(self, x):
            return self.op(x) + x

    class Gated(SepConv):
        def __init__(self):
            super().__init__()
            self.gain = 1.0

        def forward(self, x):
            return self.op(x) * self.gain

    class Plain(SepConv):
        def forward(self, x):
            return self.op(x)

    class Zero(nn.Module):
        def forward(self, x):
            return x.mul(1e-3)

    mixed = stock.MixedOp(4, 1, ("none",))
    mixed._ops.extend([SepConv(), Gated(), Plain(), Zero()])
    model = Edges(mixed)
    original = copy.deepcopy(model)
    report = fastnas.accelerate(model)
    assert [(s.fused, s.candidates) for s in report.swapped] == [(1, 5)]
    routes = model.ops[0]._routes()
    assert [r.norm is not None for r in routes] == [False, False, False, True, False]
    assert [r.zero for r in routes] == [True, False, False, False, False]
    x, weights = torch.randn(3, 4, 6, 6), torch.randn(5)
    assert_same(observe(model, x, weights), observe(original, x, weights), 1e-4)


def test_a_candidate_that_draws_random_numbers():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.op = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(4))

        def forward(self, x):
            return self.op(x)

    mixed = stock.MixedOp(4, 1)
    mixed._ops[3] = Noisy()
    (swapped,) = fastnas.accelerate(Edges(mixed)).swapped
    assert swapped.fused == 7


def test_a_module_in_two_places_stays_one():
    mixed = stock.MixedOp(4, 1)
    model = Edges(mixed, mixed, stock.MixedOp(4, 1))
    assert [s.name for s in fastnas.accelerate(model).swapped] == ["ops.0", "ops.2"]
    assert model.ops[0] is model.ops[1]
    assert isinstance(model.ops[1], MixedOp)


def test_plain_attributes_stay_readable():
    model = Edges(Indexed(4, 2))
    fastnas.accelerate(model)
    assert model.ops[0].stride == 2


# What is left -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mixed", "what"),
    [
        (Twice(4, 1), "buffer"),
        (Auxiliary(4, 1), "output"),
        (Normalised(4, 1), "output|gradient"),
        (Detached(4, 1), "gradient of the weights"),
        (InTraining(4, 1), "evaluation"),
        (Unshuffled(8, 1), "output|gradient"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_another_formula_stays_with_the_difference(mixed, what):
    model = Edges(mixed)
    report = fastnas.accelerate(model)
    assert model.ops[0] is mixed
    assert not report.swapped
    (left,) = report.left
    assert left.name == "ops.0"
    assert left.reason.startswith("it computes something else")
    assert left.difference > 1e-3
    assert any(word in left.reason for word in what.split("|")), left.reason
    assert f"relative difference {left.difference:.1e}" in str(report)


@pytest.mark.parametrize(
    ("mixed", "reason"),
    [
        (Fading(4, 1), "reads settings that may change: fade"),
        (Shared(4, 1), "its class defines what ours lacks: fade"),
        (Extended(4, 1), "takes more than x and weights"),
        (WithParts(4, 1), "parts besides its candidates: scale"),
        (Failing(4, 1), "does not run on random data: RuntimeError: needs a mask"),
        (NoK(4, 1), "a pool `mp`, but no `k`"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_obstacles_are_named(mixed, reason):
    model = Edges(mixed)
    (left,) = fastnas.accelerate(model).left
    assert model.ops[0] is mixed
    assert reason in left.reason
    assert "\n" not in left.reason
    assert left.difference is None


def test_hooked_and_patched_ones_stay():
    hooked, patched = stock.MixedOp(4, 1), stock.MixedOp(4, 1)
    hooked.register_forward_hook(lambda *_: None)
    patched.forward = lambda x, weights: x
    report = fastnas.accelerate(Edges(hooked, patched, stock.MixedOp(4, 1)))
    assert [left.name for left in report.left] == ["ops.0", "ops.1"]
    assert report.left[1].reason == "its forward was replaced on this instance"
    assert [s.name for s in report.swapped] == ["ops.2"]


def test_the_model_itself_cannot_be_replaced():
    (left,) = fastnas.accelerate(stock.MixedOp(4, 1)).left
    assert left.name == ""
    assert "no parent" in left.reason


def test_equal_forms_with_other_settings_are_judged_apart():
    class Scaled(stock.MixedOp):
        def __init__(self, factor):
            super().__init__(4, 1)
            self.stride = factor  # a name that is trusted to stay

        def forward(self, x, weights):
            return super().forward(x, [self.stride * w for w in weights])

    report = fastnas.accelerate(Edges(Scaled(1), Scaled(2), Scaled(1)))
    assert [s.name for s in report.swapped] == ["ops.0", "ops.2"]
    assert [left.name for left in report.left] == ["ops.1"]


def test_no_mixed_op_at_all():
    report = fastnas.accelerate(nn.Sequential(nn.Conv2d(3, 3, 1)))
    assert (report.swapped, report.left) == ((), ())
    assert "found no mixed op to swap" in str(report)
    assert fastnas.restore(nn.Sequential()) == 0
    with pytest.raises(TypeError, match=r"expected an nn.Module, but got list"):
        fastnas.accelerate([])
    with pytest.raises(TypeError, match=r"expected an nn.Module, but got list"):
        fastnas.restore([])


class Residual(nn.Module):
    """A candidate that does something behind its BatchNorm."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))

    def forward(self, x):
        return self.body(x) + x


def test_the_report_tells_of_norms_that_were_not_found():
    edge = stock.MixedOp(4, 1)
    edge._ops[4] = Residual()
    lines = str(fastnas.accelerate(Edges(edge))).split("\n")
    assert lines[1].startswith("  1 x MixedOp: 5 of 8 candidates with a fused BatchNorm; 1 keep")
    assert lines[1].endswith("one after the other")


def test_the_report_is_readable():
    model = Edges(stock.MixedOp(4, 1), Auxiliary(4, 1), Auxiliary(4, 1), Fading(4, 1))
    lines = str(fastnas.accelerate(model)).split("\n")
    assert lines[0] == "accelerate: 1 mixed ops swapped, 3 left"
    assert lines[1] == "  1 x MixedOp: 6 of 8 candidates with a fused BatchNorm"
    assert lines[2].startswith("  left ops.1 and 1 more: it computes something else: the ")
    assert lines[3].startswith("  left ops.3: its forward reads settings")


# What it does not touch, and the way back -------------------------------------------------------


def test_the_proof_leaves_no_trace():
    model = Edges(stock.MixedOp(4, 1), Auxiliary(4, 1), stock.PartialMixedOp(8, 2))
    randomise_statistics(model)
    model.ops[0].eval()
    model.ops[0]._ops[4].op[1].requires_grad_(False)
    calls = []
    for m in model.ops[0]._ops:
        m.register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(model.state_dict())
    flags = [(n, p.requires_grad) for n, p in model.named_parameters()]
    modes = [m.training for m in model.modules()]
    rng, threads = torch.get_rng_state(), torch.get_num_threads()
    assert len(fastnas.accelerate(model).swapped) == 2
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.get_num_threads() == threads > 1
    assert not calls
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_restore_puts_the_originals_back_with_what_was_learned():
    model = Edges(stock.MixedOp(4, 1), stock.PartialMixedOp(4, 1, k=2))
    originals = list(model.ops)
    fastnas.accelerate(model)
    observe(model, torch.randn(3, 4, 6, 6), torch.randn(8))
    model.eval()
    state = copy.deepcopy(model.state_dict())
    assert fastnas.restore(model) == 2
    assert all(a is b for a, b in zip(model.ops, originals, strict=True))
    assert not any(m.training for m in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert fastnas.restore(model) == 0
    assert len(fastnas.accelerate(model).swapped) == 2


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_an_accelerated_model_can_be_restored(make):
    model = Edges(stock.MixedOp(4, 1), stock.PartialMixedOp(4, 1, k=2))
    fastnas.accelerate(model)
    twin = make(model)
    assert fastnas.accelerate(twin).swapped == ()  # they are ours already
    x, weights = torch.randn(3, 4, 6, 6), torch.randn(8)
    assert_same(observe(twin, x, weights), observe(model, x, weights), 0.0)
    assert fastnas.restore(twin) == 2
    assert type(twin.ops[0]) is stock.MixedOp
    assert type(model.ops[1]) is PartialMixedOp
    assert twin.ops[0]._ops[4].op[1].weight is not model.ops[0]._ops[4].op[1].weight
    randomise_statistics(twin).load_state_dict(model.state_dict())
    assert_same(observe(twin, x, weights), observe(model, x, weights), 1e-4)
