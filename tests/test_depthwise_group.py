# SPDX-License-Identifier: Apache-2.0
"""depthwise_group against ReLU and torch's own convolutions in float64, and what it refuses."""

from __future__ import annotations

import itertools

import ops_cases as cases
import pytest
import torch
import torch.nn.functional as F
from ops_cases import assert_all_near, assert_bitwise, assert_layout, assert_near
from torch import nn

from fastnas.ops import depthwise_group, reference

# Kernel size and dilation of each convolution: DARTS' edge, and one of every kind.
EDGE = ((3, 1), (5, 1), (3, 2), (5, 2))
KINDS = ((1, 1), (7, 1), (3, 3), (5, 4), (1, 2), (3, 50), (7, 2))

# (N, C, H, W): planes that fill vectors of every width, or not; images smaller than a kernel; more
# rows than are packed at once; more channels than lanes.
SHAPES = (
    (1, 1, 1, 1),
    (2, 16, 8, 8),
    (3, 4, 8, 7),
    (2, 8, 5, 6),
    (5, 3, 4, 9),
    (1, 17, 9, 3),
    (33, 2, 3, 3),
    (2, 5, 1, 19),
    (3, 6, 13, 1),
    (1, 70, 6, 5),
    (1, 3, 97, 90),
    (2, 1, 1100, 9),
    (0, 3, 4, 4),
    (2, 0, 4, 4),
    (2, 3, 0, 5),
)


def stock(x, weights, dilations, stride, relu):
    """What a supernet in plain PyTorch computes."""
    source = F.relu(x) if relu else x
    return [
        F.conv2d(source, w, None, stride, d * (w.shape[-1] // 2), d, groups=x.shape[1])
        for w, d in zip(weights, dilations, strict=True)
    ]


def make_case(shape, group=EDGE, dtype=torch.float32, layout="contiguous", device="cpu"):
    x = cases.make(shape, dtype, layout, device, seed=1).requires_grad_()
    weights = [
        cases.make((shape[1], 1, k, k), dtype, device=device, seed=10 + i).div(k).requires_grad_()
        for i, (k, _) in enumerate(group)
    ]
    return x, weights, [d for _, d in group]


def grads_of(ys, seed=50):
    return [cases.like_output(y, seed + i) for i, y in enumerate(ys)]


def check_against_torch(x, weights, dilations, stride, relu, tolerances, grads=None):
    """Outputs and all gradients; returns what was computed."""
    ys = depthwise_group(x, weights, dilations, stride, relu)
    grads = grads_of(ys) if grads is None else grads
    actual = torch.autograd.grad(ys, [x, *weights], grads)
    exact, *exact_weights = cases.in_double([x, *weights])
    if x.numel():
        expected = stock(exact, exact_weights, dilations, stride, relu)
        wide = [g.double() for g in grads]
        expected_grads = torch.autograd.grad(expected, [exact, *exact_weights], wide)
    else:  # torch's convolutions do not take every one of them
        space = [(size + stride - 1) // stride for size in x.shape[2:]]
        expected = [exact.new_zeros(*x.shape[:2], *space) for _ in weights]
        expected_grads = [torch.zeros_like(t) for t in (exact, *exact_weights)]
    assert_all_near(ys, expected, tolerances, [f"y[{i}]" for i in range(len(ys))])
    names = ["dx", *(f"dw[{i}]" for i in range(len(weights)))]
    assert_all_near(actual, expected_grads, tolerances, names)
    assert [t.dtype for t in (*ys, *actual)] == [
        *(x.dtype for _ in ys),
        x.dtype,
        *(w.dtype for w in weights),
    ]
    return ys, actual


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "_".join(map(str, s)))
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_matches_torch_and_keeps_the_format(layout, shape, stride, relu, device, tolerances):
    group = EDGE if relu else KINDS
    x, weights, dilations = make_case(shape, group, torch.float32, layout, device)
    ys, (dx, *_) = check_against_torch(x, weights, dilations, stride, relu, tolerances)
    for t in (*ys, dx):
        if t.numel() and shape[1] > 1:  # tensors of one channel are of both formats
            assert_layout(t, layout)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(2, 16, 6, 7), (3, 4, 5, 6), (2, 5, 9, 8)], ids=str)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
def test_every_kind_in_every_dtype(dtype, layout, shape, stride, device, tolerances):
    x, weights, dilations = make_case(shape, (*EDGE, *KINDS), dtype, layout, device)
    check_against_torch(x, weights, dilations, stride, True, tolerances)


@pytest.mark.parametrize("count", [1, 64])
def test_any_number_of_convolutions(count, device, tolerances):
    group = list(itertools.islice(itertools.cycle(EDGE), count))
    x, weights, dilations = make_case((2, 4, 6, 6), group, device=device)
    check_against_torch(x, weights, dilations, 1, True, tolerances)


def test_a_convolution_gives_the_same_alone_and_in_a_group(device):
    x, weights, dilations = make_case((2, 4, 9, 6), device=device)
    together = depthwise_group(x, weights, dilations)
    for i in range(4):
        (alone,) = depthwise_group(x, weights[i : i + 1], dilations[i : i + 1])
        assert_bitwise(alone, together[i])


def test_is_stride_1_and_rectified_unless_told_otherwise(device):
    x, weights, dilations = make_case((2, 4, 6, 6), device=device)
    for a, b in zip(
        depthwise_group(x, weights, dilations),
        depthwise_group(x, tuple(weights), tuple(dilations), 1, True),
        strict=True,
    ):
        assert_bitwise(a, b)


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("stride", [1, 2])
def test_nan_goes_where_torch_sends_it(stride, relu, device):
    x, weights, dilations = make_case((2, 3, 9, 9), ((3, 1), (3, 2)), device=device)
    with torch.no_grad():
        x[0, 1, 4, 4] = torch.nan
    results = []
    for function in (depthwise_group, stock):
        ys = function(x, weights, dilations, stride, relu)
        results.append([*ys, *torch.autograd.grad(ys, [x, *weights], grads_of(ys))])
    for a, b in zip(*results, strict=True):
        assert a.isnan().equal(b.isnan())
    assert results[0][0].isnan().any() and not results[0][0].isnan().all()


# --- derivatives


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradcheck_and_gradgradcheck(stride, relu, device):
    group = ((3, 1), (3, 2), (1, 1))
    x, weights, dilations = make_case((1, 2, 3, 4), group, torch.float64, device=device)

    def function(x, *weights):
        return tuple(depthwise_group(x, weights, dilations, stride, relu))

    assert torch.autograd.gradcheck(function, (x, *weights))
    assert torch.autograd.gradgradcheck(function, (x, *weights))


@pytest.mark.parametrize("wanted", [{"x"}, {"w0"}, {"w1"}], ids=lambda s: "".join(s))
def test_second_derivative_of_a_subset(wanted, device):
    x, weights, dilations = make_case((1, 2, 3, 3), ((3, 1), (3, 2)), torch.float64, device=device)
    leaves = {"x": x, "w0": weights[0], "w1": weights[1]}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in wanted)

    def function(*_):
        ys = depthwise_group(x, weights, dilations, 1, False)
        return tuple(y**2 for y in ys if y.requires_grad)

    tensors = [leaf for name, leaf in leaves.items() if name in wanted]
    assert torch.autograd.gradgradcheck(function, tensors)


# What is needed -> whether x is kept, with a ReLU and without.
@pytest.mark.parametrize(
    ("need", "kept", "kept_linear"),
    [
        ({"x"}, True, False),
        ({"w0"}, True, True),
        ({"x", "w1"}, True, True),
        ({"x", "w0", "w1"}, True, True),
        (set(), False, False),
    ],
    ids=lambda s: "-".join(sorted(s)) or "nothing" if isinstance(s, set) else None,
)
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_a_subset(stride, relu, need, kept, kept_linear, device):
    x, weights, dilations = make_case((2, 3, 4, 5), ((3, 1), (5, 2)), device=device)
    leaves = {"x": x, "w0": weights[0], "w1": weights[1]}
    ys = depthwise_group(x, weights, dilations, stride, relu)
    grads = grads_of(ys)
    full = torch.autograd.grad(ys, list(leaves.values()), grads)
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in need)
    ys, addresses = cases.saved_by(lambda: depthwise_group(x, weights, dilations, stride, relu))
    assert (x.data_ptr() in addresses) == (kept if relu else kept_linear)
    assert addresses <= {x.data_ptr(), *(w.data_ptr() for w in weights)}
    assert all(y.requires_grad == bool(need) for y in ys)
    if need:
        torch.autograd.backward(ys, grads)
    for (name, leaf), g in zip(leaves.items(), full, strict=True):
        assert (leaf.grad is not None) == (name in need), name
        if name in need:
            assert_bitwise(leaf.grad, g, name)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_outputs_that_nothing_uses(used, stride, device, tolerances):
    x, weights, dilations = make_case((2, 3, 6, 5), ((3, 1), (5, 2), (1, 1)), device=device)
    ys = depthwise_group(x, weights, dilations, stride)
    grads = grads_of(ys)
    actual = torch.autograd.grad(
        [ys[i] for i in used], [x, *weights], [grads[i] for i in used], allow_unused=True
    )
    exact, *exact_weights = cases.in_double([x, *weights])
    expected = stock(exact, exact_weights, dilations, stride, True)
    expected_grads = torch.autograd.grad(
        [expected[i] for i in used],
        [exact, *exact_weights],
        [grads[i].double() for i in used],
        allow_unused=True,
    )
    for a, e in zip(actual, expected_grads, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            assert_near(a, e, tolerances)


def test_second_derivative_of_used_outputs(device):
    x, weights, dilations = make_case((1, 2, 3, 3), ((3, 1), (3, 2)), torch.float64, device=device)
    assert torch.autograd.gradgradcheck(
        lambda x, w: depthwise_group(x, [w, weights[1]], dilations)[0] ** 2, (x, weights[0])
    )


# --- views, dtypes


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("view", cases.VIEWS)
def test_any_view_as_input(view, stride, device, tolerances):
    x, weights, dilations = make_case((2, 5, 7, 9), layout=view, device=device)
    ys, (dx, *_) = check_against_torch(x, weights, dilations, stride, True, tolerances)
    for t in (*ys, dx):
        assert_layout(t, cases.layout_after(view))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("view", cases.VIEWS)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_any_view_as_upstream_gradient(layout, view, stride, device, tolerances):
    x, weights, dilations = make_case((2, 4, 8, 6), layout=layout, device=device)
    space = (8 // stride, 6 // stride)
    grads = [cases.make((2, 4, *space), layout=view, device=device, seed=50 + i) for i in range(4)]
    _, (dx, *_) = check_against_torch(x, weights, dilations, stride, True, tolerances, grads)
    assert_layout(dx, layout)


@pytest.mark.parametrize("view", ["expanded", "transposed", "sliced", "misaligned"])
def test_any_view_as_weights(view, device, tolerances):
    x, weights, dilations = make_case((2, 5, 7, 9), device=device)
    weights = [
        cases.laid_out(w.detach().view(1, 5, *w.shape[2:]), view).transpose(0, 1).requires_grad_()
        for w in weights
    ]
    check_against_torch(x, weights, dilations, 1, True, tolerances)


def test_a_gradient_keeps_the_format_where_the_input_was_not_kept(device):
    x, weights, dilations = make_case((2, 5, 7, 9), layout="channels_last", device=device)
    ys = depthwise_group(x, [w.detach() for w in weights], dilations, 1, False)
    (dx,) = torch.autograd.grad(sum(y.sum() for y in ys), [x])
    assert_layout(dx, "channels_last")


@pytest.mark.parametrize(
    ("dtype", "weight"),
    [("bfloat16", "float32"), ("float16", "bfloat16"), ("float32", "float64"),
     ("float64", "float32")],
)  # fmt: skip
def test_weights_of_another_dtype(dtype, weight, device, tolerances):
    x, weights, dilations = make_case((2, 4, 6, 5), dtype=getattr(torch, dtype), device=device)
    weights = [w.detach().to(getattr(torch, weight)).requires_grad_() for w in weights]
    # Sums are taken in the dtype of x, or in float32.
    tolerances = {**tolerances, weights[0].dtype: max(tolerances[t.dtype] for t in (x, weights[0]))}
    check_against_torch(x, weights, dilations, 1, True, tolerances)


def test_autocast_gives_the_dtype_of_torch(device, tolerances):
    x, weights, dilations = make_case((2, 4, 6, 5), device=device)
    with torch.autocast(device.type, torch.bfloat16):
        ys = depthwise_group(x, weights, dilations)
        assert {y.dtype for y in ys} == {torch.bfloat16}
        assert {y.dtype for y in stock(x, weights, dilations, 1, True)} == {torch.bfloat16}
        wide = x.detach().double()
        assert depthwise_group(wide, weights, dilations)[0].dtype == torch.float64
    expected = stock(x.bfloat16().double(), [w.double() for w in weights], dilations, 1, True)
    assert_all_near(ys, expected, tolerances, "0123")
    sum(y.float().square().sum() for y in ys).backward()
    assert x.grad.dtype == weights[0].grad.dtype == torch.float32


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_two_runs_give_the_same_bits(layout, stride, device):
    results = []
    for _ in range(2):
        x, weights, dilations = make_case((9, 5, 21, 17), layout=layout, device=device)
        ys = depthwise_group(x, weights, dilations, stride)
        results.append([*ys, *torch.autograd.grad(ys, [x, *weights], grads_of(ys))])
    for a, b in zip(*results, strict=True):
        assert_bitwise(a, b)


def test_a_module_trains_as_with_torch(device, tolerances):
    """A few steps of gradient descent, so that gradients arrive where torch's would."""
    losses = []
    for function in (depthwise_group, stock):
        torch.manual_seed(0)
        convolutions = nn.ModuleList(
            nn.Conv2d(4, 4, k, 1, d * (k // 2), d, groups=4, bias=False) for k, d in EDGE
        ).to(device)
        optimizer = torch.optim.SGD(convolutions.parameters(), 0.05)
        x = cases.make((4, 4, 8, 8), device=device)
        found = []
        for _ in range(5):
            ys = function(x, [c.weight for c in convolutions], [d for _, d in EDGE], 1, True)
            loss = (sum(ys) - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        losses.append(torch.stack(found))
    assert_near(losses[0], losses[1], tolerances)
    assert losses[0][-1] < losses[0][0]


def test_reference_is_torch(device, tolerances):
    x, weights, dilations = make_case((2, 4, 7, 6), dtype=torch.float64, device=device)
    for stride, relu in itertools.product((1, 2), (True, False)):
        actual = reference.depthwise_group(x, weights, dilations, stride, relu)
        for a, b in zip(actual, stock(x, weights, dilations, stride, relu), strict=True):
            assert_bitwise(a, b)
