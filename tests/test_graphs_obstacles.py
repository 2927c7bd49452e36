# SPDX-License-Identifier: Apache-2.0
"""What stands in the way of recorded steps, and who says so."""

from __future__ import annotations

import pytest
import torch
from graph_cases import STEPS, Tape, assert_same, learner, train
from torch import nn

from fastnas.methods import Darts, DartsOptions, Method, Moment, Proxyless
from fastnas.methods.graphs import GraphedLearner, obstacle, with_graphs

NOW = Moment(0, 4, 0)


pytestmark = pytest.mark.usefixtures("one_thread")


class Silent(Method):
    name = "silent"
    parameters = weights = scores = None


class Annealed(Darts):
    """Says nothing of steps that depend on the epoch."""

    def weights(self, arch, moment):
        return {k: (1 + moment.epoch) * w for k, w in super().weights(arch, moment).items()}


def listen(one):
    one.supernet.cells[1].register_forward_hook(lambda *given: None)


def join(one):
    one.supernet.global_pooling = nn.SyncBatchNorm(4)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (listen, "a hook on cells.1 "),
        (lambda one: next(one.arch.parameters()).register_hook(lambda g: g), "on a parameter"),
        (join, "global_pooling is SyncBatchNorm"),
        (lambda one: setattr(one, "scaler", torch.amp.GradScaler("cpu")), "loss scaling"),
        (lambda one: setattr(one.method, "options", DartsOptions("second")), "second order"),
        (lambda one: setattr(one.method, "term", object()), "costs"),
        (lambda one: setattr(one, "method", Silent(one.method.specs)), "'silent' does not say"),
        (lambda one: setattr(one, "method", Annealed(one.method.specs)), "Annealed has a weights"),
        (lambda one: one.weight_optimizer.register_step_post_hook(print), "a hook on SGD"),
        (lambda one: one.arch_optimizer.register_step_pre_hook(print), "a hook on Adam"),
        (lambda one: one.arch.register_forward_hook(print), "a hook on the architecture"),
    ],
)
def test_obstacles(spoil, reason):
    one = learner("darts", Tape())
    assert obstacle(one) is None
    spoil(one)
    assert reason in obstacle(one)


def test_a_hook_on_all_modules_is_an_obstacle():
    handle = nn.modules.module.register_module_forward_hook(lambda *given: None)
    try:
        assert "all modules" in obstacle(learner("darts", Tape()))
    finally:
        handle.remove()


def test_second_order_and_hooks_that_come_later_are_eager():
    tape, told = Tape(), []
    one = learner("darts", tape, options=DartsOptions("second"), tell=told.append)
    eager = learner("darts", options=DartsOptions("second"))
    for each in (one, eager):
        train(each, 5)
    assert_same(one, eager)
    assert tape.warm_ups == 0 and "second order" in told[0]
    later = learner("darts", tape, tell=told.append)
    train(later, 4)
    calls = []
    later.supernet.cells[0].register_forward_hook(lambda *given: calls.append(1))
    train(later, 2, 2 * STEPS)
    assert len(calls) == 4 and "hook" in told[1]


def test_modes_on_a_cpu():
    plain = learner("darts")
    for mode in ("auto", "off"):
        assert with_graphs(plain, mode, lambda reason: None) is plain
    with pytest.raises(ValueError, match=r"cuda_graphs: .* 'on': there are none on a device 'cpu'"):
        with_graphs(plain, "on", lambda reason: None)
    assert not isinstance(plain, GraphedLearner)


def test_methods_say_whether_they_can_be_recorded():
    specs = learner("darts").method.specs
    assert Darts(specs).graph_obstacle() is None
    assert "path" in Proxyless.graph_obstacle(None)
