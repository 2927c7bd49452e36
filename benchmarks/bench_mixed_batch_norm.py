# SPDX-License-Identifier: Apache-2.0
"""`mixed_batch_norm` of six candidates in training against BatchNorm2d and the loop."""

from __future__ import annotations

import functools
import operator

from cases import BOTH, FORWARD, SHAPES, Call, Case, Setting
from torch import nn

from fastnas import ops
from fastnas.bench.machine import Work
from fastnas.ops import reference

K = 6


def build(implementation: str, setting: Setting) -> Call:
    xs, weights = [setting.image() for _ in range(K)], setting.weights(K)
    norms = [nn.BatchNorm2d(setting.shape[1], affine=False).to(setting.device) for _ in xs]

    def loop(xs, weights):
        terms = [w * norm(x) for w, norm, x in zip(weights, norms, xs, strict=True)]
        return functools.reduce(operator.add, terms)

    def fused(xs, weights):
        return ops.mixed_batch_norm(xs, weights, norms)

    def twin(xs, weights):
        kinds, eps, absent = [reference.BATCH] * K, [norms[0].eps] * K, [None] * K
        y, _, _ = reference.mixed_batch_norm(
            xs, weights, kinds, eps, absent, absent, absent, absent
        )
        return y

    function = {"torch loop": loop, "fastnas": fused, "reference": twin}[implementation]
    return Call(function, (xs, weights), (*xs, weights))


def work(setting: Setting) -> dict[str, Work]:
    """Forward: statistics, then the sum. Backward: one reduction, then the gradients."""
    forward = K + (K + 1)
    backward = (K + 1) + (2 * K + 1)
    return {
        FORWARD: Work(forward * setting.size),
        BOTH: Work((forward + backward) * setting.size),
    }


CASES = [Case("mixed_batch_norm", shape, build, work) for shape in SHAPES]


def test_row(row, prepared, mode, form):
    row(prepared, mode, form)


def test_ratio(ratio, prepared, mode):
    ratio(prepared, mode)
