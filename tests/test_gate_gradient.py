# SPDX-License-Identifier: Apache-2.0
"""gate_gradient against the reference in float64, published numbers, and its invariants."""

from __future__ import annotations

import ops_cases as cases
import pytest
import torch
from ops_cases import assert_all_near, assert_bitwise, assert_near, raises

from fastnas.ops import gate_gradient, reference


def make_case(count, shape, dtype=torch.float32, layout="contiguous", device="cpu"):
    outputs, weights = cases.make_inputs(count, shape, dtype, layout, device)
    grad_output = cases.make(shape, dtype, layout, device, seed=77).requires_grad_()
    probs = torch.softmax(3 * weights.detach(), 0).requires_grad_()
    return grad_output, outputs, probs


def check_against_reference(grad_output, outputs, probs, tolerances):
    given = [o for o in outputs if o is not None]
    dalpha = gate_gradient(grad_output, outputs, probs)
    exact_g, exact_p, *exact = cases.in_double([grad_output, probs, *given])
    items = iter(exact)
    full = [None if o is None else next(items) for o in outputs]
    expected = reference.gate_gradient(exact_g, full, exact_p)
    assert dalpha.dtype == probs.dtype
    assert_near(dalpha, expected, tolerances, "dalpha")
    upstream = torch.linspace(-1, 1, len(outputs), device=probs.device)
    leaves, exact_leaves = [grad_output, probs, *given], [exact_g, exact_p, *exact]
    grads = torch.autograd.grad(dalpha, leaves, upstream.to(dalpha.dtype))
    expected_grads = torch.autograd.grad(expected, exact_leaves, upstream.double())
    names = ["grad_output", "probs", *(f"output {k}" for k in range(len(given)))]
    assert_all_near(grads, expected_grads, tolerances, names)
    return dalpha


@pytest.mark.parametrize("shape", [(1, (1, 1, 1, 1)), *cases.SHAPES], ids=cases.ids)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
def test_matches_reference(dtype, layout, shape, device, tolerances):
    check_against_reference(*make_case(*shape, dtype, layout, device), tolerances)


@pytest.mark.parametrize("view", cases.VIEWS)
def test_any_views_in_one_call(view, device, tolerances):
    _, _, probs = make_case(len(cases.VIEWS), (1, 1, 1, 1), device=device)
    outputs = [
        cases.make((2, 5, 7, 9), layout=v, device=device, seed=k).requires_grad_()
        for k, v in enumerate(cases.VIEWS)
    ]
    grad_output = cases.make((2, 5, 7, 9), layout=view, device=device, seed=77).requires_grad_()
    check_against_reference(grad_output, outputs, probs, tolerances)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 2, 3, 4)], ids=str)
def test_any_number_of_dimensions(shape, device, tolerances):
    check_against_reference(*make_case(3, shape, device=device), tolerances)


def test_mixed_dtypes(device, tolerances):
    grad_output, outputs, probs = make_case(3, (2, 3, 5, 7), device=device)
    dtypes = (torch.bfloat16, torch.float32, torch.float64)
    narrow = [o.detach().to(d).requires_grad_() for o, d in zip(outputs, dtypes, strict=True)]
    check_against_reference(grad_output, narrow, probs, tolerances)
    bf16 = grad_output.detach().bfloat16().requires_grad_()
    check_against_reference(bf16, outputs, probs, tolerances)
    wide = gate_gradient(grad_output, outputs, probs.double())
    assert wide.dtype == torch.float64
    assert_near(wide.float(), gate_gradient(grad_output, outputs, probs), tolerances)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=cases.ids)
def test_probabilities_in_half_precision(dtype, device, tolerances):
    grad_output, outputs, probs = make_case(3, (2, 3, 5, 7), device=device)
    probs = probs.detach().to(dtype).requires_grad_()
    assert check_against_reference(grad_output, outputs, probs, tolerances).dtype == dtype


def test_autocast_changes_nothing(device):
    grad_output, outputs, probs = make_case(3, (2, 3, 5, 7), device=device)
    expected = gate_gradient(grad_output, outputs, probs)
    with torch.autocast(device.type, torch.bfloat16):
        assert_bitwise(gate_gradient(grad_output, outputs, probs), expected)


@pytest.mark.parametrize("absent", [{0}, {2}, {0, 1, 2}, {0, 1, 2, 3}, {4}])
def test_none_stands_for_an_output_of_zeros(absent, device, tolerances):
    grad_output, outputs, probs = make_case(4, (2, 3, 5, 7), device=device)
    zeroed = [o if k not in absent else torch.zeros_like(o) for k, o in enumerate(outputs)]
    outputs = [o if k not in absent else None for k, o in enumerate(outputs)]
    expected = gate_gradient(grad_output, zeroed, probs)
    assert_bitwise(gate_gradient(grad_output, outputs, probs), expected)
    if len(absent) < 4:
        check_against_reference(grad_output, outputs, probs, tolerances)
    else:
        assert expected.eq(0).all()


# --- numbers of the paper's formula

ALPHA = (0.2, -0.1, 0.4)
DOTS = (1.0, -2.0, 0.5)


def golden(device):
    alpha = torch.tensor(ALPHA, dtype=torch.float64, device=device)
    outputs = [torch.tensor([g], dtype=torch.float64, device=device) for g in DOTS]
    return alpha, outputs, torch.ones(1, dtype=torch.float64, device=device)


def test_golden_values_of_all_paths(device):
    alpha, outputs, one = golden(device)
    p = torch.softmax(alpha, 0)
    assert p.tolist() == pytest.approx([0.33758454, 0.25008878, 0.41232669], abs=1e-8)
    dalpha = gate_gradient(one, outputs, p)
    assert dalpha.tolist() == pytest.approx([0.32287587, -0.51107400, 0.18819813], abs=1e-8)


def test_golden_values_of_two_paths(device):
    alpha, outputs, one = golden(device)
    expected = {(0, 1): 0.73337494, (0, 2): 0.12375829, (1, 2): -0.58750928}
    chance = {(0, 1): 0.24003336, (0, 2): 0.44699062, (1, 2): 0.31297602}
    mean = torch.zeros(3, dtype=torch.float64)
    for (a, b), value in expected.items():
        q = torch.softmax(alpha[[a, b]], 0)
        dalpha = gate_gradient(one, [outputs[a], outputs[b]], q)
        assert dalpha.tolist() == pytest.approx([value, -value], abs=1e-8)
        mean[[a, b]] += chance[a, b] * dalpha.cpu()
    assert mean.tolist() == pytest.approx([0.23135324, -0.35991076, 0.12855752], abs=1e-8)


def test_is_the_gradient_of_the_softmax_mixture(device, tolerances):
    """<g, sum_j p_j o_j> has the same gradient in the logits, by autograd."""
    grad_output, outputs, _ = make_case(5, (2, 3, 5, 7), torch.float64, device=device)
    alpha = torch.randn(5, dtype=torch.float64, device=device, requires_grad=True)
    p = torch.softmax(alpha, 0)
    mixture = (grad_output * sum(w * o for w, o in zip(p, outputs, strict=True))).sum()
    (expected,) = torch.autograd.grad(mixture, [alpha])
    assert_near(gate_gradient(grad_output, outputs, p.detach()), expected, tolerances)


def test_sums_to_zero_and_knows_no_common_part(device, tolerances):
    grad_output, outputs, probs = make_case(7, (4, 3, 5, 7), torch.float64, device=device)
    dalpha = gate_gradient(grad_output, outputs, probs)
    assert dalpha.sum().abs() < 1e-12 * dalpha.abs().max().clamp(min=1)
    moved = [o + 3.0 for o in outputs]
    assert_near(gate_gradient(grad_output, moved, probs), dalpha, tolerances)
    order = [3, 1, 6, 0, 2, 5, 4]
    again = gate_gradient(grad_output, [outputs[k] for k in order], probs[order])
    assert_near(again, dalpha[order], tolerances)


def test_one_candidate_has_no_choice(device):
    grad_output, outputs, _ = make_case(1, (2, 3, 5, 7), device=device)
    assert gate_gradient(grad_output, outputs, torch.ones(1, device=device)).item() == 0


def test_long_sums_keep_their_digits(device):
    """A million products of one sign: a running sum in float32 would lose three digits."""
    g = torch.full((1_000_003,), 0.1, device=device)
    outputs = [torch.full_like(g, 0.3), torch.full_like(g, 0.7)]
    halves = torch.tensor([0.5, 0.5], dtype=torch.float64, device=device)
    dalpha = gate_gradient(g, outputs, halves)
    exact = 0.25 * g.numel() * g[0].double() * (outputs[0][0].double() - outputs[1][0].double())
    assert dalpha[0].item() == pytest.approx(exact.item(), rel=1e-5)


# --- derivatives


def test_gradcheck_and_gradgradcheck(device):
    grad_output, outputs, probs = make_case(3, (2, 3), torch.float64, device=device)

    def function(g, p, *o):
        return gate_gradient(g, [o[0], None, o[1]], p)

    inputs = (grad_output, probs, *outputs[:2])
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("need", ["g", "p", "o1", "g o0", ""])
def test_gradients_of_a_subset(need, device):
    grad_output, outputs, probs = make_case(2, (2, 3, 4, 4), device=device)
    leaves = {"g": grad_output, "p": probs, "o0": outputs[0], "o1": outputs[1]}
    upstream = torch.tensor([0.5, -2.0], device=device)
    dalpha = gate_gradient(grad_output, outputs, probs)
    full = torch.autograd.grad(dalpha, list(leaves.values()), upstream)
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in need)
    dalpha, kept = cases.saved_by(lambda: gate_gradient(grad_output, outputs, probs))
    assert dalpha.requires_grad == bool(need)
    if need:
        dalpha.backward(upstream)
    else:
        assert not kept
    for (name, leaf), g in zip(leaves.items(), full, strict=True):
        assert (leaf.grad is not None) == (name in need), name
        if name in need:
            assert_bitwise(leaf.grad, g, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.ids)
def test_two_runs_give_the_same_bits(dtype, device):
    first, second = (
        gate_gradient(*make_case(4, (5, 17, 33, 31), dtype, "channels_last", device))
        for _ in range(2)
    )
    assert_bitwise(first, second)


def ones(*shape, **kwargs):
    return torch.ones(shape, **kwargs)


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ((ones(2, 3), [ones(2, 3)] * 3, ones(2)), ValueError,
         ("one probability per output", "3 outputs", "probs of shape [2]")),
        ((ones(2, 3), [ones(2, 3)] * 2, ones(1, 2)), ValueError, ("probs of shape [1, 2]",)),
        ((ones(2, 3), [], ones(0)), ValueError, ("1 to 64 tensors in outputs", "got 0")),
        ((ones(2, 3), [ones(2, 3)] * 65, ones(65)), ValueError, ("1 to 64", "got 65")),
        ((ones(2, 3), [ones(2, 3), ones(3, 2)], ones(2)), ValueError,
         ("one shape", "outputs[1] is [3, 2]")),
        ((ones(2, 3), [None, ones(3, 2)], ones(2)), ValueError, ("outputs[1] is [3, 2]",)),
        ((ones(2, 3), [ones(3, 2)] * 2, ones(2)), ValueError,
         ("outputs of shape [2, 3]", "like grad_output", "got [3, 2]")),
        ((ones(2, 3), ones(2, 3), ones(2)), TypeError, ("outputs to be a list of tensors",)),
        ((ones(2, 3), [ones(2, 3).long()], ones(1)), TypeError, ("outputs[0] is torch.int64",)),
        ((ones(2, 3).long(), [ones(2, 3)], ones(1)), TypeError,
         ("floating-point grad_output", "int64")),
        ((ones(2, 3), [ones(2, 3)], ones(1).long()), TypeError, ("floating-point probs", "int64")),
        ((ones(2, 3), [ones(2, 3)], ones(1, device="meta")), ValueError,
         ("probs on cpu like grad_output", "meta")),
        ((ones(2, 3), [ones(2, 3, device="meta")], ones(1)), ValueError, ("on cpu", "meta")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) and isinstance(value[0], str) else "",
)  # fmt: skip
def test_refuses(arguments, error, parts):
    with raises(error, "gate_gradient: expected", *parts):
        gate_gradient(*arguments)


def test_the_raw_op_checks_its_arguments(device):
    op, x, p = torch.ops.fastnas.gate_gradient, ones(2, 3, device=device), ones(2, device=device)
    with raises(ValueError, "gate_gradient: expected 1 outputs, as many as present says", "got 2"):
        op(x, [x, x], p, [1, 0])
    with raises(ValueError, "gate_gradient: expected outputs of shape [2, 3]", "[3, 2]"):
        op(x, [x.t()], p, [1, 0])
    with raises(ValueError, "gate_gradient: expected one weight per input", "[2]"):
        op(x, [x], p, [1])
