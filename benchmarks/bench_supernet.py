# SPDX-License-Identifier: Apache-2.0
"""A search step's forward and backward in the whole supernet, DARTS and PC-DARTS (k = 4).

16 channels, 8 cells, a batch of 16, with the gradients of the architecture: against the same
network of stock modules, in which known waste of the published code is fixed (tests/stock.py).
"""

from __future__ import annotations

import functools

import stock
import torch
from cases import BOTH, Call, Case, Setting

from fastnas.spaces.base import CellWeights
from fastnas.spaces.darts import Supernet

NAMES = ("alphas_normal", "alphas_reduce", "betas_normal", "betas_reduce")


def build(implementation: str, setting: Setting, k: int) -> Call:
    published, x = stock.Network(k=k), setting.image()
    names = NAMES if k > 1 else NAMES[:2]
    for name in NAMES:
        leaf = getattr(published, name).detach().to(setting.device).requires_grad_()
        setattr(published, name, leaf)
    arch = tuple(getattr(published, name) for name in names)
    network = published
    if implementation == "fastnas":
        network = Supernet(partial_channels=k)
        network.load_state_dict(published.state_dict())
    network.to(setting.device, memory_format=setting.memory_format)
    parameters = tuple(network.parameters())

    def weights():
        """What the stock network makes of its architecture parameters in its forward."""
        return {
            kind: CellWeights(torch.softmax(alpha, -1), published._edge_weights(beta))
            for kind, alpha, beta in (
                ("normal", published.alphas_normal, published.betas_normal),
                ("reduce", published.alphas_reduce, published.betas_reduce),
            )
        }

    def function(x):
        mixed = setting.dtype != torch.float32
        with torch.autocast(setting.device.type, setting.dtype, enabled=mixed):
            return network(x, weights()) if implementation == "fastnas" else network(x)

    return Call(function, (x,), (*arch, *parameters), parameters)


CASES = [
    # torch.compile takes many minutes for this network: no form of it is measured. The two formats
    # of the stock network differ by 0.6 % in the gradient of alpha; tests compare in float64.
    Case(
        op,
        (16, 3, 32, 32),
        functools.partial(build, k=k),
        modes=(BOTH,),
        compiled=False,
        amplification=25,
    )
    for op, k in (("DARTS supernet", 1), ("PC-DARTS supernet", 4))
]


def test_row(row, prepared, mode, form):
    row(prepared, mode, form)


def test_ratio(ratio, prepared, mode):
    ratio(prepared, mode)
