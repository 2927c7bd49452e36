# SPDX-License-Identifier: Apache-2.0
"""What the tests of ops share that read one source through a BatchNorm and a ReLU."""

from __future__ import annotations

import copy

import ops_cases as cases
import torch
from ops_cases import assert_all_near
from torch import nn

ONE = ((3, 1),)
EDGE = ((3, 1), (5, 1), (3, 2), (5, 2))
NORMS = ("plain", "affine", "evaluation", "affine evaluation", "no statistics", "average")


def make_norm(kind, channels, device="cpu"):
    """One of NORMS; None for "none"."""
    if kind == "none":
        return None
    norm = nn.BatchNorm2d(
        channels,
        eps=1e-3,
        momentum=None if kind == "average" else 0.3,
        affine="affine" in kind,
        track_running_stats=kind != "no statistics",
    )
    with torch.no_grad():
        for i, t in enumerate((norm.weight, norm.bias, norm.running_mean)):
            if t is not None:
                t.copy_(cases.draw((channels,), 70 + i))
        if norm.running_var is not None:
            norm.running_var.copy_(cases.draw((channels,), 73).abs() + 0.5)
    return norm.train("evaluation" not in kind).to(device)


def parameters(norm):
    return [] if norm is None else list(norm.parameters())


def check_against_torch(run, stock, x, norm, weights, dilations, stride, tolerances):
    """Outputs, gradients and buffers of ``run`` are those of ``stock`` in float64."""
    twin = copy.deepcopy(norm)
    twin = twin.double() if twin is not None else None
    ys = run(x, norm, weights, dilations, stride)
    grads = [cases.like_output(y, 50 + i) for i, y in enumerate(ys)]
    leaves = [x, *weights, *parameters(norm)]
    actual = torch.autograd.grad(ys, leaves, grads)
    exact, *exact_weights = cases.in_double([x, *weights])
    exact_leaves = [exact, *exact_weights, *parameters(twin)]
    if x.numel():
        expected = stock(exact, twin, exact_weights, dilations, stride)
        wide = [g.double() for g in grads]
        expected_grads = torch.autograd.grad(expected, exact_leaves, wide)
        assert_all_near(ys, expected, tolerances, [f"y[{i}]" for i in range(len(ys))])
        if norm is not None:
            cases.assert_buffers_near([norm], [twin], tolerances)
    else:
        expected_grads = [torch.zeros_like(t) for t in exact_leaves]
    names = ["dx", *(f"dw[{i}]" for i in range(len(weights))), "dgamma", "dbeta"]
    # The gradient of what the ReLU saw is rounded to the dtype of x before anything sums it.
    rounded = {t: max(tolerances[t], tolerances[x.dtype]) for t in tolerances}
    assert_all_near(actual, expected_grads, rounded, names[: len(actual)])
    assert [t.dtype for t in actual] == [t.dtype for t in leaves]
    return ys, actual
