# SPDX-License-Identifier: Apache-2.0
"""`gate_gradient` of an edge with six MBConv candidates and Zero against one product per candidate.

Both stock forms have the closed form behind the products; the published double loop over the
probabilities would only add to them.
"""

from __future__ import annotations

import torch
from cases import FORWARD, Call, Case, Setting

from fastnas import ops
from fastnas.bench.machine import Work
from fastnas.ops import reference

K = 7


def closed_form(products, probs):
    gradients = torch.stack([*products, probs.new_zeros(())])  # Zero is the last candidate
    return probs * (gradients - (probs * gradients).sum())


def loop(grad, outputs, probs):
    return closed_form([(grad * o).sum(dtype=torch.float32) for o in outputs], probs)


def dot(grad, outputs, probs):
    """One BLAS call per candidate, and no tensor of products; all have one memory format."""

    def flat(t):
        return t.permute(0, 2, 3, 1).reshape(-1) if t.stride(1) == 1 else t.reshape(-1)

    g = flat(grad)
    return closed_form([torch.dot(g, flat(o)).float() for o in outputs], probs)


FUNCTIONS = {
    "torch loop": loop,
    "torch dot": dot,
    "fastnas": lambda grad, outputs, probs: ops.gate_gradient(grad, [*outputs, None], probs),
    "reference": lambda grad, outputs, probs: reference.gate_gradient(
        grad, [*outputs, None], probs
    ),
}


def build(implementation: str, setting: Setting) -> Call:
    grad, *outputs = (setting.image().detach() for _ in range(K))
    probs = setting.weights(K).detach()
    return Call(FUNCTIONS[implementation], (grad, outputs, probs), ())


def work(setting: Setting) -> dict[str, Work]:
    return {FORWARD: Work(K * setting.size)}


# An edge of the third stage on images of 224x224.
CASES = [
    Case("gate_gradient", (32, 40, 28, 28), build, work, modes=(FORWARD,), stock=("torch dot",))
]


def test_row(row, prepared, mode, form):
    row(prepared, mode, form)


def test_ratio(ratio, prepared, mode):
    ratio(prepared, mode)
