# SPDX-License-Identifier: Apache-2.0
"""`MixedOp` and `PartialMixedOp` (k = 4) with their eight candidates against the stock modules."""

from __future__ import annotations

import functools

import stock
import torch
from cases import BOTH, FORWARD, SHAPES, Call, Case, Setting
from torch import nn

import fastnas
from fastnas.bench.machine import Work

STOCK = {"MixedOp": stock.MixedOp, "PartialMixedOp": stock.PartialMixedOp}
FUSED = {"MixedOp": fastnas.MixedOp, "PartialMixedOp": fastnas.PartialMixedOp}


def build(implementation: str, setting: Setting, op: str) -> Call:
    channels = setting.shape[1]
    x, weights = setting.image(), setting.weights(len(stock.PRIMITIVES))
    published = STOCK[op](channels, 1)
    module = published
    if implementation == "fastnas":
        module = FUSED[op](channels, 1)
        module.load_state_dict(published.state_dict())
    module.to(setting.device, memory_format=setting.memory_format)
    parameters = tuple(module.parameters())

    def mixed_precision(x, weights):
        with torch.autocast(setting.device.type, setting.dtype):
            return module(x, weights)

    function = module if setting.dtype == torch.float32 else mixed_precision
    return Call(function, (x, weights), (x, weights, *parameters), parameters)


@functools.cache
def work(setting: Setting, op: str) -> dict[str, Work]:
    """Convolutions and pools in one pass each way, and the passes of BatchNorms and sum.

    A layer reads its input, rectified on the way, and writes its output; backward it reads its
    input and a gradient and writes one. A BatchNorm inside a separable convolution is read for its
    statistics, and normalised on the way into the next layer.
    """
    published, moved, backward, macs, norms = STOCK[op](setting.shape[1], 1), 0, 0, 0, 0

    def hook(layer, inputs, y):
        nonlocal moved, backward, macs, norms
        if isinstance(layer, nn.BatchNorm2d):
            norms += 1
        elif isinstance(layer, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
            moved += inputs[0].nbytes + y.nbytes
            backward += 2 * inputs[0].nbytes + y.nbytes
            if isinstance(layer, nn.Conv2d):
                macs += y.numel() * layer.weight[0].numel()

    for layer in published.modules():
        layer.register_forward_hook(hook)
    x = torch.empty(setting.shape, dtype=setting.dtype, device="meta")
    with torch.no_grad():
        published.to("meta", setting.dtype)(x, torch.empty(len(stock.PRIMITIVES), device="meta"))

    live, ends = 7, 6  # candidates without `none`, and those that end in a BatchNorm
    part = setting.size // getattr(published, "k", 1)
    inside, bypass = (norms - ends) * part, setting.size - part
    moved += (ends + live + 1) * part + inside + 2 * bypass
    backward += (live + 1 + 2 * live + 1 - (live - ends)) * part + 5 * inside + 2 * bypass
    return {FORWARD: Work(moved, 2 * macs), BOTH: Work(moved + backward, 6 * macs)}


CASES = [
    Case(op, shape, functools.partial(build, op=op), functools.partial(work, op=op))
    for op in STOCK
    for shape in SHAPES
]


def test_row(row, prepared, mode, form):
    row(prepared, mode, form)


def test_ratio(ratio, prepared, mode):
    ratio(prepared, mode)
