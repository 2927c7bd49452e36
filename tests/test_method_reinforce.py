# SPDX-License-Identifier: Apache-2.0
"""REINFORCE in the method ``proxyless``: reward, baseline, gradient, steps."""

from __future__ import annotations

import pytest
import torch
from proxyless_tiny import learned, moment

from fastnas.methods.reinforce import Baseline, policy_gradient, reward


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
