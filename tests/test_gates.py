# SPDX-License-Identifier: Apache-2.0
"""Gates of a whole network: how they are drawn, weighed and rescaled."""

from __future__ import annotations

import math

import pytest
import torch

from fastnas.nn import gates as module
from fastnas.nn.gates import Gate, draw_gates, rescale

ALPHA = (0.2, -0.1, 0.4)


def chance(p, a, b):
    return p[a] * p[b] * (1 / (1 - p[a]) + 1 / (1 - p[b]))


def table(*rows):
    filled = [[*row, *[-math.inf] * (4 - len(row))] for row in rows]
    return torch.tensor(filled, requires_grad=True)


def test_draws_of_a_network():
    alpha = table((0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0), (0.0,))
    seen = [set(), set(), set()]
    for step in range(60):
        gates = draw_gates(alpha, 5, step)
        assert all(g.others == () and g.logits is None for g in gates.edges)
        for edge_seen, gate in zip(seen, gates.edges, strict=True):
            edge_seen.add(gate.active)
        full = draw_gates(alpha, 5, step, paths="full", counts=(4, 3, 1))
        assert [g.active for g in full.edges] == [g.active for g in gates.edges]
        assert [sorted({g.active, *g.others}) for g in full.edges] == [[0, 1, 2, 3], [0, 1, 2], [0]]
        two = draw_gates(alpha, 5, step, paths="two")
        assert [len(g.others) for g in two.edges] == [1, 1, 0]
    assert seen == [{0, 1, 2, 3}, {0, 1, 2}, {0}]


def test_the_same_draw_at_the_same_step():
    alpha = torch.zeros(20, 7)
    first = [g.active for g in draw_gates(alpha, 3, 11).edges]
    assert first == [g.active for g in draw_gates(alpha, 3, 11).edges]
    assert first != [g.active for g in draw_gates(alpha, 3, 12).edges]
    assert first != [g.active for g in draw_gates(alpha, 4, 11).edges]


def test_one_call_and_one_transfer_for_the_whole_network(monkeypatch):
    calls = []
    real = module.sample_paths
    monkeypatch.setattr(module, "sample_paths", lambda *a, **k: calls.append(a) or real(*a, **k))
    lists = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: lists.append(t) or tolist(t))
    draw_gates(torch.zeros(21, 7, requires_grad=True), 0, 0, paths="full")
    assert len(calls) == 1 and len(lists) == 1


def test_zero_policies():
    alpha = table((0.0, 9.0), (9.0, 0.0))
    options = {"paths": "full", "counts": (2, 2), "zeros": (1, 1)}
    exact = draw_gates(alpha, 0, 0, **options)
    assert [g.active for g in exact.edges] == [1, 0]
    assert exact.skipped == () and exact.edges[0].others == (0,)
    skip = draw_gates(alpha, 0, 0, zero_policy="skip", **options)
    assert skip.skipped == (0,)
    assert skip.edges[0] == Gate(1) and skip.edges[1].others == (1,)
    # An edge without a zero candidate is never left out.
    none = draw_gates(alpha, 0, 0, zero_policy="skip", **{**options, "zeros": (None, None)})
    assert none.skipped == ()


def test_importance_of_a_draw():
    alpha = torch.tensor([ALPHA], dtype=torch.float64, requires_grad=True)
    gates = draw_gates(alpha, 0, 1, paths="two", importance=True)
    (gate,) = gates.edges
    p = torch.softmax(alpha[0].detach(), 0).tolist()
    a, (b,) = gate.active, gate.others
    assert gate.scale.item() == pytest.approx((p[a] + p[b]) ** 2 / chance(p, a, b))
    assert draw_gates(torch.zeros(1, 1), 0, 0, paths="two", importance=True).scale.item() == 1


def test_rescale():
    alpha = torch.nn.Parameter(torch.tensor(ALPHA, dtype=torch.float64))
    before = alpha.detach().clone()
    optimizer = torch.optim.Adam([alpha], lr=1e-3, betas=(0.0, 0.999), eps=1e-8)
    g = 0.73337494
    alpha.grad = torch.tensor([g, -g, 0.0], dtype=torch.float64)
    optimizer.step()
    assert alpha.tolist() == pytest.approx([0.199, -0.099, 0.4], abs=1e-8)
    rescale(alpha.data, before, (0, 1))
    assert alpha.tolist() == pytest.approx([0.19914840, -0.09885160, 0.4], abs=1e-8)
    p = torch.softmax(alpha, 0)
    assert p[2].item() == pytest.approx(torch.softmax(before, 0)[2].item(), abs=1e-15)


def test_rescale_of_large_logits_stays_finite():
    row, before = torch.tensor([801.0, 799.0, 0.0]), torch.tensor([800.0, 800.0, 0.0])
    rescale(row, before, (0, 1))
    assert torch.logsumexp(row[:2], 0).item() == pytest.approx(800 + math.log(2))


def test_errors_name_the_argument():
    alpha = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="expected paths to be one of one, two, full, but got 'f'"):
        draw_gates(alpha, 0, 0, paths="f")
    with pytest.raises(ValueError, match="zero_policy to be one of exact, skip"):
        draw_gates(alpha, 0, 0, zero_policy="never")
    with pytest.raises(ValueError, match="expected 2 counts, but got 1"):
        draw_gates(alpha, 0, 0, counts=(3,))
    with pytest.raises(ValueError, match="sample_paths: expected logits of shape"):
        draw_gates(torch.zeros(3), 0, 0)
