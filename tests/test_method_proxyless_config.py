# SPDX-License-Identifier: Apache-2.0
"""Presets, schedules and options of the method ``proxyless``."""

from __future__ import annotations

import math

import pytest
from proxyless_tiny import OPTIONS, moment

from fastnas.methods import METHODS, Proxyless, ProxylessOptions
from fastnas.search import SearchConfig, preset_config
from fastnas.search.schedule import learning_rate
from fastnas.spaces import mbconv


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
        (
            {"method": "proxyless", "space": "darts"},
            "needs a space with gates .mbconv, nasbench201., but got",
        ),
        ({"method": "pc_darts", "space": "mbconv"}, "needs a space with partial_channels .darts."),
        ({"C": 16}, "C: the space 'mbconv' has no such option, but got 16"),
        ({"stem": "imagenet"}, "stem: the space 'mbconv' has no such option"),
        ({"target": "macs=3"}, None),
        ({"target": "speed=3"}, "target: expected macs=300M"),
        ({"target": "latency=3ms"}, "latency_table: expected a table with a target of latency"),
        ({"latency_table": "t.json"}, "latency_table: expected a target as well"),
        ({"target_loss": "linear"}, "target_loss: expected a target as well, but got none"),
        ({"target_rate": 0.1}, "target_rate: expected a target as well"),
        ({"foreign_table": True}, "foreign_table: expected a target as well"),
        ({"target": "macs=1M", "foreign_table": True}, "foreign_table: expected a target of lat"),
        (
            {"target": "macs=1M", "target_loss": "linear", "target_rate": 0.1},
            "target_rate: expected it with the loss 'constraint' alone",
        ),
        ({"target": "macs=1M", "target_loss": "linear"}, None),
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
