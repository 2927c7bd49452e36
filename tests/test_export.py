# SPDX-License-Identifier: Apache-2.0
"""Trained networks as files: they classify as the network does, alone, and say what they take."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ops_cases import raises
from search_tiny import images
from test_evaluate_train import config

from fastnas.cli import main
from fastnas.data import from_datasets
from fastnas.evaluate import (
    Evaluation,
    Progress,
    export_classifier,
    find_genotype,
    load_classifier,
    load_network,
)
from fastnas.evaluate import export as export_file
from fastnas.evaluate.result import NETWORK_KIND, network_arguments, network_state
from fastnas.search import CheckpointError
from fastnas.search.checkpoint import load_checkpoint, save_checkpoint
from fastnas.spaces import get_space

NAMES = ("square", "disc", "cross", "ring")


def data():
    return replace(images(size=16), classes=NAMES)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short evaluation with an auxiliary head, and its result."""
    out = tmp_path_factory.mktemp("export") / "run"
    return out, Evaluation(config(out=str(out)), data=data(), progress=Progress()).run()


def load(path):
    extra = {export_file.METADATA: ""}
    program = torch.export.load(path, extra_files=extra)
    return program, json.loads(extra[export_file.METADATA])


def accuracy(classify):
    with torch.no_grad():
        logits = classify(data().test_images / 255)
    return (logits.argmax(dim=1) == data().test_labels).float().mean().item()


def test_a_program_classifies_as_the_network_did(run):
    folder, result = run
    exported = export_classifier(folder)
    assert exported.path == folder / "network.pt2"
    assert exported.difference < 1e-5
    program, facts = load(exported.path)
    assert accuracy(program.module()) == accuracy(load_classifier(folder)) == result.best_accuracy
    x = torch.rand(1, 1, 16, 16)
    torch.testing.assert_close(program.module()(x), load_network(folder)((x - 0.5) / 0.3))
    assert facts["classes"] == list(NAMES)
    assert facts["image_shape"] == [1, 16, 16]
    assert facts["test_accuracy"] == result.best_accuracy
    assert facts["genotype"] == result.genotype.to_dict()
    assert not [name for name in program.state_dict if "auxiliary" in name]


def test_a_program_refuses_images_of_another_size(run):
    program, _ = load(export_classifier(run[0]).path)
    with pytest.raises((AssertionError, RuntimeError)):
        program.module()(torch.rand(2, 1, 18, 18))


def test_an_onnx_file_classifies_as_the_network_did(run, tmp_path):
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    exported = export_classifier(run[0], tmp_path / "net.onnx")
    assert exported.difference < 1e-4
    session = runtime.InferenceSession(str(exported.path), providers=["CPUExecutionProvider"])

    def classify(x):
        return torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])

    assert accuracy(classify) == run[1].best_accuracy
    (entry,) = onnx.load(exported.path).metadata_props
    assert entry.key == export_file.METADATA
    assert json.loads(entry.value)["classes"] == list(NAMES)


@pytest.mark.parametrize("name", ["DARTS_V2", "proxyless_mobile", "NASBench201_857"])
def test_networks_of_every_space(name, tmp_path):
    source, c = find_genotype(name), config(C=4, layers=3)
    blank, labels = torch.zeros(4, 1, 32, 32, dtype=torch.uint8), torch.arange(4)
    sized = replace(
        data(), train_images=blank, train_labels=labels, test_images=blank, test_labels=labels
    )
    network = get_space(source.space).network(
        source.genotype, **network_arguments(source, c, sized)
    )
    state = network_state(network, source, c, sized, {"test_accuracy": 0.5, "epoch": 1})
    save_checkpoint(tmp_path / "best.pt", state, kind=NETWORK_KIND)
    assert export_classifier(tmp_path).difference < 1e-5


class Normalised(torch.utils.data.Dataset):
    """Floating-point images."""

    def __len__(self):
        return len(data().train_images)

    def __getitem__(self, i):
        return (data().train_images[i] / 255 - 0.5) / 0.3, int(data().train_labels[i])


def test_images_that_were_normalised_already_are_taken_as_they_are(tmp_path):
    set_ = from_datasets(Normalised(), Normalised(), num_classes=4, workers=0)
    set_ = replace(set_, mean=(0.5,), std=(0.3,))  # which are of other images
    out = tmp_path / "run"
    Evaluation(config(out=str(out), epochs=1), data=set_, progress=Progress()).run()
    classifier = load_classifier(out)
    assert not classifier.scaled
    assert classifier.classes is None
    x = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(classifier(x), classifier.network(x))
    assert "normalised as for the training" in load(export_classifier(out).path)[1]["input"]


def test_a_file_that_computes_something_else_is_not_written(run, tmp_path, monkeypatch):
    def off(program, metadata):
        return b"something", lambda x: program.module()(x) + 0.1

    monkeypatch.setitem(export_file._FORMATS, ".pt2", off)
    with raises(RuntimeError, "other logits than the trained one"):
        export_classifier(run[0], tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_refused(run, tmp_path, monkeypatch):
    with raises(ValueError, "out: expected a file that ends in .pt2 or .onnx, but got", "net.pth"):
        export_classifier(run[0], tmp_path / "net.pth")
    with raises(FileNotFoundError, "out: there is no folder", "nowhere"):
        export_classifier(run[0], tmp_path / "nowhere" / "net.pt2")
    with raises(FileNotFoundError, "best.pt: no such checkpoint"):
        export_classifier(tmp_path)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with raises(ImportError, 'pip install "fastnas[onnx]"'):
        export_classifier(run[0], tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (None, "a version of fastnas wrote it that did not say"),
        ({"shape": [1, 16]}, "shape: [1, 16]"),
        ({"shape": [1, -16, 16]}, "shape: [1, -16, 16]"),
        ({"mean": [0.5, 0.5]}, "mean: [0.5, 0.5]"),
        ({"mean": [float("nan")]}, "mean: [nan]"),
        ({"mean": ["x"]}, "does not say what"),
        ({"std": [-1.0]}, "std: [-1.0]"),
        ({"std": [1e-300]}, "std: [1e-300]"),
        ({"scaled": "yes"}, "scaled: 'yes'"),
        ({"classes": "abcd"}, "classes: not a list of names"),
        ({"classes": ["a", "b", "c"]}, "3 names for 4 classes"),
    ],
)
def test_networks_that_do_not_say_what_they_take(run, tmp_path, change, says):
    state = load_checkpoint(run[0] / "best.pt", kind=NETWORK_KIND)
    if change is None:
        del state["images"]
    else:
        state["images"].update(change)
    save_checkpoint(tmp_path / "best.pt", state, kind=NETWORK_KIND)
    with raises(CheckpointError, "best.pt", says):
        load_classifier(tmp_path)


def test_a_network_without_numbers_is_refused(run, tmp_path):
    state = load_checkpoint(run[0] / "best.pt", kind=NETWORK_KIND)
    state["state_dict"]["classifier.bias"][2] = float("nan")
    save_checkpoint(tmp_path / "best.pt", state, kind=NETWORK_KIND)
    with raises(CheckpointError, "best.pt: the network's logits are not finite"):
        export_classifier(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]


def test_the_command(run, tmp_path, capsys):
    folder, result = run
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "eval").symlink_to(folder)
    assert main(["export", str(tmp_path / "search"), "--out", str(tmp_path / "a.pt2")]) == 0
    told = capsys.readouterr().out
    assert "float32 images (N, 1, 16, 16), values from 0 to 1" in told
    assert "square, disc, cross, ring" in told
    assert f"{result.best_accuracy:.2%}" in told
    assert (tmp_path / "a.pt2").is_file()
    assert main(["export", str(tmp_path)]) == 2
    assert "a network is trained by: fastnas eval\n" in capsys.readouterr().err
    (tmp_path / "genotype.json").touch()
    assert main(["export", str(tmp_path)]) == 2
    assert "fastnas eval /" in capsys.readouterr().err.replace("\n", "")
    (tmp_path / "b.pt2").mkdir()
    assert main(["export", str(folder), "--out", str(tmp_path / "b.pt2")]) == 2
    assert "is a folder" in capsys.readouterr().err.replace("\n", " ")


def test_the_document_shows_how_to_read_a_program(run, tmp_path, monkeypatch):
    text = (Path(__file__).resolve().parents[1] / "docs" / "export.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    (tmp_path / "runs" / "demo" / "eval").mkdir(parents=True)
    export_classifier(run[0], tmp_path / "runs" / "demo" / "eval" / "network.pt2")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(block, "export.md", "exec"), names)
    assert set(names["names"]) <= set(NAMES)
    assert len(names["names"]) == 5


def test_names_of_classes_come_from_the_images():
    class Named(Normalised):
        classes = NAMES

    assert from_datasets(Named(), Named(), workers=0).classes == NAMES
    # Names of something else: the Dataset has more classes than are used.
    assert from_datasets(Named(), Named(), num_classes=5, workers=0).classes is None
    with raises(ValueError, "tiny: expected the names of 4 classes", "3 names"):
        replace(data(), classes=NAMES[:3])
