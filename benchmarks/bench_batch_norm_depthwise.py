# SPDX-License-Identifier: Apache-2.0
"""`batch_norm_depthwise`: what stands between the halves of a separable convolution of DARTS.

A BatchNorm without scale and shift, in training, a ReLU and one depthwise convolution (3x3 or 5x5),
at the sizes of DARTS and of PC-DARTS (a quarter of the channels), against the three layers.
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

K = 4  # of PC-DARTS


def build(implementation: str, setting: Setting, kernel: int) -> Call:
    channels = setting.shape[1]
    x, norm = setting.image(), nn.BatchNorm2d(channels, affine=False).to(setting.device)
    weight = torch.randn(channels, 1, kernel, kernel).div(kernel)
    weight = weight.to(setting.device, setting.dtype).requires_grad_()

    def loop(x, weight):
        return F.conv2d(F.relu(norm(x)), weight, None, 1, kernel // 2, groups=channels)

    def fused(x, weight):
        (y,) = ops.batch_norm_depthwise(x, norm, [weight], [1])
        return y

    def twin(x, weight):
        absent = (None,) * 4
        (y,), _, _ = reference.batch_norm_depthwise(
            x, reference.BATCH, norm.eps, *absent, [weight], [1], 1
        )
        return y

    function = {"torch loop": loop, "fastnas": fused, "reference": twin}[implementation]
    return Call(function, (x, weight), (x, weight), (weight,))


def work(setting: Setting, kernel: int) -> dict[str, Work]:
    """Forward: statistics, then all in one pass.

    Backward: input and gradient are read for the sums of the BatchNorm, then once more for the
    gradient of the input, which is written.
    """
    flops = 2 * torch.Size(setting.shape).numel() * kernel**2
    return {
        FORWARD: Work(3 * setting.size, flops),
        BOTH: Work((3 + 2 + 3) * setting.size, 3 * flops),
    }


CASES = [
    Case(
        "batch_norm_depthwise",
        (n, channels // k, h, w),
        functools.partial(build, kernel=kernel),
        functools.partial(work, kernel=kernel),
        note=f"{kernel}x{kernel}",
    )
    for kernel in (3, 5)
    for n, channels, h, w in SHAPES[:3]
    for k in (1, K)
]


def test_row(row, prepared, mode, form):
    row(prepared, mode, form)


def test_ratio(ratio, prepared, mode):
    ratio(prepared, mode)
