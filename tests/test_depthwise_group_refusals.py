# SPDX-License-Identifier: Apache-2.0
"""What depthwise_group refuses, and how it says so."""

from __future__ import annotations

import pytest
import torch
from ops_cases import raises

from fastnas.ops import depthwise_group

# Kernel size and dilation of each convolution: DARTS' edge, and one of every kind.


def ones(*shape):
    return torch.ones(shape)


@pytest.mark.parametrize(
    ("x", "weights", "dilations", "stride", "parts"),
    [
        (ones(3, 4, 4), [ones(3, 1, 3, 3)], [1], 1, ("x of shape (N, C, H, W)", "[3, 4, 4]")),
        (ones(1, 1, 1, 1).expand(1, 1, 1, 2**30 + 1), [ones(1, 1, 3, 3)], [1], 1,
         ("at most 2^30 rows and columns", "1073741825")),
        (ones(2, 3, 4, 4), [ones(3, 1, 3, 3)], [1], 3, ("stride 1 or 2", "got 3")),
        (ones(2, 3, 4, 4), [], [], 1, ("1 to 64 tensors in weights", "got 0")),
        (ones(2, 3, 4, 4), [ones(3, 1, 1, 1)] * 65, [1] * 65, 1, ("1 to 64", "got 65")),
        (ones(2, 3, 4, 4), [ones(3, 1, 3, 3)], [1, 2], 1,
         ("one dilation per weight", "1 weights and 2 dilations")),
        (ones(2, 3, 4, 4), [ones(3, 1, 3, 3), ones(4, 1, 3, 3)], [1, 1], 1,
         ("weights[1] of shape (3, 1, k, k)", "[4, 1, 3, 3]")),
        (ones(2, 3, 4, 4), [ones(3, 3, 3, 3)], [1], 1, ("(3, 1, k, k)", "[3, 3, 3, 3]")),
        (ones(2, 3, 4, 4), [ones(3, 1, 3, 5)], [1], 1, ("(3, 1, k, k)", "[3, 1, 3, 5]")),
        (ones(2, 3, 4, 4), [ones(3, 1, 4, 4)], [1], 1, ("k of 1, 3, 5 or 7", "[3, 1, 4, 4]")),
        (ones(2, 3, 4, 4), [ones(3, 1, 9, 9)], [1], 1, ("k of 1, 3, 5 or 7", "[3, 1, 9, 9]")),
        (ones(2, 3, 4, 4), [torch.tensor(1.0)], [1], 1, ("(3, 1, k, k)", "got []")),
        (ones(2, 3, 4, 4), [ones(3, 1, 3, 3)], [0], 1, ("1 to 2^20", "dilations[0] is 0")),
        (ones(2, 3, 4, 4), [ones(3, 1, 3, 3)], [2**20 + 1], 1, ("1 to 2^20", "1048577")),
        (ones(2, 3, 4, 4), [ones(3, 1, 3, 3).to("meta")], [1], 1,
         ("weights[0] on cpu like x", "meta")),
    ],
)  # fmt: skip
def test_refuses(x, weights, dilations, stride, parts):
    with raises(ValueError, "depthwise_group: expected", *parts):
        depthwise_group(x, weights, dilations, stride)
    if "meta" not in parts:
        with raises(ValueError, "depthwise_group: expected"):
            torch.ops.fastnas.depthwise_group(x, weights, dilations, stride, True)


@pytest.mark.parametrize(
    ("x", "weights", "dilations", "parts"),
    [
        (ones(2, 3, 4, 4).long(), [ones(3, 1, 3, 3)], [1], ("x to be floating-point", "int64")),
        (ones(2, 3, 4, 4), [ones(3, 1, 3, 3).int()], [1], ("weights[0] is", "int32")),
        (ones(2, 3, 4, 4), [None], [1], ("weights[0] to be a tensor", "NoneType")),
        (ones(2, 3, 4, 4), ones(3, 1, 3, 3), [1], ("weights to be a list", "Tensor")),
        (ones(2, 3, 4, 4), [ones(3, 1, 3, 3)], 1, ("dilations to be a list", "int")),
    ],
)
def test_refuses_arguments_of_another_kind(x, weights, dilations, parts):
    with raises(TypeError, "depthwise_group: expected", *parts):
        depthwise_group(x, weights, dilations)


def test_the_raw_backward_checks_its_arguments(device):
    op = torch.ops.fastnas.depthwise_group_backward
    x, g, w = (ones(*s).to(device) for s in ((2, 3, 4, 4), (2, 3, 4, 4), (3, 1, 3, 3)))
    tail = ([w], [1], 1, True, True, [1])
    nothing = x.new_empty(0)
    with raises(ValueError, "depthwise_group_backward: expected present", "got 1, 1 and 0 grads"):
        op([], [0], x, [4, 4], *tail)
    with raises(ValueError, "expected present and need_weights of one entry per weight (1)"):
        op([g], [1, 0], x, [4, 4], *tail)
    with raises(ValueError, "expected size of 2 entries", "got 1"):
        op([g], [1], x, [4], *tail)
    with raises(ValueError, "expected grads of shape [2, 3, 4, 4]", "grads[0] is [2, 3, 4, 3]"):
        op([g[..., :3]], [1], x, [4, 4], *tail)
    with raises(ValueError, "expected grads of shape (N, C, H, W)"):
        op([g[0]], [1], x, [4, 4], *tail)
    with raises(ValueError, "expected grads", "one dtype", "grads[1] is", "Double"):
        op([g, g.double()], [1, 1], x, [4, 4], [w, w], [1, 1], 1, True, True, [1, 1])
    with raises(ValueError, "expected x of shape [2, 3, 4, 4]", "got [0]"):
        op([g], [1], nothing, [4, 4], *tail)
    with raises(ValueError, "expected x of shape [2, 3, 4, 4]", "or empty", "got [2, 3, 4, 3]"):
        op([g], [1], x[..., :3], [4, 4], [w], [1], 1, False, True, [0])
    dx, dws = op([g], [1], nothing, [4, 4], [w], [1], 1, False, True, [0])
    assert dx.shape == x.shape and not dws
