# SPDX-License-Identifier: Apache-2.0
"""sparse_connections: worked examples, the reference in float64, and what the method promises."""

from __future__ import annotations

import itertools
import math

import ops_cases as cases
import pytest
import torch
from ops_cases import assert_bitwise, assert_near

from fastnas.ops import reference, sparse_connections

DARTS = (2, 3, 4, 5)
NORMS = ("edge", "node")
F64 = torch.float64
# (in_degrees, K): a lane of a warp has two candidates, a warp every eighth edge.
SIZES = ((DARTS, 7), ((1,), 1), ((3,), 4), ((1, 1), 64), ((20, 1, 9), 33), ((8, 2), 32))


def make_case(in_degrees=DARTS, count=7, dtype=F64, device="cpu", scale=1.0):
    """Logits, thresholds that leave some of the connections, and an upstream gradient."""
    shape = (sum(in_degrees), count)
    alpha = (scale * cases.draw(shape, 1)).to(device, dtype).requires_grad_()
    beta = (cases.draw((len(in_degrees),), 2) - 0.5).to(device, dtype).requires_grad_()
    return alpha, beta, cases.draw(shape, 3).to(device, dtype)


def check_against_reference(alpha, beta, grad, in_degrees, tolerances, **options):
    weights = sparse_connections(alpha, beta, in_degrees, **options)
    exact = cases.in_double([alpha, beta])
    arguments = (options.get("tau", 1.0), options.get("norm") == "node")
    expected = reference.sparse_connections(
        *exact, in_degrees, *arguments, options.get("detach_max", False)
    )
    assert weights.dtype == alpha.dtype
    assert_near(weights, expected, tolerances, "weights")
    # As seen in double: whether a rounded weight is 0 is not the question.
    if alpha.dtype in (torch.float64, torch.float32):
        assert weights.eq(0).equal(expected.eq(0))
    grads = torch.autograd.grad(weights, [alpha, beta], grad)
    expected_grads = torch.autograd.grad(expected, exact, grad.double())
    for name, a, e in zip(("alpha", "beta"), grads, expected_grads, strict=True):
        assert_near(a, e, tolerances, name)
    return weights, grads


@pytest.mark.parametrize("detach_max", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
def test_matches_reference(dtype, size, norm, detach_max, device, tolerances):
    case = make_case(*size, dtype, device)
    options = {"norm": norm, "detach_max": detach_max, "tau": 0.7}
    weights, _ = check_against_reference(*case, size[0], tolerances, **options)
    if size == (DARTS, 7):  # it is about some that stay and some that go
        assert 14 < weights.count_nonzero().item() < 98


@pytest.mark.parametrize("norm", NORMS)
def test_any_stride(norm, device, tolerances):
    alpha, beta, grad = make_case(device=device)
    for view in (
        alpha.detach().t().contiguous().t(),
        torch.cat([alpha.detach()] * 2, 1)[:, 3:10],
        alpha.detach()[:1].expand(14, 7),
        torch.cat([alpha.detach().flatten()[:1], alpha.detach().flatten()])[1:].view(14, 7),
    ):
        leaf, wide = view.requires_grad_(), beta.detach().repeat_interleave(2)[::2].requires_grad_()
        check_against_reference(leaf, wide, grad, DARTS, tolerances, norm=norm)
        runs = []
        for upstream in (grad, grad.t().contiguous().t()):
            again = sparse_connections(leaf, wide, DARTS, norm=norm)
            runs.append(torch.autograd.grad(again, leaf, upstream)[0])
        assert_bitwise(*runs)


def test_a_cell_without_nodes(device):
    alpha = torch.zeros(0, 5, device=device, requires_grad=True)
    beta = torch.zeros(0, device=device, requires_grad=True)
    weights = sparse_connections(alpha, beta, ())
    grads = torch.autograd.grad(weights.sum(), [alpha, beta])
    assert [t.shape for t in (weights, *grads)] == [(0, 5), (0, 5), (0,)]


def test_dtypes_may_differ(device, tolerances):
    for dtypes in ((torch.bfloat16, torch.float32), (torch.float32, torch.float64)):
        for first, second in (dtypes, dtypes[::-1]):
            alpha, beta, grad = make_case(device=device)
            alpha = alpha.detach().to(first).requires_grad_()
            beta = beta.detach().to(second).requires_grad_()
            weights, (dalpha, dbeta) = check_against_reference(
                alpha, beta, grad.to(first), DARTS, tolerances
            )
            assert (weights.dtype, dalpha.dtype, dbeta.dtype) == (first, first, second)


def test_autocast_changes_nothing(device):
    alpha, beta, _ = make_case(dtype=torch.float32, device=device)
    expected = sparse_connections(alpha, beta, DARTS)
    with torch.autocast(device.type, torch.bfloat16):
        assert_bitwise(sparse_connections(alpha, beta, DARTS), expected)


# --- a node with three edges of four operations, worked by hand

ALPHA = ((1.0, 0.5, 0.0, -0.5), (0.2, 0.1, 0.0, -0.1), (0.0, 2.0, -1.0, 0.0))
GRAD = ((0.3, -0.2, 0.5, 0.1), (-0.4, 0.6, 0.2, 0.0), (0.7, -0.1, 0.2, -0.3))
#: By (beta, norm): weights, loss = <GRAD, weights>, dloss/dbeta, dloss/dalpha.
WORKED = {
    (-1.0, "edge"): (
        ((0.7765567023, 0.2234432977, 0, 0),
         (0.4585787586, 0.3103458317, 0.1762191328, 0.0548562769), (0, 1, 0, 0)),
        0.1262981733,
        -0.0719996484,
        ((0.2362319182, -0.2830286189, 0.0291290430, 0.0176676577),
         (-0.7609497352, 0.7209120807, 0.1421797555, -0.1021421010),
         (0.0100940340, -0.0239014555, 0.0037133876, 0.0100940340)),
    ),
    (-1.0, "node"): (
        ((0.2365582373, 0.0680663144, 0, 0),
         (0.0799676204, 0.0541185504, 0.0307293447, 0.0095659161), (0, 0.5209940167, 0, 0)),
        0.0118847576,
        -0.0443899631,
        None,
    ),
    (0.0, "edge"): (((1, 0, 0, 0), (0,) * 4, (0, 1, 0, 0)), 0.2, 0.0, ((0,) * 4,) * 3),
    (0.0, "node"): (
        ((0.1678868738, 0, 0, 0), (0,) * 4, (0, 0.8321131262, 0, 0)),
        -0.0328452505,
        -0.1105422767,
        ((0.1813826100, -0.0918667352, -0.0557199915, -0.0337958832), (0,) * 4,
         (0.0341137080, -0.0807771480, 0.0125497319, 0.0341137080)),
    ),
    (3.0, "edge"): (((0,) * 4, (0,) * 4, (0, 1, 0, 0)), -0.1, 0.0, ((0,) * 4,) * 3),
}  # fmt: skip


def worked(beta, device, **options):
    alpha = torch.tensor(ALPHA, dtype=F64, device=device, requires_grad=True)
    beta = torch.tensor([beta], dtype=F64, device=device, requires_grad=True)
    weights = sparse_connections(alpha, beta, (3,), **options)
    loss = (weights * torch.tensor(GRAD, dtype=F64, device=device)).sum()
    return (weights, loss, *torch.autograd.grad(loss, [beta, alpha]))


@pytest.mark.parametrize(("beta", "norm"), WORKED)
def test_worked_examples(beta, norm, device):
    for actual, expected in zip(worked(beta, device, norm=norm), WORKED[beta, norm], strict=True):
        if expected is not None:
            flat = torch.tensor(expected, dtype=F64, device=device).view(actual.shape)
            torch.testing.assert_close(actual.detach(), flat, rtol=0, atol=2e-10)


def test_worked_example_with_the_max_taken_as_constant(device):
    free, constant = (worked(-1.0, device, detach_max=detach) for detach in (False, True))
    assert_bitwise(constant[0], free[0])
    assert_bitwise(constant[2], free[2])
    assert_bitwise(constant[3][:2], free[3][:2])  # the largest is on the third edge
    assert constant[3][2].eq(0).all() and free[3][2].ne(0).all()


def test_no_gradient_where_every_edge_has_one_connection_or_none(device):
    _, _, dbeta, dalpha = worked(0.0, device)
    assert dbeta.eq(0).all() and dalpha.eq(0).all()


# --- what holds for any numbers


def spread_of_betas(device):
    return [
        torch.full((4,), b, dtype=F64, device=device) for b in (-900, -40, -3, 0, 2, 9, 80, 900)
    ]


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=cases.ids)
@pytest.mark.parametrize("norm", NORMS)
def test_every_node_keeps_a_connection_and_fewer_the_larger_beta(norm, dtype, device):
    alpha, _, _ = make_case(device=device, scale=2.0)
    kept = []
    for beta in [*spread_of_betas(device), torch.full((4,), math.inf, dtype=F64, device=device)]:
        weights = sparse_connections(alpha.to(dtype), beta.to(dtype), DARTS, norm=norm)
        assert weights.isfinite().all() and weights.ge(0).all()
        kept.append(weights.gt(0))
    for more, fewer in itertools.pairwise(kept):
        assert (fewer <= more).all()
    assert kept[0].all()
    p = torch.softmax(alpha.detach().to(dtype).double(), 1)
    first = 0
    for degree in DARTS:  # at the end the largest of a node alone, and those equal to it
        rows = p[first : first + degree]
        assert kept[-1][first : first + degree].equal(rows == rows.max())
        first += degree


def test_weights_sum_to_one_by_edge_or_by_node(device):
    alpha, beta, _ = make_case(device=device, scale=2.0)
    sums = sparse_connections(alpha, beta, DARTS).sum(1)
    dead = sparse_connections(alpha, beta, DARTS).eq(0).all(1)
    assert dead.any() and not dead.all()
    assert sums[dead].eq(0).all()
    torch.testing.assert_close(sums[~dead], torch.ones_like(sums[~dead]))
    for rows in sparse_connections(alpha, beta, DARTS, norm="node").split(DARTS):
        assert rows.sum().item() == pytest.approx(1.0)


def at_the_end_of_an_edge(norm, shift, device):
    """Weights of two edges of which the second is about to lose its only connection."""
    ratio = torch.tensor([0.7, 0.5], dtype=F64, device=device)  # largest p of either edge
    alpha = torch.stack([ratio, (1 - ratio) / 2, (1 - ratio) / 2], 1).log()
    t = 0.5 / 0.7 + shift
    beta = torch.tensor([math.log(t / (1 - t))], dtype=F64, device=device)
    return sparse_connections(alpha, beta, (2,), norm=norm)[1, 0].item()


def test_the_last_connection_of_an_edge_goes_in_one_step_or_gradually(device):
    assert at_the_end_of_an_edge("edge", -1e-9, device) == 1.0
    assert at_the_end_of_an_edge("edge", 1e-9, device) == 0.0
    assert 0.0 < at_the_end_of_an_edge("node", -1e-9, device) < 1e-8
    assert at_the_end_of_an_edge("node", 1e-9, device) == 0.0


def test_a_low_temperature_prunes_no_edge(device):
    alpha, beta, _ = make_case(device=device)
    assert sparse_connections(alpha, beta, DARTS).eq(0).all(1).any()
    cold = sparse_connections(alpha, beta, DARTS, tau=1e-3)
    assert cold.gt(0).sum(1).eq(1).all()


def test_small_logits_start_with_everything(device):
    alpha, beta, _ = make_case(device=device, scale=5e-4)
    weights = sparse_connections(alpha, torch.zeros_like(beta), DARTS)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 7), rtol=0.01, atol=0)
    late = sparse_connections(alpha, torch.full_like(beta, 8.0), DARTS)
    assert late.eq(0).sum() > 49


def test_among_equal_ones_the_first_is_the_max(device):
    alpha = torch.zeros(3, 4, dtype=F64, device=device)
    alpha[1:, 1:3] = 1.0  # four times the largest
    alpha[0, 0] = 0.5
    alpha.requires_grad_()
    beta = torch.tensor([-1.0], dtype=F64, device=device)
    grad = cases.draw((3, 4), 5).double().to(device)
    for norm in NORMS:
        free, constant = (
            torch.autograd.grad(
                sparse_connections(alpha, beta, (3,), norm=norm, detach_max=detach), alpha, grad
            )[0]
            for detach in (False, True)
        )
        through = free - constant
        assert through[0].abs().max() < 1e-12 and through[2].abs().max() < 1e-12
        # dp of the largest alone, through its softmax.
        p = torch.softmax(alpha.detach()[1], 0)
        shape = p * (torch.eye(4, dtype=F64, device=device)[1] - p[1])
        factor = through[1, 1] / shape[1]
        assert factor.abs() > 1e-3
        torch.testing.assert_close(through[1], factor * shape)


# --- infinities and NaN


@pytest.mark.parametrize("dead", [-math.inf, math.nan])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("detach_max", [False, True])
def test_dead_connections(dead, norm, detach_max, device, tolerances):
    alpha, beta, grad = make_case(device=device)
    where = torch.zeros(14, 7, dtype=torch.bool, device=device)
    where[0, 3], where[2, :6], where[3], where[5:9] = True, True, True, True
    dying = alpha.detach().masked_fill(where, dead).requires_grad_()
    weights, (dalpha, dbeta) = check_against_reference(
        dying, beta, grad, DARTS, tolerances, norm=norm, detach_max=detach_max
    )
    for t in (weights, dalpha):
        assert t.isfinite().all() and t[where].eq(0).all()
    assert weights[5:9].eq(0).all() and weights[9:].gt(0).any()
    assert dbeta.isfinite().all() and dbeta[2] == 0
    other = alpha.detach().masked_fill(where, -1e4)
    other[3], other[5:9] = weights.new_full((7,), -math.inf), -math.inf
    assert_bitwise(sparse_connections(other, beta, DARTS, norm=norm), weights)


@pytest.mark.parametrize("norm", NORMS)
def test_infinite_logits_take_all(norm, device, tolerances):
    alpha, beta, grad = make_case(device=device)
    infinite = alpha.detach().clone()
    infinite[0, 2], infinite[3, 1], infinite[3, 4] = math.inf, math.inf, math.inf
    weights, grads = check_against_reference(
        infinite.requires_grad_(), beta, grad, DARTS, tolerances, norm=norm
    )
    assert all(t.isfinite().all() for t in (weights, *grads))
    assert weights[0].count_nonzero() == 1 and weights[0, 2] > 0
    assert weights[3].count_nonzero() == 2 and weights[3, 1] == weights[3, 4]


def test_huge_differences_of_logits(device):
    alpha = torch.tensor([[1e30, 0.0, -1e30], [0.0, 1.0, 2.0]], device=device, requires_grad=True)
    beta = torch.zeros(1, device=device, requires_grad=True)
    for tau in (1.0, 1e-3, 1e3):
        weights = sparse_connections(alpha, beta, (2,), tau)
        grads = torch.autograd.grad(weights.square().sum(), [alpha, beta])
        assert weights[0].tolist() == [1, 0, 0]
        assert all(t.isfinite().all() for t in (weights, *grads))


@pytest.mark.parametrize("beta", [-math.inf, -900.0, 60.0, 80.0, 900.0, math.inf])
@pytest.mark.parametrize("norm", NORMS)
def test_thresholds_at_their_ends(beta, norm, device, tolerances):
    alpha, betas, grad = make_case(device=device)
    betas = torch.full_like(betas, beta).requires_grad_()
    weights, (dalpha, dbeta) = check_against_reference(
        alpha, betas, grad, DARTS, tolerances, norm=norm
    )
    assert all(t.isfinite().all() for t in (weights, dalpha, dbeta))


def test_a_diverged_threshold_shows(device):
    alpha, beta, _ = make_case(device=device)
    beta = beta.detach()
    beta[1] = math.nan
    weights = sparse_connections(alpha.detach(), beta, DARTS)
    assert weights[2:5].isnan().all() and not weights[:2].isnan().any()
    assert not weights[5:].isnan().any()


# --- derivatives


@pytest.mark.parametrize("detach_max", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_second_derivatives(norm, detach_max, device):
    alpha, beta, _ = make_case((2, 3), 4, device=device)

    def function(alpha, beta):
        return sparse_connections(alpha, beta, (2, 3), 0.8, norm, detach_max)

    weights = function(alpha, beta)
    assert weights.eq(0).any() and (weights.gt(0).sum(1) > 1).any()
    if not detach_max:  # a constant in the backward alone: not what differences see
        assert torch.autograd.gradcheck(function, (alpha, beta))
        assert torch.autograd.gradgradcheck(function, (alpha, beta))
        return
    (first,) = torch.autograd.grad(weights.square().sum(), alpha, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), beta)
    exact = reference.sparse_connections(alpha, beta, (2, 3), 0.8, norm == "node", True)
    (first,) = torch.autograd.grad(exact.square().sum(), alpha, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), beta)
    torch.testing.assert_close(second, expected)
    assert second.ne(0).any()


@pytest.mark.parametrize("leaf", [0, 1])
def test_gradient_of_one_alone(leaf, device):
    tensors = make_case(device=device)[:2]
    both = torch.autograd.grad(sparse_connections(*tensors, DARTS).square().sum(), tensors)
    mine = [t.detach().requires_grad_(k == leaf) for k, t in enumerate(tensors)]
    for create_graph in (False, True):
        y = sparse_connections(*mine, DARTS).square().sum()
        (alone,) = torch.autograd.grad(y, mine[leaf], create_graph=create_graph)
        torch.testing.assert_close(alone.detach(), both[leaf])


def test_two_calls_give_the_same_bits(device):
    alpha, beta, grad = make_case((20, 9), 33, device=device, dtype=torch.float32)
    runs = []
    for _ in range(2):
        weights = sparse_connections(alpha, beta, (20, 9), norm="node")
        runs.append([weights, *torch.autograd.grad(weights, [alpha, beta], grad)])
    for a, b in zip(*runs, strict=True):
        assert_bitwise(a, b)
