# SPDX-License-Identifier: Apache-2.0
"""What mixed_batch_norm leaves in the norms: exactly what calling them would have left."""

from __future__ import annotations

import copy

import ops_cases as cases
import pytest
import torch
from ops_cases import assert_near, raises
from torch import nn

from fastnas.ops import mixed_batch_norm, partial_channel_mix


@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None])
@pytest.mark.parametrize("affine", [True, False])
def test_running_statistics_end_where_batch_norm_leaves_them(momentum, affine, device, tolerances):
    norms = [nn.BatchNorm2d(3, momentum=momentum, affine=affine).to(device) for _ in range(2)]
    theirs = copy.deepcopy(norms)
    for step in range(4):
        xs = [3 * cases.make((2, 3, 4, 4), device=device, seed=10 * step + k) + k for k in range(2)]
        mixed_batch_norm(xs, [0.5, 0.5], norms)
        cases.stock(xs, [0.5, 0.5], theirs)
        cases.assert_buffers_near(norms, theirs, tolerances)
    assert norms[0].num_batches_tracked.item() == 4
    xs, weights = cases.make_inputs(2, (2, 3, 4, 4), device=device)
    for norm in (*norms, *theirs):
        norm.eval()
    y = mixed_batch_norm(xs, weights, norms)
    assert_near(y, cases.stock(xs, weights, theirs), tolerances)
    assert norms[0].num_batches_tracked.item() == 4, "evaluation counts no batch"


def test_norms_of_different_momentum_in_one_call(device, tolerances):
    norms = [nn.BatchNorm2d(3, momentum=m).to(device) for m in (0.1, None, 0.7)]
    theirs = copy.deepcopy(norms)
    for step in range(3):
        xs = [cases.make((2, 3, 4, 4), device=device, seed=10 * step + k) for k in range(3)]
        mixed_batch_norm(xs, [0.5] * 3, norms)
        cases.stock(xs, [0.5] * 3, theirs)
        cases.assert_buffers_near(norms, theirs, tolerances)


def test_statistics_are_updated_without_gradients_too(device, tolerances):
    norms = [nn.BatchNorm2d(3).to(device), nn.BatchNorm2d(3, momentum=None).to(device)]
    theirs = copy.deepcopy(norms)
    xs, weights = cases.make_inputs(2, (2, 3, 4, 4), device=device)
    with torch.no_grad():
        mixed_batch_norm(xs, weights, norms)
        cases.stock(xs, weights, theirs)
    cases.assert_buffers_near(norms, theirs, tolerances)
    mixed_batch_norm(xs, weights, norms).sum().backward()  # one update, not one more in backward
    cases.stock(xs, weights, theirs)
    cases.assert_buffers_near(norms, theirs, tolerances)


def test_an_empty_batch_counts_as_in_torch(device):
    norms = [nn.BatchNorm2d(3).to(device), nn.BatchNorm2d(3, momentum=None).to(device)]
    theirs = copy.deepcopy(norms)
    xs = [torch.randn(0, 3, 4, 4, device=device)] * 2
    y = mixed_batch_norm(xs, [0.5, 0.5], norms)
    assert y.shape == cases.stock(xs, [0.5, 0.5], theirs).shape
    for norm, other in zip(norms, theirs, strict=True):
        for (name, buffer), expected in zip(norm.named_buffers(), other.buffers(), strict=True):
            assert buffer.equal(expected), name


def test_frozen_norms_keep_their_statistics(device):
    norms = [nn.BatchNorm2d(3).to(device), nn.BatchNorm2d(3).to(device).eval()]
    before = copy.deepcopy(norms)
    xs, weights = cases.make_inputs(2, (2, 3, 4, 4), device=device)
    mixed_batch_norm(xs, weights, norms)
    assert not norms[0].running_mean.equal(before[0].running_mean)
    for buffer, old in zip(norms[1].buffers(), before[1].buffers(), strict=True):
        assert buffer.equal(old)


def test_a_replica_of_data_parallel_is_a_norm_like_others():
    (x,), weights = cases.make_inputs(1, (2, 3, 4, 5))
    norm = nn.BatchNorm2d(3)
    replica = norm._replicate_for_data_parallel()
    for name, t in norm.named_parameters():  # as torch.nn.parallel.replicate does
        setattr(replica, name, t.detach().clone())
    y = mixed_batch_norm([x], weights, [replica])
    assert torch.equal(y, mixed_batch_norm([x], weights, [copy.deepcopy(norm)]))


def test_tracking_switched_off_later_is_respected(device, tolerances):
    norm = nn.BatchNorm2d(3).to(device)
    norm.track_running_stats = False
    before = copy.deepcopy(norm)
    xs, weights = cases.make_inputs(1, (2, 3, 4, 4), device=device)
    y = mixed_batch_norm(xs, weights, [norm])
    assert_near(y, cases.stock(xs, weights, [copy.deepcopy(before)]), tolerances)
    assert norm.running_mean.equal(before.running_mean)
    assert norm.running_var.equal(before.running_var)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_norm_for_two_inputs_is_updated_twice(momentum, device, tolerances):
    norm = nn.BatchNorm2d(3, affine=False, momentum=momentum).to(device)
    other = copy.deepcopy(norm)
    xs, weights = cases.make_inputs(2, (2, 3, 4, 4), device=device)
    y = mixed_batch_norm(xs, weights, [norm, norm])
    assert_near(y, cases.stock(xs, weights, [other, other]), tolerances)
    cases.assert_buffers_near([norm], [other], tolerances)


def test_a_cumulative_average_without_a_counter_stays(device, tolerances):
    norm = nn.BatchNorm2d(3, momentum=None).to(device)
    norm.num_batches_tracked = None
    other = copy.deepcopy(norm)
    xs, weights = cases.make_inputs(1, (2, 3, 4, 4), device=device)
    y = mixed_batch_norm(xs, weights, [norm])
    assert_near(y, cases.stock(xs, weights, [other]), tolerances)
    for name in ("running_mean", "running_var"):
        assert getattr(norm, name).equal(getattr(other, name)), name


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("create_graph", [False, True])
def test_statistics_may_move_between_forward_and_backward(k, create_graph, device, tolerances):
    """A validation step in evaluation, a training step, then one backward over both."""
    norm = nn.BatchNorm2d(3).to(device)
    x, rest = (
        cases.make((2, c, 4, 4), device=device, seed=c).requires_grad_() for c in (3, 3 * k - 3)
    )
    w = torch.tensor([0.5], device=device, requires_grad=True)

    def forward():
        if k == 1:
            return mixed_batch_norm([x], w, [norm])
        return partial_channel_mix(rest, [x], w, k, [norm])

    def grads(y):
        return torch.autograd.grad(y.pow(3).sum(), [x, w, norm.weight], create_graph=create_graph)

    norm.eval()
    y = forward()
    expected = grads(forward())
    norm.train()
    forward()
    for a, b in zip(grads(y), expected, strict=True):
        assert_near(a, b, tolerances)


@pytest.mark.parametrize("shape", [(4, 3, 17, 19), (16, 5, 33, 9), (300, 4, 3, 3)], ids=str)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_statistics_of_a_large_mean(layout, shape, device):
    """Mean 10^4, deviation 1: the difference of two sums would lose all digits of the variance."""
    x = (cases.make(shape, torch.float64, layout, device) + 1e4).float()
    norm = nn.BatchNorm2d(shape[1], momentum=1.0).to(device)
    mixed_batch_norm([x], [1.0], [norm])
    mean, var = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3))
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(norm.running_var.double(), var, rtol=1e-5, atol=0)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False)])
def test_one_value_per_channel_is_refused_in_training(norm, device):
    norm = copy.deepcopy(norm).to(device)
    x = torch.randn(1, 3, 1, 1, device=device)
    with pytest.raises(ValueError, match="more than 1 value per channel when training"):
        copy.deepcopy(norm)(x)
    before = copy.deepcopy(norm.state_dict())
    with raises(ValueError, "mixed_batch_norm: expected more than 1 value per channel", "1, 3, 1"):
        mixed_batch_norm([x, x], [1.0, 1.0], [None, norm])
    for name, buffer in norm.named_buffers():
        assert buffer.equal(before[name]), name
    assert mixed_batch_norm([x], [1.0], [nn.BatchNorm2d(3).to(device).eval()]).shape == x.shape


#: Of tasks with thousands of images, with a few, and with part of one; rows of channels.
UNLIKE = [(8192, 1, 1, 2), (1024, 4, 2, 2), (83, 4, 7, 7), (2, 2, 90, 97), (64, 16, 3, 3)]


@pytest.mark.parametrize("value", [1234.567, 3.7, 3e5])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("shape", UNLIKE, ids=lambda s: "_".join(map(str, s)))
def test_statistics_of_data_whose_start_is_unlike_the_rest(shape, layout, value, device):
    """Deviations are taken from the mean of the first values; no choice of them may cancel."""
    for noise in (0.0, 1.0):
        x = noise * cases.draw(shape, 3)
        x[0, :, :1] += value
        x = cases.laid_out(x.float(), layout).to(device)
        norm = nn.BatchNorm2d(shape[1], momentum=1.0).to(device)
        y = mixed_batch_norm([x], [1.0], [norm])
        assert y.isfinite().all()
        var, mean = torch.var_mean(x.double(), dim=(0, 2, 3))
        torch.testing.assert_close(norm.running_var.double(), var, rtol=5e-4, atol=0)
        assert ((norm.running_mean.double() - mean).abs() <= 2e-5 * var.sqrt()).all()


@pytest.mark.parametrize("position", [0, -1])
def test_infinity_does_not_depend_on_where_it_is(position, device):
    if device.type != "cpu":
        pytest.skip("kernels on a GPU leave NaN for the mean of a channel with an infinity")
    x = cases.draw((4, 3, 20, 20), 4).float().to(device)
    x[0 if position == 0 else 3, 1, position, position] = torch.inf
    norm, theirs = (nn.BatchNorm2d(3).to(device) for _ in range(2))
    mixed_batch_norm([x], [1.0], [norm])
    theirs(x)
    torch.testing.assert_close(norm.running_mean, theirs.running_mean, equal_nan=True)
