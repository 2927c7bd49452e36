# SPDX-License-Identifier: Apache-2.0
"""batch_norm_depthwise against BatchNorm, ReLU and torch's convolutions in float64."""

from __future__ import annotations

import ops_cases as cases
import pytest
import torch
import torch.nn.functional as F
from ops_cases import assert_bitwise, assert_layout, assert_near, raises
from source_cases import EDGE, NORMS, ONE, check_against_torch, make_norm
from torch import nn

from fastnas.ops import batch_norm_depthwise

SHAPES = (
    (2, 1, 1, 2),
    (2, 16, 8, 8),
    (3, 4, 8, 7),
    (5, 3, 4, 9),
    (1, 17, 9, 3),
    (33, 2, 3, 3),
    (1, 70, 6, 5),
    (1, 3, 97, 90),
    (0, 3, 4, 4),
)


def make_case(shape, group=ONE, dtype=torch.float32, layout="contiguous", device="cpu"):
    x = cases.make(shape, dtype, layout, device, seed=1).requires_grad_()
    weights = [
        cases.make((shape[1], 1, k, k), dtype, device=device, seed=10 + i).div(k).requires_grad_()
        for i, (k, _) in enumerate(group)
    ]
    return x, weights, [d for _, d in group]


def stock(x, norm, weights, dilations, stride):
    source = F.relu(norm(x))
    return [
        F.conv2d(source, w, None, stride, d * (w.shape[-1] // 2), d, groups=x.shape[1])
        for w, d in zip(weights, dilations, strict=True)
    ]


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "_".join(map(str, s)))
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_matches_torch_and_keeps_the_format(layout, shape, stride, kind, device, tolerances):
    x, weights, dilations = make_case(shape, layout=layout, device=device)
    norm = make_norm(kind, shape[1], device)
    ys, (dx, *_) = check_against_torch(
        batch_norm_depthwise, stock, x, norm, weights, dilations, stride, tolerances
    )
    for t in (*ys, dx):
        if t.numel() and shape[1] > 1:  # tensors of one channel are of both formats
            assert_layout(t, layout)


@pytest.mark.parametrize("kind", ["plain", "affine"])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
def test_several_convolutions_in_every_dtype(dtype, layout, kind, device, tolerances):
    x, weights, dilations = make_case((2, 5, 9, 8), EDGE, dtype, layout, device)
    norm = make_norm(kind, 5, device)
    check_against_torch(batch_norm_depthwise, stock, x, norm, weights, dilations, 1, tolerances)


@pytest.mark.parametrize("layout", cases.VIEWS)
def test_any_view(layout, device, tolerances):
    x, weights, dilations = make_case((2, 6, 7, 5), layout=layout, device=device)
    check_against_torch(
        batch_norm_depthwise,
        stock,
        x,
        make_norm("plain", 6, device),
        weights,
        dilations,
        1,
        tolerances,
    )


@pytest.mark.parametrize("kind", ["affine", "affine evaluation"])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradcheck_and_gradgradcheck(stride, kind, device):
    x, weights, dilations = make_case((2, 2, 4, 3), ((3, 1), (3, 2)), torch.float64, device=device)
    norm = make_norm(kind, 2, device).double()

    def run(x, gamma, beta, *weights):
        norm._parameters["weight"], norm._parameters["bias"] = gamma, beta
        return tuple(batch_norm_depthwise(x, norm, weights, dilations, stride))

    inputs = (x, norm.weight, norm.bias, *weights)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_any_subset_of_gradients(device):
    x, weights, dilations = make_case((2, 3, 6, 5), EDGE, device=device)
    norm = make_norm("affine", 3, device)
    leaves = [x, *norm.parameters(), *weights]
    ys = batch_norm_depthwise(x, norm, weights, dilations)
    grads = [cases.like_output(y, i) for i, y in enumerate(ys)]
    full = torch.autograd.grad(ys, leaves, grads)
    for wanted in range(1, 1 << len(leaves), 5):
        some = [wanted >> i & 1 for i in range(len(leaves))]
        for leaf, on in zip(leaves, some, strict=True):
            leaf.requires_grad_(bool(on))
        ys = batch_norm_depthwise(x, norm, weights, dilations)
        asking = [i for i, on in enumerate(some) if on]
        found = torch.autograd.grad(ys, [leaves[i] for i in asking], grads)
        for a, i in zip(found, asking, strict=True):
            assert_bitwise(a, full[i])


def test_outputs_without_a_gradient(device, tolerances):
    x, weights, dilations = make_case((2, 3, 6, 5), EDGE, device=device)
    norm = make_norm("plain", 3, device)
    ys = batch_norm_depthwise(x, norm, weights, dilations)
    used = torch.autograd.grad(ys[1].sum(), [x, *weights], allow_unused=True)
    alone = batch_norm_depthwise(x, norm, weights[1:2], dilations[1:2])[0]
    dx, dw = torch.autograd.grad(alone.sum(), [x, weights[1]])
    assert_near(used[0], dx, tolerances)
    assert_near(used[2], dw, tolerances)
    assert used[1] is used[3] is used[4] is None


def test_saves_neither_the_normalised_nor_the_rectified_tensor(device):
    x, weights, dilations = make_case((2, 16, 8, 8), device=device)
    norm = make_norm("plain", 16, device)
    (y,), addresses = cases.saved_by(lambda: batch_norm_depthwise(x, norm, weights, dilations))
    assert x.data_ptr() in addresses and y.data_ptr() not in addresses
    sizes = {}

    def pack(t):
        sizes[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        batch_norm_depthwise(x, norm, weights, dilations)
    assert sorted(sizes.values())[-2] < x.numel() == max(sizes.values())


def test_two_runs_give_the_same_bits(device):
    results = []
    for _ in range(2):
        x, weights, dilations = make_case((3, 17, 33, 31), EDGE, device=device)
        norm = make_norm("affine", 17, device)
        ys = batch_norm_depthwise(x, norm, weights, dilations)
        leaves = [x, *norm.parameters(), *weights]
        results.append([*ys, *torch.autograd.grad(ys, leaves, [torch.ones_like(y) for y in ys])])
    for a, b in zip(*results, strict=True):
        assert_bitwise(a, b)


def test_under_autocast_as_a_convolution(device, tolerances):
    x, weights, dilations = make_case((2, 4, 6, 6), device=device)
    norm, twin = make_norm("plain", 4, device), make_norm("plain", 4, device)
    with torch.autocast(device.type, torch.bfloat16):
        (y,) = batch_norm_depthwise(x, norm, weights, dilations)
        (expected,) = stock(x, twin, weights, dilations, 1)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=3e-2, atol=3e-2)
    cases.assert_buffers_near([norm], [twin], tolerances)
    y.float().square().sum().backward()
    assert x.grad.dtype == weights[0].grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("x", "norm", "weights", "error", "parts"),
    [
        (torch.ones(2, 3, 4), nn.BatchNorm1d(3), [torch.ones(3, 1, 3, 3)], ValueError,
         ("x of shape (N, C, H, W)", "got [2, 3, 4]")),
        (torch.ones(2, 3, 4, 4), nn.BatchNorm2d(4), [torch.ones(3, 1, 3, 3)], ValueError,
         ("norm.weight of shape [3]", "got [4]")),
        (torch.ones(2, 3, 4, 4), None, [torch.ones(3, 1, 3, 3)], TypeError,
         ("norm to be a BatchNorm", "got None")),
        (torch.ones(2, 3, 4, 4), nn.InstanceNorm2d(3), [torch.ones(3, 1, 3, 3)], TypeError,
         ("BatchNorm", "InstanceNorm2d")),
        (torch.ones(2, 3, 4, 4), nn.BatchNorm2d(3), [torch.ones(3, 1, 2, 2)], ValueError,
         ("weights[0]", "got [3, 1, 2, 2]")),
        (torch.ones(1, 3, 1, 1), nn.BatchNorm2d(3), [torch.ones(3, 1, 3, 3)], ValueError,
         ("more than 1 value per channel",)),
        (torch.ones(2, 3, 4, 4).long(), nn.BatchNorm2d(3), [torch.ones(3, 1, 3, 3)], TypeError,
         ("x to be floating-point", "int64")),
    ],
)  # fmt: skip
def test_refuses(x, norm, weights, error, parts):
    with raises(error, "batch_norm_depthwise: expected", *parts):
        batch_norm_depthwise(x, norm, weights, [1])


def test_the_raw_ops_check_their_arguments(device):
    op = torch.ops.fastnas.batch_norm_depthwise
    backward = torch.ops.fastnas.batch_norm_depthwise_backward
    x, w, three = (torch.ones(*s).to(device) for s in ((2, 3, 4, 4), (3, 1, 3, 3), (3,)))
    none = (None,) * 4
    with raises(ValueError, "batch_norm_depthwise: expected kind 1 or 2, but got 0"):
        op(x, 0, 0.1, *none, [w], [1], 1)
    with raises(ValueError, "batch_norm_depthwise: expected gamma and beta or neither"):
        op(x, 1, 0.1, three, None, None, None, [w], [1], 1)
    with raises(ValueError, "batch_norm_depthwise: expected running statistics of 3 values"):
        op(x, 2, 0.1, *none, [w], [1], 1)
    with raises(ValueError, "batch_norm_depthwise_backward: expected mean and var"):
        backward([x], [1], x, three[:2], three, 1, 0.1, None, None, [w], [1], 1, True, False, [1])
    with raises(ValueError, "_backward: expected grads of shape"):
        backward(
            [x[:, :, :2]], [1], x, three, three, 1, 0.1, None, None, [w], [1], 1, True, False, [1]
        )
