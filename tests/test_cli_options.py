# SPDX-License-Identifier: Apache-2.0
"""From words to configurations: presets, a field an option, resuming without repetition."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from fastnas.cli import evaluate as eval_command
from fastnas.cli import main
from fastnas.cli import search as search_command
from fastnas.evaluate import EvaluateConfig
from fastnas.methods import METHODS
from fastnas.search import SearchConfig, preset_config
from fastnas.search.files import write_json
from fastnas.spaces import SPACES
from fastnas.spaces.darts import GENOTYPES


def test_search_without_options_is_the_default_configuration():
    assert search_command._config([]) == SearchConfig()


def test_eval_without_options_is_the_default_configuration():
    assert eval_command._config([]) == EvaluateConfig()


@pytest.mark.parametrize("preset", ["demo", "cifar10", "imagenet"])
@pytest.mark.parametrize("method", ["darts", "pc_darts"])
def test_search_preset(preset, method):
    words = ["--preset", preset, "--method", method]
    assert search_command._config(words) == preset_config(preset, method=method)


@pytest.mark.parametrize("preset", ["demo", "cifar10", "imagenet"])
def test_eval_preset(preset):
    config = eval_command._config(["DARTS_V1", f"--preset={preset}"])
    from fastnas.evaluate import preset_config

    assert config == preset_config(preset, source="DARTS_V1")


def test_options_override_the_preset():
    words = ["--preset", "cifar10", "--epochs", "3", "--batch-size", "7", "--seed", "11"]
    words += ["--data", "fashion-mnist:d", "--out", "x", "--device", "cpu", "--C", "4", "--flip"]
    config = search_command._config(words)
    wanted = preset_config("cifar10")
    wanted = dataclasses.replace(
        wanted,
        epochs=3,
        batch_size=7,
        seed=11,
        data="fashion-mnist:d",
        out="x",
        device="cpu",
        C=4,
        augment=dataclasses.replace(wanted.augment, flip=True),
    )
    assert config == wanted


def test_options_of_the_method():
    assert search_command._config(["--method", "darts", "--order", "second"]).options.order == (
        "second"
    )


@pytest.mark.parametrize("command", [search_command, eval_command], ids=["search", "eval"])
def test_every_field_is_an_option_with_a_description(command, capsys):
    with pytest.raises(SystemExit) as end:
        command._config(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    config = command._config([])
    for owner in (config, config.augment, *([config.options] if command is search_command else [])):
        for field in dataclasses.fields(owner):
            value = getattr(owner, field.name)
            if dataclasses.is_dataclass(value) or field.name == "source":
                continue
            assert f"--{field.name.replace('_', '-')}" in text, field.name
    # An option without a description has its default alone on its line.
    for line in text.splitlines():
        assert "--" not in line or not line.split("--", 1)[1].strip("│ ").endswith("(required)")


COMMANDS = [
    *(
        ["search", "--method", m, "--space", s]
        for m, s in (("da2s", "nasbench201"), ("proxyless", "mbconv"))
    ),
    *(["search", "--method", method] for method in ("entrannas", "entrannas_dst")),
    *(["eval"], ["gap"], ["genotypes"], ["latency", "measure"], ["latency", "check"], ["bench"]),
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_names_nothing_that_only_the_code_knows(words, capsys):
    assert main([*words, "--help"]) == 0
    text = capsys.readouterr().out
    assert not re.findall(r"fastnas\.\w+|``|:\w+:`", text)


def test_help_of_a_search_names_methods_and_spaces(capsys):
    assert main(["search", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for option, names, after in (("--space", SPACES, "--method"), ("--method", METHODS, "--data")):
        words = text[text.index(f"{option} STR") : text.index(f"{after} STR")]
        assert all(re.search(rf"\b{name}\b", words) for name in names), words


def test_search_resumes_with_the_options_of_the_run(tmp_path):
    begun = preset_config("demo", method="darts", epochs=3, lr=0.3, out=str(tmp_path))
    write_json(tmp_path / "config.json", begun.to_dict())
    config = search_command._config(["--resume", "--out", str(tmp_path)])
    assert config == dataclasses.replace(begun, resume=True)
    # What is given explicitly is kept, so that the search can refuse what does not fit.
    config = search_command._config(["--resume", "--out", str(tmp_path), "--lr", "0.4"])
    assert config == dataclasses.replace(begun, resume=True, lr=0.4)


def test_a_folder_that_was_moved_is_resumed_where_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/demo/eval").mkdir(parents=True)
    begun = preset_config("demo", epochs=3, out="somewhere/else")
    write_json("runs/demo/config.json", begun.to_dict())
    wanted = dataclasses.replace(begun, resume=True, out="runs/demo")
    assert search_command._config(["--resume"]) == wanted
    Path("runs/demo/genotype.json").write_text(GENOTYPES["DARTS_V1"].to_json())
    begun = EvaluateConfig(epochs=3, out="somewhere/else")
    write_json("runs/demo/eval/config.json", begun.to_dict())
    wanted = dataclasses.replace(begun, resume=True, out="runs/demo/eval")
    assert eval_command._config(["--resume"]) == wanted


def test_eval_resumes_with_the_options_of_the_run(tmp_path):
    folder = tmp_path / "run" / "eval"
    folder.mkdir(parents=True)
    (tmp_path / "run" / "genotype.json").write_text(GENOTYPES["DARTS_V1"].to_json())
    begun = EvaluateConfig(source=str(tmp_path / "run"), out=str(folder), epochs=3, C=4)
    write_json(folder / "config.json", begun.to_dict())
    wanted = dataclasses.replace(begun, resume=True)
    assert eval_command._config(["--resume", "--out", str(folder)]) == wanted
    assert eval_command._config([str(tmp_path / "run"), "--resume"]) == wanted


def test_damaged_config_of_a_run_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"epochs": "many"}))
    with pytest.raises(ValueError, match=r"config\.json: epochs: expected int, but got 'many'"):
        search_command._config(["--resume", "--out", str(tmp_path)])


@pytest.mark.parametrize("given", ["entrannas", "da2s", "darts"])
def test_another_method_than_the_run_has(tmp_path, given):
    begun = preset_config("demo", method="entrannas_dst", out=str(tmp_path))
    write_json(tmp_path / "config.json", begun.to_dict())
    with pytest.raises(ValueError, match=f"begun with method='entrannas_dst', not '{given}'"):
        search_command._config(["--resume", "--out", str(tmp_path), "--method", given])
    # Its method's options are there without its name.
    words = ["--resume", "--out", str(tmp_path), "--norm", "node"]
    assert search_command._config(words).options.norm == "node"


def test_help_of_a_run_that_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        search_command._config(["--resume", "--out", str(tmp_path / "none"), "--help"])
    assert ended.value.code == 0 and "--method" in capsys.readouterr().out
