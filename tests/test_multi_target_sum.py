# SPDX-License-Identifier: Apache-2.0
"""multi_target_sum against the stock loops of each target in float64, and what it promises."""

from __future__ import annotations

import copy

import ops_cases as cases
import pytest
import torch
from ops_cases import assert_all_near, assert_bitwise, assert_layout, assert_near, raises
from torch import nn

from fastnas.ops import mixed_batch_norm, mixed_sum, multi_target_sum

TARGETS = 3
KINDS = ("plain", "normed")


def make_case(
    count, shape, dtype=torch.float32, layout="contiguous", device="cpu", targets=TARGETS
):
    """Inputs, weights of which some are 0, and norms of all kinds."""
    xs, _ = cases.make_inputs(count, shape, dtype, layout, device)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    weights = cases.draw((targets, count), 1000).div(count**0.5).to(device, acc)
    weights[:, ::5] = 0  # of these, no target uses any
    weights[1:, 1::2] = 0
    return xs, weights.requires_grad_(), cases.make_norms(count, shape[1], device)


def stock(xs, weights, norms=None):
    """Every target by the loop; a norm runs once."""
    norms = [None] * len(xs) if norms is None else norms
    terms = [x if norm is None else norm(x) for x, norm in zip(xs, norms, strict=True)]
    return [cases.stock(terms, w) for w in weights]


def check_against_torch(xs, weights, norms, tolerances, grads=None, training=None):
    """Forward, all gradients and all buffers; ``grads``: None where a target has none."""
    exact_norms = None if norms is None else cases.doubled(norms)
    affine = [] if norms is None else cases.affine_parameters(norms)
    ys = multi_target_sum(xs, weights, norms, training)
    if grads is None:
        grads = [cases.like_output(y, seed=90 + t) for t, y in enumerate(ys)]
    used = [t for t, g in enumerate(grads) if g is not None]
    leaves = [weights, *xs, *affine]
    given = torch.autograd.grad([ys[t] for t in used], leaves, [grads[t] for t in used])

    *exact, w = cases.in_double([*xs, weights])
    if training is not None and norms is not None:
        for norm in exact_norms:
            if norm is not None:
                norm.train(training)
    expected = stock(exact, w, exact_norms)
    exact_affine = [] if norms is None else cases.affine_parameters(exact_norms)
    expected_grads = torch.autograd.grad(
        [expected[t] for t in used],
        [w, *exact, *exact_affine],
        [grads[t].double() for t in used],
    )
    names = ["dw", *(f"dxs[{k}]" for k in range(len(xs)))]
    names += [f"affine {k}" for k in range(len(affine))]
    assert_all_near(ys, expected, tolerances, [f"ys[{t}]" for t in range(len(ys))])
    assert_all_near(given, expected_grads, tolerances, names)
    assert [g.dtype for g in given] == [t.dtype for t in leaves]
    if norms is not None:
        cases.assert_buffers_near(norms, exact_norms, tolerances)
    return ys, given


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", cases.SHAPES, ids=cases.ids)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
def test_matches_torch_and_keeps_the_format(dtype, layout, shape, kind, device, tolerances):
    count, size = shape
    xs, weights, norms = make_case(count, size, dtype, layout, device)
    ys, (_, *dxs) = check_against_torch(
        xs, weights, norms if kind == "normed" else None, tolerances
    )
    for t in (*ys, *dxs[:count]):
        assert t.dtype == dtype
        if t.numel():
            assert_layout(t, layout)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("targets", [1, 2, 4, 5, 9, 64])
def test_any_number_of_targets(targets, layout, kind, device, tolerances):
    for dtype in (torch.float32, torch.bfloat16):
        xs, weights, norms = make_case(5, (2, 8, 3, 8), dtype, layout, device, targets)
        check_against_torch(xs, weights, norms if kind == "normed" else None, tolerances)


@pytest.mark.parametrize("first", range(7))
def test_each_kind_of_norm_in_the_first_place(first, device, tolerances):
    xs, weights, _ = make_case(3, (3, 5, 7, 4), layout="channels_last", device=device)
    weights = (weights.detach() + 0.5).requires_grad_()
    check_against_torch(xs, weights, cases.make_norms(3, 5, device, first), tolerances)


@pytest.mark.parametrize("training", [True, False])
def test_training_overrides_the_modules(training, device, tolerances):
    xs, weights, norms = make_case(7, (3, 5, 7, 4), device=device)
    check_against_torch(xs, weights, norms, tolerances, training=training)


@pytest.mark.parametrize("kind", KINDS)
def test_one_target_is_the_mixed_op(kind, device, tolerances):
    xs, weights, norms = make_case(7, (2, 3, 5, 7), torch.float64, device=device, targets=1)
    (y,) = multi_target_sum(xs, weights, copy.deepcopy(norms) if kind == "normed" else None)
    expected = (
        mixed_batch_norm(xs, weights[0], cases.doubled(norms))
        if kind == "normed"
        else mixed_sum(xs, weights[0])
    )
    assert_near(y, expected, tolerances)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", cases.VIEWS)
def test_any_views_in_one_call(first, kind, device, tolerances):
    views = [first, *cases.VIEWS]
    shape = (2, 5, 7, 9)
    _, weights, norms = make_case(len(views), shape, device=device)
    xs = [
        cases.make(shape, torch.float32, view, device, seed=k).requires_grad_()
        for k, view in enumerate(views)
    ]
    grads = [cases.make(shape, torch.float32, views[-1 - t], device, seed=50 + t) for t in range(3)]
    ys, _ = check_against_torch(xs, weights, norms if kind == "normed" else None, tolerances, grads)
    for y in ys:
        assert_layout(y, cases.layout_after(first))


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 2, 3, 4)], ids=str)
def test_any_number_of_dimensions_without_norms(shape, device, tolerances):
    xs, _ = cases.make_inputs(3, shape, device=device)
    weights = cases.draw((2, 3), 4).to(device).requires_grad_()
    check_against_torch(xs, weights, None, tolerances)


def test_mixed_dtypes(device, tolerances):
    xs, weights, norms = make_case(3, (2, 3, 5, 7), device=device)
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    xs = [x.detach().to(d).requires_grad_() for x, d in zip(xs, dtypes, strict=True)]
    for n in (None, norms):
        ys, _ = check_against_torch(xs, weights, n, tolerances)
        assert {y.dtype for y in ys} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("absent", [(0,), (1, 2), (0, 1)])
def test_targets_without_a_gradient(absent, kind, device, tolerances):
    xs, weights, norms = make_case(7, (2, 3, 5, 7), device=device)
    norms = norms if kind == "normed" else None
    grads = [
        None if t in absent else cases.make((2, 3, 5, 7), device=device, seed=t)
        for t in range(TARGETS)
    ]
    _, (dw, *_) = check_against_torch(xs, weights, norms, tolerances, grads)
    assert dw[list(absent)].eq(0).all() and dw.ne(0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_subset_of_gradients(kind, device):
    shape = (2, 3, 5, 7)
    xs, weights, norms = make_case(5, shape, device=device)
    norms = norms if kind == "normed" else None
    affine = [] if norms is None else cases.affine_parameters(norms)
    leaves = [weights, *xs, *affine]

    def gradients(wanted):
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(i in wanted)
        ys = multi_target_sum(xs, weights, norms)
        grads = [cases.make(shape, device=device, seed=50 + t) for t in range(TARGETS)]
        return torch.autograd.grad(ys, [leaves[i] for i in wanted], grads)

    everything = gradients(range(len(leaves)))
    for wanted in ([0], [1], [2, 4], [0, 3], list(range(1, 6)), list(range(6, len(leaves)))):
        if wanted:
            for i, g in zip(wanted, gradients(wanted), strict=True):
                torch.testing.assert_close(g, everything[i])


# --- inputs that are not used


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_an_input_of_weight_zero_leaves_no_trace(layout, kind, device):
    """Not even NaN, in the sums of those targets that do not use it."""
    shape = (2, 8, 3, 8)
    xs, _ = cases.make_inputs(3, shape, layout=layout, device=device)
    norms = None if kind == "plain" else [None, nn.BatchNorm2d(8).to(device), None]
    weights = torch.tensor([[1.0, 0.5, 0.0], [0.0, 2.0, 1.0], [0.0, 0.0, 0.0]], device=device)
    expected = multi_target_sum([xs[0], xs[1], torch.zeros_like(xs[2])], weights, norms)
    xs[2] = torch.full_like(xs[2], torch.nan).requires_grad_()
    ys = multi_target_sum(xs, weights, norms)
    assert_bitwise(ys[0], expected[0])
    assert ys[1].isnan().all()
    assert ys[2].eq(0).all()
    weights[1, 2] = 0
    ys = multi_target_sum(xs, weights, norms)
    assert ys[1].isfinite().all()
    (gradient,) = torch.autograd.grad(sum(y.sum() for y in ys), [xs[2]])
    assert gradient.eq(0).all()


def test_none_stands_for_a_candidate_that_did_not_run(device):
    shape = (2, 3, 5, 7)
    xs, weights, norms = make_case(7, shape, device=device)
    others = copy.deepcopy(norms)
    live, filled = [0, 2, 3, 6], [None] * 7
    for k in live:
        filled[k] = xs[k]
    ys = multi_target_sum(filled, weights, norms)
    expected = multi_target_sum([xs[k] for k in live], weights[:, live], [others[k] for k in live])
    for a, b in zip(ys, expected, strict=True):
        assert_bitwise(a, b)
    grads = torch.autograd.grad(
        sum(y.square().sum() for y in ys), [weights, *(xs[k] for k in live)]
    )
    assert grads[0][:, [1, 4, 5]].eq(0).all() and grads[0][:, live].ne(0).all()
    for k, (norm, other) in enumerate(zip(norms, others, strict=True)):
        if norm is not None:  # a norm that has not run has counted nothing
            for a, b in zip(norm.buffers(), other.buffers(), strict=True):
                assert_bitwise(a, b, str(k))


def test_what_is_kept_for_the_backward(device):
    shape = (2, 3, 5, 7)
    xs, weights, _ = make_case(3, shape, device=device)
    norms = [None, nn.BatchNorm2d(3, affine=False).to(device), None]
    _, kept = cases.saved_by(lambda: multi_target_sum(xs, weights, norms))
    assert {x.data_ptr() for x in xs} <= kept
    _, kept = cases.saved_by(lambda: multi_target_sum(xs, weights.detach(), norms))
    assert {x.data_ptr() for x in xs} & kept == {xs[1].data_ptr()}
    _, kept = cases.saved_by(lambda: multi_target_sum(xs, weights.detach()))
    assert not {x.data_ptr() for x in xs} & kept


# --- derivatives


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_and_gradgradcheck(kind, device):
    xs, weights, _ = make_case(4, (2, 2, 1, 2), torch.float64, "channels_last", device, 2)
    norms = [nn.BatchNorm2d(2, affine=False), None, nn.BatchNorm2d(2), nn.BatchNorm2d(2).eval()]
    norms = cases.on_device(norms, device, torch.float64) if kind == "normed" else None

    def function(w, *xs):
        return tuple(multi_target_sum(xs[:4], w, norms))

    inputs = (weights, *xs, *([] if norms is None else cases.affine_parameters(norms)))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_second_derivative_where_inputs_were_not_kept(device):
    xs, weights, _ = make_case(3, (2, 3, 2, 2), torch.float64, device=device)
    fixed = weights.detach()
    y = sum(y.square().sum() for y in multi_target_sum(xs, fixed))
    (first,) = torch.autograd.grad(y, [xs[1]], create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), [xs[2]])
    # y = sum_t (sum_k w_tk x_k)^2, so that d2y / dx_1 dx_2 = 2 sum_t w_t1 w_t2
    expected = 2 * (fixed[:, 1] * fixed[:, 2]).sum()
    torch.testing.assert_close(second, torch.full_like(second, expected.item()))


def test_two_calls_give_the_same_bits(device):
    runs = []
    for _ in range(2):
        xs, weights, norms = make_case(5, (3, 17, 12, 11), device=device)
        ys = multi_target_sum(xs, weights, norms)
        runs.append([*ys, *torch.autograd.grad(sum(y.sum() for y in ys), [weights, *xs])])
    for a, b in zip(*runs, strict=True):
        assert_bitwise(a, b)


# --- errors

X, W = torch.ones(2, 3, 4, 4), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ((X, W), TypeError, ("xs to be a list of tensors", "got one tensor")),
        (([], W[:, :0]), ValueError, ("1 to 64 tensors in xs", "got 0")),
        (([None] * 3, W), ValueError, ("1 to 64 tensors in xs", "got 0")),
        (([X, X], W), ValueError, ("weights of shape (T, 2)", "got [2, 3]")),
        (([X, None, X], W[:, :2]), ValueError, ("weights of shape (T, 3)", "got [2, 2]")),
        (([X] * 3, W[0]), ValueError, ("weights of shape (T, 3)", "got [3]")),
        (([X] * 3, W[:0]), ValueError, ("T of 1 to 64", "got [0, 3]")),
        (([X] * 3, W[:1].expand(65, 3)), ValueError, ("T of 1 to 64", "got [65, 3]")),
        (([X] * 3, W.long()), TypeError, ("floating-point tensor", "int64")),
        (([X] * 3, [[1.0] * 3]), TypeError, ("floating-point tensor", "list")),
        (([X, X[:1], X], W), ValueError, ("one shape", "xs[1]")),
        (([X, X.long(), X], W), TypeError, ("floating-point", "xs[1]", "int64")),
        (([X] * 3, W, [None] * 2), ValueError, ("one norm (or None) per input", "2 norms")),
        (([X] * 3, W, [nn.ReLU()] * 3), TypeError, ("norms[0]", "ReLU")),
        (([X[:1, :, :1, :1]] * 3, W, [nn.BatchNorm2d(3)] * 3), ValueError,
         ("more than 1 value per channel",)),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) and isinstance(value[0], str) else "",
)  # fmt: skip
def test_refuses(arguments, error, parts):
    with raises(error, "multi_target_sum: expected", *parts):
        multi_target_sum(*arguments)


def test_the_raw_ops_check_their_arguments(device):
    raw, back = torch.ops.fastnas.multi_target_sum, torch.ops.fastnas.multi_target_sum_backward
    x, w = X.to(device), W.to(device)
    tail = ([0] * 3, [0.0] * 3, [0] * 3, [], [])
    with raises(ValueError, "multi_target_sum: expected weights of shape (T, 3)", "[3]"):
        raw([x] * 3, w[0], *tail, [], [])
    with raises(ValueError, "multi_target_sum: expected kinds, eps and affine of one entry"):
        raw([x] * 3, w, [0], [0.0], [0], [], [], [], [])
    with raises(ValueError, "multi_target_sum: expected tensors of shape (N, C, ...)", "[2]"):
        raw([x[:, 0, 0, 0]] * 3, w, [1, 0, 0], *tail[1:], [], [])
    mean = w.new_empty(0)
    for grads, xs, need, parts in (
        ([x], [x] * 3, [1] * 3, ("one gradient per row of weights", "1 gradients", "[2, 3]")),
        ([x, x[:1]], [x] * 3, [1] * 3, ("all grads of one shape", "[1, 3, 4, 4]")),
        ([x, x.double()], [x] * 3, [1] * 3, ("all grads of one shape and dtype", "Double")),
        ([x, x], [x] * 2, [1] * 2, ("weights of shape (T, 2)", "[2, 3]")),
        ([x, x], [x, x[:1], x], [1] * 3, ("xs[1] of shape [2, 3, 4, 4]", "[1, 3, 4, 4]")),
        ([x, x], [x] * 3, [1] * 2, ("need_xs of one entry", "got 2")),
    ):
        with raises(ValueError, "multi_target_sum_backward: expected", *parts):
            back(grads, xs, w, mean, mean, *tail, need, True)
