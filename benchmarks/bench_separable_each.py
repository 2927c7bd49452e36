# SPDX-License-Identifier: Apache-2.0
"""`separable_each`: the second halves of the separable convolutions that read one state of a cell.

Of four edges with a 3x3 and a 5x5 one each: BatchNorm, ReLU, depthwise and pointwise convolution of
eight sources, at the sizes of DARTS and of PC-DARTS (a quarter of the channels).
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from cases import BOTH, FORWARD, SHAPES, Call, Case, Setting
from torch import nn

from fastnas import ops
from fastnas.bench.machine import Work
from fastnas.ops import reference
from fastnas.ops.reference import BATCH

KERNELS = (3, 5) * 4
K = 4  # of PC-DARTS


def split(tensors):
    count = len(KERNELS)
    return tensors[:count], tensors[count : 2 * count], tensors[2 * count :]


def loop(*tensors, norms):
    return [
        F.conv2d(F.conv2d(F.relu(norm(x)), w, None, 1, k // 2, 1, x.shape[1]), p)
        for x, w, p, k, norm in zip(*split(tensors), KERNELS, norms, strict=True)
    ]


def fused(*tensors, norms):
    xs, depthwise, pointwise = split(tensors)
    return ops.separable_each(xs, depthwise, pointwise, [1] * len(KERNELS), norms)


def twin(*tensors, norms):
    rest = (None,) * 4
    return [
        reference.separable_group(x, BATCH, norm.eps, *rest, [w], [p], [1], 1)[0][0]
        for x, w, p, norm in zip(*split(tensors), norms, strict=True)
    ]


FUNCTIONS = {"torch loop": loop, "fastnas": fused, "reference": twin}


def build(implementation: str, setting: Setting) -> Call:
    channels = setting.shape[1]
    xs = tuple(setting.image() for _ in KERNELS)
    sizes = [(channels, 1, k, k) for k in KERNELS] + [(channels, channels, 1, 1)] * len(KERNELS)
    weights = tuple(
        (torch.randn(size) / (size[1] ** 0.5 * size[-1]))
        .to(setting.device, setting.dtype)
        .requires_grad_()
        for size in sizes
    )
    norms = [nn.BatchNorm2d(channels, affine=False).to(setting.device) for _ in KERNELS]
    function = functools.partial(FUNCTIONS[implementation], norms=norms)
    return Call(function, (*xs, *weights), (*xs, *weights), weights)


def work(setting: Setting) -> dict[str, Work]:
    """Forward: a source read for its statistics and again, an output written.

    Backward: the source three times, the output's gradient once, that of what the ReLU saw written
    and read twice, dx written.
    """
    pixels = torch.Size(setting.shape).numel()
    flops = sum(2 * pixels * (k * k + setting.shape[1]) for k in KERNELS)
    forward = 3 * len(KERNELS) * setting.size
    return {
        FORWARD: Work(forward, flops),
        BOTH: Work(forward + 8 * len(KERNELS) * setting.size, 3 * flops),
    }


CASES = [
    Case("separable_each", (n, c // k, h, w), build, work)
    for n, c, h, w in SHAPES[:3]
    for k in (1, K)
]


def test_row(row, prepared, mode, form):
    row(prepared, mode, form)


def test_ratio(ratio, prepared, mode):
    ratio(prepared, mode)
