# SPDX-License-Identifier: Apache-2.0
"""Every op as one call, forward and backward, on inputs that may be replaced.

Nothing but the given inputs is read, and nothing of it comes from the host: for streams, graphs and
tools that watch a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import ops_cases as cases
import torch
from torch import Tensor, nn

from fastnas import ops

SHAPE = (3, 4, 8, 6)


class Call(NamedTuple):
    """Inputs on a device, and a forward and backward of an op on any such inputs."""

    inputs: list[Tensor]
    run: Callable[[Sequence[Tensor]], list[Tensor]]
    norms: Sequence[nn.Module | None] = ()


def _mixed(device, layout, dtype, shape, mix, kinds=None, weights=None, rest_shape=None):
    """The call of an op of candidates; the gradient of its output is an input as well."""
    xs, w = cases.make_inputs(7, shape, dtype, layout, device)
    norms = [] if kinds is None else cases.make_norms(7, shape[1], device, kinds)
    leaves = [w, *xs]
    if rest_shape is not None:
        leaves.append(cases.make(rest_shape, dtype, layout, device, seed=60).requires_grad_())
    out = shape if rest_shape is None else (shape[0], 4 * shape[1], *shape[2:])
    grad = cases.make(out, dtype, layout, device, seed=50)

    def run(inputs):
        *leaves, grad = inputs
        w, xs, rest = leaves[0], leaves[1:8], leaves[8:]
        given = w if weights is None else weights(w)
        y = mix(xs, given, norms, *rest)
        asked = [*leaves, *cases.affine_parameters(norms)]
        grads = torch.autograd.grad(y, asked, grad, allow_unused=True)
        return [y, *(g for g in grads if g is not None)]

    return Call([*leaves, grad], run, norms)


def mixed_sum(device, layout="contiguous", dtype=torch.float32, shape=SHAPE, weights=None):
    def mix(xs, weights, norms):
        return ops.mixed_sum(xs, weights)

    return _mixed(device, layout, dtype, shape, mix, weights=weights)


def mixed_batch_norm(device, layout="contiguous", dtype=torch.float32, shape=SHAPE):
    return _mixed(device, layout, dtype, shape, ops.mixed_batch_norm, kinds=0)


def partial_channel_mix(
    device, layout="contiguous", dtype=torch.float32, shape=SHAPE, pooled=False
):
    def mix(xs, weights, norms, rest):
        return ops.partial_channel_mix(rest, xs, weights, 4, norms)

    n, c, h, w = shape
    rest = (n, 3 * c, 2 * h + 1, 2 * w) if pooled else (n, 3 * c, h, w)
    return _mixed(device, layout, dtype, shape, mix, kinds=2, rest_shape=rest)


def partial_channel_node(device, layout="contiguous", dtype=torch.float32, shape=SHAPE):
    n, c, h, w = shape
    sizes = [shape, *[(n, 3 * c, h, w)] * 3]
    leaves = [cases.make((3,), device=device, seed=61).requires_grad_()]
    leaves += [
        cases.make(size, dtype, layout, device, seed=i).requires_grad_()
        for i, size in enumerate(sizes)
    ]
    grads = [cases.make(size, dtype, layout, device, seed=50) for size in sizes[:2]]

    def run(inputs):
        (weights, mixed, *rests), grads = inputs[:5], inputs[5:]
        parts = ops.partial_channel_node(mixed, rests, weights, 4)
        return [*parts, *torch.autograd.grad(parts, [weights, mixed, *rests], grads)]

    return Call([*leaves, *grads], run)


def multi_target_sum(device, layout="contiguous", dtype=torch.float32, shape=SHAPE, normed=False):
    xs, _ = cases.make_inputs(7, shape, dtype, layout, device)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    weights = cases.make((3, 7), acc, device=device, seed=61).requires_grad_()
    norms = cases.make_norms(7, shape[1], device) if normed else []
    grads = [cases.make(shape, dtype, layout, device, seed=50 + t) for t in range(3)]

    def run(inputs):
        weights, xs, grads = inputs[0], inputs[1:8], inputs[8:]
        ys = ops.multi_target_sum(xs, weights, norms or None)
        leaves = [weights, *xs, *cases.affine_parameters(norms)]
        return [*ys, *torch.autograd.grad(ys, leaves, grads)]

    return Call([weights, *xs, *grads], run, norms)


def gate_gradient(device, layout="contiguous", dtype=torch.float32, shape=SHAPE):
    xs, _ = cases.make_inputs(3, shape, dtype, layout, device)
    grad = cases.make(shape, dtype, layout, device, seed=50)
    v = cases.make((4,), torch.float32, device=device, seed=51)
    probs = torch.softmax(cases.draw((4,), 52), 0).to(device).requires_grad_()

    def run(inputs):
        *xs, probs, grad, v = inputs
        alpha = ops.gate_gradient(grad, [*xs, None], probs)
        return [alpha, *torch.autograd.grad(alpha, [probs, *xs], v)]

    return Call([*xs, probs, grad, v], run)


def depthwise_group(device, layout="contiguous", dtype=torch.float32, shape=SHAPE, stride=1):
    channels, dilations = shape[1], (1, 1, 2)
    x = cases.make(shape, dtype, layout, device).requires_grad_()
    weights = [
        cases.make((channels, 1, k, k), dtype, device=device, seed=20 + i).requires_grad_()
        for i, k in enumerate((3, 5, 3))
    ]
    out = (*shape[:2], *((size + stride - 1) // stride for size in shape[2:]))
    grads = [cases.make(out, dtype, layout, device, seed=30 + i) for i in range(3)]

    def run(inputs):
        x, weights, grads = inputs[0], inputs[1:4], inputs[4:]
        ys = ops.depthwise_group(x, weights, dilations, stride)
        return [*ys, *torch.autograd.grad(ys, [x, *weights], grads)]

    return Call([x, *weights, *grads], run)


def pool_pair(device, layout="contiguous", dtype=torch.float32, shape=SHAPE, stride=1):
    x = cases.make(shape, dtype, layout, device).requires_grad_()
    out = (*shape[:2], *((size + stride - 1) // stride for size in shape[2:]))
    grads = [cases.make(out, dtype, layout, device, seed=30 + i) for i in range(2)]

    def run(inputs):
        x, *grads = inputs
        ys = ops.pool_pair(x, stride)
        return [*ys, *torch.autograd.grad(ys, [x], grads)]

    return Call([x, *grads], run)


def relu_pointwise(device, layout="contiguous", dtype=torch.float32, shape=SHAPE):
    x = cases.make(shape, dtype, layout, device).requires_grad_()
    weight = cases.make((6, shape[1], 1, 1), dtype, device=device, seed=20).requires_grad_()
    grad = cases.make((shape[0], 6, *shape[2:]), dtype, layout, device, seed=30)

    def run(inputs):
        x, weight, grad = inputs
        y = ops.relu_pointwise(x, weight)
        return [y, *torch.autograd.grad(y, [x, weight], grad)]

    return Call([x, weight, grad], run)


def separable_group(device, layout="contiguous", dtype=torch.float32, shape=SHAPE, stride=1):
    channels, dilations = shape[1], (1, 2)
    x = cases.make(shape, dtype, layout, device).requires_grad_()
    sizes = [(channels, 1, 3, 3), (channels, 1, 5, 5), *[(channels, channels, 1, 1)] * 2]
    weights = [
        cases.make(size, dtype, device=device, seed=20 + i).div(channels).requires_grad_()
        for i, size in enumerate(sizes)
    ]
    out = (*shape[:2], *((size + stride - 1) // stride for size in shape[2:]))
    grads = [cases.make(out, dtype, layout, device, seed=30 + i) for i in range(2)]

    def run(inputs):
        x, weights, grads = inputs[0], inputs[1:5], inputs[5:]
        ys = ops.separable_group(x, weights[:2], weights[2:], dilations, stride)
        return [*ys, *torch.autograd.grad(ys, [x, *weights], grads)]

    return Call([x, *weights, *grads], run)


def separable_each(device, layout="contiguous", dtype=torch.float32, shape=SHAPE):
    channels = shape[1]
    xs = [cases.make(shape, dtype, layout, device, seed=i).requires_grad_() for i in range(3)]
    sizes = [*[(channels, 1, k, k) for k in (3, 5, 3)], *[(channels, channels, 1, 1)] * 3]
    weights = [
        cases.make(size, dtype, device=device, seed=20 + i).div(channels).requires_grad_()
        for i, size in enumerate(sizes)
    ]
    norms = [nn.BatchNorm2d(channels, affine=i == 1).to(device) for i in range(3)]
    grads = [cases.make(shape, dtype, layout, device, seed=30 + i) for i in range(3)]

    def run(inputs):
        xs, depthwise, pointwise, grads = (inputs[i : i + 3] for i in range(0, 12, 3))
        ys = ops.separable_each(xs, depthwise, pointwise, (1, 1, 2), norms)
        leaves = [*xs, *depthwise, *pointwise, *norms[1].parameters()]
        return [*ys, *torch.autograd.grad(ys, leaves, grads)]

    return Call([*xs, *weights, *grads], run, norms)


def sample_paths(device, two=True):
    logits = cases.make((9, 7), device=device).requires_grad_()
    counts = torch.tensor([7, 3, 1, 7, 2, 6, 5, 4, 7]).to(device)
    grad = cases.make((9, 2), device=device, seed=53)

    def run(inputs):
        logits, counts, grad = inputs
        paths = ops.sample_paths(logits, 5, 6, counts, two)
        return [*paths, *torch.autograd.grad(paths.probs, [logits], grad)]

    return Call([logits, counts, grad], run)


def sparse_connections(device, norm="edge"):
    in_degrees = (2, 3, 4)
    alpha = cases.make((9, 7), device=device).requires_grad_()
    beta = cases.make((3,), device=device, seed=54).requires_grad_()
    grad = cases.make((9, 7), device=device, seed=53)

    def run(inputs):
        alpha, beta, grad = inputs
        weights = ops.sparse_connections(alpha, beta, in_degrees, 1.0, norm)
        return [weights, *torch.autograd.grad(weights, [alpha, beta], grad)]

    return Call([alpha, beta, grad], run)


def numbers(w):
    """Weights that are numbers of the host."""
    return [0.5, -1.0, 2.0, 0.25, 0.0, 1.0, 3.0]


def some_numbers(w):
    return [w[0], 0.5, w[2], *w[3:].unbind()]


CALLS = {
    "mixed_sum": mixed_sum,
    "mixed_sum of numbers": lambda device, **kw: mixed_sum(device, weights=numbers, **kw),
    "mixed_sum of both": lambda device, **kw: mixed_sum(device, weights=some_numbers, **kw),
    "mixed_batch_norm": mixed_batch_norm,
    "multi_target_sum": multi_target_sum,
    "multi_target_sum, normed": lambda device, **kw: multi_target_sum(device, normed=True, **kw),
    "partial_channel_mix": partial_channel_mix,
    "partial_channel_mix, pooled": lambda device, **kw: partial_channel_mix(
        device, pooled=True, **kw
    ),
    "gate_gradient": gate_gradient,
    "depthwise_group": depthwise_group,
    "depthwise_group, stride 2": lambda device, **kw: depthwise_group(device, stride=2, **kw),
    "partial_channel_node": partial_channel_node,
    "pool_pair": pool_pair,
    "pool_pair, stride 2": lambda device, **kw: pool_pair(device, stride=2, **kw),
    "relu_pointwise": relu_pointwise,
    "separable_group": separable_group,
    "separable_group, stride 2": lambda device, **kw: separable_group(device, stride=2, **kw),
    "separable_each": separable_each,
    "sample_paths": lambda device, layout="", dtype=None, shape=SHAPE: sample_paths(device),
    "sparse_connections": lambda device, layout="", dtype=None, shape=SHAPE: sparse_connections(
        device
    ),
}

#: Those of them that take no images: dtype, layout and shape are their own.
WITHOUT_IMAGES = ("sample_paths", "sparse_connections")
