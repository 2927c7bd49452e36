# SPDX-License-Identifier: Apache-2.0
"""MixedOp as a module among modules: hooks, copies, foreign candidates, replaced parts, DDP."""

from __future__ import annotations

import copy
import pickle

import pytest
import stock
import torch
from data_parallel import train_a_step
from side_by_side import assert_same, observe, randomise_statistics, twins
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from fastnas import MixedOp, PartialMixedOp
from fastnas.nn.candidates import FactorizedReduce, ReLUConvBN, SepConv

BOTH = pytest.mark.parametrize("cls", [MixedOp, PartialMixedOp])


def fused(op):
    """Which candidates take the fused tail at this moment."""
    return [route.norm is not None for route in op._routes()]


@BOTH
def test_train_and_eval_reach_every_candidate(cls):
    op = cls(8, 1)
    assert fused(op) == [False, True, True, False, True, True, True, True]
    assert all(not m.training for m in op.eval().modules())
    assert all(m.training for m in op.train().modules())


def test_a_norm_can_be_frozen_alone():
    ours, theirs = twins(MixedOp(4, 1), stock.MixedOp(4, 1))
    for op in (ours, theirs):
        op._ops[1][1].eval()
    x, weights = torch.randn(3, 4, 6, 6), torch.randn(8)
    assert_same(observe(ours, x, weights), observe(theirs, x, weights), 1e-5)
    assert int(ours._ops[1][1].num_batches_tracked) == 7
    assert int(ours._ops[2][1].num_batches_tracked) == 8


@BOTH
def test_frozen_parameters_get_no_gradient(cls):
    op = cls(8, 1).requires_grad_(False)
    weights = torch.randn(8, requires_grad=True)
    op(torch.randn(3, 8, 6, 6), weights).square().sum().backward()
    assert all(p.grad is None for p in op.parameters())
    assert weights.grad[1:].abs().min() > 0


@BOTH
@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_equal_and_independent(cls, make):
    op = randomise_statistics(cls(8, 2))
    x, weights = torch.randn(3, 8, 6, 6), torch.randn(8)
    twin = make(op)
    before = copy.deepcopy(op.state_dict())
    seen = observe(twin, x, weights)
    for name, value in op.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert_same(seen, observe(op, x, weights), 0.0)
    assert fused(twin) == fused(op)


# Hooks ------------------------------------------------------------------------------------------


def places(op):
    """Modules whose call the fused way leaves out, by the candidate they belong to."""
    return {
        0: [op._ops[0]],
        1: [op._ops[1], op._ops[1][1]],
        4: [op._ops[4], op._ops[4].op, op._ops[4].op[-1]],
    }


@BOTH
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_fire_once_per_call_and_change_nothing_else(cls, kind):
    op = cls(8, 1)
    plain = copy.deepcopy(op)
    x, weights = torch.randn(3, 8, 6, 6), torch.randn(8)
    calls, handles = [], []
    for modules in places(op).values():
        for module in modules:
            register = getattr(module, f"register_{kind}_hook")
            handles.append(register(lambda m, *_: calls.append(m)))
    assert fused(op) == [False, False, True, False, False, True, True, True]
    seen = observe(op, x, weights)
    assert sorted(map(id, calls)) == sorted(id(m) for ms in places(op).values() for m in ms)
    assert_same(seen, observe(plain, x, weights), 1e-5)
    for handle in handles:
        handle.remove()
    assert fused(op) == fused(plain)
    calls.clear()
    observe(op, x, weights)
    assert not calls


@BOTH
def test_a_hook_may_change_the_candidate_s_output(cls):
    op = cls(8, 1).eval()
    x, one_hot = torch.randn(3, 8, 6, 6), torch.eye(8)[4]
    expected = op(x, 2 * one_hot)
    op._ops[4].register_forward_hook(lambda m, args, y: 2 * y)
    mixed = slice(None, None, 4 if cls is PartialMixedOp else 1)
    torch.testing.assert_close(op(x, one_hot)[:, mixed], expected[:, mixed])


@BOTH
def test_hooks_inside_a_candidate_s_body_fire_on_the_fused_way(cls):
    op, calls = cls(8, 1), []
    op._ops[4].op[1].register_forward_hook(lambda m, args, y: calls.append(m))
    assert fused(op)[4]
    op(torch.randn(2, 8, 6, 6), torch.ones(8))
    assert len(calls) == 1


@BOTH
def test_global_hooks_see_every_module(cls):
    op = cls(8, 2)
    expected = {m for m in op.modules() if not isinstance(m, nn.ModuleList)}
    seen = set()
    handle = register_module_forward_hook(lambda m, args, y: seen.add(m))
    try:
        op(torch.randn(2, 8, 6, 6), torch.ones(8))
    finally:
        handle.remove()
    assert seen == expected
    assert fused(op)[1]


def test_a_hook_on_the_pool_of_the_bypass_fires():
    op, calls = PartialMixedOp(8, 2).eval(), []
    x, weights = torch.randn(2, 8, 6, 6), torch.randn(8)
    expected = op(x, weights)
    op.mp.register_forward_hook(lambda m, args, y: calls.append(y.shape))
    torch.testing.assert_close(op(x, weights), expected)
    assert calls == [(2, 6, 3, 3)]


# Candidates of other people ---------------------------------------------------------------------


class Scaled(nn.Module):
    """Has a child `op` like ours, but does more with it."""

    def __init__(self, C):
        super().__init__()
        self.op = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C))

    def forward(self, x):
        return self.op(x) + x


class Announced(nn.Module):
    """Speaks the protocol."""

    def __init__(self, C):
        super().__init__()
        self.before = nn.Conv2d(C, C, 3, padding=1)
        self.after = nn.BatchNorm2d(C)

    def body(self, x):
        return self.before(x).tanh()

    def split_batch_norm(self):
        return self.body, self.after

    def forward(self, x):
        return self.after(self.body(x))


class Override(Announced):
    """Inherits the protocol, but computes something else."""

    def forward(self, x):
        return 3 * super().forward(x)


class DoubleReLU(ReLUConvBN):
    """A subclass of one of our own candidates."""

    def forward(self, x):
        return torch.relu(super().forward(x))


class OddNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def foreign_candidates(C):
    return [
        nn.Conv2d(C, C, 1),
        nn.Sequential(nn.ReLU(), nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C))),
        nn.BatchNorm2d(C),
        nn.BatchNorm2d(C, affine=False, track_running_stats=False),
        nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C, momentum=None)),
        Scaled(C),
        Announced(C),
        Override(C),
        DoubleReLU(C, C, 1, 1, 0),
        nn.Sequential(nn.Conv2d(C, C, 1), OddNorm(C)),
        nn.Sequential(nn.ReLU(), SepConv(C, C, 3, 1, 1, affine=True)),
        nn.Sequential(),
    ]


@pytest.mark.parametrize("training", [True, False])
def test_any_module_may_be_a_candidate(training):
    candidates = foreign_candidates(4)
    ours = MixedOp.from_candidates(copy.deepcopy(candidates)).double().train(training)
    theirs = stock.MixedOp(4, 1, ())
    theirs._ops = nn.ModuleList(candidates)
    twins(ours, theirs.double().train(training))
    assert fused(ours) == [k in (1, 2, 3, 4, 6, 10) for k in range(12)]
    x, weights = torch.randn(3, 4, 6, 6).double(), torch.randn(12).double()
    assert_same(observe(ours, x, weights), observe(theirs, x, weights), 1e-10)


def test_from_candidates_copies_and_wraps_nothing():
    modules = nn.ModuleList([nn.MaxPool2d(3, 1, 1), nn.Identity()])
    op = MixedOp.from_candidates(modules)
    assert op._ops is modules
    assert op._ops[0] is modules[0]
    partial = PartialMixedOp.from_candidates(iter(modules), k=2)
    assert partial._ops[1] is modules[1]
    assert partial(torch.randn(2, 4, 6, 6), [1.0, 1.0]).shape == (2, 4, 6, 6)


def test_a_broken_protocol_is_named():
    class Broken(Announced):
        def split_batch_norm(self):
            return self.body, nn.BatchNorm2d(4)

    with pytest.raises(TypeError, match=r"Broken.split_batch_norm: expected .*of this module"):
        MixedOp.from_candidates([Broken(4)])


def test_an_instance_with_a_forward_of_its_own_takes_the_general_way():
    op = MixedOp(4, 1).eval()
    op._ops[4].forward = torch.zeros_like
    op.train()
    assert not fused(op)[4]
    one_hot = torch.eye(8)[4]
    assert torch.count_nonzero(op(torch.randn(2, 4, 6, 6), one_hot)) == 0


# Replaced parts ---------------------------------------------------------------------------------


@BOTH
def test_replaced_modules_are_used_from_the_next_call_on(cls):
    C = 8 // (4 if cls is PartialMixedOp else 1)
    op, x = cls(8, 2).eval(), torch.randn(2, 8, 6, 6)
    weights = torch.ones(8)
    op(x, weights)
    replacements = [
        (op._ops, "6", nn.AvgPool2d(2)),
        (op._ops[1], "1", nn.GroupNorm(1, C)),
        (op._ops[4].op, "7", nn.BatchNorm2d(C, eps=0.1)),
        (op._ops[5], "op", nn.Sequential(nn.AvgPool2d(2), nn.BatchNorm2d(C, eps=0.1))),
        (op._ops[3], "bn", nn.BatchNorm2d(C, eps=0.1)),
    ]
    for parent, name, module in replacements:
        setattr(parent, name, module.eval())
        rebuilt = cls.from_candidates(op._ops).eval()
        assert fused(rebuilt) == fused(op)
        assert torch.equal(op(x, weights), rebuilt(x, weights)), name
    assert not fused(op)[1]
    assert not fused(op)[6]


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_weights_that_are_parametrized_between_calls_are_used():
    ours, theirs = twins(MixedOp(4, 1), stock.MixedOp(4, 1))
    x, weights = torch.randn(3, 4, 6, 6), torch.randn(8)
    ours(x, weights), theirs(x, weights)
    for op in (ours, theirs):
        for place in (1, 2, 5, 6):  # the convolutions of a separable one
            nn.utils.parametrize.register_parametrization(op._ops[4].op[place], "weight", Doubled())
    assert_same(observe(ours, x, weights), observe(theirs, x, weights), 1e-5)


@pytest.mark.parametrize(
    ("place", "shape"), [(1, (4, 1, 3, 5)), (2, (4, 3, 1, 1)), (6, (3, 4, 1, 1))]
)
def test_weights_of_another_shape_are_refused_by_the_kernels(place, shape):
    op = MixedOp(4, 1)
    op._ops[4].op[place].weight = nn.Parameter(torch.randn(shape))
    expected = r"separable_(group|each): expected (weights|pointwise)\[0\]"
    with pytest.raises(ValueError, match=expected):
        op(torch.randn(3, 4, 6, 6), torch.randn(8))


def test_converted_to_sync_batch_norm_it_takes_the_general_way():
    op = nn.SyncBatchNorm.convert_sync_batchnorm(MixedOp(4, 2))
    assert not any(fused(op))
    assert isinstance(op._ops[3], FactorizedReduce)
    op.eval()(torch.randn(2, 4, 6, 6), torch.ones(8))


def test_state_moves_and_converts():
    op = MixedOp(4, 1)
    op.load_state_dict(MixedOp(4, 1).state_dict(), assign=True)
    op.to(torch.float64)
    assert op(torch.randn(2, 4, 6, 6).double(), torch.ones(8)).dtype == torch.float64


# Several processes ------------------------------------------------------------------------------


@pytest.mark.slow
def test_distributed_data_parallel_averages_the_gradients(tmp_path):
    manager = torch.multiprocessing.Manager()
    results = manager.dict()
    torch.multiprocessing.spawn(
        train_a_step, (tmp_path / "store", PartialMixedOp, results), nprocs=2
    )
    torch.manual_seed(0)
    op = PartialMixedOp(8, 2)
    shards = torch.randn(2, 3, 8, 6, 6)
    expected = {n: torch.zeros_like(p) for n, p in op.named_parameters()}
    for x in shards:
        for _ in range(2):
            op.zero_grad()
            op(x, torch.linspace(-1, 1, 8)).square().sum().backward()
            for name, p in op.named_parameters():
                expected[name] += p.grad / 2
    for rank in range(2):
        assert_same(results[rank], expected, 1e-4)
