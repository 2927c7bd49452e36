# SPDX-License-Identifier: Apache-2.0
"""The method ``proxyless``: its steps, schedules, estimators and what it leaves alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastnas.costs import Cost
from fastnas.methods import METHODS, CostTerm, Learner, Proxyless, ProxylessOptions
from fastnas.methods.base import ArchParameters, Moment
from fastnas.methods.reinforce import Baseline, policy_gradient, reward
from fastnas.nn.gates import draw_gates
from fastnas.search import SearchConfig, preset_config
from fastnas.search.schedule import learning_rate
from fastnas.spaces import CellGates, mbconv

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

    from fastnas.nn.gated import frozen_statistics

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


# --- REINFORCE -------------------------------------------------------------------------------


def test_reward():
    found = reward(torch.tensor(0.5, dtype=torch.float64), 100.0, 80.0, 0.1)
    assert found.item() == pytest.approx(0.488966384, abs=1e-9)


@pytest.mark.parametrize(("rule", "step"), [("released", 0.99), ("average", 0.01)])
def test_baselines(rule, step):
    baseline = Baseline(rule)
    rewards = torch.tensor([0.1, 0.5, 0.3])
    assert (rewards - baseline.update(rewards.mean())).sum().abs() < 1e-6
    assert baseline.update(torch.tensor(0.8)).item() == pytest.approx(step * 0.8 + (1 - step) * 0.3)
    other = Baseline(rule)
    other.load_state_dict(baseline.state_dict())
    assert other.update(torch.tensor(0.0)) == baseline.update(torch.tensor(0.0))


def test_policy_gradient_is_that_of_the_log_probability():
    alpha = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    drawn = torch.tensor([[0, 1, 3], [2, 2, 2]])
    advantages = torch.tensor([0.7, -0.2], dtype=torch.float64)
    log_p = torch.log_softmax(alpha, 1)
    chosen = torch.stack([log_p[torch.arange(3), d].sum() for d in drawn])
    (wanted,) = torch.autograd.grad(-(advantages * chosen).mean(), alpha)
    found = policy_gradient(torch.softmax(alpha.detach(), 1), drawn, advantages)
    torch.testing.assert_close(found, wanted)


def test_reinforce_prefers_what_is_cheap_when_nothing_else_differs():
    learner = learned("reinforce", target=0.5, lr=0.2, rl_samples=8, rl_updates=10, rl_exponent=3.0)
    learner.criterion = lambda logits, y: logits.sum() * 0
    x, y = torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    with torch.no_grad():
        learner.supernet.classifier.linear.weight.zero_()  # all networks are always right
    before = learner.method.facts(learner.arch, moment())["macs"]["expected"]
    learner.weight_step = lambda *a: None
    state = {n: b.clone() for n, b in learner.supernet.named_buffers()}
    for step in range(15):
        learner.method.iteration(learner, (x, y), lambda: (x, y), moment(step))
    assert learner.method.facts(learner.arch, moment())["macs"]["expected"] < 0.7 * before
    assert all(torch.equal(b, state[n]) for n, b in learner.supernet.named_buffers())
    assert set(learner.method.state_dict()) == {"term", "baseline"}


# --- schedules and configuration -------------------------------------------------------------


def test_preset_of_imagenet():
    config = preset_config("imagenet", method="proxyless", space="mbconv")
    c, o = config, config.options
    assert (c.epochs, o.warmup_epochs, c.arch_warmup_epochs) == (160, 40, 41)
    assert (c.lr, o.warmup_lr, c.lr_min, c.momentum, c.nesterov) == (0.025, 0.05, 0.0, 0.9, True)
    assert (c.weight_decay, c.label_smoothing, c.batch_size) == (4e-5, 0.1, 256)
    assert (c.arch_lr, c.arch_betas, c.arch_weight_decay) == (1e-3, (0.0, 0.999), 0.0)
    assert (o.arch_every, o.arch_steps, o.estimator) == (5, 1, "full")
    images = 1_281_167
    assert int(images * c.weight_share + 1e-6) // c.batch_size == 4_809 + 0
    assert int(images * c.arch_share + 1e-6) == 50_000
    assert c.network == mbconv.MBConvOptions()
    assert SearchConfig.from_dict(c.to_dict()) == c


def test_two_cosines_by_iterations():
    options = ProxylessOptions(warmup_epochs=4, warmup_lr=0.5)
    method = Proxyless(mbconv.Supernet(4, 1, **OPTIONS).cell_specs, options)

    def rate(step):
        position, length, high = method.lr_span(moment(step, 10, step // 10, 12))
        return learning_rate(position, length, 0.2 if high is None else high)

    assert rate(0) == 0.5 and rate(20) == pytest.approx(0.25)
    assert rate(39) == pytest.approx(0.25 * (1 + math.cos(math.pi * 39 / 40)))
    assert rate(40) == pytest.approx(0.2) and rate(80) == pytest.approx(0.1)
    assert 0 < rate(119) < 1e-4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "proxyless", "space": "darts"}, "needs a space with gates .mbconv., but got"),
        ({"method": "pc_darts", "space": "mbconv"}, "needs a space with partial_channels .darts."),
        ({"C": 16}, "C: the space 'mbconv' has no such option, but got 16"),
        ({"stem": "imagenet"}, "stem: the space 'mbconv' has no such option"),
        ({"target": "macs=3"}, None),
        ({"target": "speed=3"}, "target: expected macs=300M"),
        ({"target": "latency=3ms"}, "latency_table: expected a table with a target of latency"),
        ({"latency_table": "t.json"}, "latency_table: expected a target as well"),
        (
            {"target": "macs=1M", "latency_table": "t.json"},
            "latency_table: expected a table with a target of latency, and with no other",
        ),
        ({"options": ProxylessOptions(warmup_epochs=9)}, "arch_warmup_epochs: expected at least"),
        (
            {"options": ProxylessOptions(estimator="two"), "arch_betas": (0.5, 0.999)},
            r"arch_betas\[0\]: expected 0 with two paths, but got 0.5",
        ),
        (
            {"options": ProxylessOptions(estimator="two"), "arch_weight_decay": 0.1},
            "arch_weight_decay: expected 0 with two paths",
        ),
        (
            {"options": ProxylessOptions(importance=True)},
            "importance: expected the estimator 'two', but got 'full'",
        ),
        ({"label_smoothing": 1.0}, "label_smoothing: expected 0 or more and less than 1"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov: expected momentum above 0"),
    ],
)
def test_configurations_that_make_no_sense(fields, message):
    names = {"method": "proxyless", "space": "mbconv", **fields}
    if message is None:
        preset_config("demo", **names)
        return
    with pytest.raises(ValueError, match=message):
        preset_config("demo", **names)


@pytest.mark.parametrize("name", ["arch_every", "arch_steps", "rl_samples", "rl_updates"])
def test_options_out_of_range(name):
    with pytest.raises(ValueError, match=f"{name}: expected 1 to 32767, but got 0"):
        ProxylessOptions(**{name: 0})


def test_the_method_is_registered():
    assert METHODS["proxyless"] is Proxyless
