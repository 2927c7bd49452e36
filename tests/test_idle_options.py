# SPDX-License-Identifier: Apache-2.0
"""Options that would do nothing: refused where a run begins, no obstacle to one that goes on."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from pathlib import Path

import pytest
import search_tiny as tiny

from fastnas.cli import evaluate as eval_command
from fastnas.cli import main
from fastnas.cli import search as search_command
from fastnas.evaluate import EvaluateConfig, Evaluation, find_genotype
from fastnas.evaluate import preset_config as eval_preset
from fastnas.methods import METHODS, DA2SOptions, ProxylessOptions
from fastnas.search import PRESETS, Progress, Search, loop, preset_config
from fastnas.search.files import write_json
from fastnas.search.idle import idle_options, refuse_idle_values
from fastnas.spaces import SPACES

PROXYLESS = ("--method", "proxyless", "--space", "mbconv")
CELLS = "a space that has it (darts, nasbench201), but got 'mbconv'"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*PROXYLESS, "--rl-samples", "10"), "the estimator 'reinforce', but got 'full'"),
        ((*PROXYLESS, "--rl_baseline=released"), "the estimator 'reinforce', but got 'full'"),
        ((*PROXYLESS, "--no-importance"), "the estimator 'two', but got 'full'"),
        ((*PROXYLESS, "--warmup-lr", "0.05"), "warmup_epochs above 0, but got 0"),
        (
            (*PROXYLESS, "--estimator", "reinforce", "--arch-every", "2"),
            "the estimator 'full' or 'two', but got 'reinforce'",
        ),
        (
            (*PROXYLESS, "--estimator", "reinforce", "--rl-exponent", "0.1"),
            "a target as well, but got None",
        ),
        (
            (*PROXYLESS, "--estimator", "reinforce", "--target", "macs=1M", "--target-rate", "0.1"),
            "the estimator 'full' or 'two', but got 'reinforce'",
        ),
        ((*PROXYLESS, "--C", "8"), CELLS),
        ((*PROXYLESS, "--layers", "3"), CELLS),
        ((*PROXYLESS, "--memory", "default"), CELLS),
        (
            ("--space", "nasbench201", "--stem", "cifar"),
            "a space that has it (darts), but got 'nasbench201'",
        ),
        (
            ("--method", "proxyless", "--space", "nasbench201", "--memory", "low"),
            "a method that runs more than one path, but got 'proxyless'",
        ),
        (
            ("--method", "da2s", "--space", "nasbench201", "--derive-none"),
            "a method with the candidate none, but got 'da2s'",
        ),
        (
            ("--method", "da2s", "--op-schedule", "log", "--delay", "3"),
            "a schedule that is delayed, but got none",
        ),
        (("--method", "da2s", "--op-weight", "0", "--op-schedule", "log"), "op_weight above 0"),
        (("--method", "da2s", "--edge-weight", "0", "--sum-weight", "1"), "edge_weight above 0"),
        (("--method", "da2s", "--aux-weight", "0", "--edge-weight", "4"), "aux_weight above 0"),
        (("--target-loss", "constraint"), "a target as well, but got None"),
        (("--target", "macs=1M", "--no-foreign-table"), "a target of latency, but got 'macs=1M'"),
        (
            ("--target", "macs=1M", "--target-loss", "linear", "--target-rate", "0.02"),
            "target_loss 'constraint', but got 'linear'",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_of_a_search(words, message):
    option = [word.partition("=")[0] for word in words if word.startswith("--")][-1]
    with pytest.raises(ValueError) as refused:
        search_command._config(words)
    assert str(refused.value).startswith(f"{option}: does nothing here: expected {message}")


@pytest.mark.parametrize(
    "words",
    [
        (*PROXYLESS, "--estimator", "reinforce", "--rl-samples", "10", "--rl-baseline", "average"),
        (*PROXYLESS, "--warmup-epochs", "1", "--warmup-lr", "0.05"),
        ("--method", "da2s", "--delay", "2"),
        ("--space", "nasbench201", "--no-derive-none", "--memory", "low", "--C", "8"),
        ("--target", "macs=1M", "--target-loss", "constraint", "--target-rate", "0.02"),
    ],
    ids=" ".join,
)
def test_what_works_is_taken(words):
    refuse_idle_values(search_command._config(words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("proxyless_cpu", "--drop-path", "0.2"), "a network of a space that has it (darts), but"),
        (("proxyless_cpu", "--layers", "20"), "a network of a space that has it (darts, nasbench"),
        (("NASBench201_857", "--no-auxiliary"), "a network of a space that has it (darts), but"),
        (("DARTS_V1", "--auxiliary-weight", "0.4"), "auxiliary as well, but got False"),
        (("DARTS_V1", "--lr-decay", "0.97"), "the schedule exponential, but got 'cosine'"),
        (("DARTS_V1", "--schedule", "linear", "--lr-min", "0"), "the schedule cosine, but got"),
        (("DARTS_V1", "--weight-decay", "0", "--norm-decay"), "weight_decay above 0, but got 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_of_an_evaluation(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", *words]) == 2
    option = [word for word in words if word.startswith("--")][-1]
    assert f"{option}: does nothing here: expected {message}" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_of_a_list(capsys):
    assert main(["genotypes", "--format", "json"]) == 2
    assert "--format: does nothing here: expected the NAME" in capsys.readouterr().err


def test_values_from_python():
    options = ProxylessOptions(rl_samples=3)
    config = preset_config(method="proxyless", space="mbconv", options=options, out=None)
    with pytest.raises(
        ValueError, match=r"rl_samples: 3 does nothing here: expected the estimator"
    ):
        Search(config, progress=Progress())
    with pytest.raises(ValueError, match=r"lr_min: 0\.1 does nothing here: expected the schedule"):
        Evaluation(EvaluateConfig("DARTS_V1", schedule="linear", lr_min=0.1, out=None))


@pytest.mark.parametrize(
    ("method", "space"),
    [
        (m, s.name)
        for m, s in itertools.product(METHODS, SPACES.values())
        if METHODS[m].needs <= s.features
    ],
)
@pytest.mark.parametrize("preset", PRESETS)
def test_no_preset_is_refused_and_names_are_those_of_fields(preset, method, space):
    config = preset_config(preset, method=method, space=space)
    refuse_idle_values(config)
    names = {f.name for part in (config, config.options) for f in fields(part)}
    assert set(idle_options(config)) <= names | {"derive_none"}


def test_values_of_presets_may_do_nothing(monkeypatch):
    """Whoever turns a switch off has not asked for what a preset says of it."""
    config = preset_config(method="da2s")
    assert config.options.delay == 1 != DA2SOptions().delay
    refuse_idle_values(replace(config, options=replace(config.options, op_schedule="log")))
    options = replace(config.options, op_schedule="log", delay=2)
    with pytest.raises(ValueError, match="delay: 2 does nothing here"):
        refuse_idle_values(replace(config, options=options))
    config = preset_config(method="proxyless", space="nasbench201", memory="low")
    with pytest.raises(ValueError, match="memory: 'low' does nothing here"):
        refuse_idle_values(config)
    monkeypatch.setitem(PRESETS, "small", {"memory": "low"})
    refuse_idle_values(config)


@pytest.mark.parametrize("preset", ["demo", "cifar10", "imagenet", "proxyless"])
@pytest.mark.parametrize("name", ["DARTS_V1", "proxyless_cpu", "NASBench201_857"])
def test_no_preset_of_an_evaluation_is_refused(preset, name):
    config = eval_preset(preset, source=name)
    assert set(config.idle(config.find_source().space)) <= set(vars(config))
    config.resolve(find_genotype(name))


def test_a_run_with_such_a_value_goes_on(tmp_path, monkeypatch):
    """It was begun before anybody looked; what is given anew is refused all the same."""
    out = str(tmp_path / "run")
    with tiny.registered():
        options = DA2SOptions(aux_weight=0.0, op_weight=7.0)
        config = tiny.config("da2s", epochs=1, out=out, gap=False, options=options)
        with monkeypatch.context() as before:
            before.setattr(loop, "refuse_idle_values", lambda config: None)
            tiny.run(config)
        begun = search_command._config(["--resume", "--out", out])
        search = Search(begun, data=tiny.images(), progress=Progress())
        assert search.over and search.config.options.op_weight == 7.0
        with pytest.raises(ValueError, match="--op-weight: does nothing here"):
            search_command._config(["--resume", "--out", out, "--op-weight", "7"])
    begun = EvaluateConfig("DARTS_V1", schedule="linear", lr_min=0.1, out=out)
    write_json(tmp_path / "run/config.json", begun.to_dict())
    going_on = eval_command._config(["DARTS_V1", "--resume", "--out", out])
    assert going_on.resolve(going_on.find_source()).lr_min == 0.1


def test_defaults_of_an_old_run_go_on(tmp_path):
    begun = preset_config(method="proxyless", space="mbconv", out=str(tmp_path))
    write_json(tmp_path / "config.json", begun.to_dict())
    wanted = replace(begun, resume=True)
    assert search_command._config(["--resume", "--out", str(tmp_path)]) == wanted


@pytest.fixture
def tiny_space():
    with tiny.registered():
        yield


def test_a_size_that_the_given_images_do_not_have(tiny_space):
    """Images from Python are taken as they are, whatever their size."""
    config = tiny.config("darts", image_size=16)
    message = r"image_size: 16 does nothing here: expected None or 8, .* data are 8 x 8 pixels"
    with pytest.raises(ValueError, match=message):
        Search(config, data=tiny.images(), progress=Progress())
    with pytest.raises(ValueError, match=message):
        Evaluation(EvaluateConfig("DARTS_V1", image_size=16, out=None), data=tiny.images())
    with pytest.raises(ValueError, match=r"image_size: 8 does nothing here: expected None or 16"):
        Search(replace(config, image_size=8), data=tiny.images(size=16), progress=Progress())
    Search(replace(config, image_size=8), data=tiny.images(), progress=Progress())
    Search(config, data=tiny.images().pad_to(16), progress=Progress())


def test_no_size_is_that_of_images_that_are_not_square(tiny_space):
    square = tiny.images()
    low = replace(
        square, train_images=square.train_images[:, :, :4], test_images=square.test_images[:, :, :4]
    )
    message = "expected None, for the images in data are 4 x 8 pixels"
    with pytest.raises(ValueError, match=message):
        Search(tiny.config("darts", image_size=8), data=low, progress=Progress())


def test_a_run_with_such_a_size_goes_on(tmp_path, monkeypatch, tiny_space):
    config = tiny.config(epochs=1, out=str(tmp_path / "run"), image_size=16, gap=False)
    with monkeypatch.context() as before:
        before.setattr(loop, "with_data", lambda config, data: replace(config, data=data.name))
        tiny.run(config)
    assert Search(replace(config, resume=True), data=tiny.images(), progress=Progress()).over
