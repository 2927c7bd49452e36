# SPDX-License-Identifier: Apache-2.0
"""`multi_target_sum` of six candidates for four targets, with BatchNorm in training and without.

`torch loop` sums the candidates for one target after the other, their norms having run once; `torch
matmul` is one product of the weights with the stacked candidates; `separate` calls `mixed_sum` or
`mixed_batch_norm` for each target, which normalises again for each: what sharing the passes gives
is measured against the fused ops of one target, too.
"""

from __future__ import annotations

import functools
import operator

import torch
from cases import BOTH, FORWARD, SHAPES, Call, Case, Setting
from torch import nn

from fastnas import ops
from fastnas.bench.machine import Work
from fastnas.ops import reference

K, TARGETS = 6, 4


def loop(terms, weights):
    products = [[w * x for w, x in zip(row, terms, strict=True)] for row in weights]
    return [functools.reduce(operator.add, row) for row in products]


def matmul(terms, weights):
    sums = weights.to(terms[0].dtype) @ torch.stack(terms).flatten(1)
    return list(sums.view(len(weights), *terms[0].shape).unbind(0))


def build(implementation: str, setting: Setting, normed: bool) -> Call:
    xs = [setting.image() for _ in range(K)]
    weights = torch.stack([setting.weights(K).detach() for _ in range(TARGETS)]).requires_grad_()
    norms = [nn.BatchNorm2d(setting.shape[1], affine=False).to(setting.device) for _ in xs]

    def function(xs, weights):
        if implementation == "fastnas":
            return ops.multi_target_sum(xs, weights, norms if normed else None)
        if implementation == "separate":
            mix = functools.partial(ops.mixed_batch_norm, norms=norms) if normed else ops.mixed_sum
            return [mix(xs, row) for row in weights]
        if implementation == "reference":
            kind, absent = reference.BATCH if normed else reference.PLAIN, [None] * K
            ys, _, _ = reference.multi_target_sum(
                xs, weights, [kind] * K, [norms[0].eps] * K, absent, absent, absent, absent
            )
            return ys
        terms = [norm(x) for norm, x in zip(norms, xs, strict=True)] if normed else xs
        return (matmul if implementation == "torch matmul" else loop)(terms, weights)

    return Call(function, (xs, weights), (*xs, weights))


def work(setting: Setting, normed: bool) -> dict[str, Work]:
    """Forward: statistics, then the sums. Backward: a reduction, then the gradients."""
    forward = (K if normed else 0) + K + TARGETS
    backward = (2 if normed else 1) * (K + TARGETS) + K
    return {
        FORWARD: Work(forward * setting.size),
        BOTH: Work((forward + backward) * setting.size),
    }


CASES = [
    Case(
        "multi_target_sum",
        shape,
        functools.partial(build, normed=normed),
        functools.partial(work, normed=normed),
        stock=("torch matmul", "separate"),
        note="normed" if normed else "",
    )
    for normed in (False, True)
    for shape in SHAPES[::2]
]


def test_row(row, prepared, mode, form):
    row(prepared, mode, form)


def test_ratio(ratio, prepared, mode):
    ratio(prepared, mode)
