# SPDX-License-Identifier: Apache-2.0
"""partial_channel_mix against PC-DARTS' formula in plain PyTorch: mix, bypass or pool, shuffle."""

from __future__ import annotations

import copy
import itertools

import ops_cases as cases
import pytest
import torch
import torch.nn.functional as F
from ops_cases import assert_all_near, assert_bitwise, assert_layout, assert_near, raises
from torch import nn

from fastnas.ops import mixed_batch_norm, mixed_sum, partial_channel_mix

# (K, (N, c, H, W) of the candidates' outputs), k: as few and as odd as they come.
SHAPES = (
    ((1, (2, 1, 1, 2)), 2),
    ((8, (2, 4, 8, 8)), 4),
    ((9, (3, 3, 3, 1)), 3),
    ((17, (1, 12, 5, 3)), 2),
    ((64, (2, 1, 1, 3)), 4),
    ((3, (1, 33, 3, 5)), 8),
    ((2, (2, 17, 3, 3)), 17),
    ((3, (0, 3, 4, 4)), 4),
    ((2, (1, 4, 40, 41)), 4),
    ((2, (18, 2, 31, 30)), 2),
)


def stock(x, xs, weights, k, norms=None):
    """Upstream's mixed op once its candidates have run; ``x`` has all channels."""
    mixed = cases.stock(xs, weights, norms)
    rest = x[:, mixed.shape[1] :]
    if mixed.shape[2] != x.shape[2]:
        rest = F.max_pool2d(rest, 2, 2)
    return cases.shuffled(torch.cat([mixed, rest], 1), k)


def make_case(shape, k, halved, dtype=torch.float32, layout="contiguous", device="cpu"):
    """Input, candidates and weights; ``halved``: the input is twice as large, or one more."""
    count, (n, c, h, w) = shape
    xs, weights = cases.make_inputs(count, (n, c, h, w), dtype, layout, device)
    size = (2 * h + 1, 2 * w + 1) if halved == "odd" else (2 * h, 2 * w) if halved else (h, w)
    x = cases.make((n, k * c, *size), dtype, layout, device, seed=500).requires_grad_()
    return x, xs, weights


def check_against_torch(x, xs, weights, k, norms, tolerances, training=None, grad=None):
    exact_norms = cases.doubled(norms)
    leaves = [x, weights, *xs, *cases.affine_parameters(norms)]
    y = partial_channel_mix(x, xs, weights, k, norms, training)
    grad = cases.like_output(y) if grad is None else grad
    grads = torch.autograd.grad(y, leaves, grad)
    exact_x, *exact, w = cases.in_double([x, *xs, weights])
    expected = stock(exact_x, exact, w, k, exact_norms)
    exact_leaves = [exact_x, w, *exact, *cases.affine_parameters(exact_norms)]
    expected_grads = torch.autograd.grad(expected, exact_leaves, grad.double())
    names = ["dx", "dw", *(f"dxs[{j}]" for j in range(len(xs)))]
    names += [f"affine {j}" for j in range(len(leaves) - len(names))]
    assert_near(y, expected, tolerances, "y")
    assert_all_near(grads, expected_grads, tolerances, names)
    assert [g.dtype for g in grads] == [t.dtype for t in leaves]
    for norm, other in zip(norms, exact_norms, strict=True):
        if norm is not None and norm.running_mean is not None:
            assert_near(norm.running_mean, other.running_mean, tolerances)
            assert_near(norm.running_var, other.running_var, tolerances)
            assert norm.num_batches_tracked.equal(other.num_batches_tracked)
    return y, grads


@pytest.mark.parametrize("halved", [False, True, "odd"], ids=["same", "halved", "odd"])
@pytest.mark.parametrize(("shape", "k"), SHAPES, ids=cases.ids)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_matches_the_stock_formula_and_keeps_the_format(
    layout, shape, k, halved, device, tolerances
):
    x, xs, weights = make_case(shape, k, halved, torch.float32, layout, device)
    norms = cases.make_norms(len(xs), xs[0].shape[1], device)
    y, (_, _, *grads) = check_against_torch(x, xs, weights, k, norms, tolerances)
    if y.numel() and xs[0].shape[1] > 1:  # candidates of one channel are of both formats
        assert_layout(y, layout, "y")
        for j in range(len(xs)):
            assert_layout(grads[j], layout, f"dxs[{j}]")


@pytest.mark.parametrize("halved", [False, True], ids=["same", "halved"])
@pytest.mark.parametrize(
    ("shape", "k"), [((8, (2, 4, 8, 8)), 4), ((3, (1, 3, 5, 7)), 4), ((2, (1, 3, 5, 7)), 3)],
    ids=cases.ids,
)  # fmt: skip
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16], ids=cases.ids
)  # fmt: skip
def test_matches_in_other_dtypes(dtype, layout, shape, k, halved, device, tolerances):
    x, xs, weights = make_case(shape, k, halved, dtype, layout, device)
    norms = cases.make_norms(len(xs), xs[0].shape[1], device)
    y, _ = check_against_torch(x, xs, weights, k, norms, tolerances)
    assert y.dtype == dtype


@pytest.mark.parametrize("halved", [False, True], ids=["same", "halved"])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_only_the_bypassed_channels_may_be_handed_over(layout, halved, device):
    x, xs, weights = make_case((3, (2, 3, 4, 4)), 4, halved, torch.float32, layout, device)
    expected = partial_channel_mix(x, xs, weights, 4)
    grad = cases.like_output(expected)
    (dx,) = torch.autograd.grad(expected, [x], grad)
    assert dx[:, :3].eq(0).all(), "the processed channels of x are not read"
    for rest in (x[:, 3:], x[:, 3:].detach().clone().requires_grad_()):
        y = partial_channel_mix(rest, xs, weights, 4)
        assert_bitwise(y, expected)
        (drest,) = torch.autograd.grad(y, [rest], grad)
        assert_bitwise(drest, dx[:, 3:])
        assert_layout(drest, layout)


@pytest.mark.parametrize("training", [True, False])
def test_training_overrides_the_modules(training, device, tolerances):
    x, xs, weights = make_case((7, (2, 3, 4, 4)), 4, True, device=device)
    norms = cases.make_norms(7, 3, device)
    theirs = copy.deepcopy(norms)
    y = partial_channel_mix(x, xs, weights, 4, norms, training)
    for norm in theirs:
        if norm is not None:
            norm.train(training)
    assert_near(y, stock(x, xs, weights, 4, theirs), tolerances)


def test_norms_default_to_none(device):
    x, xs, weights = make_case((3, (2, 3, 4, 4)), 2, False, device=device)
    plain = partial_channel_mix(x, xs, weights, 2, [None] * 3)
    assert_bitwise(partial_channel_mix(x, xs, weights, 2), plain)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_mixed_channels_are_those_of_the_op_without_bypass(layout, device):
    x, xs, weights = make_case((5, (2, 3, 7, 5)), 4, False, torch.float32, layout, device)
    norms = cases.make_norms(5, 3, device)
    y = partial_channel_mix(x, xs, weights, 4, copy.deepcopy(norms))
    assert_bitwise(y[:, ::4], mixed_batch_norm(xs, weights, copy.deepcopy(norms)))
    y = partial_channel_mix(x, xs, weights, 4)
    assert_bitwise(y[:, ::4], mixed_sum(xs, weights))


# --- derivatives, views, dtypes


@pytest.mark.parametrize("halved", [False, True], ids=["same", "halved"])
def test_gradcheck_and_gradgradcheck(halved, device):
    x, xs, weights = make_case((3, (2, 1, 1, 2)), 3, halved, torch.float64, device=device)
    norms = [nn.BatchNorm2d(1, affine=False), None, nn.BatchNorm2d(1)]
    norms = [norm if norm is None else norm.double().to(device) for norm in norms]
    tensors = (x, weights, *xs, *cases.affine_parameters(norms))

    def function(x, w, *others):
        """The parameters are already in the modules: gradcheck perturbs them in place."""
        return partial_channel_mix(x, others[:3], w, 3, norms)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("halved", [False, True], ids=["same", "halved"])
def test_second_derivative_where_inputs_were_not_kept(halved, device):
    x, xs, weights = make_case((2, (1, 1, 2, 2)), 2, halved, torch.float64, device=device)
    weights = weights.detach()
    assert torch.autograd.gradgradcheck(
        lambda x, *xs: partial_channel_mix(x, xs, weights, 2) ** 2, (x, *xs)
    )


# What is needed -> which of x and the candidates (0 normalised, 1 plain) are kept.
@pytest.mark.parametrize(
    ("need", "kept", "kept_pooled"),
    [
        ({"x"}, set(), {"x"}),
        ({"w"}, {"x0", "x1"}, {"x0", "x1"}),
        ({"x0"}, {"x0"}, {"x0"}),
        ({"x1"}, set(), set()),
        ({"x", "x0", "x1"}, {"x0"}, {"x", "x0"}),
        ({"x", "w", "x0", "x1"}, {"x0", "x1"}, {"x", "x0", "x1"}),
        (set(), set(), set()),
    ],
    ids=lambda s: "-".join(sorted(s)) or "nothing",
)
def test_gradients_of_a_subset(need, kept, kept_pooled, device):
    for halved, expected in ((False, kept), (True, kept_pooled)):
        x, xs, weights = make_case((2, (2, 3, 4, 4)), 4, halved, device=device)
        rest = x.detach()[:, 3:].clone().requires_grad_()
        norms = [nn.BatchNorm2d(3, affine=False).to(device), None]
        leaves = dict(zip(("x", "w", "x0", "x1"), [rest, weights, *xs], strict=True))
        grad = cases.make((2, 12, 4, 4), device=device, seed=9)
        y = partial_channel_mix(rest, xs, weights, 4, norms)
        full = torch.autograd.grad(y, list(leaves.values()), grad)
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in need)
        y, addresses = cases.saved_by(lambda: partial_channel_mix(rest, xs, weights, 4, norms))  # noqa: B023
        candidates = {name for name in ("x", "x0", "x1") if leaves[name].data_ptr() in addresses}
        assert candidates == expected
        assert y.requires_grad == bool(need)
        if need:
            y.backward(grad)
        for (name, leaf), g in zip(leaves.items(), full, strict=True):
            assert (leaf.grad is not None) == (name in need), name
            if name in need:
                assert_bitwise(leaf.grad, g, name)


@pytest.mark.parametrize("halved", [False, True], ids=["same", "halved"])
@pytest.mark.parametrize("view", cases.VIEWS)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_any_view_of_the_input(layout, view, halved, device, tolerances):
    x, xs, weights = make_case((2, (2, 3, 4, 5)), 4, halved, torch.float32, layout, device)
    x = cases.laid_out(x.detach(), view).requires_grad_()
    y, _ = check_against_torch(x, xs, weights, 4, [None, None], tolerances)
    assert_layout(y, layout)


@pytest.mark.parametrize("halved", [False, True], ids=["same", "halved"])
@pytest.mark.parametrize("first", cases.VIEWS)
def test_any_views_of_the_candidates(first, halved, device, tolerances):
    views = [first, *cases.VIEWS]
    x, xs, weights = make_case((len(views), (2, 3, 4, 5)), 4, halved, device=device)
    xs = [cases.laid_out(t.detach(), v).requires_grad_() for t, v in zip(xs, views, strict=True)]
    norms = cases.make_norms(len(xs), 3, device)
    y, (_, _, *grads) = check_against_torch(x, xs, weights, 4, norms, tolerances)
    layout = "channels_last" if first in ("channels_last", "sliced_last") else "contiguous"
    assert_layout(y, layout)
    assert_layout(grads[0], layout)


@pytest.mark.parametrize("view", ["expanded", "transposed", "sliced", "sliced_last", "misaligned"])
@pytest.mark.parametrize("halved", [False, True], ids=["same", "halved"])
def test_any_view_as_upstream_gradient(halved, view, device, tolerances):
    x, xs, weights = make_case((3, (2, 3, 4, 5)), 4, halved, torch.float32, "channels_last", device)
    norms = cases.make_norms(3, 3, device)
    grad = cases.make((2, 12, 4, 5), torch.float32, view, device, seed=50)
    check_against_torch(x, xs, weights, 4, norms, tolerances, grad=grad)


def test_gradients_keep_the_format_where_no_input_was_kept(device):
    x, xs, _ = make_case((2, (2, 3, 4, 5)), 4, False, torch.float32, "channels_last", device)
    rest = x.detach()[:, 3:].contiguous(memory_format=torch.channels_last).requires_grad_()
    y = partial_channel_mix(rest, xs, [0.5, 0.5], 4)
    for g in torch.autograd.grad(y.sum(), [rest, *xs]):
        assert_layout(g, "channels_last")


@pytest.mark.parametrize("halved", [False, True], ids=["same", "halved"])
@pytest.mark.parametrize(
    "dtypes",
    [("float32", "bfloat16", "bfloat16"), ("bfloat16", "float32", "bfloat16"),
     ("float64", "float32", "float16")],
    ids="-".join,
)  # fmt: skip
def test_mixed_dtypes_and_formats(dtypes, halved, device, tolerances):
    x, xs, weights = make_case((2, (2, 3, 4, 5)), 4, halved, device=device)
    layouts = itertools.cycle(["contiguous", "channels_last"])
    x, *xs = (
        cases.laid_out(t.detach().to(getattr(torch, d)), v).requires_grad_()
        for t, d, v in zip([x, *xs], dtypes, layouts, strict=False)
    )
    norms = [nn.BatchNorm2d(3).to(device), None]
    y, _ = check_against_torch(x, xs, weights, 4, norms, tolerances)
    assert y.dtype == torch.promote_types(x.dtype, torch.promote_types(xs[0].dtype, xs[1].dtype))
    assert_layout(y, "channels_last")


def test_autocast(device, tolerances):
    conv = nn.Conv2d(3, 3, 1).to(device)
    x = cases.make((2, 12, 8, 8), device=device)
    weights = torch.tensor([0.25, 0.5], device=device, requires_grad=True)
    norm = nn.BatchNorm2d(3, affine=False).to(device)
    exact_norm = cases.doubled([norm])[0]
    with torch.autocast(device.type, torch.bfloat16):
        candidates = [conv(x[:, :3]), x[:, :3]]
        y = partial_channel_mix(x, candidates, weights, 4, [norm, None])
    assert candidates[0].dtype == torch.bfloat16 and y.dtype == torch.float32
    exact = [c.detach().double() for c in candidates]
    expected = stock(x.double(), exact, weights.double(), 4, [exact_norm, None])
    assert_near(y, expected, tolerances)
    y.square().sum().backward()
    assert weights.grad.dtype == conv.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_two_runs_give_the_same_bits(layout, device):
    results = []
    for _ in range(2):
        x, xs, weights = make_case((3, (9, 5, 31, 17)), 4, True, torch.float32, layout, device)
        norms = cases.make_norms(3, 5, device)
        y = partial_channel_mix(x, xs, weights, 4, norms)
        leaves = [x, weights, *xs]
        results.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    for a, b in zip(*results, strict=True):
        assert_bitwise(a, b)


# --- refusals


def ones(*shape):
    return torch.ones(shape)


@pytest.mark.parametrize(
    ("x", "xs", "k", "parts"),
    [
        (ones(2, 8, 4, 4), [ones(2, 8, 4, 4)], 1, ("k of at least 2", "got 1")),
        (ones(2, 8, 4), [ones(2, 2, 4)], 4, ("x and xs of shape (N, C, H, W)", "[2, 8, 4]")),
        (ones(2, 9, 4, 4), [ones(2, 2, 4, 4)], 4,
         ("x with 8 channels", "its last 6", "k = 4", "[2, 2, 4, 4]", "[2, 9, 4, 4]")),
        (ones(3, 8, 4, 4), [ones(2, 2, 4, 4)], 4, ("got [3, 8, 4, 4]",)),
        (ones(2, 8, 8, 8), [ones(2, 2, 3, 4)], 4, ("8x8 like x or of half that", "got 3x4")),
        (ones(2, 8, 8, 8), [ones(2, 2, 4, 8)], 4, ("8x8 like x or of half that", "got 4x8")),
        (ones(2, 8, 4, 4), [ones(2, 2, 4, 4), ones(2, 2, 4, 5)], 4, ("xs[1] is [2, 2, 4, 5]",)),
        (ones(2, 8, 4, 4), [], 4, ("1 to 64 tensors in xs", "got 0")),
    ],
)  # fmt: skip
def test_refuses(x, xs, k, parts):
    with raises(ValueError, "partial_channel_mix: expected", *parts):
        partial_channel_mix(x, xs, [1.0] * len(xs), k)


def test_refuses_an_input_of_another_kind():
    xs = [ones(2, 2, 4, 4)]
    with raises(TypeError, "partial_channel_mix: expected", "x ", "int64"):
        partial_channel_mix(ones(2, 8, 4, 4).long(), xs, [1.0], 4)
    with raises(ValueError, "partial_channel_mix: expected", "x on cpu", "meta"):
        partial_channel_mix(ones(2, 8, 4, 4).to("meta"), xs, [1.0], 4)
    with raises(ValueError, "partial_channel_mix: expected one norm (or None) per input"):
        partial_channel_mix(ones(2, 8, 4, 4), xs, [1.0], 4, [None, None])
    with raises(ValueError, "partial_channel_mix: expected one weight per input"):
        partial_channel_mix(ones(2, 8, 4, 4), xs, [1.0, 2.0], 4)
    with raises(ValueError, "partial_channel_mix: expected more than 1 value per channel"):
        one = [ones(1, 2, 1, 1)]
        partial_channel_mix(ones(1, 8, 1, 1), one, [1.0], 4, [nn.BatchNorm2d(2)])


def test_the_raw_ops_check_their_arguments(device):
    op = torch.ops.fastnas.partial_channel_mix
    x, rest, w = (ones(*s).to(device) for s in ((2, 2, 4, 4), (2, 6, 4, 4), (1,)))
    tail = ([0], [0.0], [0], [], [], [], [])
    with raises(ValueError, "partial_channel_mix: expected k of 2 to 2^20, but got 1"):
        op(rest, [x], w, 1, *tail)
    with raises(ValueError, "partial_channel_mix: expected rest of shape [2, 4, H, W]"):
        op(rest, [x], w, 3, *tail)
    with raises(ValueError, "partial_channel_mix: expected outputs of 4x4", "got 4x3"):
        op(rest, [x[..., :3]], w, 4, *tail)
    backward = torch.ops.fastnas.partial_channel_mix_backward
    grad, table = ones(2, 8, 4, 4).to(device), ones(1, 2).to(device)
    norm = ([0], [0.0], [0], [], [])
    with raises(ValueError, "partial_channel_mix_backward: expected rest of shape", "maxima"):
        args = (grad, x.new_empty(0), [8, 8], [x], w, 4, table, table, *norm)
        backward(*args, True, [1], True)
    with raises(ValueError, "partial_channel_mix_backward: expected grad", "divisible by k = 3"):
        backward(grad, rest, [4, 4], [x], w, 3, table, table, *norm, True, [1], True)
