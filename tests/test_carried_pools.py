# SPDX-License-Identifier: Apache-2.0
"""The gradients of pools that several sums read, each of which carries its own."""

from __future__ import annotations

import ops_cases as cases
import pytest
import torch
from ops_cases import raises
from source_cases import make_norm
from torch import nn

from fastnas.nn import carriers as carriers_file
from fastnas.nn.carriers import Carriers
from fastnas.nn.source import evaluate_source, make_recipe
from fastnas.ops.mixed_batch_norm import mix_apart
from fastnas.ops.pool_pair import run_pool_pair

F64 = torch.float64
NORMS = ("plain", "affine", "none", "affine evaluation")


def sums(x, stride, readers, carry, left_out=()):
    """For each reader a sum of both pools, its weights and its norms; of ``left_out`` no max."""
    outputs, carriers = run_pool_pair(x, stride, readers)
    if not carry:
        top, mean = nn.MaxPool2d(3, stride, 1)(x), nn.AvgPool2d(3, stride, 1, False, False)(x)
        outputs, carriers = [[top] * readers, [mean] * readers], []
    ys, leaves = [], []
    for r in range(readers):
        norms = [make_norm(NORMS[(r + k) % len(NORMS)], x.shape[1]) for k in range(2)]
        norms = [norm if norm is None else norm.to(x.dtype) for norm in norms]
        weights = torch.tensor([0.5 + r, -0.3], dtype=x.dtype, requires_grad=True)
        used = [k for k in range(2) if k or r not in left_out]
        ys.append(
            mix_apart(
                [outputs[k][r] for k in used],
                weights[used],
                [norms[k] for k in used],
                {i: carriers[k][r] for i, k in enumerate(used)} if carriers else {},
            )
        )
        leaves += [weights, *(p for k in used if norms[k] for p in norms[k].parameters())]
    return ys, leaves


def gradients(x, stride, readers, carry, read=None, **options):
    torch.manual_seed(0)
    ys, leaves = sums(x, stride, readers, carry, options.pop("left_out", ()))
    read = range(readers) if read is None else read
    loss = sum((ys[r] * cases.like_output(ys[r], r)).sum() + ys[r].pow(3).sum() for r in read)
    return loss, torch.autograd.grad(loss, [x, *leaves], allow_unused=True, **options)


def assert_near(found, expected, tolerance=1e-11):
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a is None) == (b is None), i
        if a is not None:
            assert (a - b).norm() <= tolerance * (b.norm() + 1), i


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size, stride", [((5, 6), 1), ((7, 4), 2), ((1, 1), 1), ((70, 40), 1)])
@pytest.mark.parametrize("channels", [1, 3, 8, 16, 20])
def test_the_same_gradients(channels, size, stride, layout):
    x = cases.make((3, channels, *size), F64, layout).requires_grad_()
    (_, found), (_, expected) = (gradients(x, stride, 4, carry) for carry in (True, False))
    assert found[0].stride() == x.stride()
    assert_near(found, expected)


def test_float32():
    x = cases.make((3, 16, 12, 12), torch.float32, "channels_last").requires_grad_()
    (_, found), (_, expected) = (gradients(x, 1, 3, carry) for carry in (True, False))
    assert_near(found, expected, 1e-5)


@pytest.mark.parametrize("read", [[0], [3], [1, 2], [0, 2, 3]])
def test_readers_without_a_gradient(read):
    x = cases.make((2, 4, 5, 5), F64).requires_grad_()
    both = [gradients(x, 1, 4, carry, read, left_out=(0, 2))[1] for carry in (True, False)]
    assert_near(*both)


@pytest.mark.parametrize("left_out", [(0,), (0, 1)])
def test_readers_of_one_pool_alone(left_out):
    x = cases.make((2, 4, 5, 5), F64).requires_grad_()
    assert_near(*(gradients(x, 2, 2, carry, left_out=left_out)[1] for carry in (True, False)))


def test_means_that_are_far_from_zero():
    """What readers carry refers to a centre, or the numbers of float32 would not be enough."""
    x = (cases.make((4, 8, 9, 9), F64) + 1e4).requires_grad_()
    expected = gradients(x, 1, 3, False)[1][0]
    assert_near(gradients(x, 1, 3, True)[1][:1], [expected], 1e-7)
    narrow = x.detach().float().requires_grad_()
    carried, written = (gradients(narrow, 1, 3, carry)[1][0] - expected for carry in (True, False))
    assert carried.norm() < 1.5 * written.norm()


def test_two_readers_with_one_gradient():
    """Sums that are added up get the same gradient, in the same memory."""
    x = cases.make((2, 5, 4, 4), F64).requires_grad_()
    results = []
    for carry in (True, False):
        ys, _ = sums(x, 1, 3, carry)
        results.append(torch.autograd.grad(ys[0] + ys[1] + ys[2], x, cases.like_output(ys[0])))
    assert_near(*results)


def test_the_second_derivative():
    x = cases.make((2, 3, 4, 4), F64).requires_grad_()
    results = []
    for carry in (True, False):
        loss, first = gradients(x, 1, 3, carry, create_graph=True)
        total = loss + sum(g.square().sum() for g in first if g is not None)
        results.append(torch.autograd.grad(total, x))
    assert_near(*results)


def test_written_over_before_the_backward():
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    ys, carriers = run_pool_pair(x, 1, 2)
    y = mix_apart([ys[0][1]], torch.ones(1), [None], {0: carriers[0][1]})
    with torch.no_grad():
        ys[0][0].zero_()  # the same memory
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_every_recipe_has_a_tensor_of_its_own(monkeypatch):
    monkeypatch.setattr(carriers_file, "_CARRIED_ELEMENTS", 1)
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    top, mean = nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1, False, False)
    edges = [[make_recipe([pool]) for pool in pools] for pools in ([top, mean], [mean], [top, top])]
    carriers = Carriers()
    xs = [y for ys in evaluate_source(x, edges, carriers=carriers) for y in ys]
    assert len({id(y) for y in xs}) == 5 and len({y.data_ptr() for y in xs}) == 2
    assert [*carriers.take(xs)] == [*range(5)] and not carriers.take(xs)
    plain = [y for ys in evaluate_source(x, edges) for y in ys]
    assert len({id(y) for y in plain}) == 2
    assert all(torch.equal(a, b) for a, b in zip(xs, plain, strict=True))


@pytest.mark.parametrize("channels", [3, 16])
def test_the_numbers_are_what_the_gradient_is_made_of(channels):
    """Each reader's with a centre of its own."""
    x = cases.make((2, channels, 5, 6), F64)
    top, mean, _ = torch.ops.fastnas.pool_pair(x, 1, False)
    numbers = [cases.make((4, channels), F64, seed=i) for i in range(5)]
    gradients = [cases.make(x.shape, F64, seed=10 + i) for i in range(5)]

    def total(y, rows):
        parts = [(g, n[:, :, None, None].unbind(0)) for g, n in rows]
        return sum(a * g + b * (y - centre) + c for g, (a, b, centre, c) in parts)

    rows = [*zip(gradients, numbers, strict=True)]
    written = total(top, rows[:3]), total(mean, rows[2:])
    expected = torch.ops.fastnas.pool_pair_backward(*written, x, [5, 6], 1)
    lists = gradients[:3], numbers[:3], gradients[2:], numbers[2:]
    found = torch.ops.fastnas.pool_pair_carried_backward(*lists, top, mean, x, 1)
    assert_near([found], [expected])


def test_the_raw_op_checks_its_arguments():
    x, n = torch.ones(2, 3, 4, 4), torch.ones(4, 3)
    op, name = torch.ops.fastnas.pool_pair_carried_backward, "pool_pair_carried_backward: expected"
    with raises(ValueError, f"{name} numbers, perhaps empty, for every gradient (1)"):
        op([x], [], [x], [n], x, x, x, 1)
    with raises(ValueError, f"{name} outputs and gradients of shape [2, 3, 4, 4]"):
        op([x], [n], [x[:, :2]], [n], x, x, x, 1)
    with raises(ValueError, f"{name} outputs and gradients of shape [2, 3, 4, 4]"):
        op([x], [n], [x], [n], x, x[..., :3], x, 1)
    with raises(ValueError, f"{name} outputs and gradients", "x's dtype"):
        op([x.double()], [n], [x], [n], x, x, x, 1)
    with raises(ValueError, f"{name} numbers of shape [4, 3]", "[3, 4]"):
        op([x], [n], [x], [n.t()], x, x, x, 1)
    with raises(ValueError, f"{name} stride 1 or 2, but got 3"):
        op([x], [n], [x], [n], x, x, x, 3)
