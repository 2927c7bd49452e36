# SPDX-License-Identifier: Apache-2.0
"""Where the genotype of an evaluation comes from."""

from __future__ import annotations

import json

import pytest

from fastnas.evaluate import PRESETS, EvaluateConfig, find_genotype, preset_config
from fastnas.spaces.darts import GENOTYPES

GENOTYPE = GENOTYPES["DARTS_V2"]


def test_published_name():
    source = find_genotype("PC_DARTS_cifar")
    assert source.genotype == GENOTYPES["PC_DARTS_cifar"]
    assert (source.space, source.search, source.data) == ("darts", None, None)


def test_search(tmp_path):
    (tmp_path / "genotype.json").write_text(GENOTYPE.to_json())
    (tmp_path / "config.json").write_text(json.dumps({"data": "cifar10:somewhere"}))
    source = find_genotype(tmp_path)
    assert source.genotype == GENOTYPE
    assert source.search == tmp_path
    assert source.data == "cifar10:somewhere"
    assert source.epochs_left == 0


def test_search_that_is_not_over(tmp_path):
    (tmp_path / "genotype.json").write_text(GENOTYPE.to_json())
    (tmp_path / "config.json").write_text(json.dumps({"epochs": 5}))
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n')
    assert find_genotype(tmp_path).epochs_left == 3


@pytest.mark.parametrize(
    "text",
    [
        GENOTYPE.to_json(),
        str(GENOTYPE),
        f"DARTS_V2 = {GENOTYPE}\n",
        f"2019-01-01 10:00:00 genotype = {GENOTYPE}\n2019-01-01 epoch 49 done (ok)\n",
    ],
    ids=["json", "text", "assignment", "log"],
)
def test_file(tmp_path, text):
    path = tmp_path / "found"
    path.write_text(text)
    source = find_genotype(path)
    assert source.genotype == GENOTYPE
    assert source.search is None


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    path = tmp_path / "found.json"
    path.write_text(GENOTYPE.to_json(), encoding="utf-8-sig")
    assert find_genotype(path).genotype == GENOTYPE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "one Genotype"),
        ("[" * 50_000, "one Genotype"),
        ('{"normal": ' + "[" * 50_000, "not a JSON file"),
        ('{"version": ' + "9" * 5_000 + "}", "not a JSON file"),
        ("Genotype(normal=" + "[" * 50_000, "not of the form"),
        (f"{GENOTYPE}\n{GENOTYPE}", "it has 2 of these"),
        ("Genotype(__import__('os').system('true'))", "genotype"),
        ("{}", "one of the spaces darts"),
        ("{", "not a JSON file"),
        ('{"space": "darts"}', "format"),
        ("x" * 200_000, "over 100000 bytes"),
    ],
)
def test_what_is_no_genotype_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "found"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as refused:
        find_genotype(path)
    assert str(refused.value).startswith(str(path))


def test_nothing_there():
    with pytest.raises(FileNotFoundError, match=r"nowhere: expected .* PC_DARTS_cifar"):
        find_genotype("nowhere")


def test_search_without_genotype(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no genotype\.json"):
        find_genotype(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=f"fastnas search --resume --out {tmp_path}"):
        find_genotype(tmp_path)


def test_folder_and_data_follow_from_the_source(tmp_path):
    (tmp_path / "genotype.json").write_text(GENOTYPE.to_json())
    (tmp_path / "config.json").write_text(json.dumps({"data": "cifar10:somewhere"}))
    search = find_genotype(tmp_path)
    resolved = EvaluateConfig().resolve(search)
    assert (resolved.data, resolved.out) == ("cifar10:somewhere", str(tmp_path / "eval"))
    resolved = EvaluateConfig().resolve(find_genotype("DARTS_V1"))
    assert (resolved.data, resolved.out) == ("fashion-mnist-mini", "runs/eval-DARTS_V1")
    resolved = EvaluateConfig(data="cifar100:d", out="x").resolve(search)
    assert (resolved.data, resolved.out) == ("cifar100:d", "x")


def test_images_have_the_size_they_had_in_the_search(tmp_path):
    (tmp_path / "genotype.json").write_text(GENOTYPE.to_json())
    for size, taken in ((48, 48), (None, None), ("48", None), (-1, None), (True, None)):
        config = {"data": "folder:somewhere", "image_size": size}
        (tmp_path / "config.json").write_text(json.dumps(config))
        search = find_genotype(tmp_path)
        assert EvaluateConfig().resolve(search).image_size == taken
        assert EvaluateConfig(image_size=32).resolve(search).image_size == 32
        assert EvaluateConfig(data="folder:other").resolve(search).image_size is None


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_json(preset):
    config = preset_config(preset, source="DARTS_V1")
    assert EvaluateConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_presets_are_those_of_the_papers():
    cifar = preset_config("cifar10")
    assert (cifar.C, cifar.layers, cifar.epochs, cifar.batch_size) == (36, 20, 600, 96)
    assert (cifar.lr, cifar.lr_min, cifar.weight_decay, cifar.grad_clip) == (0.025, 0, 3e-4, 5)
    assert (cifar.drop_path, cifar.auxiliary_weight, cifar.augment.cutout) == (0.2, 0.4, 16)
    assert cifar.auxiliary and cifar.label_smoothing == 0
    imagenet = preset_config("imagenet")
    assert (imagenet.C, imagenet.layers, imagenet.epochs, imagenet.batch_size) == (48, 14, 250, 128)
    assert (imagenet.lr, imagenet.schedule, imagenet.lr_decay) == (0.1, "exponential", 0.97)
    assert (imagenet.weight_decay, imagenet.label_smoothing, imagenet.drop_path) == (3e-5, 0.1, 0)
    mobile = preset_config("proxyless")
    assert (mobile.epochs, mobile.batch_size, mobile.lr, mobile.schedule) == (
        *(300, 256, 0.05),
        "cosine",
    )
    assert (mobile.lr_min, mobile.weight_decay, mobile.label_smoothing) == (0, 4e-5, 0.1)
    assert (mobile.momentum, mobile.nesterov, mobile.norm_decay) == (0.9, True, False)
    assert mobile.augment.color_jitter == (0.4, 0.4, 0.4, 0.1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0}, "epochs: expected at least 1, but got 0"),
        ({"drop_path": 1.0}, r"drop_path: expected at least 0 and below 1, but got 1\.0"),
        ({"lr": float("nan")}, "lr: expected at least 0, but got nan"),
        ({"lr": float("inf")}, "lr: expected at least 0 and below inf, but got inf"),
        ({"label_smoothing": -0.1}, "label_smoothing: expected at least 0"),
        ({"lr_decay": 1.1}, r"lr_decay: expected from 0 to 1, but got 1\.1"),
        ({"lr_decay": float("nan")}, "lr_decay: expected from 0 to 1, but got nan"),
        ({"seed": 2**63}, "seed: expected at least 0 and below 9223372036854775808"),
        ({"batch_size": 2**31}, "batch_size: expected at least 1 and below 2147483648"),
        ({"image_size": -3}, "image_size: expected at least 1, but got -3"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov: expected momentum above 0, but got 0"),
        ({"resume": True, "out": None}, "resume: expected a folder in out"),
    ],
)
def test_values_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        preset_config(**fields)


def test_unknown_preset_and_field():
    with pytest.raises(
        ValueError, match="preset: expected one of demo, cifar10, imagenet, proxyless"
    ):
        preset_config("cifar")
    with pytest.raises(TypeError, match="no field 'epoch'"):
        preset_config(epoch=3)
