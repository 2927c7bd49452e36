# SPDX-License-Identifier: Apache-2.0
"""A search step's forward and backward in the whole supernet, DARTS and PC-DARTS (k = 4).

16 channels, 8 cells, a batch of 16, with the gradients of the architecture: against the same
network of stock modules, in which known waste of the published code is fixed. `fastnas bench`
measures the same, other sizes too, within minutes. And the same for a network as others write it,
after `accelerate`: with its mixed ops swapped alone, and with cells that run node by node.
"""

from __future__ import annotations

import copy
import functools

import stock
import torch
from cases import BOTH, Call, Case, Setting

import fastnas
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


@functools.cache
def foreign(k: int, layers: int, cells: bool | None) -> stock.Network:
    """Somebody else's network, accelerated unless `cells` is None."""
    torch.manual_seed(0)
    network = stock.Network(k=k, layers=layers)
    if cells is not None:
        report = fastnas.accelerate(network, cells=cells)
        assert not report.left, str(report)
        assert len(report.swapped) == layers * (14 + cells)
    return network


def build_foreign(implementation: str, setting: Setting, k: int, cells: bool) -> Call:
    x, ours = setting.image(), implementation == "fastnas"
    # Small images are looked at, not timed.
    layers = 8 if setting.shape == SHAPE else 3
    network = copy.deepcopy(foreign(k, layers, cells if ours else None))
    network.to(setting.device, memory_format=setting.memory_format)
    names = [f"{what}_{kind}" for what in ("alphas", "betas")[: 1 + (k > 1)] for kind in KINDS]
    for name in names:  # plain attributes, which do not move along
        setattr(network, name, getattr(network, name).detach().to(setting.device).requires_grad_())
    parameters = tuple(network.parameters())

    def function(x):
        mixed = setting.dtype != torch.float32
        with torch.autocast(setting.device.type, setting.dtype, enabled=mixed):
            return network(x)

    return Call(function, (x,), (*network.arch_parameters(), *parameters), parameters)


SHAPE, KINDS = (16, 3, 32, 32), ("normal", "reduce")

CASES = [
    # torch.compile takes many minutes for this network: no form of it is measured. The two formats
    # of the stock network differ by 0.6 % in the gradient of alpha; tests compare in float64.
    Case(
        op,
        SHAPE,
        functools.partial(build, method=method, k=k, memory=memory),
        modes=(BOTH,),
        compiled=False,
        amplification=25,
        note="" if memory == "default" else "low memory",
    )
    for op, method, k in (("DARTS supernet", "darts", 1), ("PC-DARTS supernet", "pc_darts", 4))
    for memory in MEMORY
]

CASES += [
    Case(
        op,
        SHAPE,
        functools.partial(build_foreign, k=k, cells=cells),
        modes=(BOTH,),
        compiled=False,
        amplification=25,
        note="by nodes" if cells else "mixed ops only",
    )
    for op, k in (("DARTS accelerated", 1), ("PC-DARTS accelerated", 4))
    for cells in (False, True)
]


def test_row(row, prepared, mode, form):
    row(prepared, mode, form)


def test_ratio(ratio, prepared, mode):
    ratio(prepared, mode)
