# SPDX-License-Identifier: Apache-2.0
"""mixed_sum against the reference in float64, its properties, and what it refuses."""

from __future__ import annotations

import itertools

import ops_cases as cases
import pytest
import torch
from ops_cases import assert_all_near, assert_bitwise, assert_layout, assert_near, raises

from fastnas.ops import mixed_sum, reference


def check_against_reference(xs, weights, tolerances, grad=None):
    """Forward and all gradients; returns what was computed."""
    y = mixed_sum(xs, weights)
    grad = cases.like_output(y) if grad is None else grad
    grads = torch.autograd.grad(y, [weights, *xs], grad)
    *exact, w = cases.in_double([*xs, weights])
    expected = reference.mixed_sum(exact, w)
    assert y.dtype == reference.result_dtype(xs)
    assert_near(y, expected, tolerances, "y")
    names = ["dw", *(f"dxs[{k}]" for k in range(len(xs)))]
    expected_grads = torch.autograd.grad(expected, [w, *exact], grad.double())
    assert_all_near(grads, expected_grads, tolerances, names)
    assert [g.dtype for g in grads] == [t.dtype for t in (weights, *xs)]
    return y, grads


@pytest.mark.parametrize("shape", [(1, (1, 1, 1, 1)), *cases.SHAPES], ids=cases.ids)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
def test_matches_reference_and_keeps_the_format(dtype, layout, shape, device, tolerances):
    xs, weights = cases.make_inputs(*shape, dtype, layout, device)
    y, (_, *dxs) = check_against_reference(xs, weights, tolerances)
    for name, t in (("y", y), *((f"dxs[{k}]", dx) for k, dx in enumerate(dxs))):
        assert t.dtype == dtype
        if t.numel():
            assert_layout(t, layout, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.ids)
@pytest.mark.parametrize("first", cases.VIEWS)
def test_any_views_in_one_call(first, dtype, device, tolerances):
    views = [first, *cases.VIEWS]
    xs = [
        cases.make((2, 5, 7, 9), dtype, view, device, seed=k).requires_grad_()
        for k, view in enumerate(views)
    ]
    weights = torch.linspace(-1, 1, len(xs), device=device).requires_grad_()
    y, _ = check_against_reference(xs, weights, tolerances)
    assert_layout(y, cases.layout_after(first))


@pytest.mark.parametrize("view", cases.VIEWS)
def test_any_view_as_upstream_gradient(view, device, tolerances):
    xs, weights = cases.make_inputs(3, (2, 5, 7, 9), torch.float32, "channels_last", device)
    grad = cases.make((2, 5, 7, 9), torch.float32, view, device, seed=50)
    _, (_, *dxs) = check_against_reference(xs, weights, tolerances, grad)
    for dx in dxs:
        assert_layout(dx, "channels_last")


def test_gradients_keep_the_format_where_no_input_was_kept(device):
    xs, _ = cases.make_inputs(3, (2, 5, 7, 9), torch.float32, "channels_last", device)
    y = mixed_sum(xs, [0.2, 0.3, 0.5])
    for dx in torch.autograd.grad(y.sum(), xs):  # the upstream gradient is one expanded number
        assert_layout(dx, "channels_last")


def test_misaligned_flat_inputs(device, tolerances):
    xs = [torch.randn(1000, device=device).flatten()[k:][:990].requires_grad_() for k in range(9)]
    check_against_reference(xs, torch.randn(9, device=device, requires_grad=True), tolerances)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 3, 5), (2, 3, 5, 7, 3)], ids=str)
def test_any_number_of_dimensions(shape, device, tolerances):
    xs, weights = cases.make_inputs(3, shape, device=device)
    check_against_reference(xs, weights, tolerances)


def test_channels_last_3d_is_kept(device, tolerances):
    xs, weights = cases.make_inputs(2, (2, 3, 5, 7, 4), device=device)
    xs = [x.detach().contiguous(memory_format=torch.channels_last_3d) for x in xs]
    y, _ = check_against_reference([x.requires_grad_() for x in xs], weights, tolerances)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize(
    "dtypes",
    [
        ("bfloat16", "float32"),
        ("float32", "bfloat16", "float16"),
        ("float16", "bfloat16"),
        ("float16", "float64", "float32"),
    ],
    ids="-".join,
)
def test_mixed_dtypes_and_formats(dtypes, device, tolerances):
    layouts = itertools.cycle(["channels_last", "contiguous"])
    xs = [
        cases.make((2, 5, 7, 9), getattr(torch, dtype), layout, device, seed=k).requires_grad_()
        for k, (dtype, layout) in enumerate(zip(dtypes, layouts, strict=False))
    ]
    weights = torch.randn(len(xs), device=device, requires_grad=True)
    y, _ = check_against_reference(xs, weights, tolerances)
    assert_layout(y, "channels_last")
    assert y.dtype == sum(0 * x for x in xs).dtype


def test_weights_in_any_form(device):
    xs, weights = cases.make_inputs(3, (2, 3, 4, 4), device=device)
    expected = mixed_sum(xs, weights)
    numbers = weights.tolist()
    assert_bitwise(mixed_sum(xs, numbers), expected)
    assert_bitwise(mixed_sum(tuple(xs), tuple(numbers)), expected)
    assert_bitwise(mixed_sum(xs, weights.double()), expected)
    tensors = [w.detach().clone().requires_grad_() for w in weights]
    mixed = mixed_sum(xs, [tensors[0].double(), numbers[1], tensors[2].reshape(1)])
    assert_bitwise(mixed, expected)
    grad = cases.like_output(expected)
    (dw,) = torch.autograd.grad(expected, [weights], grad)
    d0, d2 = torch.autograd.grad(mixed, [tensors[0], tensors[2]], grad)
    assert_bitwise(torch.stack([d0, d2]), dw[[0, 2]])


def test_numbers_reach_another_device_without_a_copy_from_the_host(monkeypatch):
    """Such a copy would wait for a GPU, and could not be recorded into a graph."""

    def copy(*args, **kwargs):
        raise AssertionError("copied from the host")

    monkeypatch.setattr(torch, "tensor", copy)
    monkeypatch.setattr(torch, "as_tensor", copy)
    xs = [torch.ones(2, 3, device="meta") for _ in range(3)]
    weight = torch.ones((), device="meta", dtype=torch.float64)
    for weights in ([0.5, 1, 2.0], [0.5, weight, 1]):
        assert mixed_sum(xs, weights).device.type == "meta"


def test_half_precision_weights_are_used_as_they_are(device):
    xs, _ = cases.make_inputs(2, (2, 3, 4, 4), torch.bfloat16, device=device)
    weights = torch.tensor([0.3, 0.7], dtype=torch.bfloat16, device=device, requires_grad=True)
    y = mixed_sum(xs, weights)
    assert_bitwise(y, mixed_sum(xs, weights.float()))
    (dw,) = torch.autograd.grad(y.sum(), [weights])
    assert dw.dtype == torch.bfloat16


def test_gradcheck_and_gradgradcheck(device):
    xs, weights = cases.make_inputs(3, (2, 2, 1, 3), torch.float64, "channels_last", device)
    assert torch.autograd.gradcheck(lambda w, *x: mixed_sum(x, w), (weights, *xs))
    assert torch.autograd.gradgradcheck(lambda w, *x: mixed_sum(x, w), (weights, *xs))


def test_second_derivative_where_inputs_were_not_kept(device):
    xs, weights = cases.make_inputs(2, (1, 2, 2, 2), torch.float64, device=device)
    weights = weights.detach()
    assert torch.autograd.gradgradcheck(lambda *x: mixed_sum(x, weights) ** 2, tuple(xs))


@pytest.mark.parametrize("subset", list(itertools.product([False, True], repeat=3)), ids=str)
def test_gradients_of_a_subset(subset, device):
    xs, weights = cases.make_inputs(2, (2, 3, 5, 5), device=device)
    leaves = [weights, *xs]
    grad = cases.make((2, 3, 5, 5), device=device, seed=9)
    full = torch.autograd.grad(mixed_sum(xs, weights), leaves, grad)
    part = [t.detach().requires_grad_(need) for t, need in zip(leaves, subset, strict=True)]
    y, kept = cases.saved_by(lambda: mixed_sum(part[1:], part[0]))
    assert y.requires_grad == any(subset)
    # dx_k = w_k g reads no input; dw_k = <g, x_k> reads them all.
    expected = {x.data_ptr() for x in part[1:]} if subset[0] else set()
    assert kept - {part[0].data_ptr()} == expected
    if any(subset):
        y.backward(grad)
    for t, need, g in zip(part, subset, full, strict=True):
        assert (t.grad is not None) == need
        if need:
            assert_bitwise(t.grad, g)


def test_nothing_is_kept_without_grad_mode(device):
    xs, weights = cases.make_inputs(2, (2, 3, 5, 5), device=device)
    with torch.no_grad():
        y, kept = cases.saved_by(lambda: mixed_sum(xs, weights))
    assert not y.requires_grad and not kept


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
def test_one_hot_weights_return_the_input_bitwise(dtype, layout, device):
    limits = torch.finfo(dtype)
    least = limits.smallest_normal
    special = [limits.max, limits.min, least, least / 2, -least / 4, limits.eps]
    xs = [cases.make((2, 5, 7, 9), dtype, layout, device, seed=k) for k in range(9)]
    for x in xs:
        x[0, 0, 0, :6] = torch.tensor(special, dtype=dtype)
    for k in (0, 4, 8):
        weights = torch.zeros(9, device=device)
        weights[k] = 1
        assert_bitwise(mixed_sum(xs, weights), xs[k])
    alone = mixed_sum([xs[0]], [1.0])
    assert_bitwise(alone, xs[0])
    assert alone.data_ptr() != xs[0].data_ptr(), "the output must be a tensor of its own"


@pytest.mark.parametrize("weight", [1.0, 0.3, 1.5, 1.0 + 2.0**-12, 2.0**-11])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=cases.ids)
def test_every_half_is_read_and_rounded_as_ieee_says(dtype, weight, device):
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype).to(device)
    expected = (x.float() * weight).to(dtype)
    assert_bitwise(mixed_sum([x], [weight]), expected)
    assert_bitwise(mixed_sum([x[1:14]], [weight]), expected[1:14])  # less than a vector


def test_infinity_and_nan_pass_through(device):
    xs = [cases.make((1, 2, 3, 7), device=device, seed=k) for k in range(3)]
    xs[0][0, 0, 0, 0], xs[1][0, 1, 2, 6], xs[2][0, 0, 1, 1] = torch.inf, torch.nan, -torch.inf
    weights = torch.tensor([0.5, -2.0, 0.0], device=device)
    y = mixed_sum(xs, weights)
    assert_bitwise(y.isnan(), reference.mixed_sum(xs, weights).isnan())
    assert y.isnan().sum() == 2 and y[0, 0, 0, 0] == torch.inf


def test_linear_in_the_weights(device, tolerances):
    xs, v = cases.make_inputs(9, (2, 5, 7, 9), torch.float64, device=device)
    w = torch.linspace(-2, 3, 9, dtype=torch.float64, device=device)
    parts = 2.5 * mixed_sum(xs, v) - 0.5 * mixed_sum(xs, w)
    assert_near(mixed_sum(xs, 2.5 * v - 0.5 * w), parts, tolerances)


def test_order_of_the_candidates_does_not_matter(device, tolerances):
    xs, weights = cases.make_inputs(17, (2, 5, 7, 9), torch.float64, device=device)
    order = torch.randperm(17).tolist()
    y = mixed_sum([xs[k] for k in order], weights[order])
    assert_near(y, mixed_sum(xs, weights), tolerances)


def test_autocast_promotes_and_leaves_the_weights_alone(device, tolerances):
    conv = torch.nn.Conv2d(3, 3, 1).to(device)
    x = cases.make((2, 3, 8, 8), device=device)
    weights = torch.tensor([0.25, 0.5, 0.125], device=device, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16):
        candidates = [conv(x), torch.nn.functional.max_pool2d(x, 3, 1, 1), x]
        y = mixed_sum(candidates, weights)
        narrow = mixed_sum([candidates[0]] * 2, weights[:2])
    assert candidates[0].dtype == narrow.dtype == torch.bfloat16
    assert y.dtype == torch.float32
    y.square().sum().backward()
    assert weights.grad.dtype == conv.weight.grad.dtype == torch.float32
    exact = [c.detach().double() for c in candidates]
    assert_near(y, reference.mixed_sum(exact, weights.double()), tolerances)
    dots = torch.stack([(2 * y.detach().double() * e).sum() for e in exact])
    assert_near(weights.grad, dots, tolerances)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=cases.ids)
def test_two_runs_give_the_same_bits(dtype, device):
    results = []
    for _ in range(2):
        xs, weights = cases.make_inputs(3, (5, 17, 33, 31), dtype, device=device)
        y = mixed_sum(xs, weights)
        results.append((y, *torch.autograd.grad(y, [weights, *xs], torch.ones_like(y))))
    for a, b in zip(*results, strict=True):
        assert_bitwise(a, b)


def ones(*shape, **kwargs):
    return torch.ones(shape, **kwargs)


@pytest.mark.parametrize(
    ("xs", "weights", "error", "parts"),
    [
        ([], [], ValueError, ("1 to 64 tensors in xs", "got 0")),
        ([ones(2)] * 65, [1.0] * 65, ValueError, ("1 to 64 tensors in xs", "got 65")),
        (ones(3, 2), [1.0] * 3, TypeError, ("xs to be a list of tensors", "one tensor")),
        ([ones(2), 3.0], [1.0, 1.0], TypeError, ("xs[1] to be a tensor", "got float")),
        ([ones(2), ones(2, dtype=torch.int64)], [1.0] * 2, TypeError, ("xs[1] is torch.int64",)),
        ([ones(2, dtype=torch.complex64)], [1.0], TypeError, ("xs[0] is torch.complex64",)),
        ([ones(2, 3), ones(2, 3), ones(3, 2)], [1.0] * 3, ValueError,
         ("one shape", "xs[2] is [3, 2]", "xs[0] is [2, 3]")),
        ([ones(2), ones(2, device="meta")], [1.0] * 2, ValueError,
         ("one device", "xs[1] is on meta", "xs[0] on cpu")),
        ([ones(2)] * 8, ones(7), ValueError, ("one weight per input", "8 inputs", "shape [7]")),
        ([ones(2)] * 3, [1.0] * 2, ValueError, ("one weight per input", "3 inputs", "[2]")),
        ([ones(2)] * 3, ones(1, 3), ValueError, ("one weight per input", "shape [1, 3]")),
        ([ones(2)], ones(1, dtype=torch.int64), TypeError, ("floating-point weights", "int64")),
        ([ones(2)], ones(1, device="meta"), ValueError, ("weights on cpu like the inputs", "meta")),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)  # fmt: skip
def test_refuses(xs, weights, error, parts):
    with raises(error, "mixed_sum: expected", *parts):
        mixed_sum(xs, weights)


def test_the_raw_ops_check_their_arguments(device):
    op, backward = torch.ops.fastnas.mixed_sum, torch.ops.fastnas.mixed_sum_backward
    x, w = ones(2, 3, device=device), ones(2, device=device)
    with raises(ValueError, "mixed_sum: expected all inputs of one shape", "xs[1] is [3, 2]"):
        op([x, x.t()], w)
    with raises(ValueError, "mixed_sum: expected one weight per input", "1 inputs", "[2]"):
        op([x], w)
    with raises(ValueError, "mixed_sum: expected 1 to 64 tensors", "got 0"):
        op([], w)
    with raises(TypeError, "mixed_sum: expected inputs to be float32", "Long"):
        op([x.long()] * 2, w)
    with raises(TypeError, "mixed_sum: expected inputs to be float32", "Float8_e4m3fn"):
        op([x.to(torch.float8_e4m3fn)] * 2, w)
    with raises(ValueError, "mixed_sum_backward", "xs[1] of shape [2, 3]", "[3, 2]"):
        backward(x, [x, x.t()], w, [1, 1], True)
    with raises(ValueError, "mixed_sum_backward: expected 2 inputs", "got 0"):
        backward(x, [], w, [1, 1], True)
    with raises(ValueError, "mixed_sum_backward: expected one weight per input"):
        backward(x, [x], w, [1], False)
