# SPDX-License-Identifier: Apache-2.0
"""The plain-PyTorch ops against torch's own modules, literal formulas and published numbers.

And the way every op takes on a device without kernels, which is these same functions.
"""

from __future__ import annotations

import importlib
import math

import ops_cases as cases
import pytest
import torch
import torch.nn.functional as F
from ops_cases import assert_bitwise, assert_near
from torch import nn

from fastnas import ops
from fastnas.ops import reference
from fastnas.ops.reference import BATCH, PLAIN, RUNNING


def test_dtypes_of_sums_and_results():
    bf16, f16, f32, f64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
    assert [reference.accumulate_dtype(d) for d in (bf16, f16, f32, f64)] == [f32, f32, f32, f64]
    tensors = [torch.ones(1, dtype=d) for d in (bf16, f16, f32, f64)]
    assert reference.result_dtype(tensors[:1]) == bf16
    assert reference.result_dtype(tensors[:2]) == f32  # neither holds the other
    assert reference.result_dtype(tensors) == f64


def test_mixed_sum_is_the_loop(device):
    xs, weights = cases.make_inputs(3, (2, 3, 4, 4), torch.float64, device=device)
    expected = weights[0] * xs[0] + weights[1] * xs[1] + weights[2] * xs[2]
    assert_bitwise(reference.mixed_sum(xs, weights), expected)
    narrow = [x.detach().half() for x in xs[:2]]
    y = reference.mixed_sum(narrow, weights[:2].detach())
    exact = weights[0].float() * narrow[0].float() + weights[1].float() * narrow[1].float()
    assert_bitwise(y, exact.detach().half())


def test_mixed_batch_norm_is_the_modules_and_the_loop(device, tolerances):
    xs, weights = cases.make_inputs(4, (3, 5, 4, 6), torch.float64, device=device)
    norms = [
        nn.BatchNorm2d(5, affine=False, eps=1e-2),
        None,
        nn.BatchNorm2d(5),
        nn.BatchNorm2d(5, eps=1e-3).eval(),
    ]
    norms = cases.on_device(norms, device, torch.float64)
    with torch.no_grad():
        for norm in norms[2:]:
            for t in (norm.weight, norm.bias, norm.running_mean):
                t.normal_()
            norm.running_var.uniform_(0.5, 2.0)
    y, mean, var = reference.mixed_batch_norm(
        xs,
        weights,
        [BATCH, PLAIN, BATCH, RUNNING],
        [1e-2, 0.0, 1e-5, 1e-3],
        [None, None, norms[2].weight, norms[3].weight],
        [None, None, norms[2].bias, norms[3].bias],
        [None, None, None, norms[3].running_mean],
        [None, None, None, norms[3].running_var],
    )
    dims = (0, 2, 3)
    zero, one = torch.zeros_like(mean[0]), torch.ones_like(mean[0])
    expected_mean = [xs[0].mean(dims), zero, xs[2].mean(dims), norms[3].running_mean.clone()]
    biased = [xs[0].var(dims, correction=0), one, xs[2].var(dims, correction=0)]
    biased.append(norms[3].running_var.clone())
    assert_near(y, cases.stock(xs, weights, norms), tolerances)
    assert_near(mean, torch.stack(expected_mean), tolerances)
    assert_near(var, torch.stack(biased), tolerances)


def test_statistics_and_normalise_are_the_textbook_formulas(device, tolerances):
    x = cases.make((2, 3, 4, 5), torch.float64, device=device)
    mean, var = reference.statistics(x)
    for c in range(3):
        values = x[:, c].flatten().tolist()
        m = sum(values) / len(values)
        v = sum((value - m) ** 2 for value in values) / len(values)
        assert mean[c].item() == pytest.approx(m) and var[c].item() == pytest.approx(v)
    gamma, beta = torch.randn(2, 3, dtype=torch.float64, device=device)
    for affine in ((gamma, beta), (gamma, None), (None, None)):
        expected = F.batch_norm(x, mean, var, *affine, eps=0.1)
        assert_near(reference.normalise(x, mean, var, 0.1, *affine), expected, tolerances)


def test_multi_target_sum_is_the_modules_and_a_loop_for_each_target(device, tolerances):
    xs, _ = cases.make_inputs(4, (3, 5, 4, 6), torch.float64, device=device)
    weights = torch.randn(2, 4, dtype=torch.float64, device=device)
    plain, mean, var = reference.multi_target_sum(
        xs, weights, [PLAIN] * 4, [0.0] * 4, *[[None] * 4] * 4
    )
    assert mean.shape == var.shape == (0,)
    norm = nn.BatchNorm2d(5, affine=False).double().to(device)
    kinds = [PLAIN, BATCH, PLAIN, BATCH]
    normed, mean, _ = reference.multi_target_sum(
        xs, weights, kinds, [norm.eps] * 4, *[[None] * 4] * 4
    )
    assert mean.shape == (4, 5)
    terms = [xs[0], norm(xs[1]), xs[2], norm(xs[3])]
    for t in range(2):
        assert_near(plain[t], cases.stock(xs, weights[t]), tolerances)
        assert_near(normed[t], cases.stock(terms, weights[t]), tolerances)


@pytest.mark.parametrize(("channels", "k"), [(16, 4), (12, 3), (10, 2), (6, 6), (5, 1)])
def test_channel_shuffle(channels, k, device):
    z = torch.randn(2, channels, 3, 2, device=device)
    out = reference.channel_shuffle(z, k)
    c = channels // k
    assert_bitwise(out, z[:, [(o % k) * c + o // k for o in range(channels)]])
    assert_bitwise(out, nn.ChannelShuffle(k)(z))
    assert_bitwise(reference.channel_shuffle(out, c), z)


@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_partial_channel_join(size, device):
    rest = torch.randn(2, 6, *size, device=device)
    mixed = torch.randn(2, 2, *size, device=device)
    expected = nn.ChannelShuffle(4)(torch.cat([mixed, rest], 1))
    assert_bitwise(reference.partial_channel_join(rest, mixed, 4), expected)
    mixed = torch.randn(2, 2, size[0] // 2, size[1] // 2, device=device)
    expected = nn.ChannelShuffle(4)(torch.cat([mixed, nn.MaxPool2d(2)(rest)], 1))
    assert_bitwise(reference.partial_channel_join(rest, mixed, 4), expected)


def test_gate_gradient_is_the_double_loop(device, tolerances):
    grad_output, *outputs = cases.make_inputs(5, (2, 3, 4, 4), torch.float64, device=device)[0]
    p = torch.softmax(torch.randn(4, dtype=torch.float64, device=device), 0)
    dots = [(grad_output * o).sum() for o in outputs]
    expected = [
        sum(dots[j] * p[j] * ((1.0 if i == j else 0.0) - p[i]) for j in range(4)) for i in range(4)
    ]
    assert_near(reference.gate_gradient(grad_output, outputs, p), torch.stack(expected), tolerances)


# Known answers that come with Random123, for 10 rounds: counter, key, result.
PHILOX = (
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
)  # fmt: skip


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), PHILOX)
def test_philox_known_answers(counter, key, expected, device):
    result = reference.philox4x32(torch.tensor(words(counter), device=device), tuple(words(key)))
    assert result.tolist() == words(expected)


def test_philox_treats_counters_one_by_one():
    counters = torch.tensor([words(counter) for counter, _, _ in PHILOX])
    together = reference.philox4x32(counters.view(3, 1, 4), (1, 2))
    assert together.shape == (3, 1, 4)
    assert (together >= 0).all() and (together < 1 << 32).all()
    for k in range(3):
        assert_bitwise(together[k, 0], reference.philox4x32(counters[k], (1, 2)))


def test_path_probabilities_are_the_softmax(device):
    logits = torch.randn(4, 5, dtype=torch.float64, device=device)
    counts = torch.tensor([5, 3, 2, 0], device=device)
    active = torch.tensor([2, 0, 1, -1], device=device)
    nobody = torch.full_like(active, -1)
    one = reference.path_probabilities(logits, counts, active, nobody)
    for e, n in enumerate([5, 3, 2]):
        assert one[e, 0].item() == pytest.approx(torch.softmax(logits[e, :n], 0)[active[e]].item())
    assert one[:, 1].eq(0).all() and one[3].eq(0).all()
    inactive = torch.tensor([4, 2, 0, -1], device=device)
    two = reference.path_probabilities(logits, counts, active, inactive)
    for e in range(3):
        pair = torch.softmax(logits[e, [active[e], inactive[e]]], 0)
        assert two[e].tolist() == pytest.approx(pair.tolist())
    assert two[3].eq(0).all()


@pytest.mark.parametrize("node_norm", [False, True])
def test_sparse_connections_is_the_loop_over_edges_and_operations(node_norm, device):
    alpha = torch.randn(5, 4, dtype=torch.float64, device=device)
    beta = torch.tensor([-1.0, 0.3], dtype=torch.float64, device=device)
    weights = reference.sparse_connections(alpha, beta, (2, 3), 0.5, node_norm, False)
    first = 0
    for degree, b in zip((2, 3), beta.tolist(), strict=True):
        rows = [
            [math.exp(a / 0.5) / sum(math.exp(o / 0.5) for o in row) for a in row]
            for row in alpha[first : first + degree].tolist()
        ]
        most, t = max(map(max, rows)), 1 / (1 + math.exp(-b))
        left = [[max(p / most - t, 0.0) for p in row] for row in rows]
        for e, row in enumerate(left):
            total = sum(map(sum, left)) if node_norm else sum(row)
            expected = [q / total if total else 0.0 for q in row]
            assert weights[first + e].tolist() == pytest.approx(expected)
        first += degree


# --- devices without kernels


def calls(device):
    """Each op once, on fresh inputs: its result, gradients and what it leaves behind."""
    xs, weights = cases.make_inputs(7, (2, 3, 4, 5), torch.float64, "channels_last", device)
    x = cases.make((2, 12, 8, 10), torch.float64, "channels_last", device, seed=7).requires_grad_()
    logits = torch.randn(5, 4, dtype=torch.float64, device=device, requires_grad=True)
    probs = torch.softmax(weights.detach(), 0).requires_grad_()
    norms = [cases.doubled(cases.make_norms(7, 3, device)) for _ in range(2)]
    affine = [cases.affine_parameters(n) for n in norms]
    yield ops.mixed_sum(xs, weights), [weights, *xs], []
    yield ops.mixed_sum(xs, [0.5] * 7), xs, []
    yield ops.mixed_batch_norm(xs, weights, norms[0]), [weights, *xs, *affine[0]], norms[0]
    rows = torch.stack([weights, 2 * weights.flip(0)]).detach().requires_grad_()
    yield ops.multi_target_sum(xs, rows)[1], [rows, *xs], []
    shared = cases.doubled(cases.make_norms(7, 3, device))
    y = torch.stack(ops.multi_target_sum(xs, rows, shared))
    yield y, [rows, *xs, *cases.affine_parameters(shared)], shared
    y = ops.partial_channel_mix(x, xs, weights, 4, norms[1])
    yield y, [x, weights, *xs, *affine[1]], norms[1]
    yield ops.partial_channel_mix(x, xs, [0.5] * 7, 4), [x, *xs], []
    rests = [x[:, 3:, :4, :5], 2 * x[:, 3:, 4:, 5:]]
    parts = ops.partial_channel_node(xs[0], rests, weights[:2], 4)
    yield torch.cat(parts, 1), [x, xs[0], weights], []
    for two in (False, True):
        paths = ops.sample_paths(logits, 3, 4, None, two)
        yield paths.probs, [logits], [paths.active, paths.inactive]
    yield ops.gate_gradient(xs[0], [None, *xs[1:]], probs), [probs, *xs], []
    beta = torch.zeros(2, dtype=torch.float64, device=device, requires_grad=True)
    for norm in ("edge", "node"):
        yield ops.sparse_connections(logits, beta, (2, 3), 2.0, norm), [logits, beta], []
    kernels = [cases.make((3, 1, k, k), torch.float64, device=device) for k in (3, 5)]
    kernels[1].requires_grad_()
    yield ops.depthwise_group(xs[0], kernels, [2, 1], 2)[1], [xs[0], kernels[1]], []
    yield torch.stack(ops.pool_pair(xs[0], 2)), xs[:1], []
    for k in (0, 2, 3):  # in training, affine, in evaluation
        norm = cases.doubled(cases.make_norms(7, 3, device))[k]
        y = ops.batch_norm_depthwise(xs[0], norm, kernels, [2, 1], 2)[1]
        yield y, [xs[0], kernels[1], *norm.parameters()], [norm]
    matrices = [cases.make((3, 3, 1, 1), torch.float64, device=device, seed=k) for k in (3, 5)]
    matrices[1].requires_grad_()
    yield ops.relu_pointwise(xs[0], matrices[1]), [xs[0], matrices[1]], []
    for norm in (None, cases.doubled(cases.make_norms(7, 3, device))[2]):
        y = ops.separable_group(xs[0], kernels, matrices, [2, 1], 2, norm)[1]
        yield y, [xs[0], kernels[1], matrices[1]], [norm]
    pair = cases.doubled(cases.make_norms(7, 3, device)[2:4])
    y = torch.stack(ops.separable_each(xs[:2], kernels, matrices, [2, 1], pair, 2))
    yield y, [*xs[:2], kernels[1], matrices[1], *cases.affine_parameters(pair)], pair


def outcomes(device):
    torch.manual_seed(1)
    results = []
    for y, leaves, others in calls(device):
        grads = torch.autograd.grad(y, leaves, cases.like_output(y))
        buffers = [b for n in others if isinstance(n, nn.Module) for b in n.buffers()]
        results += [
            y.detach(),
            *grads,
            *buffers,
            *(t for t in others if isinstance(t, torch.Tensor)),
        ]
    return results


def test_every_op_falls_back_where_there_are_no_kernels(device, monkeypatch, tolerances):
    expected = outcomes(device)
    asked = []

    def has_kernels(device_type):
        asked.append(device_type)
        return False

    for name in ("_source", *ops.__all__):  # where ops of one source ask
        if name != "Paths":
            module = importlib.import_module(f"fastnas.ops.{name}")
            monkeypatch.setattr(module, "has_kernels", has_kernels, raising=False)
    fallback = outcomes(device)
    assert len(asked) >= 12 and set(asked) == {device.type}
    for k, (a, b) in enumerate(zip(fallback, expected, strict=True)):
        assert a.dtype == b.dtype
        if a.is_floating_point():
            assert_near(a, b, tolerances, str(k))
        else:
            assert_bitwise(a, b, str(k))
