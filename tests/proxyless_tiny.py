# SPDX-License-Identifier: Apache-2.0
"""A supernet of four mixed blocks with everything that steps it, for the tests of ``proxyless``."""

from __future__ import annotations

import torch
from torch import nn

from fastnas.costs import Cost
from fastnas.methods import CostTerm, Learner, Proxyless, ProxylessOptions
from fastnas.methods.base import Moment
from fastnas.spaces import mbconv

OPTIONS = {
    "stem_channels": 8,
    "stem_stride": 1,
    "first_channels": 8,
    "stage_channels": (8, 16),
    "stage_blocks": (2, 2),
    "stage_strides": (2, 2),
    "head_channels": 32,
}
SHAPE = mbconv.MBConvShape(image_size=8, in_channels=1, num_classes=4, **OPTIONS)


def learned(estimator="full", target=None, lr=1e-2, **options):
    """A small supernet with everything that steps it; ``target`` is a share of the mean cost."""
    torch.manual_seed(3)
    net = mbconv.Supernet(num_classes=4, in_channels=1, **OPTIONS)
    term = None
    if target is not None:
        cost = Cost.counted("macs", mbconv.SPACE.blocks.plan(SHAPE))
        term = CostTerm(cost, target * cost.expected(net.uniform_weights()).item(), weight=1.0)
    chosen = ProxylessOptions(estimator=estimator, **options)
    method = Proxyless(net.cell_specs, chosen, seed=5, term=term)
    arch = method.parameters()
    return Learner(
        net,
        arch,
        method,
        torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=0.1),
        torch.optim.Adam(arch.parameters(), lr, betas=(0.0, 0.999), weight_decay=0.0),
        nn.CrossEntropyLoss(),
    )


def batch(n=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.arange(n) % 4


def alphas(learner):
    return [row.detach().clone() for row in learner.method.rows(learner.arch)]


def moment(step=0, length=10, epoch=0, epochs=1):
    return Moment(epoch, epochs, step, "weights", length)
