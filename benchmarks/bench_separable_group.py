# SPDX-License-Identifier: Apache-2.0
"""`separable_group` of the four separable convolutions that one edge makes of its input.

A ReLU, a depthwise and a pointwise convolution each: the first halves of DARTS' separable
convolutions and its dilated ones, at its sizes and at those of PC-DARTS (a quarter of the
channels), against a ReLU and two convolutions for each.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from cases import BOTH, FORWARD, SHAPES, Call, Case, Setting

from fastnas import ops
from fastnas.bench.machine import Work
from fastnas.ops import reference
from fastnas.ops.reference import PLAIN

EDGE = ((3, 1), (5, 1), (3, 2), (5, 2))  # kernel size and dilation
DILATIONS = [d for _, d in EDGE]
K = 4  # of PC-DARTS


def loop(x, *weights, stride):
    return [
        F.conv2d(F.conv2d(F.relu(x), w, None, stride, d * (k // 2), d, x.shape[1]), p)
        for w, p, (k, d) in zip(weights[:4], weights[4:], EDGE, strict=True)
    ]


def fused(x, *weights, stride):
    return ops.separable_group(x, weights[:4], weights[4:], DILATIONS, stride)


def twin(x, *weights, stride):
    none, halves = (None,) * 4, (weights[:4], weights[4:])
    return reference.separable_group(x, PLAIN, 0.0, *none, *halves, DILATIONS, stride)[0]


FUNCTIONS = {"torch loop": loop, "fastnas": fused, "reference": twin}


def build(implementation: str, setting: Setting, stride: int = 1) -> Call:
    channels = setting.shape[1]
    x = setting.image()
    sizes = [(channels, 1, k, k) for k, _ in EDGE] + [(channels, channels, 1, 1)] * len(EDGE)
    weights = tuple(
        (torch.randn(size) / (size[1] ** 0.5 * size[-1]))
        .to(setting.device, setting.dtype)
        .requires_grad_()
        for size in sizes
    )
    function = functools.partial(FUNCTIONS[implementation], stride=stride)
    return Call(function, (x, *weights), (x, *weights), weights)


def work(setting: Setting, stride: int = 1) -> dict[str, Work]:
    """Forward: x read, outputs written; backward: x and their gradients read, dx written."""
    outputs = len(EDGE) * setting.size // stride**2
    pixels = torch.Size(setting.shape).numel() // stride**2
    flops = 2 * pixels * sum(k * k + setting.shape[1] for k, _ in EDGE)
    forward = setting.size + outputs
    return {
        FORWARD: Work(forward, flops),
        BOTH: Work(forward + 2 * setting.size + outputs, 3 * flops),
    }


def case(shape: tuple[int, ...], stride: int) -> Case:
    return Case(
        "separable_group",
        shape,
        functools.partial(build, stride=stride),
        functools.partial(work, stride=stride),
        note="stride 2" if stride == 2 else "",
    )


SIZES = [(n, c // k, h, w) for n, c, h, w in SHAPES[:3] for k in (1, K)]
CASES = [case(shape, stride) for stride in (1, 2) for shape in SIZES if shape[2] // stride > 4]
CASES.append(case(SHAPES[3], 1))


def test_row(row, prepared, mode, form):
    row(prepared, mode, form)


def test_ratio(ratio, prepared, mode):
    ratio(prepared, mode)
