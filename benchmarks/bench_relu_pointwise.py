# SPDX-License-Identifier: Apache-2.0
"""`relu_pointwise` of the output of a cell that the next one reads, at the sizes of the supernet.

Against PyTorch's ReLU and 1x1 convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from cases import BOTH, FORWARD, SHAPES, Call, Case, Setting

from fastnas import ops
from fastnas.bench.machine import Work
from fastnas.ops import reference

WIDTH = 4  # of a cell's output, in widths of its nodes


def apart(x, weight):
    return F.conv2d(F.relu(x), weight)


FUNCTIONS = {
    "torch loop": apart,
    "fastnas": ops.relu_pointwise,
    "reference": reference.relu_pointwise,
}


def build(implementation: str, setting: Setting) -> Call:
    x = setting.image()
    C = x.shape[1]
    weight = torch.randn(C // WIDTH, C, 1, 1, device=setting.device, dtype=setting.dtype)
    weight = (weight / C**0.5).requires_grad_()
    return Call(FUNCTIONS[implementation], (x, weight), (x, weight), ())


def work(setting: Setting) -> dict[str, Work]:
    """Forward: x read, y written; backward: both gradients of it, x read, dx written."""
    outputs = setting.size // WIDTH
    flops = 2 * torch.Size(setting.shape).numel() * setting.shape[1] // WIDTH
    forward = setting.size + outputs
    return {
        FORWARD: Work(forward, flops),
        BOTH: Work(forward + 2 * setting.size + outputs, 3 * flops),
    }


CASES = [Case("relu_pointwise", (n, WIDTH * c, h, w), build, work) for n, c, h, w in SHAPES[:3]]


def test_row(row, prepared, mode, form):
    row(prepared, mode, form)


def test_ratio(ratio, prepared, mode):
    ratio(prepared, mode)
