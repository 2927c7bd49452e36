# SPDX-License-Identifier: Apache-2.0
"""The steps of the method ``proxyless``: what they move and what they leave alone."""

from __future__ import annotations

import pytest
import torch
from proxyless_tiny import OPTIONS, alphas, batch, learned, moment
from torch import nn

from fastnas.methods import Proxyless, ProxylessOptions
from fastnas.methods.parameters import ArchParameters
from fastnas.nn.gated import frozen_statistics
from fastnas.nn.gates import draw_gates
from fastnas.spaces import CellGates, mbconv

# --- parameters ------------------------------------------------------------------------------


def test_logits_of_the_imagenet_space():
    method = Proxyless(mbconv.Supernet().cell_specs)
    arch = method.parameters()
    assert sum(p.numel() for p in arch.parameters()) == 141
    assert len(list(arch.parameters())) == 21
    assert arch.alpha("block").shape == (21, 7)
    assert arch.alpha("block").isneginf().sum() == 6
    assert arch.entropy()["block"] == pytest.approx(1.901867, abs=1e-4)
    assert 0 < max(p.abs().max().item() for p in arch.parameters()) < 6e-3
    other = method.parameters()
    other.load_state_dict(arch.state_dict())
    assert torch.equal(other.alpha("block"), arch.alpha("block"))


def test_ragged_parameters_can_do_without_a_gradient():
    arch = ArchParameters({"a": torch.zeros(2, 3)}, counts={"a": (2, 3)})
    arch.alpha("a")[0, 1].backward()
    assert arch.rows("a")[0].grad.tolist() == [0, 1] and arch.rows("a")[1].grad.tolist() == [0] * 3
    with pytest.raises(ValueError, match="the edges of kind 'b' share one parameter"):
        ArchParameters({"b": torch.zeros(2, 3)}).rows("b")


# --- steps -----------------------------------------------------------------------------------


def test_a_weight_step_trains_one_path_and_no_alpha():
    learner = learned()
    before, state = (
        alphas(learner),
        {n: t.clone() for n, t in learner.supernet.state_dict().items()},
    )
    at = moment(3)
    gates = learner.method.weights(learner.arch, at)["block"].edges
    learner.weight_step(batch(), at)
    for name, value in learner.supernet.state_dict().items():
        parts = name.split(".")
        active = "candidate_ops" not in parts or gates[int(parts[1]) - 1].active == int(parts[4])
        assert torch.equal(value, state[name]) != active, name
    assert all(map(torch.equal, alphas(learner), before))


@pytest.mark.parametrize("estimator", ["full", "two", "reinforce"])
def test_an_architecture_step_moves_alphas_and_no_weight(estimator):
    learner = learned(estimator, arch_every=1, rl_samples=3, rl_updates=10)
    before = {n: p.detach().clone() for n, p in learner.supernet.named_parameters()}
    old = alphas(learner)
    weight_step = learner.weight_step
    learner.weight_step = lambda *a: None
    _, outcome = learner.method.iteration(learner, batch(), batch, moment(1))
    learner.weight_step = weight_step
    assert outcome.images == 8 and outcome.loss.isfinite()
    for name, p in learner.supernet.named_parameters():
        assert torch.equal(p, before[name]) and p.requires_grad and p.grad is None, name
    moved = [not torch.equal(a, b) for a, b in zip(alphas(learner), old, strict=True)]
    assert any(moved)


def test_the_order_is_weights_first():
    learner = learned(arch_every=1)
    order = []
    learner.weight_step = lambda *a: order.append("weights")
    learner.method._gradient_step = lambda *a: order.append("architecture")
    learner.method.iteration(learner, batch(), batch, moment(0))
    assert order == ["weights", "architecture"]


@pytest.mark.parametrize(
    ("options", "length", "steps"),
    [
        ({}, 4810, 962),
        ({"arch_every": 5, "arch_steps": 2}, 20, 8),
        ({"estimator": "reinforce", "rl_updates": 300}, 4810, 300),
        ({"estimator": "reinforce", "rl_updates": 25}, 10, 25),
    ],
)
def test_how_often(options, length, steps):
    method = Proxyless(mbconv.Supernet(4, 1, **OPTIONS).cell_specs, ProxylessOptions(**options))
    counts = [method._steps_at(moment(3 * length + i, length, 3)) for i in range(length)]
    assert sum(counts) == steps
    if options.get("estimator") != "reinforce":
        assert [i for i, n in enumerate(counts) if n][:2] == [4, 9]
    else:
        assert max(counts) - min(counts) == 1 and sum(counts[: length // 2]) in (steps // 2, 12)


def test_no_architecture_step_while_it_is_frozen():
    learner = learned(arch_every=1)
    _, outcome = learner.method.iteration(learner, batch(), None, moment(0))
    assert outcome is None


def test_two_paths_leave_all_other_probabilities_alone():
    learner = learned("two", target=0.7, lr=0.05)
    method = learner.method
    for step in range(6):
        before = alphas(learner)
        at = moment(step).during("architecture")
        gates = method.draw(learner.arch, at, "two", 1).edges
        method.architecture_step(learner, batch(), batch(), at)
        for old, new, gate in zip(before, alphas(learner), gates, strict=True):
            pair = [gate.active, *gate.others]
            rest = [k for k in range(len(old)) if k not in pair]
            assert torch.equal(new[rest], old[rest])
            p, q = torch.softmax(old.double(), 0), torch.softmax(new.double(), 0)
            torch.testing.assert_close(q[rest], p[rest], rtol=1e-6, atol=0)
            assert (q[pair] - p[pair]).abs().min() > 0
            assert q[pair].sum().item() == pytest.approx(p[pair].sum().item(), rel=1e-6)


def test_skip_leaves_an_edge_whose_zero_is_active_alone():
    """Neither the gates' gradient, nor the target's, nor Adam's state."""
    for policy in ("skip", "exact"):
        learner = learned(target=0.5, zero_policy=policy)
        with torch.no_grad():
            learner.method.rows(learner.arch)[1][6] = 9.0
        before = alphas(learner)
        learner.method.architecture_step(learner, batch(), batch(), moment(2))
        moved = [not torch.equal(a, b) for a, b in zip(alphas(learner), before, strict=True)]
        assert moved == [True, policy == "exact", True, True]
        row = learner.method.rows(learner.arch)[1]
        assert (row in learner.arch_optimizer.state) == (policy == "exact")


def test_full_gradient_by_hand():
    """Against the sum of all candidates weighted by gates, over the whole network."""
    learner = learned()
    method, at = learner.method, moment(4).during("architecture")
    gates = method.draw(learner.arch, at, "one", 1)
    rows = method.rows(learner.arch)
    x, y = batch()
    learner.supernet.double()
    hard = [
        nn.functional.one_hot(torch.tensor(g.active), len(r)).double().requires_grad_()
        for g, r in zip(gates.edges, rows, strict=True)
    ]

    def gated(module, arguments):
        h, edge = arguments
        total = h if module.residual else 0.0
        for k, op in enumerate(module.mobile_inverted_conv.candidate_ops):
            out = op(h)
            total = total + hard[edge][k] * (out if hard[edge][k] else out.detach())
        return total

    net = learner.supernet
    with frozen_statistics(net):
        h = net.blocks[0](net.first_conv(x.double()))
        for edge, block in enumerate(list(net.blocks)[1:]):
            h = gated(block, (h, edge))
        loss = nn.functional.cross_entropy(net.classifier(net.feature_mix_layer(h)), y)
    G = torch.autograd.grad(loss, hard)
    wanted = []
    for row, g in zip(rows, G, strict=True):
        p = torch.softmax(row.detach().double(), 0)
        wanted.append(p * (g - (p * g).sum()))
    found = []
    learner.apply_architecture_gradient = lambda gradient: found.extend(gradient)
    method.architecture_step(learner, None, (x.double(), y), at)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("importance", [False, True])
def test_the_cost_s_gradient_in_two_paths_is_that_of_the_pair(importance):
    learner = learned("two", target=0.5, importance=importance)
    method, at = learner.method, moment(1).during("architecture")
    with torch.no_grad():
        for row in method.rows(learner.arch):
            row.copy_(torch.randn(len(row)))
    gates = method.draw(learner.arch, at, "two", 1)
    cost = method.term.cost
    weights = method._expectation_of(learner.arch, gates)
    expected = cost.expected(weights)
    true = cost.expected(method.expectation(learner.arch, at))
    torch.testing.assert_close(expected, true)
    rows = method.rows(learner.arch)
    found = torch.autograd.grad(expected, rows)
    for edge, (row, gate, g) in enumerate(zip(rows, gates.edges, found, strict=True)):
        a, b = gate.active, gate.others[0]
        q = torch.softmax(row.detach()[[a, b]], 0)
        F = cost.values["block"][edge]
        wanted = torch.zeros(len(row))
        wanted[a] = q[0] * q[1] * (F[a] - F[b])
        wanted[b] = -wanted[a]
        if importance:
            wanted = wanted * gate.scale
        torch.testing.assert_close(g, wanted, rtol=1e-4, atol=1e-2)


def test_a_target_pulls_the_expected_cost_down():
    learner = learned(target=0.5, lr=0.1)
    method = learner.method
    first = method.facts(learner.arch, moment())["macs"]
    for step in range(25):
        method.architecture_step(learner, batch(), batch(), moment(step).during("architecture"))
        method.settle(learner.arch, moment(step))
    last = method.facts(learner.arch, moment())["macs"]
    assert last["expected"] < 0.8 * first["expected"]
    assert last["derived"] <= last["target"]


def test_label_smoothing_is_of_the_weights_only():
    learner = learned()
    learner.weight_criterion = nn.CrossEntropyLoss(label_smoothing=0.5)
    x, y = batch()
    at = moment(0)
    with torch.no_grad():
        logits = learner.supernet(x, learner.method.weights(learner.arch, at))
        smooth = nn.functional.cross_entropy(logits, y, label_smoothing=0.5)
        step = at.during("architecture")
        plain = nn.functional.cross_entropy(
            learner.supernet(x, learner.method.weights(learner.arch, step)), y
        )
    torch.testing.assert_close(
        learner.method.architecture_step(learner, None, (x, y), step).loss, plain
    )
    torch.testing.assert_close(learner.weight_step((x, y), at).loss, smooth)


def test_draws_within_an_iteration_differ_and_come_again():
    method, arch = learned().method, learned().arch
    draws = [
        [g.active for g in method.draw(arch, moment(step), "one", index).edges]
        for step in range(3)
        for index in range(12)
    ]
    assert len({tuple(d) for d in draws}) > 20
    again = [g.active for g in method.draw(arch, moment(0), "one", 0).edges]
    assert again == draws[0] == [g.active for g in draw_gates(arch.alpha("block"), 5, 0).edges]


def test_validation_takes_the_most_probable_path_and_moves_no_statistics():
    learner = learned()
    with torch.no_grad():
        for k, row in enumerate(learner.method.rows(learner.arch)):
            row[k + 1] = 1.0
    at = moment().during("validation")
    gates = learner.method.weights(learner.arch, at)["block"]
    assert gates == CellGates(gates.edges) and [g.active for g in gates.edges] == [1, 2, 3, 4]
    learner.supernet.eval()
    before = {n: b.clone() for n, b in learner.supernet.named_buffers()}
    by_batch = learner.method.evaluate(learner, batch(), at)
    assert all(torch.equal(b, before[n]) for n, b in learner.supernet.named_buffers())
    assert not learner.supernet.training and not learner.supernet.blocks[1].training
    assert by_batch.loss != learner.evaluate(batch(), at).loss
    learner.method.evaluate(learner, batch(1), at)
