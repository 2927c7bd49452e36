# SPDX-License-Identifier: Apache-2.0
"""The stock network that `fastnas bench` measures against is the formula, not a slower one."""

from __future__ import annotations

import pytest
import stock
import torch
import torch.nn.functional as F

from fastnas.bench.stock import StockSupernet
from fastnas.spaces.base import CellWeights
from fastnas.spaces.darts import Supernet

SIZE = {"C": 8, "layers": 3, "num_classes": 5}


def outcome(network, call, arch):
    """Output, gradients by parameter, gradients of the architecture, buffers after the step."""
    y = call()
    F.cross_entropy(y, torch.tensor([1, 4])).backward()
    found = {"y": y.detach(), **{f"arch {i}": a.grad.clone() for i, a in enumerate(arch)}}
    for a in arch:
        a.grad = None
    found |= {name: p.grad for name, p in network.named_parameters()}
    return found | dict(network.named_buffers())


@pytest.mark.parametrize("k", [1, 4])
def test_equals_the_published_network_and_the_supernet(k):
    torch.set_default_dtype(torch.float64)
    try:
        published = stock.Network(k=k, **SIZE)
        networks = [build(partial_channels=k, **SIZE) for build in (StockSupernet, Supernet)]
        for network in networks:
            network.load_state_dict(published.state_dict())
        x = torch.randn(2, 3, 16, 16)
    finally:
        torch.set_default_dtype(torch.float32)
    arch = published.arch_parameters()

    def weights():
        return {
            kind: CellWeights(F.softmax(alpha, -1), published._edge_weights(beta))
            for kind, alpha, beta in (
                ("normal", published.alphas_normal, published.betas_normal),
                ("reduce", published.alphas_reduce, published.betas_reduce),
            )
        }

    wanted = outcome(published, lambda: published(x), arch)
    for network in networks:
        found = outcome(network, lambda network=network: network(x, weights()), arch)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-9, msg=name)


def test_each_candidate_runs_once_per_forward():
    """What the published code of some repositories does twice would count as our gain."""
    network, calls = StockSupernet(**SIZE), []
    edges = [op for cell in network.cells for op in cell._ops]
    for edge in edges:
        for candidate in edge._ops:
            candidate.register_forward_hook(lambda module, args, y: calls.append(module))
    network(torch.randn(2, 3, 16, 16), Supernet(**SIZE).uniform_weights())
    assert len(calls) == len(set(calls)) == 8 * len(edges) == 8 * 14 * 3
