# SPDX-License-Identifier: Apache-2.0
"""``torch.utils.checkpoint`` around our ops: statistics take the steps that BatchNorm's would."""

from __future__ import annotations

import contextlib
import copy

import ops_cases as cases
import pytest
import stock
import torch
import torch.nn.functional as F
from side_by_side import randomise_statistics
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import fastnas
from fastnas import ops
from fastnas.spaces.base import CellWeights
from fastnas.spaces.darts import Supernet

pytestmark = pytest.mark.usefixtures("one_thread")

F64 = torch.float64
# How a function is run: as it is, or by a checkpoint: computed again to the end, or up to the last
# tensor that the backward asks for.
WAYS = ("plain", "reentrant", "whole", "early stop")


def run(function, way, *inputs):
    """Call a function, with or without a checkpoint, and go back through it."""
    for x in inputs:
        x.grad = None
    stop = contextlib.nullcontext()
    if way in ("whole", "early stop"):
        stop = set_checkpoint_early_stop(way == "early stop")
    with stop:
        y = function(*inputs) if way == "plain" else None
        if y is None:
            y = checkpoint(function, *inputs, use_reentrant=way == "reentrant")
    parts = y if isinstance(y, (list, tuple)) else [y]
    sum(part.square().sum() for part in parts).backward()
    return [x.grad for x in inputs]


def assert_same_statistics(ours: nn.Module, theirs: nn.Module, steps: int) -> None:
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
        assert a.is_floating_point() or a.item() == steps, name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cells", [True, False])
@pytest.mark.parametrize("k", [1, 2])
def test_an_accelerated_cell(k, cells, way):
    cell = randomise_statistics(stock.Cell(2, 2, 8, 8, 4, False, False, k)).to(F64)
    theirs, ours = (nn.ModuleDict({"cell": copy.deepcopy(cell)}) for _ in range(2))
    report = fastnas.accelerate(ours, cells=cells)
    assert len(report.swapped) == 5 + cells
    inputs = [cases.make((2, 8, 6, 6), F64, seed=i).requires_grad_() for i in range(2)]
    inputs.append(cases.make((5, 8), F64, seed=3).requires_grad_())
    seen = [run(net["cell"], way, *inputs) for net in (ours, theirs)]
    torch.testing.assert_close(*seen, rtol=1e-7, atol=1e-8)
    before = 8 if way == "plain" else 9
    assert_same_statistics(ours, theirs, before)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("memory", ["default", "low"])
def test_a_cell_of_ours(memory, way):
    """With little memory the cell has notes of its own within those of the checkpoint."""
    net = randomise_statistics(Supernet(4, 3, 5, memory=memory)).to(F64)
    ours, theirs = net.cells[0], copy.deepcopy(net.cells[0])
    inputs = [cases.make((2, 12, 6, 6), F64, seed=i).requires_grad_() for i in range(2)]
    ops = cases.make((14, 8), F64, seed=3).requires_grad_()

    def forward(cell):
        return lambda s0, s1, w: cell(s0, s1, CellWeights(w, None))

    run(forward(ours), way, *inputs, ops)
    for _ in range(1 if way == "plain" else 2):
        run(forward(theirs), "plain", *inputs, ops)
    assert_same_statistics(ours, theirs, 8 if way == "plain" else 9)


W = [cases.make((4, 1, size, size), F64, seed=size) for size in (3, 5)]
P = [cases.make((4, 4, 1, 1), F64, seed=size) for size in (3, 5)]
SOME = torch.tensor([0.25, 0.75], dtype=F64)


def convolved(x, i, pointwise=True):
    y = F.conv2d(x.relu(), W[i], None, 1, W[i].shape[-1] // 2, 1, 4)
    return F.conv2d(y, P[i]) if pointwise else y


def mixed(x, norms):
    return sum(w * norm(f * x) for w, f, norm in zip(SOME, (1, 2), norms, strict=True))


# Name -> the op, and the same by PyTorch; both of (x, norms).
OPS = {
    "mixed_batch_norm": (lambda x, n: ops.mixed_batch_norm([x, 2 * x], SOME, n), mixed),
    "multi_target_sum": (
        lambda x, n: ops.multi_target_sum([x, 2 * x], SOME[None], n)[0],
        mixed,
    ),
    "partial_channel_mix": (
        lambda x, n: ops.partial_channel_mix(torch.cat([x, x], 1), [x, 2 * x], SOME, 2, n),
        mixed,  # the channels that pass by leave no statistics
    ),
    "batch_norm_depthwise": (
        lambda x, n: sum(ops.batch_norm_depthwise(x, n[0], W, [1, 1])),
        lambda x, n: (lambda h: convolved(h, 0, False) + convolved(h, 1, False))(n[0](x)),
    ),
    "separable_group": (
        lambda x, n: sum(ops.separable_group(x, W, P, [1, 1], 1, n[0])),
        lambda x, n: (lambda h: convolved(h, 0) + convolved(h, 1))(n[0](x)),
    ),
    "separable_each": (
        lambda x, n: sum(ops.separable_each([x, 2 * x], W, P, [1, 1], n)),
        lambda x, n: convolved(n[0](x), 0) + convolved(n[1](2 * x), 1),
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPS)
def test_an_op_alone(name, way):
    op, plain = OPS[name]
    norms = nn.ModuleList(randomise_statistics(nn.BatchNorm2d(4)) for _ in range(2)).to(F64)
    ours, theirs = norms, copy.deepcopy(norms)
    x = cases.make((2, 4, 6, 6), F64).requires_grad_()
    run(lambda x: op(x, ours), way, x)
    run(lambda x: plain(x, theirs), way, x)
    for a, b in zip(ours, theirs, strict=True):
        assert_same_statistics(a, b, int(b.num_batches_tracked))
        assert way == "plain" or b.num_batches_tracked in (7, 9)
