# SPDX-License-Identifier: Apache-2.0
"""A search step's forward and backward in the whole supernet, DARTS and PC-DARTS (k = 4).

16 channels, 8 cells, a batch of 16, with the gradients of the architecture: against the same
network of stock modules, in which known waste of the published code is fixed. `fastnas bench`
measures the same, other sizes too, within minutes.
"""

from __future__ import annotations

import functools

import torch
from cases import BOTH, Call, Case, Setting

from fastnas.bench.stock import StockSupernet
from fastnas.methods import METHODS, Moment
from fastnas.nn.recompute import MEMORY, Memory
from fastnas.spaces.darts import Supernet


def build(
    implementation: str, setting: Setting, method: str, k: int, memory: Memory = "default"
) -> Call:
    # The same in the same order for all, so that all get the same numbers.
    x, stock, ours = (
        setting.image(),
        StockSupernet(partial_channels=k),
        Supernet(partial_channels=k, memory=memory),
    )
    chosen = METHODS[method](ours.cell_specs)
    arch = chosen.parameters().to(setting.device)
    ours.load_state_dict(stock.state_dict())
    network = ours if implementation == "fastnas" else stock
    network.to(setting.device, memory_format=setting.memory_format)
    parameters = tuple(network.parameters())

    def function(x):
        mixed = setting.dtype != torch.float32
        with torch.autocast(setting.device.type, setting.dtype, enabled=mixed):
            return network(x, chosen.weights(arch, Moment(0, 1, 0)))

    return Call(function, (x,), (*arch.parameters(), *parameters), parameters)


CASES = [
    # torch.compile takes many minutes for this network: no form of it is measured. The two formats
    # of the stock network differ by 0.6 % in the gradient of alpha; tests compare in float64.
    Case(
        op,
        (16, 3, 32, 32),
        functools.partial(build, method=method, k=k, memory=memory),
        modes=(BOTH,),
        compiled=False,
        amplification=25,
        note="" if memory == "default" else "low memory",
    )
    for op, method, k in (("DARTS supernet", "darts", 1), ("PC-DARTS supernet", "pc_darts", 4))
    for memory in MEMORY
]


def test_row(row, prepared, mode, form):
    row(prepared, mode, form)


def test_ratio(ratio, prepared, mode):
    ratio(prepared, mode)
