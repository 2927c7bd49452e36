# SPDX-License-Identifier: Apache-2.0
"""`partial_channel_node` of a PC-DARTS node with four edges, k = 4, against sum, join and shuffle.

The two parts of the result are dense tensors, as the next edges read them.
"""

from __future__ import annotations

import functools
import operator

import stock
import torch
from cases import BOTH, FORWARD, SHAPES, Call, Case, Setting

from fastnas import ops
from fastnas.bench.machine import Work
from fastnas.ops import reference

EDGES, K = 4, 4


def build(implementation: str, setting: Setting) -> Call:
    n, channels, h, w = setting.shape
    c = channels // K
    mixed = setting.image(n, c, h, w)
    rests = [setting.image(n, channels - c, h, w) for _ in range(EDGES)]
    weights = setting.weights(EDGES)

    def loop(mixed, rests, weights):
        rest = functools.reduce(operator.add, [w * x for w, x in zip(weights, rests, strict=True)])
        y = stock.channel_shuffle(torch.cat([mixed, rest], 1), K)
        parts = y.split([c, channels - c], 1)
        return [part.contiguous(memory_format=setting.memory_format) for part in parts]

    def fused(mixed, rests, weights):
        return list(ops.partial_channel_node(mixed, rests, weights, K))

    def twin(mixed, rests, weights):
        return list(reference.partial_channel_node(mixed, rests, weights, K))

    function = {"torch loop": loop, "fastnas": fused, "reference": twin}[implementation]
    return Call(function, (mixed, rests, weights), (mixed, *rests, weights))


def work(setting: Setting) -> dict[str, Work]:
    """Everything read and written once each way; the rests are read again for their factors."""
    part = setting.size // K
    rests = EDGES * (setting.size - part)
    forward = part + rests + setting.size
    return {FORWARD: Work(forward), BOTH: Work(forward + setting.size + part + 2 * rests)}


CASES = [Case("partial_channel_node", shape, build, work) for shape in SHAPES]


def test_row(row, prepared, mode, form):
    row(prepared, mode, form)


def test_ratio(ratio, prepared, mode):
    ratio(prepared, mode)
