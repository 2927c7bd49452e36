# SPDX-License-Identifier: Apache-2.0
"""PC-DARTS: edge normalisation, scores, and the option for partial channels."""

from __future__ import annotations

import pytest
import torch

from fastnas.methods import METHODS, Moment, PCDarts, PCDartsOptions
from fastnas.spaces import SPACES, CellSpec

NOW = Moment(epoch=0, epochs=2, step=0)
SPEC = CellSpec((2, 3, 4, 5), ("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect"))


@pytest.fixture
def method() -> PCDarts:
    return PCDarts({"normal": SPEC, "reduce": SPEC})


def test_parameters() -> None:
    net = SPACES["darts"].supernet(C=4, layers=3, num_classes=2, in_channels=1)
    arch = PCDarts(net.cell_specs).parameters()
    assert sum(p.numel() for p in arch.parameters()) == 252
    assert set(arch.state_dict()) == {
        "alpha_normal",
        "alpha_reduce",
        "beta_normal",
        "beta_reduce",
    }
    assert all(0 < p.abs().max() < 1e-2 for p in arch.parameters())


def test_edge_weights_are_a_softmax_per_node(method: PCDarts) -> None:
    arch = method.parameters()
    with torch.no_grad():
        arch.beta("normal").copy_(torch.arange(14.0))
    edges = method.weights(arch, NOW)["normal"].edges
    for rows in (slice(0, 2), slice(2, 5), slice(5, 9), slice(9, 14)):
        torch.testing.assert_close(edges[rows], torch.arange(14.0)[rows].softmax(0))
    assert edges.sum().item() == pytest.approx(4)


def test_scores_are_products(method: PCDarts) -> None:
    arch = method.parameters()
    with torch.no_grad():
        for parameter in arch.parameters():
            parameter.normal_()
    weights = method.weights(arch, NOW)["reduce"]
    expected = weights.ops * weights.edges[:, None]
    torch.testing.assert_close(method.scores(arch)["reduce"], expected)


def test_betas_choose_edges_not_candidates(method: PCDarts) -> None:
    arch = method.parameters()
    with torch.no_grad():
        for parameter in arch.parameters():
            parameter.zero_()
        arch.alpha("normal")[:, 3] = 0.1
        # In the last node edges 11 and 13 (states 2 and 4) win by their betas.
        arch.beta("normal")[11] = 1.0
        arch.beta("normal")[13] = 2.0
    genotype = method.derive(arch, SPACES["darts"])
    assert genotype.normal[6:] == (("skip_connect", 4), ("skip_connect", 2))
    assert genotype.normal[:6] == (("skip_connect", 0), ("skip_connect", 1)) * 3


def test_gradient_reaches_alphas_and_betas(method: PCDarts) -> None:
    arch = method.parameters()
    weights = method.weights(arch, NOW)["normal"]
    (weights.ops * torch.rand(14, 4)).sum().backward(retain_graph=True)
    (weights.edges * torch.rand(14)).sum().backward()
    assert arch.alpha("normal").grad.abs().min() > 0
    assert arch.beta("normal").grad.abs().min() > 0


def test_supernet_option() -> None:
    assert PCDarts.supernet_options(PCDartsOptions(partial_channels=2)) == {"partial_channels": 2}
    assert METHODS["darts"].supernet_options(METHODS["darts"].Options()) == {}
    with pytest.raises(ValueError, match="partial_channels: expected at least 1, but got 0"):
        PCDartsOptions(partial_channels=0)
