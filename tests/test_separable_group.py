# SPDX-License-Identifier: Apache-2.0
"""separable_group against BatchNorm, ReLU and torch's convolutions in float64."""

from __future__ import annotations

import ops_cases as cases
import pytest
import torch
import torch.nn.functional as F
from ops_cases import assert_bitwise, assert_layout, assert_near, raises
from source_cases import EDGE, NORMS, ONE, check_against_torch, make_norm, parameters
from torch import nn

from fastnas.ops import separable_group

#: Channels that fill vectors, that leave room in one for other images, and others; images that are
#: cut into slabs.
SHAPES = (
    (2, 1, 1, 2),
    (2, 16, 8, 8),
    (3, 32, 5, 6),
    (5, 4, 8, 7),
    (3, 8, 4, 9),
    (7, 2, 3, 3),
    (1, 17, 9, 3),
    (33, 3, 3, 3),
    (1, 4, 97, 90),
    (1, 16, 70, 64),
    (0, 4, 4, 4),
)


def make_case(shape, group=ONE, dtype=torch.float32, layout="contiguous", device="cpu"):
    """x, the depthwise and after them the pointwise weights, dilations."""
    x, c = cases.make(shape, dtype, layout, device, seed=1).requires_grad_(), shape[1]
    sizes = [(c, 1, k, k) for k, _ in group] + [(c, c, 1, 1)] * len(group)
    weights = [
        cases.make(size, dtype, device=device, seed=10 + i)
        .div(size[-1] * size[1] ** 0.5)
        .requires_grad_()
        for i, size in enumerate(sizes)
    ]
    return x, weights, [d for _, d in group]


def run(x, norm, weights, dilations, stride=1):
    count = len(dilations)
    return separable_group(x, weights[:count], weights[count:], dilations, stride, norm)


def stock(x, norm, weights, dilations, stride=1):
    source, count = F.relu(x if norm is None else norm(x)), len(dilations)
    return [
        F.conv2d(F.conv2d(source, w, None, stride, d * (w.shape[-1] // 2), d, x.shape[1]), p)
        for w, p, d in zip(weights[:count], weights[count:], dilations, strict=True)
    ]


@pytest.mark.parametrize("kind", ("none", *NORMS))
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "_".join(map(str, s)))
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_matches_torch_and_keeps_the_format(layout, shape, stride, kind, device, tolerances):
    x, weights, dilations = make_case(shape, layout=layout, device=device)
    norm = make_norm(kind, shape[1], device)
    ys, (dx, *_) = check_against_torch(run, stock, x, norm, weights, dilations, stride, tolerances)
    for t in (*ys, dx):
        if t.numel() and shape[1] > 1:  # tensors of one channel are of both formats
            assert_layout(t, layout)


@pytest.mark.parametrize("kind", ["none", "affine"])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("channels", [4, 5, 16])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
def test_several_convolutions_in_every_dtype(dtype, channels, layout, kind, device, tolerances):
    x, weights, dilations = make_case((2, channels, 9, 8), EDGE, dtype, layout, device)
    norm = make_norm(kind, channels, device)
    check_against_torch(run, stock, x, norm, weights, dilations, 1, tolerances)


def test_more_images_than_tasks(tolerances):
    """A task has several of them then, and folds its sums more than once."""
    x, weights, dilations = make_case((300, 8, 32, 20), dtype=torch.float64)
    check_against_torch(run, stock, x, None, weights, dilations, 1, tolerances)


@pytest.mark.parametrize("layout", cases.VIEWS)
def test_any_view(layout, device, tolerances):
    x, weights, dilations = make_case((2, 6, 7, 5), layout=layout, device=device)
    check_against_torch(
        run, stock, x, make_norm("plain", 6, device), weights, dilations, 1, tolerances
    )


@pytest.mark.parametrize("kind", ["none", "affine", "affine evaluation"])
@pytest.mark.parametrize("channels", [2, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradcheck_and_gradgradcheck(stride, channels, kind, device):
    group = ((3, 1), (3, 2)) if channels == 2 else ONE
    x, weights, dilations = make_case((2, channels, 4, 3), group, torch.float64, device=device)
    norm = make_norm(kind, channels, device)
    norm = norm.double() if norm is not None else None
    affine = parameters(norm)

    def function(x, *tensors):
        if norm is not None:
            norm._parameters["weight"], norm._parameters["bias"] = tensors[-2:]
        return tuple(run(x, norm, tensors[: len(weights)], dilations, stride))

    assert torch.autograd.gradcheck(function, (x, *weights, *affine))
    assert torch.autograd.gradgradcheck(function, (x, *weights, *affine))


@pytest.mark.parametrize("kind", ["none", "affine"])
def test_many_channels_and_a_subset_without_products(kind, device, tolerances):
    """As in a step of the architecture, which freezes all weights."""
    channels = 65
    x, weights, dilations = make_case((2, channels, 6, 5), EDGE, device=device)
    norm = make_norm(kind, channels, device)
    asking = [x, *weights[: len(weights) // 2]]
    ys = run(x, norm, weights, dilations)
    grads = [cases.like_output(y, i) for i, y in enumerate(ys)]
    full = torch.autograd.grad(ys, asking, grads)
    for frozen in weights[len(weights) // 2 :]:
        frozen.requires_grad_(False)
    found = torch.autograd.grad(run(x, norm, weights, dilations), asking, grads)
    for k, (a, b) in enumerate(zip(found, full, strict=True)):
        cases.assert_near(a, b, tolerances, str(k))


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("kind", ["none", "affine"])
def test_any_subset_of_gradients(kind, channels, device):
    x, weights, dilations = make_case((2, channels, 6, 5), EDGE, device=device)
    norm = make_norm(kind, channels, device)
    leaves = [x, *parameters(norm), *weights]
    ys = run(x, norm, weights, dilations)
    grads = [cases.like_output(y, i) for i, y in enumerate(ys)]
    full = torch.autograd.grad(ys, leaves, grads)
    for wanted in range(1, 1 << len(leaves), 37):
        some = [wanted >> i & 1 for i in range(len(leaves))]
        for leaf, on in zip(leaves, some, strict=True):
            leaf.requires_grad_(bool(on))
        ys = run(x, norm, weights, dilations)
        asking = [i for i, on in enumerate(some) if on]
        pairs = [(y, g) for y, g in zip(ys, grads, strict=True) if y.requires_grad]
        found = torch.autograd.grad(
            [y for y, _ in pairs], [leaves[i] for i in asking], [g for _, g in pairs]
        )
        for a, i in zip(found, asking, strict=True):
            assert_bitwise(a, full[i])


def test_outputs_without_a_gradient(device, tolerances):
    x, weights, dilations = make_case((2, 4, 6, 5), EDGE, device=device)
    ys = run(x, make_norm("plain", 4, device), weights, dilations)
    used = torch.autograd.grad(ys[1].sum(), [x, *weights], allow_unused=True)
    pair = [weights[1], weights[5]]
    alone = run(x, make_norm("plain", 4, device), pair, dilations[1:2])[0]
    expected = torch.autograd.grad(alone.sum(), [x, *pair])
    for a, b in zip([used[0], used[2], used[6]], expected, strict=True):
        assert_near(a, b, tolerances)
    assert all(used[1 + i] is None for i in (0, 2, 3, 4, 6, 7))


@pytest.mark.parametrize("kind", ["none", "plain"])
def test_saves_nothing_as_large_as_x_but_x(kind, device):
    x, weights, dilations = make_case((2, 4, 20, 20), device=device)
    norm, sizes = make_norm(kind, 4, device), {}

    def pack(t):
        sizes[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(x, norm, weights, dilations)
    assert sizes[x.data_ptr()] == x.numel()
    assert sorted(sizes.values())[-2] < x.numel()


def test_two_runs_give_the_same_bits(device, monkeypatch):
    # On CUDA the products are cuDNN's, which may add up in another order unless told not to.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    results = []
    for _ in range(2):
        x, weights, dilations = make_case((3, 16, 33, 31), EDGE, device=device)
        norm = make_norm("affine", 16, device)
        ys = run(x, norm, weights, dilations)
        leaves = [x, *norm.parameters(), *weights]
        results.append([*ys, *torch.autograd.grad(ys, leaves, [torch.ones_like(y) for y in ys])])
    for a, b in zip(*results, strict=True):
        assert_bitwise(a, b)


@pytest.mark.parametrize("kind", ["none", "plain"])
def test_under_autocast_as_a_convolution(kind, device, tolerances):
    x, weights, dilations = make_case((2, 4, 6, 6), device=device)
    norm, twin = make_norm(kind, 4, device), make_norm(kind, 4, device)
    with torch.autocast(device.type, torch.bfloat16):
        (y,) = run(x, norm, weights, dilations)
        (expected,) = stock(x, twin, weights, dilations)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=3e-2, atol=3e-2)
    if norm is not None:
        cases.assert_buffers_near([norm], [twin], tolerances)
    y.float().square().sum().backward()
    assert x.grad.dtype == weights[0].grad.dtype == torch.float32


ONES = {"x": torch.ones(2, 3, 4, 4), "depthwise": [torch.ones(3, 1, 3, 3)]}
MATRIX = torch.ones(3, 3, 1, 1)


@pytest.mark.parametrize(
    ("changes", "error", "parts"),
    [
        ({"x": torch.ones(2, 3, 4)}, ValueError, ("x of shape (N, C, H, W)", "got [2, 3, 4]")),
        ({"x": torch.ones(2, 3, 4, 4).long()}, TypeError, ("x to be floating-point", "int64")),
        ({"depthwise": [torch.ones(3, 1, 2, 2)]}, ValueError,
         ("depthwise[0] of shape", "got [3, 1, 2, 2]")),
        ({"pointwise": []}, ValueError, ("one pointwise weight per", "1 depthwise and 0")),
        ({"pointwise": MATRIX}, TypeError, ("pointwise to be a list", "Tensor")),
        ({"pointwise": [1.0]}, TypeError, ("pointwise[0] to be a tensor", "float")),
        ({"pointwise": [MATRIX.long()]}, TypeError, ("floating-point weights", "int64")),
        ({"pointwise": [torch.ones(3, 2, 1, 1)]}, ValueError,
         ("pointwise[0] of shape [3, 3, 1, 1]", "got [3, 2, 1, 1]")),
        ({"stride": 3}, ValueError, ("stride 1 or 2, but got 3",)),
        ({"dilations": [1, 1]}, ValueError, ("one dilation per weight", "1 depthwise and 2")),
        ({"norm": nn.BatchNorm2d(4)}, ValueError, ("norm.weight of shape [3]", "got [4]")),
        ({"norm": nn.InstanceNorm2d(3)}, TypeError, ("norm to be None", "InstanceNorm2d")),
        ({"norm": "bn"}, TypeError, ("norm to be None or a BatchNorm", "str")),
        ({"x": [1.0]}, TypeError, ("x to be a tensor", "list")),
        ({"pointwise": None}, TypeError, ("pointwise to be a list", "NoneType")),
        ({"dilations": [1.5]}, TypeError, ("dilations to be integers", "1.5")),
        ({"x": torch.ones(1, 3, 1, 1), "norm": nn.BatchNorm2d(3)}, ValueError,
         ("more than 1 value per channel",)),
    ],
)  # fmt: skip
def test_refuses(changes, error, parts):
    arguments = {**ONES, "pointwise": [MATRIX], "dilations": [1], **changes}
    with raises(error, "separable_group: expected", *parts):
        separable_group(**arguments)


def test_the_raw_ops_check_their_arguments(device):
    op, backward = torch.ops.fastnas.separable_group, torch.ops.fastnas.separable_group_backward
    x, w, p, three = (
        torch.ones(*s).to(device) for s in ((2, 3, 4, 4), (3, 1, 3, 3), (3, 3, 1, 1), (3,))
    )
    none = (None,) * 4
    with raises(ValueError, "separable_group: expected kind 0, 1 or 2, but got 3"):
        op(x, 3, 0.1, *none, [w], [p], [1], 1, None, False)
    with raises(ValueError, "separable_group: expected gamma and beta or neither"):
        op(x, 1, 0.1, three, None, None, None, [w], [p], [1], 1, None, False)
    with raises(ValueError, "expected running statistics of 3 values"):
        op(x, 2, 0.1, *none, [w], [p], [1], 1, None, False)
    with raises(ValueError, "separable_group: expected one pointwise weight per depthwise one"):
        op(x, 0, 0.1, *none, [w], [], [1], 1, None, False)
    with raises(ValueError, "separable_group: expected pointwise[0] of shape [3, 3, 1, 1]"):
        op(x, 0, 0.1, *none, [w], [p[:2]], [1], 1, None, False)
    head, tail = ([1], x, three[:0], three[:0], 0, 0.1, None, None), ([w], [p], [1], 1, True, False)
    with raises(ValueError, "_backward: expected grads of shape"):
        backward([x[:, :, :2]], *head, *tail, [1], [1], [], [])
    with raises(ValueError, "_backward: expected need_pointwise of one entry"):
        backward([x], *head, *tail, [1], [], [], [])
    with raises(ValueError, "_backward: expected mean and var"):
        backward([x], [1], x, three[:2], three, 1, *head[5:], *tail, [1], [1], [], [])
