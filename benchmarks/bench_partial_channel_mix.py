# SPDX-License-Identifier: Apache-2.0
"""`partial_channel_mix` of seven candidates, k = 4, against BatchNorms, loop, join and shuffle.

The candidates are those of DARTS without `none`: six end in a BatchNorm, the skip connection does
not. One case is an edge of stride 2, whose bypass is pooled; there every candidate has a BatchNorm.
"""

from __future__ import annotations

import functools
import operator

import stock
import torch
import torch.nn.functional as F
from cases import BOTH, FORWARD, SHAPES, Call, Case, Setting
from torch import nn

from fastnas import ops
from fastnas.bench.machine import Work
from fastnas.ops import reference

CANDIDATES, K = 7, 4
SKIP = 2  # the place of the skip connection


def build(implementation: str, setting: Setting, stride: int = 1) -> Call:
    n, channels, h, w = setting.shape
    c = channels // K
    xs = [setting.image(n, c, h // stride, w // stride) for _ in range(CANDIDATES)]
    # As in a cell, the bypassed channels are a part of the edge's input, not a tensor of their own.
    rest = setting.image().detach()[:, c:].requires_grad_()
    weights = setting.weights(CANDIDATES)
    norms = [
        None if stride == 1 and i == SKIP else nn.BatchNorm2d(c, affine=False).to(setting.device)
        for i in range(CANDIDATES)
    ]

    def loop(rest, xs, weights):
        terms = [
            w * (x if norm is None else norm(x))
            for w, norm, x in zip(weights, norms, xs, strict=True)
        ]
        if stride == 2:
            rest = F.max_pool2d(rest, 2, 2)
        mixed = functools.reduce(operator.add, terms)
        return stock.channel_shuffle(torch.cat([mixed, rest], 1), K)

    def fused(rest, xs, weights):
        return ops.partial_channel_mix(rest, xs, weights, K, norms)

    def twin(rest, xs, weights):
        kinds = [reference.PLAIN if norm is None else reference.BATCH for norm in norms]
        eps, absent = [1e-5] * CANDIDATES, [None] * CANDIDATES
        mixed, _, _ = reference.mixed_batch_norm(
            xs, weights, kinds, eps, absent, absent, absent, absent
        )
        return reference.partial_channel_join(rest, mixed, K)

    function = {"torch loop": loop, "fastnas": fused, "reference": twin}[implementation]
    return Call(function, (rest, xs, weights), (rest, *xs, weights))


def work(setting: Setting, stride: int = 1) -> dict[str, Work]:
    """The passes of `mixed_batch_norm` over a k-th of the channels; the others once each way."""
    rest = setting.size * (K - 1) // K
    out = setting.size // stride**2
    part = out // K
    forward = 2 * CANDIDATES * part + rest + out
    # The reduction and the gradients each read the mixed part of the output's gradient.
    backward = (3 * CANDIDATES + 2) * part + (out - part) + rest
    if stride == 2:
        backward += rest  # read again to find the maxima
    return {FORWARD: Work(forward), BOTH: Work(forward + backward)}


CASES = [Case("partial_channel_mix", shape, build, work) for shape in SHAPES]
CASES.append(
    Case(
        "partial_channel_mix",
        (64, 32, 32, 32),
        functools.partial(build, stride=2),
        functools.partial(work, stride=2),
        note="stride 2",
    )
)


def test_row(row, prepared, mode, form):
    row(prepared, mode, form)


def test_ratio(ratio, prepared, mode):
    ratio(prepared, mode)
