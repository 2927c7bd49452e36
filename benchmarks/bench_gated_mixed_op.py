# SPDX-License-Identifier: Apache-2.0
"""An architecture step through one edge of ProxylessNAS: `GatedMixedOp`, all candidates' gates.

The edge has 2 to 32 MBConv candidates (24 channels, 28x28). `torch loop` is the mode `full` of the
released code: the sum of all outputs times the gates, those of inactive candidates detached. `DARTS
sum` weighs and trains all of them. `test_saved` prints what each form keeps for the backward:
`pytest benchmarks/bench_gated_mixed_op.py -k saved -s`.
"""

from __future__ import annotations

import functools

import pytest
import torch
from cases import BOTH, Call, Case, Setting
from torch import nn

from fastnas.bench.measure import saved_bytes
from fastnas.nn.gated import GatedMixedOp, frozen_statistics
from fastnas.nn.gates import Gate
from fastnas.spaces.mbconv.layers import MBConv

SIZES = (2, 4, 7, 16, 32)
KINDS = [(k, e) for e in (3, 6) for k in (3, 5, 7)]


def edge(setting: Setting, n: int, frozen: bool = True) -> GatedMixedOp:
    C = setting.shape[1]
    op = GatedMixedOp(MBConv(C, C, KINDS[j % 6][0], 1, KINDS[j % 6][1]) for j in range(n))
    op.to(setting.device, setting.dtype, memory_format=setting.memory_format)
    return op.requires_grad_(not frozen)


def released(op, x, alpha):
    """sum_j g_j o_j(x), with dL/dalpha from dL/dg as the released code forms it."""
    p = torch.softmax(alpha, 0)
    # Its value is one-hot and its gradient p_i (G_i - sum_j p_j G_j).
    gates = nn.functional.one_hot(torch.tensor(0), len(p)).to(p) - p.detach() + p
    total = gates[0] * op.candidate_ops[0](x)
    for gate, candidate in zip(gates[1:], op.candidate_ops[1:], strict=True):
        with torch.no_grad():  # as detaching its output, but without a graph that is built first
            y = candidate(x)
        total = total + gate * y
    return total


def darts(op, x, alpha):
    return op(x, torch.softmax(alpha, 0))


def fused(op, x, alpha, others=None):
    n = len(op.candidate_ops)
    return op(x, Gate(0, tuple(range(1, n)) if others is None else others, alpha))


def one(op, x, alpha):
    return op(x, Gate(0))


FUNCTIONS = {"torch loop": released, "reference": released, "DARTS sum": darts, "fastnas": fused}


def build(implementation: str, setting: Setting, n: int) -> Call:
    op, x = edge(setting, n), setting.image()
    alpha = torch.zeros(n, device=setting.device, requires_grad=True)

    def function(x, alpha):
        with frozen_statistics(op):
            return FUNCTIONS[implementation](op, x, alpha)

    return Call(function, (x, alpha), (x, alpha), tuple(op.parameters()))


CASES = [
    Case(
        "gated_mixed_op",
        (8, 24, 28, 28),
        functools.partial(build, n=n),
        modes=(BOTH,),
        stock=("DARTS sum",),
        compiled=False,
        others=("DARTS sum",),
        note=f"{n} candidates",
    )
    for n in SIZES
]


def test_row(row, prepared, mode, form):
    row(prepared, mode, form)


def test_ratio(ratio, prepared, mode):
    ratio(prepared, mode)


@pytest.mark.parametrize("n", SIZES)
def test_saved(session, n):
    """Bytes kept in an architecture step, beside those of the active path alone."""
    setting = Setting((8, 24, 28, 28), torch.float32, session.device)
    op, x = edge(setting, n), setting.image()
    alpha = torch.zeros(n, device=session.device, requires_grad=True)
    forms = {
        "one path": one,
        "full": fused,
        "two": functools.partial(fused, others=(1,)),
        "released full": released,
        "DARTS": darts,
    }
    saved = {
        name: saved_bytes(lambda f=form: [f(op, x, alpha)], tuple(op.parameters()))
        for name, form in forms.items()
    }
    line = ", ".join(
        f"{k} {v / 1e6:.2f} MB ({v / saved['one path']:.2f}x)" for k, v in saved.items()
    )
    print(f"{n} candidates: {line}")
    assert saved["full"] <= 1.15 * saved["one path"] and saved["two"] <= 1.15 * saved["one path"]
