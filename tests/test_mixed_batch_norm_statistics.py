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
from fastnas.ops._norms import _update, gather_norms, update_running_statistics


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


@pytest.mark.parametrize("momentum", [0.1, None])
def test_an_empty_batch_counts_as_in_torch(momentum, device):
    norms = [nn.BatchNorm2d(3).to(device), nn.BatchNorm2d(3, momentum=momentum).to(device)]
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


# --- many norms in one call of their own op ----------------------------------------------------


def strided(norm):
    """The same norm with statistics that are not contiguous."""
    norm.running_mean = torch.zeros(6)[::2]
    norm.running_var = torch.ones(3, 2)[:, 1]
    return norm


def with_double_variance(norm):
    norm.running_var = norm.running_var.double()
    return norm


def uncounted(norm):
    norm.num_batches_tracked = None
    return norm


def counted_in_int32(norm):
    norm.num_batches_tracked = norm.num_batches_tracked.int()
    return norm


#: Norms of one call, and how often the op is called for them.
CALLS = {
    "plain": ([nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=0.1)], 1),
    "strided": ([strided(nn.BatchNorm2d(3)), nn.BatchNorm2d(3)], 1),
    "uncounted": ([uncounted(nn.BatchNorm2d(3)), nn.BatchNorm2d(3)], 1),
    "one": ([nn.BatchNorm2d(3, momentum=0.6)] * 2, 2),
    "int32": ([nn.BatchNorm2d(3), counted_in_int32(nn.BatchNorm2d(3))], 1),
    "double": ([nn.BatchNorm2d(3), nn.BatchNorm2d(3).double()], 1),
    "variance": ([with_double_variance(nn.BatchNorm2d(3)), nn.BatchNorm2d(3)], 1),
    "bfloat16": ([nn.BatchNorm2d(3), nn.BatchNorm2d(3).bfloat16()], 1),
    "unlike": ([nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=0.2)], 1),
    "average": ([nn.BatchNorm2d(3, momentum=None)] * 3, 0),
}


@pytest.mark.parametrize(("norms", "calls"), CALLS.values(), ids=CALLS.keys())
def test_who_moves_the_statistics_makes_no_difference(norms, calls, tolerances, monkeypatch):
    move, moved = torch.ops.fastnas.update_running_statistics, []
    monkeypatch.setattr(
        torch.ops.fastnas, "update_running_statistics", lambda *args: moved.append(move(*args))
    )
    norms = copy.deepcopy(norms)
    theirs = [copy.deepcopy(norm).float() for norm in norms]
    if len({*norms}) < len(norms):
        theirs = theirs[:1] * len(norms)
    for step in range(2):
        xs = [3 * cases.make((2, 3, 4, 4), seed=10 * step + k) + k for k in range(len(norms))]
        mixed_batch_norm(xs, [0.5] * len(xs), norms)
        assert len(moved) == calls
        moved.clear()
        cases.stock(xs, [0.5] * len(xs), theirs)
    for norm, other in zip(norms, theirs, strict=True):
        for name, buffer in norm.named_buffers():
            low = buffer.dtype == torch.bfloat16
            loose = tolerances[torch.bfloat16 if low else torch.float32]
            expected = getattr(other, name).to(buffer.dtype)
            torch.testing.assert_close(buffer, expected, rtol=loose.rtol, atol=loose.atol, msg=name)


@pytest.mark.parametrize("momenta", [(0.3, 0.3, 0.3), (0.1, None, 0.7)])
@pytest.mark.parametrize("count", [0, 20])
def test_the_operations_of_other_devices_do_the_same(count, momenta, tolerances):
    norms = [nn.BatchNorm2d(3, momentum=momentum) for momentum in momenta]
    theirs = copy.deepcopy(norms)
    xs, (mean, var) = [torch.randn(4, 3, 5)] * 4, torch.rand(2, 4, 3)
    for moved, move in ((norms, update_running_statistics), (theirs, _update)):
        updates = gather_norms("test", xs, [moved[0], None, *moved[1:]], None).updates
        with torch.no_grad():
            move(updates, mean, var, count)
    cases.assert_buffers_near(norms, theirs, tolerances)
    assert norms[2].num_batches_tracked.item() == 1


def test_autograd_sees_that_the_statistics_were_written():
    """As after any in-place operation: a backward that needs the old ones is an error."""
    norms = [nn.BatchNorm2d(3), nn.BatchNorm2d(3)]
    norms[1].eval()
    versions = [[b._version for b in norm.buffers()] for norm in norms]
    x = torch.randn(2, 3, 4, 4)
    mixed_batch_norm([x, x], [1.0, 1.0], norms)
    moved, frozen = ([b._version for b in norm.buffers()] for norm in norms)
    assert moved == [v + 1 for v in versions[0]]
    assert frozen == versions[1]


SPECIAL = (0.0, -1.5, 3e38, -3e38, float("inf"), -float("inf"), float("nan"))


@pytest.mark.parametrize("momentum", [0.1, 0.5, 1.0])
def test_after_an_infinity(momentum):
    """A running mean that became infinite stays so in batches of finite values."""
    norms = [nn.BatchNorm2d(3, momentum=momentum) for _ in range(2)]
    x = torch.randn(2, 3, 4, 4)
    x[0, 1, 2, 3] = float("inf")
    for values in (x, x.nan_to_num(0, 0, 0)):
        mixed_batch_norm([values], [1.0], norms[:1])
        norms[1](values)
        for a, b in zip(norms[0].buffers(), norms[1].buffers(), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_statistics_move_as_those_of_batch_norm(dtype, momentum):
    """Infinities and NaN leave what they leave there; what overflows on the way only does not."""
    running, new = torch.cartesian_prod(*[torch.tensor(SPECIAL, dtype=dtype)] * 2).unbind(1)
    running, new = (
        torch.cat([special, torch.randn(30, dtype=dtype)]) for special in (running, new)
    )
    expected = momentum * new.double() + (1 - momentum) * running.double()
    means, variances, counter = running.clone(), running.clone(), torch.tensor(7)
    move = torch.ops.fastnas.update_running_statistics
    statistics = torch.stack([torch.zeros_like(new), new])
    move([means], [variances], [counter], statistics, statistics / 2, [1], [momentum], 2)
    assert counter.item() == 8
    for moved in (means, variances):
        torch.testing.assert_close(moved, expected.to(dtype), rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("change", "error", "parts"),
    [
        ({"running_means": [torch.zeros(4)]}, ValueError, ("running_means of shape [3]", "[4]")),
        ({"running_vars": []}, ValueError, ("one of running_vars per row (1)", "0")),
        ({"running_vars": [torch.ones(3).double()]}, TypeError, ("running_vars", "Double")),
        ({"running_means": [torch.zeros(1).expand(3)]}, RuntimeError, ("expanded",)),
        ({"counters": [torch.tensor(1.0)]}, ValueError, ("counters of one int64", "Float")),
        ({"mean": torch.rand(2, 3).bfloat16()}, TypeError, ("float32 or float64", "BFloat16")),
        ({"var": torch.rand(1, 3)}, ValueError, ("of one shape (K, C)", "[1, 3]")),
        ({"momenta": []}, ValueError, ("one of momenta per row (1)", "0")),
        ({"rows": [2]}, ValueError, ("rows of 0 to 1", "2")),
        ({"rows": [-1]}, ValueError, ("rows of 0 to 1", "-1")),
        ({"count": 1}, ValueError, ("count of 0 or at least 2", "1")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_statistics_that_do_not_fit_are_refused_before_any_moves(change, error, parts):
    arguments = {
        "running_means": [torch.zeros(3)],
        "running_vars": [torch.ones(3)],
        "counters": [torch.tensor(0)],
        "mean": torch.rand(2, 3),
        "var": torch.rand(2, 3),
        "rows": [1],
        "momenta": [0.1],
        "count": 9,
    }
    with raises(error, "update_running_statistics: expected", *parts):
        torch.ops.fastnas.update_running_statistics(*{**arguments, **change}.values())
    for name, value in (("running_means", 0), ("running_vars", 1), ("counters", 0)):
        assert (arguments[name][0] == value).all(), name
