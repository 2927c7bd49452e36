# SPDX-License-Identifier: Apache-2.0
"""PartialMixedOp in the place of PC-DARTS' mixed op."""

from __future__ import annotations

import pytest
import stock
import torch
from side_by_side import RELATIVE, assert_same, observe, twins
from torch import nn

from fastnas import MixedOp, PartialMixedOp


@pytest.mark.parametrize("stride", [1, 2])
def test_module_tree_is_the_published_one(stride):
    ours, theirs = PartialMixedOp(16, stride), stock.PartialMixedOp(16, stride)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.k == 4
    assert (ours.mp.kernel_size, ours.mp.stride) == (2, 2)
    assert ours._ops[1][1].num_features == 4


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("C", "k"), [(8, 2), (16, 4), (6, 3)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_stock_formula(device, dtype, stride, C, k, training):
    ours, theirs = twins(PartialMixedOp(C, stride, k), stock.PartialMixedOp(C, stride, k))
    for op in (ours, theirs):
        op.to(device, dtype).train(training)
    x = torch.randn(3, C, 8, 6, device=device, dtype=dtype)
    weights = torch.randn(8, device=device, dtype=dtype)
    assert_same(observe(ours, x, weights), observe(theirs, x, weights), RELATIVE[dtype])


@pytest.mark.parametrize("stride", [1, 2])
def test_k_1_is_the_mixed_op(stride):
    partial, whole = twins(PartialMixedOp(4, stride, k=1), MixedOp(4, stride))
    x, weights = torch.randn(3, 4, 6, 6), torch.randn(8)
    assert_same(observe(partial, x, weights), observe(whole, x, weights), 0.0)


def test_the_shuffle_of_a_skip_is_exact():
    x = torch.arange(16.0).view(1, 16, 1, 1).expand(2, 16, 4, 4)
    y = PartialMixedOp(16, 1).eval()(x, [0.0, 0, 0, 1, 0, 0, 0, 0])
    order = [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15]
    assert y[0, :, 0, 0].tolist() == order
    assert torch.equal(y, x[:, order])


def test_none_at_stride_2_leaves_zeros_and_the_pooled_bypass():
    x = torch.randn(2, 8, 6, 6)
    y = PartialMixedOp(8, 2).eval()(x, [1.0] + [0.0] * 7)
    pooled = nn.functional.max_pool2d(x[:, 2:], 2, 2)
    joined = torch.cat([torch.zeros(2, 2, 3, 3), pooled], 1)
    assert torch.equal(y, stock.channel_shuffle(joined, 4))


def test_another_pool_is_respected():
    op = PartialMixedOp(8, 2).eval()
    x, weights = torch.randn(2, 8, 6, 6), torch.randn(8)
    op.mp = nn.AvgPool2d(2)
    theirs = stock.PartialMixedOp(8, 2).eval()
    theirs.load_state_dict(op.state_dict())
    theirs.mp = nn.AvgPool2d(2)
    torch.testing.assert_close(op(x, weights), theirs(x, weights))
    op.mp = nn.MaxPool2d(3)
    with pytest.raises(ValueError, match=r"mp to return \[3, 3\].*got \[2, 2\]"):
        op(x, weights)


def test_the_gradient_of_x_is_joined_once():
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    y = PartialMixedOp(8, 1).eval()(x, torch.ones(8))
    names, todo = [], [y.grad_fn]
    while todo:
        node = todo.pop()
        names.append(node.name())
        todo += [parent for parent, _ in node.next_functions if parent is not None]
    assert any("Split" in name for name in names)
    assert not any("Slice" in name for name in names)


def test_errors_name_what_came_and_what_is_wanted():
    with pytest.raises(ValueError, match=r"C must be a multiple of k, got C = 10, k = 4"):
        PartialMixedOp(10, 1)
    for k in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=rf"k must be a positive integer, got {k}"):
            PartialMixedOp(8, 1, k)
        with pytest.raises(ValueError, match=rf"k must be a positive integer, got {k}"):
            PartialMixedOp.from_candidates([nn.Identity()], k=k)
    op = PartialMixedOp.from_candidates([nn.Identity()], k=4)
    with pytest.raises(ValueError, match=r"multiple of k = 4, but got \[1, 6, 4, 4\]"):
        op(torch.randn(1, 6, 4, 4), [1.0])
    with pytest.raises(ValueError, match=r"even, got 5x6"):
        PartialMixedOp(8, 2)(torch.randn(2, 8, 5, 6), torch.ones(8))
