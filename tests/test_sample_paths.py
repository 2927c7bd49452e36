# SPDX-License-Identifier: Apache-2.0
"""sample_paths: the draws of the reference, the right frequencies, differentiable probabilities."""

from __future__ import annotations

import itertools
import math

import ops_cases as cases
import pytest
import torch
from ops_cases import assert_bitwise, assert_near, raises

from fastnas.ops import reference, sample_paths

SEEDS = (0, 1, 7, 2**31, 2**32 + 5, 2**63, 2**63 + 11, 2**64 - 1)
STEPS = (0, 1, 1000, 2**32 + 1, 2**63 + 3, 2**64 - 1)


def make_logits(edges, count, dtype=torch.float32, device="cpu", scale=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(edges, count, generator=generator)).to(device, dtype)


def check_against_reference(logits, seed, step, counts, two, tolerances):
    paths = sample_paths(logits, seed, step, counts, two)
    active, inactive = reference.sample_path_indices(logits, counts, seed, step, two)
    assert paths.active.dtype == paths.inactive.dtype == torch.int64
    assert_bitwise(paths.active, active)
    assert_bitwise(paths.inactive, inactive)
    assert paths.probs.dtype == logits.dtype
    expected = reference.path_probabilities(logits.double(), counts, active, inactive)
    assert_near(paths.probs, expected, tolerances)
    return paths


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("shape", [(14, 8), (21, 7), (1, 1), (5, 1), (3, 64), (64, 2), (0, 5)])
def test_draws_what_the_reference_draws(shape, two, device, tolerances):
    for k, (seed, step) in enumerate(itertools.product(SEEDS, STEPS)):
        logits = make_logits(*shape, device=device, seed=k, scale=[0.001, 1.0, 5.0, 40.0][k % 4])
        check_against_reference(logits, seed, step, None, two, tolerances)


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
def test_any_dtype_and_stride(dtype, two, device, tolerances):
    logits = make_logits(21, 7, dtype, device)
    for view in (
        logits,
        logits.t().contiguous().t(),
        logits[::2, 1:],
        logits[:1].expand(9, 7),
        torch.cat([logits.flatten()[:1], logits.flatten()])[1:].view(21, 7),
    ):
        paths = check_against_reference(view, 3, 4, None, two, tolerances)
        again = sample_paths(view.contiguous(), 3, 4, None, two)
        assert_bitwise(again.active, paths.active)


@pytest.mark.parametrize("two", [False, True])
def test_ragged_edges(two, device, tolerances):
    logits = make_logits(40, 7, device=device)
    counts = torch.arange(40, device=device) % 8  # from none to all
    for step in range(10):
        paths = check_against_reference(logits, 5, step, counts, two, tolerances)
        assert (paths.active < counts).all() and (paths.inactive < counts).all()
        assert ((paths.active < 0) == (counts == 0)).all()
        if two:
            assert ((paths.inactive < 0) == (counts < 2)).all()
        beyond = torch.arange(7, device=device) >= counts.unsqueeze(1)
        other = sample_paths(logits.masked_fill(beyond, -torch.inf), 5, step, None, two)
        for a, b in zip(paths, other, strict=True):
            assert_bitwise(a, b)


def test_counts_may_be_strided(device):
    logits = make_logits(6, 5, device=device)
    counts = torch.tensor([[5, 0], [1, 0], [2, 0], [3, 0], [4, 0], [5, 0]], device=device)[:, 0]
    paths = sample_paths(logits, 1, 2, counts, True)
    assert_bitwise(paths.active, sample_paths(logits, 1, 2, counts.contiguous(), True).active)


@pytest.mark.parametrize("dead", [-math.inf, math.nan])
@pytest.mark.parametrize("two", [False, True])
def test_dead_candidates_are_never_drawn(dead, two, device, tolerances):
    logits = make_logits(300, 6, torch.float64, device).requires_grad_()
    where = torch.rand(300, 6, generator=torch.Generator().manual_seed(3)).to(device) < 0.5
    where[0], where[1], where[1, 4] = True, True, False  # none alive, one alive
    dying = logits.masked_fill(where, dead)
    paths = check_against_reference(dying, 1, 2, None, two, tolerances)
    alive = (~where).sum(1)
    assert (alive == 0).sum() >= 2 and (alive == 1).sum() >= 5
    assert ((paths.active < 0) == (alive == 0)).all()
    chosen = torch.where(paths.active < 0, 0, paths.active).unsqueeze(1)
    assert not (where.gather(1, chosen).squeeze(1) & (alive > 0)).any()
    assert paths.probs.isfinite().all()
    assert paths.probs[alive == 0].eq(0).all()
    assert (paths.active[1].item(), paths.inactive[1].item()) == (4, -1)
    assert paths.probs[1].tolist() == [1.0, 0.0]
    (gradient,) = torch.autograd.grad(paths.probs.square().sum(), [logits])
    assert gradient.isfinite().all()
    assert gradient[where].eq(0).all() and gradient[alive <= 1].eq(0).all()


@pytest.mark.parametrize("two", [False, True])
def test_infinite_logits_take_all(two, device, tolerances):
    logits = make_logits(200, 6, torch.float64, device)
    logits[:100, 2] = math.inf
    logits[:50, 5] = math.inf
    paths = check_against_reference(logits.requires_grad_(), 1, 2, None, two, tolerances)
    assert paths.probs.isfinite().all()
    if not two:
        assert set(paths.active[:50].tolist()) == {2, 5} and paths.active[50:100].eq(2).all()
        assert paths.probs[:50, 0].eq(0.5).all() and paths.probs[50:100, 0].eq(1).all()
    (gradient,) = torch.autograd.grad(paths.probs.square().sum(), [logits])
    assert gradient.isfinite().all() and gradient[50:100, 2].eq(0).all()


def test_huge_differences_of_logits(device):
    for far in (40.0, 1e3, 1e30):
        logits = torch.tensor([[far, 0.0, -far]] * 50, device=device)
        one, pair = sample_paths(logits, 1, 2), sample_paths(logits, 1, 2, two=True)
        assert one.active.eq(0).all() and one.probs[:, 0].eq(1).all()
        assert pair.active.eq(0).all(), "the active one of a pair goes by its probability"
        assert pair.inactive.gt(0).all() and pair.probs.isfinite().all()
        assert pair.probs.sum(1).sub(1).abs().max() < 1e-6


def test_a_live_candidate_is_never_impossible(device):
    """Of two candidates the pair is both, however unlikely the second."""
    pair = sample_paths(torch.tensor([[0.0, -1e4]] * 20, device=device), 0, 0, two=True)
    assert pair.active.eq(0).all() and pair.inactive.eq(1).all()


def test_the_first_words_of_philox_decide(device):
    """With 64 equal logits the top six bits of the first word are the active candidate."""
    logits = torch.zeros(9, 64, device=device)
    for seed, step in itertools.product(SEEDS, STEPS):
        counter = torch.zeros(9, 4, dtype=torch.int64)
        counter[:, 0] = torch.arange(9)
        counter[:, 2], counter[:, 3] = step & 0xFFFFFFFF, step >> 32
        words = reference.philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
        active = sample_paths(logits, seed, step).active
        assert_bitwise(active.cpu(), words[:, 0] >> 26)
    first = sample_paths(logits[:1], 0, 0).active.item()
    assert first == 0x6627E8D5 >> 26  # published: counter 0, key 0


# --- frequencies


def chi_square(observed, expected):
    """Pearson's statistic over cells of which each expects at least five."""
    assert expected.min() >= 5
    return ((observed - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("by", ["edge", "step", "seed"])
def test_frequencies_follow_the_softmax(by, device):
    logits = torch.tensor([0.5, -1.0, 1.5, 0.0, -2.0], device=device)
    p = torch.softmax(logits.double(), 0).cpu()
    if by == "edge":
        draws = sample_paths(logits.expand(20000, 5), 123, 4).active.cpu()
    else:
        rows = logits.expand(10, 5)
        pairs = [(123, i) if by == "step" else (i, 123) for i in range(300)]
        draws = torch.cat([sample_paths(rows, *pair).active.cpu() for pair in pairs])
    observed = torch.bincount(draws, minlength=5).double()
    assert chi_square(observed, p * len(draws)) < 23.5  # 4 degrees of freedom: p = 10^-4


def pair_probability(p, a, b):
    """Drawing {a, b} in two draws without replacement (ProxylessNAS' two-path mode)."""
    return p[a] * p[b] * (1 / (1 - p[a]) + 1 / (1 - p[b]))


def test_pair_probabilities_of_the_formula():
    p = torch.softmax(torch.tensor([0.2, -0.1, 0.4], dtype=torch.float64), 0).tolist()
    golden = {(0, 1): 0.24003336, (0, 2): 0.44699062, (1, 2): 0.31297602}
    for pair, value in golden.items():
        assert pair_probability(p, *pair) == pytest.approx(value, abs=1e-8)


def test_frequencies_of_pairs_and_of_the_active_one(device):
    logits = torch.tensor([0.5, -1.0, 1.5, 0.0], device=device)
    p = torch.softmax(logits.double(), 0).tolist()
    paths = sample_paths(logits.expand(40000, 4), 77, 1, two=True)
    cells = [(a, b) for a in range(4) for b in range(4) if a != b]
    code = (paths.active * 4 + paths.inactive).cpu()
    observed = torch.bincount(code, minlength=16).double()
    assert observed.sum() == sum(observed[a * 4 + b] for a, b in cells), "two different ones"
    observed = torch.stack([observed[a * 4 + b] for a, b in cells])
    expected = torch.tensor(
        [40000 * pair_probability(p, a, b) * p[a] / (p[a] + p[b]) for a, b in cells],
        dtype=torch.float64,
    )
    assert chi_square(observed, expected) < 37.4  # 11 degrees of freedom: p = 10^-4


def test_every_bit_of_seed_and_step_matters(device):
    logits = torch.zeros(200, 8, device=device)
    keys = [(0, 0)]
    keys += [(1 << bit, 0) for bit in (0, 13, 31, 32, 50, 63)]
    keys += [(0, 1 << bit) for bit in (0, 13, 31, 32, 50, 63)]
    draws = [tuple(sample_paths(logits, *key).active.tolist()) for key in keys]
    assert len(set(draws)) == len(keys)
    for a, b in itertools.combinations(draws, 2):  # unrelated draws agree on one edge in eight
        assert sum(x == y for x, y in zip(a, b, strict=True)) < 60


def test_an_edge_is_drawn_for_itself(device):
    logits = make_logits(30, 6, device=device)
    every = sample_paths(logits, 1, 2, two=True)
    fewer = sample_paths(logits[:11], 1, 2, two=True)
    assert_bitwise(fewer.active, every.active[:11])
    shifted = sample_paths((logits * 8).round() / 8 + 4.0, 1, 2, two=True)
    assert_bitwise(shifted.active, sample_paths((logits * 8).round() / 8, 1, 2, two=True).active)


def test_two_calls_give_the_same_bits_and_leave_the_generator_alone(device):
    logits = make_logits(30, 6, device=device)
    state = torch.get_rng_state()
    first, second = (sample_paths(logits, 9, 9, two=True) for _ in range(2))
    assert torch.get_rng_state().equal(state)
    for a, b in zip(first, second, strict=True):
        assert_bitwise(a, b)


def test_tolist(device):
    paths = sample_paths(make_logits(4, 3, device=device), 0, 1, two=True)
    assert paths.tolist() == (paths.active.tolist(), paths.inactive.tolist())


# --- probabilities


def test_probabilities_of_one_path_and_of_a_pair(device):
    logits = make_logits(50, 6, torch.float64, device)
    p = torch.softmax(logits, 1)
    one = sample_paths(logits, 1, 2)
    torch.testing.assert_close(one.probs[:, 0], p.gather(1, one.active.unsqueeze(1)).squeeze(1))
    assert one.inactive.eq(-1).all() and one.probs[:, 1].eq(0).all()
    two = sample_paths(logits, 1, 2, two=True)
    a, b = (p.gather(1, i.unsqueeze(1)).squeeze(1) for i in (two.active, two.inactive))
    torch.testing.assert_close(two.probs, torch.stack([a / (a + b), b / (a + b)], 1))


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_gradcheck_and_gradgradcheck(ragged, two, device):
    logits = make_logits(5, 4, torch.float64, device, scale=1.0).requires_grad_()
    counts = torch.tensor([4, 1, 2, 0, 3], device=device) if ragged else None

    def probs(x):
        return sample_paths(x, 3, 1, counts, two).probs

    paths = sample_paths(logits, 3, 1, counts, two)
    assert paths.probs.requires_grad
    assert not paths.active.requires_grad and not paths.inactive.requires_grad
    assert torch.autograd.gradcheck(probs, (logits,))
    assert torch.autograd.gradgradcheck(probs, (logits,))


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("shape", [(9, 5), (3, 64), (40, 33), (2, 1), (0, 4)], ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
def test_gradient_of_the_reference(dtype, shape, two, device, tolerances):
    edges, count = shape
    logits = make_logits(edges, count, dtype, device)
    logits[1:2, :2], logits[2:3, count // 2 :] = -math.inf, math.nan
    counts = (torch.arange(edges, device=device) * 7 + 3) % (count + 1)
    for view in (logits, logits.t().contiguous().t()):
        leaf = view.detach().requires_grad_()
        paths = sample_paths(leaf, 3, 1, counts, two)
        grad = cases.draw((edges, 2), 5).to(device, dtype)
        (gradient,) = torch.autograd.grad(paths.probs, [leaf], grad)
        exact = leaf.detach().double().requires_grad_()
        expected = reference.path_probabilities(exact, counts, paths.active, paths.inactive)
        assert_near(gradient, *torch.autograd.grad(expected, [exact], grad.double()), tolerances)
        assert gradient.dtype == dtype


def test_gradient_stays_within_the_pair(device):
    logits = make_logits(6, 5, torch.float64, device).requires_grad_()
    paths = sample_paths(logits, 3, 1, two=True)
    (gradient,) = torch.autograd.grad(paths.probs[:, 0].sum(), [logits])
    q = paths.probs.detach().prod(1)
    expected = torch.zeros_like(gradient)
    expected.scatter_(1, paths.active.unsqueeze(1), q.unsqueeze(1))
    expected.scatter_(1, paths.inactive.unsqueeze(1), -q.unsqueeze(1))
    torch.testing.assert_close(gradient, expected)


def test_no_gradient_where_none_is_asked_for(device):
    assert not sample_paths(make_logits(3, 4, device=device), 0, 0).probs.requires_grad


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ((torch.zeros(3), 0, 0), ValueError, ("shape (E, K) with K of 1 to 64", "got [3]")),
        ((torch.zeros(3, 65), 0, 0), ValueError, ("K of 1 to 64", "got [3, 65]")),
        ((torch.zeros(3, 0), 0, 0), ValueError, ("K of 1 to 64", "got [3, 0]")),
        ((torch.zeros(3, 2).long(), 0, 0), TypeError, ("floating-point logits", "int64")),
        ((torch.zeros(3, 2), -1, 0), ValueError, ("seed in [0, 2^64)", "got -1")),
        ((torch.zeros(3, 2), 2**64, 0), ValueError, ("seed in [0, 2^64)", str(2**64))),
        ((torch.zeros(3, 2), 0, -1), ValueError, ("step in [0, 2^64)", "got -1")),
        ((torch.zeros(3, 2), 0, 0, torch.ones(2).long()), ValueError,
         ("counts of shape [3] on cpu", "got [2]")),
        ((torch.zeros(3, 2), 0, 0, torch.ones(3)), TypeError, ("counts of dtype int64", "float32")),
        ((torch.zeros(3, 2), 0, 0, torch.tensor([1, 3, 0])), ValueError, ("counts in [0, 2]", "3")),
        ((torch.zeros(3, 2), 0, 0, torch.tensor([1, -1, 0])), ValueError, ("counts in [0, 2]",)),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) and isinstance(value[0], str) else "",
)  # fmt: skip
def test_refuses(arguments, error, parts):
    with raises(error, "sample_paths: expected", *parts):
        sample_paths(*arguments)


def test_the_raw_op_checks_its_arguments(device):
    op, logits = torch.ops.fastnas.sample_paths, torch.zeros(3, 2, device=device)
    with raises(ValueError, "sample_paths: expected logits of shape (E, K)", "[3]"):
        op(logits[:, 0], None, 0, 0, False)
    with raises(ValueError, "sample_paths: expected counts of shape [3]", "[2]"):
        op(logits, torch.ones(2, dtype=torch.int64, device=device), 0, 0, False)
    with raises(TypeError, "sample_paths: expected counts of dtype int64", "Float"):
        op(logits, torch.ones(3, device=device), 0, 0, False)


def test_the_raw_backward_checks_its_arguments(device):
    op = torch.ops.fastnas.sample_paths_backward
    logits, grad = torch.zeros(3, 2, device=device), torch.zeros(3, 2, device=device)
    index = torch.zeros(3, dtype=torch.int64, device=device)
    with raises(ValueError, "sample_paths_backward: expected grad of shape [3, 2]", "[2, 2]"):
        op(grad[1:], logits, None, index, index)
    with raises(TypeError, "sample_paths_backward: expected active of dtype int64", "Float"):
        op(grad, logits, None, grad[:, 0], index)
    with raises(ValueError, "sample_paths_backward: expected inactive of shape [3]", "[2]"):
        op(grad, logits, None, index, index[1:])


def test_the_raw_backward_counts_candidates():
    """On the CPU alone: elsewhere the values would have to be waited for."""
    logits, index = torch.zeros(3, 2), torch.full((3,), 2)
    with raises(ValueError, "expected active and inactive below the 2 candidates of edge 0"):
        torch.ops.fastnas.sample_paths_backward(logits, logits, None, index, index - 2)
