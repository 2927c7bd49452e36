# SPDX-License-Identifier: Apache-2.0
"""accelerate() and restore() in models that are wrapped, compiled, hooked, halved, shared, odd."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import stock
import torch
from foreign import Edges, Indexed
from foreign_forms import loop_that_skips, mixed_op, weighted_sum
from side_by_side import assert_same, observe, randomise_statistics
from torch import nn

import fastnas
from fastnas import MixedOp

SMALL = ("none", "max_pool_3x3", "skip_connect", "dil_conv_3x3")


def small(C=4, stride=1):
    return stock.MixedOp(C, stride, SMALL)


def swap(model):
    """Accelerate ``model``, which must not leave anything; give back what it was."""
    original = copy.deepcopy(randomise_statistics(model))
    report = fastnas.accelerate(model)
    assert report.swapped, str(report)
    assert not report.left, str(report)
    return original


def both(model, original, rtol=1e-4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 4, 8, 8, generator=generator).to(dtype)
    weights = torch.randn(4, generator=generator).to(dtype)
    assert_same(observe(model, x, weights), observe(original, x, weights), rtol)


def reason_of(mixed):
    """Why ``mixed`` is left where it is."""
    model = Edges(mixed)
    (left,) = fastnas.accelerate(model).left
    assert model.ops[0] is mixed
    return left.reason


# Wrappers ---------------------------------------------------------------------------------------


def test_data_parallel():
    model = nn.DataParallel(Edges(small()))
    both(model, swap(model))
    assert fastnas.restore(model) == 1


def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        model = nn.parallel.DistributedDataParallel(Edges(small()))
        for rewrite in (fastnas.accelerate, fastnas.restore):
            rewrite(model)
            for _ in range(2):  # the second pass fails if a gradient of the first was left out
                model(torch.randn(2, 4, 6, 6), torch.randn(4)).square().sum().backward()
            assert all(p.grad is not None for p in model.parameters())
            model.zero_grad()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), lambda m: m])
def test_a_compiled_model_runs_what_was_swapped(wrap):
    inner = Edges(small())
    model = wrap(inner)
    if model is inner:
        model.compile(backend="eager")
    x, weights = torch.randn(3, 4, 8, 8), torch.randn(4)
    expected = model(x, weights)  # compiled with the original in it
    assert len(fastnas.accelerate(model).swapped) == 1
    calls = []
    inner.ops[0].register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(model(x, weights), expected, rtol=1e-4, atol=1e-4)
    assert calls == [1]


@pytest.mark.slow
def test_a_compiled_mixed_op_stays():
    wrapped, in_place = torch.compile(small(), backend="eager"), small()
    in_place.compile(backend="eager")
    report = fastnas.accelerate(Edges(wrapped, in_place))
    assert [left.name for left in report.left] == ["ops.0._orig_mod", "ops.1"]
    assert {left.reason for left in report.left} == {
        "it is compiled; accelerate a model before compiling it"
    }


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:The .grad:UserWarning")
def test_scripted_and_traced_candidates():
    mixed = small()
    x = torch.randn(3, 4, 8, 8)
    mixed._ops[2] = torch.jit.script(nn.Conv2d(4, 4, 1))
    mixed._ops.append(torch.jit.trace(nn.Conv2d(4, 4, 1), x))
    model = Edges(mixed)
    swap(model)
    assert model(x, torch.randn(5)).shape == x.shape
    assert fastnas.restore(model) == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:Iterating")
def test_a_traced_model_has_no_mixed_op():
    traced = torch.jit.trace(small().eval(), (torch.randn(3, 4, 8, 8), torch.randn(4)))
    assert fastnas.accelerate(Edges(traced)) == fastnas.accelerate(nn.Sequential())
    assert fastnas.restore(traced) == 0


def test_mixed_ops_inside_candidates():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixed = small()
            self.alpha = nn.Parameter(torch.randn(4))

        def forward(self, x):
            return self.mixed(x, self.alpha)

    outer = small()
    outer._ops[2] = Inner()
    outer._ops[3] = nn.Sequential(Inner(), nn.BatchNorm2d(4))
    model = Edges(outer)
    both(model, swap(model))
    assert sum(isinstance(m, MixedOp) for m in model.modules()) == 3
    assert fastnas.restore(model) == 3
    assert not any(isinstance(m, MixedOp) for m in model.modules())


def test_shared_candidates():
    one, two = small(), small()
    two._ops = one._ops
    twice = small()
    twice._ops[1] = twice._ops[3]
    model = Edges(one, two, twice)
    both(model, swap(model), 1e-3)
    assert model.ops[0]._ops is model.ops[1]._ops


# Kinds of parameters and norms ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    model = Edges(small()).to(dtype)
    both(model, swap(model), 5e-2, dtype)


def test_a_change_of_dtype_afterwards():
    model = Edges(small())
    swap(model)
    model.bfloat16()
    accelerated = copy.deepcopy(model)
    assert fastnas.restore(model) == 1
    both(accelerated, model, 5e-2, torch.bfloat16)


@pytest.mark.parametrize(
    "options",
    [
        {"affine": True},
        {"momentum": None},
        {"track_running_stats": False},
        {"eps": 0.1, "momentum": 0.3},
    ],
    ids=str,
)
def test_any_batch_norm(options):
    mixed = small()
    mixed._ops[1][1] = nn.BatchNorm2d(4, **options)
    mixed._ops[3].op[3] = nn.BatchNorm2d(4, **options)
    model = Edges(mixed)
    original = swap(model)
    for training in (True, True, False):
        both(model.train(training), original.train(training))


def test_frozen_parameters_and_norms():
    model = Edges(small()).requires_grad_(False)
    model.ops[0]._ops[1].eval()
    model.ops[0]._ops[3].op[3].eval()
    original = swap(model)
    assert not model.ops[0]._ops[1].training
    both(model, original)
    assert not model(torch.randn(2, 4, 6, 6), torch.randn(4)).requires_grad


def test_parametrized_candidates():
    mixed = small()
    nn.utils.parametrizations.weight_norm(mixed._ops[3].op[1])
    model = Edges(mixed)
    both(model, swap(model))


def test_state_dicts_load_both_ways_strictly():
    model = Edges(small(), stock.PartialMixedOp(8, 1, 2, SMALL))
    original = swap(model)
    state = {name: torch.rand_like(t.float()).to(t) for name, t in model.state_dict().items()}
    for loaded, saved in ((model, state), (original, model.state_dict())):
        loaded.load_state_dict(saved, strict=True)
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, state[name]), name
    model.load_state_dict(copy.deepcopy(state), assign=True)  # tensors are replaced, not filled
    both(model.ops[0], original.ops[0])
    fastnas.restore(model)
    both(model.ops[0], original.ops[0])


def test_a_saved_model_can_be_restored():
    model = Edges(small())
    swap(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    both(loaded, model, 0.0)
    assert fastnas.restore(loaded) == 1
    assert type(loaded.ops[0]) is stock.MixedOp


# What goes along --------------------------------------------------------------------------------


def test_settings_hooks_and_candidates_go_along():
    mixed = small()
    mixed.index, mixed._label, mixed.k = 3, "edge", 7
    model = Edges(mixed)
    swap(model)
    ours = model.ops[0]
    assert (ours.index, ours._label, ours.k) == (3, "edge", 7)
    calls = []
    handle = ours.register_full_backward_hook(lambda *_: calls.append(1))
    ours.index = 4
    ours._ops = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Identity()])
    assert fastnas.restore(model) == 1
    assert model.ops[0] is mixed
    assert mixed.index == 4
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    mixed(x, torch.randn(2)).sum().backward()
    handle.remove()
    mixed(x, torch.randn(2)).sum().backward()
    assert calls == [1]
    assert not any(isinstance(m, MixedOp) for m in model.modules())
    assert not {"skip_zero", "_plan", "_forms", "_original"} & set(vars(mixed))


def test_accelerating_twice():
    model = Edges(small(), mixed_op(loop_that_skips))
    assert len(fastnas.accelerate(model).swapped) == 2
    ops = list(model.ops)
    assert fastnas.accelerate(model).swapped == ()
    assert all(a is b for a, b in zip(model.ops, ops, strict=True))
    assert (fastnas.restore(model), fastnas.restore(model)) == (2, 0)


# What is left -----------------------------------------------------------------------------------


def _with(mixed, **attributes):
    for name, value in attributes.items():
        setattr(mixed, name, value)
    return mixed


def _with_candidate(candidate):
    mixed = small()
    mixed._ops[3] = candidate
    return mixed


class Strange(Exception):
    pass


def strange(self, x, weights):
    raise Strange("no")


class Candidates(nn.ModuleList):
    pass


def _subclass(**members):
    return type("Mixed", (stock.MixedOp,), members)(4, 1, SMALL)


def _patched():
    candidate = stock.DilConv(4, 3, 1)
    forward = candidate.forward
    candidate.forward = lambda x: 2 * forward(x)
    return _with_candidate(candidate)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: _with_candidate(nn.LazyConv2d(4, 1)), "some of its parameters have no shape yet"),
        (lambda: small().to("meta"), "its parameters hold no numbers yet"),
        (
            lambda: _with_candidate(_with(nn.Identity(), lock=threading.Lock())),
            "it cannot be copied for the proof: TypeError: cannot pickle '_thread.lock' object",
        ),
        (lambda: mixed_op(strange), "it does not run on random data: Strange: no"),
        (_patched, "the forward of a part was replaced on that instance"),
        (lambda: _with(small(), _ops=Candidates(small()._ops)), "a ModuleList of another class"),
        (
            lambda: stock.MixedOp(4, 1, ("skip_connect",)),
            "no Conv2d or BatchNorm2d among its candidates says what x is",
        ),
        (lambda: _subclass(__call__=lambda self, x, w: x), "what ours lacks: __call__"),
        (lambda: _subclass(__len__=lambda self: 3), "what ours lacks: __len__"),
        (lambda: _subclass(_apply=lambda self, *a: self), "what ours lacks: _apply"),
        (lambda: _subclass(steps=4), "what ours lacks: steps"),
        (lambda: _subclass(cost=property(lambda self: 4)), "what ours lacks: cost"),
    ],
)
def test_obstacles(make, reason):
    assert reason in reason_of(make())


def test_a_forward_that_a_copy_would_share_is_not_run():
    mixed = _patched()
    before = copy.deepcopy(mixed.state_dict())
    reason_of(mixed)
    assert all(torch.equal(t, before[name]) for name, t in mixed.state_dict().items())


def test_arguments_passed_by_names_that_ours_does_not_have():
    class ByName(Edges):
        def forward(self, x, weights):
            return [op(inputs=x, alphas=weights) for op in self.ops][-1]

    class ByOurNames(Edges):
        def forward(self, x, weights):
            return [op(x, weights=weights) for op in self.ops][-1]

    (left,) = fastnas.accelerate(ByName(Indexed(4, 1))).left
    assert left.reason == "its argument inputs, which ours calls x, may be passed by that name"
    model = ByOurNames(mixed_op(weighted_sum))
    swap(model)
    assert model(torch.randn(2, 4, 6, 6), torch.randn(3)).shape == (2, 4, 6, 6)
