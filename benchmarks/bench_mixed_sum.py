# SPDX-License-Identifier: Apache-2.0
"""`mixed_sum` of six candidates against the loop over them."""

from __future__ import annotations

import functools
import operator

from cases import BOTH, FORWARD, SHAPES, Call, Case, Setting

from fastnas import ops
from fastnas.bench.machine import Work
from fastnas.ops import reference

K = 6


def loop(xs, weights):
    # sum() would add the first term to 0, one pass more
    return functools.reduce(operator.add, [w * x for w, x in zip(weights, xs, strict=True)])


FUNCTIONS = {"torch loop": loop, "fastnas": ops.mixed_sum, "reference": reference.mixed_sum}


def build(implementation: str, setting: Setting) -> Call:
    xs, weights = [setting.image() for _ in range(K)], setting.weights(K)
    return Call(FUNCTIONS[implementation], (xs, weights), (*xs, weights))


def work(setting: Setting) -> dict[str, Work]:
    """Backward: the output's gradient and each x read, each gradient written."""
    forward, backward = K + 1, 2 * K + 1
    return {
        FORWARD: Work(forward * setting.size),
        BOTH: Work((forward + backward) * setting.size),
    }


CASES = [Case("mixed_sum", shape, build, work) for shape in SHAPES]


def test_row(row, prepared, mode, form):
    row(prepared, mode, form)


def test_ratio(ratio, prepared, mode):
    ratio(prepared, mode)
