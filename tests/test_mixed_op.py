# SPDX-License-Identifier: Apache-2.0
"""MixedOp in the place of the stock mixed op: names, arguments, results, errors."""

from __future__ import annotations

import pytest
import stock
import torch
from side_by_side import RELATIVE, assert_same, observe, randomise_statistics, twins
from torch import nn

from fastnas import MixedOp, PartialMixedOp
from fastnas.nn import DARTS_PRIMITIVES
from fastnas.nn.candidates import Zero


def parameter_count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("C", "stride", "whole", "partial"),
    [
        (16, 1, 3168, 504),
        (32, 1, 9408, 1200),
        (64, 1, 31104, 3168),
        (16, 2, 3424, 520),
        (32, 2, 10432, 1264),
        (64, 2, 35200, 3424),
    ],
)
def test_parameter_counts(C, stride, whole, partial):
    assert parameter_count(MixedOp(C, stride)) == whole
    assert parameter_count(PartialMixedOp(C, stride, k=4)) == partial


@pytest.mark.parametrize("stride", [1, 2])
def test_module_tree_is_the_published_one(stride):
    ours, theirs = MixedOp(8, stride), stock.MixedOp(8, stride)
    assert DARTS_PRIMITIVES == stock.PRIMITIVES
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert not ours._ops[0].state_dict()  # `none` owns nothing
    pool = ours._ops[1]
    assert isinstance(pool[0], nn.MaxPool2d)
    assert isinstance(pool[1], nn.BatchNorm2d)
    assert not pool[1].affine
    twins(ours, theirs)  # loads strictly, both ways


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_the_stock_formula(device, dtype, stride, training):
    ours, theirs = twins(MixedOp(6, stride), stock.MixedOp(6, stride))
    for op in (ours, theirs):
        op.to(device, dtype).train(training)
    x = torch.randn(5, 6, 10, 8, device=device, dtype=dtype)
    weights = torch.randn(8, device=device, dtype=dtype)
    seen = observe(ours, x, weights)
    if dtype != torch.bfloat16:
        assert_same(seen, observe(theirs, x, weights), RELATIVE[dtype])
        return
    # The stock formula in bf16 rounds every product: the result to be near to is the float32 one
    # of the same numbers. Gradients of convolutions pass more bf16 layers than that.
    exact = observe(theirs.float(), x.float(), weights.float())
    assert seen["y"].dtype == seen["grad x"].dtype == dtype
    for name in ("y", "grad weights"):
        error = (seen[name].float() - exact[name]).abs().max() / exact[name].abs().max()
        assert error <= RELATIVE[dtype], name


def test_statistics_move_once_per_forward_in_training_only():
    op = MixedOp(4, 1)
    x, weights = torch.randn(3, 4, 6, 6), torch.randn(8, requires_grad=True)
    norms = [m for m in op.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 8  # two in each separable convolution
    op(x, weights).sum().backward()
    assert {int(n.num_batches_tracked) for n in norms} == {1}
    op.eval()(x, weights)
    assert {int(n.num_batches_tracked) for n in norms} == {1}


def test_a_second_derivative_leaves_the_statistics_alone():
    op, x = MixedOp(4, 1), torch.randn(3, 4, 6, 6)
    weights = torch.randn(8, requires_grad=True)
    (g,) = torch.autograd.grad(op(x, weights).square().sum(), weights, create_graph=True)
    before = {n: b.clone() for n, b in op.named_buffers()}
    g.sum().backward()
    assert weights.grad is not None
    for name, buffer in op.named_buffers():
        assert torch.equal(buffer, before[name]), name


@pytest.mark.parametrize("cls", [MixedOp, PartialMixedOp])
def test_every_kind_of_weights(cls):
    op, x = cls(8, 1).eval(), torch.randn(2, 8, 6, 6)
    alphas = torch.randn(3, 8)
    row = alphas[1]
    expected = op(x, row)
    assert torch.equal(op(x, row.clone()), expected)
    assert torch.equal(op(x, alphas.t().contiguous().t()[1]), expected)  # a row with a stride
    assert torch.equal(op(x, list(row)), expected)
    assert torch.equal(op(x, tuple(row)), expected)
    torch.testing.assert_close(op(x, row.tolist()), expected)
    torch.testing.assert_close(op(x, [*row[:4].tolist(), *row[4:]]), expected)


def test_weights_get_a_gradient_only_if_they_ask():
    op, x = MixedOp(4, 1), torch.randn(2, 4, 6, 6)
    alphas = torch.randn(3, 8, requires_grad=True)
    op(x, alphas[1]).square().sum().backward()
    assert alphas.grad[1, 1:].abs().min() > 0
    assert torch.count_nonzero(alphas.grad[[0, 2]]) == 0
    singles = [torch.randn((), requires_grad=k % 2 == 0) for k in range(8)]
    op(x, singles).square().sum().backward()
    assert [w.grad is not None for w in singles] == [k % 2 == 0 for k in range(8)]
    op.requires_grad_(False)
    assert not op(x, torch.randn(8)).requires_grad


def test_none_keeps_its_gradient_slot_and_is_not_run(monkeypatch):
    monkeypatch.delattr(Zero, "forward")  # calling it would fail
    op = MixedOp(4, 2)
    weights = torch.full((8,), 0.125, requires_grad=True)
    op(torch.randn(2, 4, 6, 6), weights).square().sum().backward()
    assert weights.grad[0] == 0
    assert weights.grad[1:].abs().min() > 0


@pytest.mark.parametrize("primitives", [("none",), ("none", "none"), ("skip_connect",)])
def test_edges_of_little(primitives):
    ours, theirs = MixedOp(4, 1, primitives), stock.MixedOp(4, 1, primitives)
    x, weights = torch.randn(2, 4, 6, 6), torch.randn(len(primitives))
    assert_same(observe(ours, x, weights), observe(theirs, x, weights), 1e-6)


def test_none_between_others():
    names = ("skip_connect", "none", "max_pool_3x3", "none", "dil_conv_3x3", "avg_pool_3x3")
    ours, theirs = twins(MixedOp(4, 2, names), stock.MixedOp(4, 2, names))
    x, weights = torch.randn(3, 4, 6, 6), torch.randn(6)
    assert_same(observe(ours, x, weights), observe(theirs, x, weights), 1e-5)
    singles = [w.clone().requires_grad_() for w in weights]
    ours(x, singles).sum().backward()
    assert [w.grad == 0 for w in singles] == [n == "none" for n in names]


@pytest.mark.parametrize("cls", [MixedOp, PartialMixedOp])
@pytest.mark.parametrize("primitives", [DARTS_PRIMITIVES, ("skip_connect",), ("none",)])
def test_the_result_is_fresh_and_x_is_not_written(cls, primitives):
    op = cls(8, 1, primitives=primitives).eval()  # batch statistics would couple the samples
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    before = x.detach().clone()
    y = op(x, torch.ones(len(primitives), requires_grad=True))
    assert y.data_ptr() != x.data_ptr()
    y.div_(0.5)  # drop path as the family of DARTS codes applies it
    y.mul_(torch.tensor([1.0, 0.0]).view(2, 1, 1, 1))
    y.sum().backward()
    assert torch.equal(x, before)
    assert torch.count_nonzero(x.grad[1]) == 0


@pytest.mark.parametrize("cls", [MixedOp, PartialMixedOp])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("x_dtype", [torch.float32, "low"])
@pytest.mark.parametrize(
    "primitives",
    [DARTS_PRIMITIVES, ("sep_conv_3x3", "dil_conv_3x3"), ("none", "sep_conv_3x3")],
)
def test_autocast_returns_the_stock_dtype(device, cls, dtype, x_dtype, primitives):
    ours, theirs = twins(
        cls(8, 1, primitives=primitives),
        (stock.MixedOp if cls is MixedOp else stock.PartialMixedOp)(8, 1, primitives=primitives),
    )
    ours.to(device), theirs.to(device)
    x = torch.randn(3, 8, 6, 6, device=device).to(dtype if x_dtype == "low" else x_dtype)
    weights = torch.softmax(torch.randn(len(primitives), device=device), 0)
    with torch.autocast(device.type, dtype):
        y = ours(x, weights)
        expected = theirs(x, weights)
        as_list = ours(x, list(weights))
    assert y.dtype == expected.dtype == as_list.dtype
    torch.testing.assert_close(y.float(), expected.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("cls", [MixedOp, PartialMixedOp])
@pytest.mark.parametrize("stride", [1, 2])
def test_channels_last_stays(device, cls, stride):
    op = cls(8, stride).to(device, memory_format=torch.channels_last)
    x = torch.randn(2, 8, 6, 6, device=device)
    weights = torch.randn(8, device=device)
    expected = observe(op.eval(), x, weights)
    x_last = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    y = op(x_last, weights)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()
    assert x_last.grad.is_contiguous(memory_format=torch.channels_last)
    assert_same(observe(op, x_last.detach(), weights), expected, 1e-5)


def test_zero_weights_are_ordinary_by_default():
    ours, theirs = twins(MixedOp(4, 2), stock.MixedOp(4, 2))
    x, weights = torch.randn(3, 4, 6, 6), torch.zeros(8)
    seen = observe(ours, x, weights)
    assert_same(seen, observe(theirs, x, weights), 1e-5)
    assert torch.count_nonzero(seen["y"]) == 0
    assert seen["grad weights"][1:].abs().min() > 0
    assert int(ours._ops[1][1].num_batches_tracked) == 8  # seven before


@pytest.mark.parametrize("weights_as", [lambda w: w, list, torch.Tensor.tolist])
def test_skip_zero_leaves_candidates_out(weights_as):
    weights = torch.tensor([0.5, 0.0, 2.0, -1.0, 0.0, 0.0, 1.0, 0.0])
    op = MixedOp(4, 1, skip_zero=True)
    plain = MixedOp(4, 1)
    plain.load_state_dict(op.state_dict())
    x = torch.randn(3, 4, 6, 6)
    torch.testing.assert_close(op(x, weights_as(weights)), plain(x, weights))
    last_norms = [op._ops[1][-1], op._ops[2][-1], *(c.op[-1] for c in op._ops[4:])]
    assert [int(n.num_batches_tracked) for n in last_norms] == [0, 1, 0, 0, 1, 0]


@pytest.mark.parametrize("cls", [MixedOp, PartialMixedOp])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("primitives", [DARTS_PRIMITIVES, ("max_pool_3x3", "sep_conv_3x3")])
def test_skip_zero_on_an_all_zero_edge(cls, stride, primitives):
    op = cls(8, stride, primitives=primitives, skip_zero=True)
    before = {n: b.clone() for n, b in op.named_buffers()}
    weights = torch.zeros(len(primitives), requires_grad=True)
    x = torch.randn(2, 8, 6, 6)
    y = op(x, weights)
    assert torch.equal(y, cls(8, stride, primitives=("none",))(x, [1.0]))
    for name, buffer in op.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_nan_weights_are_not_zero():
    op = MixedOp(4, 1, skip_zero=True)
    assert op(torch.randn(2, 4, 6, 6), [float("nan")] * 8).isnan().all()


@pytest.mark.parametrize("cls", [MixedOp, PartialMixedOp])
def test_errors_name_what_came_and_what_is_wanted(cls):
    op, x = cls(8, 1), torch.randn(2, 8, 6, 6)
    for wrong in (torch.ones(7), torch.ones(9), torch.ones(1, 8), torch.tensor(1.0)):
        shape = str(list(wrong.shape)).replace("[", r"\[").replace("]", r"\]")
        with pytest.raises(ValueError, match=rf"{cls.__name__}: expected 8 weights.*{shape}"):
            op(x, wrong)
    with pytest.raises(ValueError, match=r"expected 8 weights, one per candidate, but got 3"):
        op(x, [1.0, 2.0, 3.0])
    with pytest.raises(TypeError, match=r"expected weights to be a tensor.*but got dict"):
        op(x, dict.fromkeys(range(8), 1.0))
    with pytest.raises(TypeError, match=r"floating-point weights.*int64"):
        op(x, torch.ones(8, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"weights on cpu.*meta"):
        op(x, torch.ones(8, device="meta"))
    with pytest.raises(ValueError, match=r"\(N, 8, H, W\), but got \[2, 4, 6, 6\]"):
        op(torch.randn(2, 4, 6, 6), torch.ones(8))
    with pytest.raises(ValueError, match=r"\(N, 8, H, W\), but got \[8, 6, 6\]"):
        op(x[0], torch.ones(8))
    with pytest.raises(TypeError, match=r"floating-point x, but got torch.int64"):
        op(x.long(), torch.ones(8))


@pytest.mark.parametrize("cls", [MixedOp, PartialMixedOp])
def test_errors_at_construction(cls):
    with pytest.raises(ValueError, match=r"at least one candidate"):
        cls(8, 1, primitives=())
    with pytest.raises(ValueError, match=r"at least one candidate"):
        cls.from_candidates([])
    with pytest.raises(ValueError, match=r"unknown candidate 'conv'"):
        cls(8, 1, primitives=("none", "conv"))
    with pytest.raises(TypeError, match=r"primitives to be names, got 'none'"):
        cls(8, 1, primitives="none")
    with pytest.raises(TypeError, match=r"candidate 1 to be an nn.Module, but got str"):
        cls.from_candidates([nn.Identity(), "skip_connect"])
    with pytest.raises(ValueError, match=r"stride must be 1 or 2, got 3"):
        cls(8, 3)
    with pytest.raises(ValueError, match=r"C must be a positive integer, got 0"):
        cls(0, 1)


def test_candidates_of_different_shapes_are_an_error():
    op = MixedOp.from_candidates([nn.Identity(), nn.MaxPool2d(2)])
    with pytest.raises(ValueError, match=r"one shape.*\[1, 2, 2, 2\].*\[1, 2, 4, 4\]"):
        op(torch.randn(1, 2, 4, 4), [1.0, 1.0])


def test_one_value_per_channel_fails_as_in_batch_norm():
    op = randomise_statistics(MixedOp(4, 1))
    x = torch.randn(1, 4, 1, 1)
    with pytest.raises(ValueError, match=r"more than 1 value per channel"):
        op(x, torch.ones(8))
    assert op.eval()(x, torch.ones(8)).isfinite().all()
