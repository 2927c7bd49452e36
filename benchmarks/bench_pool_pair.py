# SPDX-License-Identifier: Apache-2.0
"""`pool_pair` of the max pool and the average pool that read one state of a DARTS cell.

At its sizes and at those of PC-DARTS (a quarter of the channels), against PyTorch's own pools.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from cases import BOTH, FORWARD, SHAPES, Call, Case, Setting

from fastnas import ops
from fastnas.bench.machine import Work
from fastnas.nn.pool import AvgPool2d
from fastnas.ops import reference

K = 4  # of PC-DARTS


def apart(x, stride):
    average = AvgPool2d(3, stride, 1, count_include_pad=False)
    return [F.max_pool2d(x, 3, stride, 1), average(x)]


def fused(x, stride):
    return list(ops.pool_pair(x, stride))


def twin(x, stride):
    return list(reference.pool_pair(x, stride))


FUNCTIONS = {"torch loop": apart, "fastnas": fused, "reference": twin}


def build(implementation: str, setting: Setting, stride: int = 1) -> Call:
    x = setting.image()
    function = functools.partial(FUNCTIONS[implementation], stride=stride)
    return Call(function, (x,), (x,), ())


def work(setting: Setting, stride: int = 1) -> dict[str, Work]:
    """Forward: x read, outputs written; backward: x and their gradients read, dx written."""
    outputs = 2 * setting.size // stride**2
    flops = 18 * torch.Size(setting.shape).numel() // stride**2
    forward = setting.size + outputs
    return {
        FORWARD: Work(forward, flops),
        BOTH: Work(forward + 2 * setting.size + outputs, 3 * flops),
    }


def case(shape: tuple[int, ...], stride: int) -> Case:
    return Case(
        "pool_pair",
        shape,
        functools.partial(build, stride=stride),
        functools.partial(work, stride=stride),
        note="stride 2" if stride == 2 else "",
    )


SIZES = [(n, c // k, h, w) for n, c, h, w in SHAPES[:3] for k in (1, K)]
CASES = [case(shape, stride) for stride in (1, 2) for shape in SIZES if shape[2] // stride > 4]


def test_row(row, prepared, mode, form):
    row(prepared, mode, form)


def test_ratio(ratio, prepared, mode):
    ratio(prepared, mode)
