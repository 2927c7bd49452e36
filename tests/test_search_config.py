# SPDX-License-Identifier: Apache-2.0
"""The configuration: presets, checks at the door, and JSON both ways."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch
from search_tiny import config, images, registered

from fastnas.data import Augment
from fastnas.methods import METHODS, DartsOptions, EnTranNASOptions, PCDartsOptions
from fastnas.search import PRESETS, Progress, Search, SearchConfig, preset_config
from fastnas.spaces import SPACES


def test_cifar10_of_darts() -> None:
    c = preset_config("cifar10", method="darts")
    assert (c.C, c.layers, c.epochs, c.batch_size) == (16, 8, 50, 64)
    assert (c.lr, c.lr_min, c.momentum, c.weight_decay, c.grad_clip) == (0.025, 0.001, 0.9, 3e-4, 5)
    assert (c.arch_lr, c.arch_betas, c.arch_weight_decay) == (3e-4, (0.5, 0.999), 1e-3)
    assert (c.arch_warmup_epochs, c.arch_grad_clip) == (0, 0)
    assert (c.weight_share, c.arch_share, c.validate) == (0.5, 0.5, "every")
    assert c.augment == Augment(crop_padding=4, flip=True)
    assert c.options == DartsOptions(order="first")


def test_cifar10_of_pc_darts() -> None:
    c = preset_config("cifar10", method="pc_darts")
    assert (c.C, c.layers, c.epochs, c.batch_size) == (16, 8, 50, 256)
    assert (c.lr, c.lr_min, c.arch_lr, c.arch_warmup_epochs) == (0.1, 0, 6e-4, 15)
    assert c.validate == "last"
    assert c.options == PCDartsOptions(partial_channels=4)


def test_imagenet_of_pc_darts() -> None:
    c = preset_config("imagenet", method="pc_darts")
    assert (c.C, c.layers, c.stem, c.epochs, c.batch_size) == (16, 8, "imagenet", 50, 1024)
    assert (c.lr, c.lr_min, c.lr_warmup_epochs) == (0.5, 0, 5)
    assert (c.arch_lr, c.arch_grad_clip, c.arch_warmup_epochs) == (6e-3, 5, 35)
    assert (c.weight_share, c.arch_share, c.split) == (0.1, 0.025, "random")
    assert c.augment == Augment(resized_crop=0.08, flip=True)
    assert c.options == PCDartsOptions(partial_channels=2)


def space_for(method: str) -> str:
    return next(s.name for s in SPACES.values() if METHODS[method].needs <= s.features)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_serves_every_method(preset: str, method: str) -> None:
    c = preset_config(preset, method=method, space=space_for(method))
    assert c.method == method
    assert type(c.options) is METHODS[method].Options


def test_what_is_given_wins() -> None:
    c = preset_config("cifar10", method="darts", epochs=3, options=DartsOptions("second"))
    assert (c.epochs, c.batch_size, c.options.order) == (3, 64, "second")


def test_defaults_are_the_demo() -> None:
    assert SearchConfig() == preset_config("demo") == preset_config()
    assert SearchConfig().options == PCDartsOptions(partial_channels=2)
    assert preset_config("cifar10").options == PCDartsOptions(partial_channels=4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preset", PRESETS)
def test_json_round_trip(preset: str, method: str) -> None:
    c = preset_config(preset, method=method, space=space_for(method))
    text = json.dumps(c.to_dict(), allow_nan=False)
    assert SearchConfig.from_dict(json.loads(text)) == c


def test_json_keeps_what_differs_from_the_defaults() -> None:
    c = replace(
        preset_config("demo", method="darts"),
        options=DartsOptions("second"),
        out=None,
        image_size=32,
        arch_betas=(0.1, 0.2),
        augment=Augment(cutout=3),
    )
    assert SearchConfig.from_dict(json.loads(json.dumps(c.to_dict()))) == c


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epoch": 3}, r"run: unknown field 'epoch'; known are space, method"),
        ({"epochs": "3"}, r"run: epochs: expected int, but got '3'"),
        ({"epochs": True}, r"run: epochs: expected int, but got True"),
        ({"epochs": 2.5}, r"run: epochs: expected int, but got 2.5"),
        ({"lr": None}, r"run: lr: expected float, but got None"),
        ({"lr": 10**400}, r"run: lr: expected a smaller number, but got 1000"),
        ({"lr": 10**5000}, r"run: lr: expected a smaller number, but got a value of the type int"),
        ({"resume": 1}, r"run: resume: expected bool, but got 1"),
        ({"amp": "fp8"}, r"run: amp: expected one of 'off', 'bf16', 'fp16', but got 'fp8'"),
        ({"arch_betas": [0.5]}, r"run: arch_betas: expected 2 values, but got 1"),
        ({"arch_betas": 0.5}, r"run: arch_betas: expected a list, but got 0.5"),
        ({"arch_betas": [0.5, "x"]}, r"run: arch_betas\[1\]: expected float, but got 'x'"),
        ({"augment": {"flips": True}}, r"run: augment: unknown field 'flips'"),
        ({"augment": 3}, r"run: augment: expected an object with fields, but got 3"),
        ({"options": {"k": 2}}, r"run: options: unknown field 'k'; known are order, partial"),
        ({"options": {"partial_channels": 0}}, r"run: options: partial_channels: expected at l"),
        ({"method": "nothing", "options": {}}, r"run: method: unknown name 'nothing'"),
        ({"method": "nothing"}, r"run: method: unknown name 'nothing', known are .*darts, .*pc_"),
        ({"space": "nothing"}, r"run: space: unknown name 'nothing'"),
        ({"epochs": 0}, r"run: epochs: expected at least 1, but got 0"),
        ([], r"run: expected an object with fields, but got \[\]"),
    ],
)
def test_json_from_elsewhere(fields: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchConfig.from_dict(fields, "run")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"C": 0}, "C: expected at least 1, but got 0"),
        ({"lr": float("nan")}, "lr: expected at least 0, but got nan"),
        ({"seed": -1}, "seed: expected at least 0, but got -1"),
        ({"seed": 2**63}, "seed: expected at least 0 and below 9223372036854775808, but got 9223"),
        ({"lr": float("inf")}, "lr: expected at least 0 and below inf, but got inf"),
        ({"grad_clip": float("-inf")}, "grad_clip: expected at least 0, but got -inf"),
        ({"epochs": 10**40}, "epochs: expected at least 1 and below 2147483648, but got 1000"),
        ({"image_size": 0}, "image_size: expected at least 1, but got 0"),
        ({"image_size": 10**30}, "image_size: expected at least 1 and below 2147483648"),
        ({"weight_share": 1.0}, "weight_share: expected more than 0 and less than 1"),
        ({"weight_share": 0.9}, "expected a sum of at most 1, but got 0.9 and 0.16"),
        ({"arch_betas": (0.5, 1.0)}, r"arch_betas: expected 0 <= beta < 1"),
        ({"out": None, "resume": True}, "resume: expected a folder in out"),
        ({"method": "pcdarts"}, "method: unknown name 'pcdarts', known are .*darts, .*pc_darts"),
    ],
)
def test_values_out_of_range(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SearchConfig(), **fields)


def test_options_of_another_method() -> None:
    with pytest.raises(TypeError, match="expected PCDartsOptions for the method 'pc_darts'"):
        SearchConfig(method="pc_darts", options=DartsOptions())


def test_unknown_preset_and_field() -> None:
    with pytest.raises(ValueError, match="expected one of demo, cifar10, imagenet, but got 'x'"):
        preset_config("x")
    with pytest.raises(TypeError, match="SearchConfig has no field 'epoch'"):
        preset_config("demo", epoch=3)


def test_device() -> None:
    assert preset_config(device="cpu").torch_device() == torch.device("cpu")
    assert preset_config().torch_device().type in ("cpu", "cuda")


@pytest.mark.parametrize("name", ["gpu", "", "0", "cpu:1", "cuda:-1", "cuda:99", "xpu:9", "meta"])
def test_device_that_is_not_there(name: str) -> None:
    with pytest.raises(ValueError, match=f"device: expected auto or cpu.* but got '{name}'"):
        preset_config(device=name).torch_device()


def test_devices_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a machine with an accelerator that PyTorch calls ``xpu``, three of them, would take."""
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device("xpu")
    )
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 3)
    for name in ("cpu", "xpu", "xpu:2"):
        assert str(preset_config(device=name).torch_device()) == name
    with pytest.raises(ValueError, match=r"expected auto or cpu or xpu:0 to xpu:2 .* got 'xpu:3'"):
        preset_config(device="xpu:3").torch_device()


def test_more_threads_than_cores() -> None:
    """They make each other wait, with hundreds of them for ever."""
    cores = os.cpu_count()
    with pytest.raises(ValueError, match=f"threads: expected at most {cores}, .* got {cores + 1}"):
        Search(preset_config(threads=cores + 1, out=None), progress=Progress())


def test_memory_of_a_space_that_knows_no_other() -> None:
    assert SearchConfig(memory="low").to_dict()["memory"] == "low"
    with registered(), pytest.raises(ValueError, match="memory: expected 'default' for the space"):
        SearchConfig(space="tiny", memory="low")


def test_a_search_with_less_memory_finds_the_same() -> None:
    results = []
    for memory in ("default", "low"):
        fields = {"space": "darts", "epochs": 1, "memory": memory, "threads": 1}
        search = Search(config(**fields), data=images(32))
        low = [m for m in search.learner.supernet.modules() if getattr(m, "memory", "") == "low"]
        assert len(low) == (3 if memory == "low" else 0)
        search.run()
        results.append(search.learner.arch.state_dict())
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: EnTranNASOptions(derive="x"), "derive"),
        (lambda: EnTranNASOptions(order="third"), "order"),
        (lambda: EnTranNASOptions(share="no"), "share"),
        (lambda: EnTranNASOptions(engine_cells=[1, 2]), "engine_cells"),
        (lambda: EnTranNASOptions(tau="1"), "tau"),
        (lambda: EnTranNASOptions(tau=1e-40), "tau"),
    ],
)
def test_options_of_another_type_are_refused(make, said):
    with pytest.raises(ValueError, match=f"{said}: expected"):
        SearchConfig(method="entrannas", options=make())
