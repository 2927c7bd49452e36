# SPDX-License-Identifier: Apache-2.0
"""mixed_batch_norm against torch's BatchNorm2d in float64: values, gradients, views, dtypes."""

from __future__ import annotations

import copy
import itertools

import ops_cases as cases
import pytest
import torch
from ops_cases import assert_all_near, assert_bitwise, assert_layout, assert_near, raises
from torch import nn

from fastnas.ops import mixed_batch_norm, mixed_sum


def check_against_torch(xs, weights, norms, tolerances, training=None, grad=None):
    """Forward, all gradients and all buffers against the stock loop in float64."""
    exact_norms = cases.doubled(norms)
    if training is not None:
        for norm in exact_norms:
            if norm is not None:
                norm.train(training)
    leaves = [weights, *xs, *cases.affine_parameters(norms)]
    y = mixed_batch_norm(xs, weights, norms, training)
    grad = cases.like_output(y) if grad is None else grad
    grads = torch.autograd.grad(y, leaves, grad)

    # On the CPU: on CUDA PyTorch's own norm needs a weight where it has a bias.
    exact_norms = [None if norm is None else norm.cpu() for norm in exact_norms]
    *exact, w = cases.in_double([t.cpu() for t in (*xs, weights)])
    expected = cases.stock(exact, w, exact_norms)
    exact_leaves = [w, *exact, *cases.affine_parameters(exact_norms)]
    expected_grads = torch.autograd.grad(expected, exact_leaves, grad.cpu().double())
    names = ["dw", *(f"dxs[{k}]" for k in range(len(xs)))]
    names += [f"affine {k}" for k in range(len(leaves) - len(names))]
    assert_near(y, expected, tolerances, "y")
    assert_all_near(grads, expected_grads, tolerances, names)
    assert [g.dtype for g in grads] == [t.dtype for t in leaves]
    cases.assert_buffers_near(norms, exact_norms, tolerances)
    return y, grads


@pytest.mark.parametrize("shape", cases.SHAPES, ids=cases.ids)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
def test_matches_torch_and_keeps_the_format(dtype, layout, shape, device, tolerances):
    count, size = shape
    xs, weights = cases.make_inputs(count, size, dtype, layout, device)
    norms = cases.make_norms(count, size[1], device)
    y, (_, *grads) = check_against_torch(xs, weights, norms, tolerances)
    assert y.dtype == dtype
    if y.numel():
        assert_layout(y, layout, "y")
        for k in range(count):
            assert_layout(grads[k], layout, f"dxs[{k}]")


@pytest.mark.parametrize("first", range(7))
def test_each_kind_of_norm_in_the_first_place(first, device, tolerances):
    xs, weights = cases.make_inputs(3, (3, 5, 7, 4), torch.float32, "channels_last", device)
    check_against_torch(xs, weights, cases.make_norms(3, 5, device, first), tolerances)


@pytest.mark.parametrize("training", [True, False])
def test_training_overrides_the_modules(training, device, tolerances):
    xs, weights = cases.make_inputs(8, (3, 5, 7, 4), device=device)
    norms = cases.make_norms(8, 5, device)
    modes = [norm is not None and norm.training for norm in norms]
    check_against_torch(xs, weights, norms, tolerances, training)
    assert modes == [norm is not None and norm.training for norm in norms]


def test_without_any_norm_it_is_the_weighted_sum(device):
    xs, weights = cases.make_inputs(5, (2, 3, 5, 7), device=device)
    assert_bitwise(mixed_batch_norm(xs, weights, [None] * 5), mixed_sum(xs, weights))


def test_one_hot_on_a_plain_input_returns_it_bitwise(device):
    xs, _ = cases.make_inputs(4, (2, 3, 5, 7), device=device)
    norms = [nn.BatchNorm2d(3), None, nn.BatchNorm2d(3, affine=False), None]
    y = mixed_batch_norm(xs, [0.0, 0.0, 0.0, 1.0], cases.on_device(norms, device))
    assert_bitwise(y, xs[3].detach())


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_normalises_a_large_mean(layout, device):
    x = (cases.make((4, 3, 17, 19), torch.float64, layout, device) + 1e4).float()
    y = mixed_batch_norm([x], [1.0], [nn.BatchNorm2d(3, affine=False).to(device)])
    expected = nn.BatchNorm2d(3, affine=False).double().to(device)(x.double())
    # One unit in the last place of 10^4 in float32 is 10^-3 deviations.
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-3)


def test_a_constant_channel_is_zero(device):
    x = torch.full((2, 3, 4, 5), 7.25, device=device, requires_grad=True)
    norm = nn.BatchNorm2d(3, affine=False).to(device)
    y = mixed_batch_norm([x], [1.0], [norm])
    # x / sqrt(eps) cancels to its last place.
    assert y.abs().max() <= 7.25 / norm.eps**0.5 * 2**-22
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_scale_and_shift_of_an_input_do_not_matter(device, tolerances):
    xs, weights = cases.make_inputs(3, (4, 3, 5, 7), torch.float64, device=device)
    norms = [nn.BatchNorm2d(3, affine=False, eps=0.0).double().to(device) for _ in xs]
    y = mixed_batch_norm(xs, weights, norms)
    moved = [x * (k + 2) + 5 * k for k, x in enumerate(xs)]
    assert_near(mixed_batch_norm(moved, weights, norms), y, tolerances)


def test_order_of_the_candidates_does_not_matter(device, tolerances):
    xs, weights = cases.make_inputs(9, (2, 5, 7, 9), torch.float64, device=device)
    norms = cases.make_norms(9, 5, device)
    order = torch.randperm(9).tolist()
    y = mixed_batch_norm(xs, weights, copy.deepcopy(norms))
    again = mixed_batch_norm([xs[k] for k in order], weights[order], [norms[k] for k in order])
    assert_near(again, y, tolerances)


def test_gradcheck_and_gradgradcheck(device):
    xs, weights = cases.make_inputs(4, (2, 2, 1, 2), torch.float64, "channels_last", device)
    norms = [
        nn.BatchNorm2d(2, affine=False),
        None,
        nn.BatchNorm2d(2),
        nn.BatchNorm2d(2, eps=0.1).eval(),
    ]
    norms = cases.on_device(norms, device, torch.float64)

    def function(w, *tensors):
        """The affine parameters are already in the norms: gradcheck perturbs them in place."""
        return mixed_batch_norm(tensors[:4], w, norms)

    inputs = (weights, *xs, *cases.affine_parameters(norms))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_second_derivative_where_inputs_were_not_kept(device):
    xs, weights = cases.make_inputs(3, (2, 2, 1, 2), torch.float64, device=device)
    weights = weights.detach()
    norms = [nn.BatchNorm2d(2, affine=False), nn.BatchNorm2d(2).eval().requires_grad_(False), None]
    norms = cases.on_device(norms, device, torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda *x: mixed_batch_norm(x, weights, norms) ** 2, tuple(xs)
    )


# Candidates: 0 of the batch, 1 plain, 2 of the batch and affine, 3 running and affine.
# What is needed -> which of them are kept.
@pytest.mark.parametrize(
    ("need", "kept"),
    [
        ({"w"}, {0, 1, 2, 3}),
        ({"affine"}, {2, 3}),
        ({"x0"}, {0}),
        ({"x1"}, set()),
        ({"x2"}, {2}),
        ({"x3"}, set()),
        ({"x0", "x1", "x2", "x3"}, {0, 2}),
        ({"x1", "affine"}, {2, 3}),
        ({"w", "x0", "x1", "x2", "x3", "affine"}, {0, 1, 2, 3}),
        (set(), set()),
    ],
    ids=lambda s: "-".join(sorted(map(str, s))) or "nothing",
)
def test_gradients_of_a_subset(need, kept, device):
    xs, weights = cases.make_inputs(4, (2, 3, 5, 5), device=device)
    norms = [nn.BatchNorm2d(3, affine=False), None, nn.BatchNorm2d(3), nn.BatchNorm2d(3).eval()]
    norms = cases.on_device(norms, device)
    names = ["w", "x0", "x1", "x2", "x3", *["affine"] * 4]
    leaves = [weights, *xs, *cases.affine_parameters(norms)]
    grad = cases.make((2, 3, 5, 5), device=device, seed=9)
    full = torch.autograd.grad(mixed_batch_norm(xs, weights, norms), leaves, grad)
    for name, leaf in zip(names, leaves, strict=True):
        leaf.requires_grad_(name in need)
    y, addresses = cases.saved_by(lambda: mixed_batch_norm(xs, weights, norms))
    assert {k for k, x in enumerate(xs) if x.data_ptr() in addresses} == kept
    assert y.requires_grad == bool(need)
    if need:
        y.backward(grad)
    for name, leaf, g in zip(names, leaves, full, strict=True):
        assert (leaf.grad is not None) == (name in need), name
        if name in need:
            assert_bitwise(leaf.grad, g, name)


def test_no_normalised_output_is_kept(device):
    xs, weights = cases.make_inputs(6, (4, 8, 16, 16), device=device)
    norms = [nn.BatchNorm2d(8, affine=False).to(device) for _ in xs]
    _, addresses = cases.saved_by(lambda: mixed_batch_norm(xs, weights, norms))
    assert len(addresses) == 6 + 3  # the inputs; weights, means, variances


@pytest.mark.parametrize("first", cases.VIEWS)
def test_any_views_in_one_call(first, device, tolerances):
    views = [first, *cases.VIEWS]
    xs = [
        cases.make((3, 5, 7, 9), torch.float32, view, device, seed=k).requires_grad_()
        for k, view in enumerate(views)
    ]
    weights = torch.linspace(-1, 1, len(xs), device=device).requires_grad_()
    y, grads = check_against_torch(xs, weights, cases.make_norms(len(xs), 5, device), tolerances)
    assert_layout(y, cases.layout_after(first), "y")
    assert_layout(grads[1], cases.layout_after(first), "dx")


@pytest.mark.parametrize("view", cases.VIEWS)
@pytest.mark.parametrize("first", [1, 3])
def test_any_view_as_upstream_gradient(view, first, device, tolerances):
    xs, weights = cases.make_inputs(3, (2, 5, 7, 9), torch.float32, "channels_last", device)
    norms = cases.make_norms(3, 5, device, first)
    grad = cases.make((2, 5, 7, 9), torch.float32, view, device, seed=50)
    _, (_, *dxs) = check_against_torch(xs, weights, norms, tolerances, grad=grad)
    for k in range(3):
        assert_layout(dxs[k], "channels_last", f"dxs[{k}]")


def test_gradients_keep_the_format_where_no_input_was_kept(device):
    xs, _ = cases.make_inputs(2, (2, 5, 7, 9), torch.float32, "channels_last", device)
    norms = [nn.BatchNorm2d(5, affine=False).eval().to(device), None]
    for g in torch.autograd.grad(mixed_batch_norm(xs, [0.5, 0.5], norms).sum(), xs):
        assert_layout(g, "channels_last")


@pytest.mark.parametrize(
    "dtypes", [("bfloat16", "float32"), ("float32", "float16", "bfloat16")], ids="-".join
)
def test_mixed_dtypes_and_formats(dtypes, device, tolerances):
    layouts = itertools.cycle(["channels_last", "contiguous"])
    xs = [
        cases.make((2, 5, 7, 9), getattr(torch, dtype), layout, device, seed=k).requires_grad_()
        for k, (dtype, layout) in enumerate(zip(dtypes, layouts, strict=False))
    ]
    weights = torch.randn(len(xs), device=device, requires_grad=True)
    norms = [nn.BatchNorm2d(5), nn.BatchNorm2d(5, affine=False), None]
    norms = cases.on_device(norms, device)[: len(xs)]
    y, _ = check_against_torch(xs, weights, norms, tolerances)
    assert y.dtype == torch.float32
    assert_layout(y, "channels_last")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=cases.ids)
def test_norms_of_another_dtype_than_float32(dtype, device, tolerances):
    xs, weights = cases.make_inputs(3, (2, 5, 7, 9), dtype, device=device)
    norms = [nn.BatchNorm2d(5), nn.BatchNorm2d(5, momentum=None), nn.BatchNorm2d(5).eval()]
    check_against_torch(xs, weights, cases.on_device(norms, device, dtype), tolerances)


@pytest.mark.parametrize("shape", [(9, 3), (4, 3, 5), (2, 3, 2, 3, 4)], ids=str)
def test_batch_norms_of_other_dimensions(shape, device, tolerances):
    kind = nn.BatchNorm3d if len(shape) == 5 else nn.BatchNorm1d
    xs, weights = cases.make_inputs(2, shape, device=device)
    check_against_torch(xs, weights, [kind(3).to(device), kind(3).to(device)], tolerances)


def test_autocast_leaves_statistics_and_weights_in_float32(device, tolerances):
    conv = nn.Conv2d(3, 4, 1).to(device)
    x = cases.make((2, 3, 8, 8), device=device)
    weights = torch.tensor([0.25, 0.5], device=device, requires_grad=True)
    norms = [nn.BatchNorm2d(4, affine=False).to(device), nn.BatchNorm2d(4).to(device)]
    exact_norms = cases.doubled(norms)
    with torch.autocast(device.type, torch.bfloat16):
        candidates = [conv(x), conv(2 * x)]
        y = mixed_batch_norm(candidates, weights, norms)
    assert y.dtype == torch.bfloat16 and norms[0].running_mean.dtype == torch.float32
    exact = [c.detach().double() for c in candidates]
    assert_near(y, cases.stock(exact, weights.double(), exact_norms), tolerances)
    cases.assert_buffers_near(norms, exact_norms, tolerances)
    y.float().square().sum().backward()
    assert weights.grad.dtype == conv.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_two_runs_give_the_same_bits(layout, device):
    results = []
    for _ in range(2):
        xs, weights = cases.make_inputs(4, (3, 17, 33, 31), torch.float32, layout, device)
        norms = cases.make_norms(4, 17, device)
        y = mixed_batch_norm(xs, weights, norms)
        leaves = [weights, *xs, *cases.affine_parameters(norms)]
        grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
        results.append([y, *grads, norms[0].running_mean, norms[0].running_var])
    for a, b in zip(*results, strict=True):
        assert_bitwise(a, b)


def ones(*shape):
    return torch.ones(shape)


@pytest.mark.parametrize(
    ("xs", "norms", "parts"),
    [
        ([ones(2, 3, 4, 4)] * 2, [None], ("one norm (or None) per input", "2 inputs and 1 norms")),
        ([ones(2, 3, 4, 4)], [nn.BatchNorm2d(4)], ("norms[0].weight of shape [3]", "got [4]")),
        ([ones(2, 3, 4, 4)] * 2, [None, nn.BatchNorm2d(4, affine=False)],
         ("norms[1].running_mean of shape [3]", "got [4]")),
        ([ones(3)], [None], ("inputs of shape (N, C, ...)", "got [3]")),
        ([ones(2, 3), ones(2, 4)], [None] * 2, ("one shape", "xs[1] is [2, 4]")),
        ([], [], ("1 to 64 tensors in xs", "got 0")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)  # fmt: skip
def test_refuses(xs, norms, parts):
    with raises(ValueError, "mixed_batch_norm: expected", *parts):
        mixed_batch_norm(xs, [1.0] * len(xs), norms)


class Shifted(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(
    "norm",
    [nn.InstanceNorm2d(3), nn.SyncBatchNorm(3), nn.GroupNorm(1, 3), nn.Identity(), Shifted(3)],
    ids=lambda norm: type(norm).__name__,
)
def test_refuses_other_norms_than_batch_norm(norm):
    with raises(TypeError, "expected norms[1] to be None or a BatchNorm", type(norm).__name__):
        mixed_batch_norm([ones(2, 3, 4, 4)] * 2, [1.0] * 2, [None, norm])


def test_refuses_a_norm_without_parameters_yet():
    with raises(ValueError, "norms[0]", "LazyBatchNorm2d", "no input yet"):
        mixed_batch_norm([ones(2, 3, 4, 4)], [1.0], [nn.LazyBatchNorm2d()])


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_refuses_a_tensor_of_a_norm_that_does_not_fit(name):
    x = ones(2, 3, 4, 4)
    for other, got in ((ones(1), "[1] on cpu"), (ones(3).to("meta"), "[3] on meta")):
        norm = nn.BatchNorm2d(3)
        vars(norm)["_buffers" if "running" in name else "_parameters"][name] = other
        with raises(ValueError, f"norms[0].{name} of shape [3] on cpu", f"got {got}"):
            mixed_batch_norm([x], [1.0], [norm])
        if "running" in name:
            vars(norm)["_buffers"][name] = None
            with raises(ValueError, "norms[0] with running_mean and running_var or without both"):
                mixed_batch_norm([x], [1.0], [norm])


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_norm_may_lack_one_affine_parameter(name, device, tolerances):
    xs, weights = cases.make_inputs(2, (2, 3, 5, 4), device=device)
    norms = [nn.BatchNorm2d(3).to(device), nn.BatchNorm2d(3, affine=False).to(device)]
    with torch.no_grad():
        norms[0].weight.copy_(cases.draw((3,), 1))
        norms[0].bias.copy_(cases.draw((3,), 2))
    setattr(norms[0], name, None)
    check_against_torch(xs, weights, norms, tolerances)


def test_refuses_weights_that_do_not_fit():
    with raises(ValueError, "mixed_batch_norm: expected one weight per input", "1 inputs", "[2]"):
        mixed_batch_norm([ones(2, 3)], [1.0, 2.0], [None])


def test_the_raw_ops_check_their_arguments(device):
    op, backward = torch.ops.fastnas.mixed_batch_norm, torch.ops.fastnas.mixed_batch_norm_backward
    x, w, three = ones(2, 3).to(device), ones(1).to(device), ones(3).to(device)
    with raises(ValueError, "mixed_batch_norm: expected kinds, eps and affine of one entry"):
        op([x], w, [1, 1], [0.1], [0], [], [], [], [], [])
    with raises(ValueError, "mixed_batch_norm: expected kinds of 0, 1 or 2, but got 3"):
        op([x], w, [3], [0.1], [0], [], [], [], [], [])
    with raises(ValueError, "mixed_batch_norm: expected a gamma and a beta of 3 values"):
        op([x], w, [1], [0.1], [1], [], [], [], [], [])
    with raises(ValueError, "mixed_batch_norm: expected a gamma and a beta of 3 values"):
        op([x], w, [1], [0.1], [1], [w], [three], [], [], [])
    with raises(ValueError, "mixed_batch_norm: expected running statistics of 3 values"):
        op([x], w, [2], [0.1], [0], [], [], [], [], [])
    with raises(ValueError, "mixed_batch_norm: expected inputs of shape (N, C, ...)"):
        op([three], w, [1], [0.1], [0], [], [], [], [], [])
    table = ones(1, 3).to(device)
    with raises(ValueError, "mixed_batch_norm_backward: expected mean and var of shape [1, 3]"):
        backward(x, [x], w, table, w, [1], [0.1], [0], [], [], [1], True)
    with raises(ValueError, "mixed_batch_norm_backward: expected need_xs of one entry per input"):
        backward(x, [x], w, table, table, [1], [0.1], [0], [], [], [1, 1], True)
