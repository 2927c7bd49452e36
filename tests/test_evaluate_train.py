# SPDX-License-Identifier: Apache-2.0
"""The training of a derived network: its recipe, its files, and how it ends."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from search_tiny import CLASSES, images
from torch import nn

from fastnas.data import Augment
from fastnas.evaluate import (
    EvaluateConfig,
    Evaluation,
    Progress,
    TextProgress,
    load_network,
    preset_config,
)
from fastnas.search import NonFiniteLossError
from fastnas.search.files import read_json, read_jsonl
from fastnas.spaces import count_macs, count_parameters


def config(**fields: object) -> EvaluateConfig:
    """Two epochs of six batches, unless ``fields`` say otherwise."""
    values: dict[str, object] = {
        "source": "DARTS_V1",
        "C": 4,
        "layers": 3,
        "epochs": 2,
        "batch_size": 16,
        "lr": 0.05,
        "augment": Augment(crop_padding=1, flip=True, cutout=2),
        "auxiliary": True,
        "drop_path": 0.2,
        "device": "cpu",
        "threads": 1,
        "log_every": 1,
        "out": None,
    }
    return preset_config("demo", **{**values, **fields})


def evaluation(**fields: object) -> Evaluation:
    return Evaluation(config(**fields), data=images(size=16), progress=Progress())


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_learns(amp):
    """One pattern a class under noise. BatchNorm's running statistics need some ten epochs of six
    batches to arrive, so the accuracy of the test comes later than that of the training."""
    fields = {"auxiliary": False, "drop_path": 0.0, "augment": Augment()}
    result = evaluation(epochs=12, lr=0.1, amp=amp, **fields).run()
    assert result.accuracy > 0.8
    losses = [record["train_loss"] for record in result.history]
    assert losses[-1] < losses[0] / 2


def test_result_counts_what_the_network_has():
    run = evaluation(epochs=1)
    result = run.run()
    assert result.parameters == count_parameters(run.network)
    assert result.parameters_with_auxiliary == count_parameters(run.network, auxiliary=True)
    assert result.parameters_with_auxiliary > result.parameters
    assert result.macs == count_macs(run.network, (1, 1, 16, 16))
    assert result.accuracy_top5 is None  # four classes


def test_top5_of_more_classes():
    data = images(size=16)
    ten = replace(data, num_classes=10)
    result = Evaluation(config(epochs=1), data=ten, progress=Progress()).run()
    assert result.accuracy <= result.accuracy_top5 <= 1
    assert result.accuracy_top5 == result.history[-1]["test_accuracy_top5"]


def test_figures_of_the_test_are_those_of_the_network():
    data = images(size=16)
    run = Evaluation(config(), data=data, progress=Progress())
    result = run.run()
    with torch.no_grad():
        logits = run.network.eval()((data.test_images / 255 - 0.5) / 0.3)
    right = logits.argmax(dim=1) == data.test_labels
    assert result.accuracy == right.float().mean().item()
    loss = nn.functional.cross_entropy(logits, data.test_labels).item()
    assert result.history[-1]["test_loss"] == pytest.approx(loss, rel=1e-4)


def test_drop_path_rises_linearly_and_learning_rate_follows_the_cosine():
    history = evaluation(epochs=4, drop_path=0.2, lr=0.1, lr_min=0.02).run().history
    assert [r["drop_path"] for r in history] == pytest.approx([0.0, 0.05, 0.1, 0.15])
    cosine = [0.02 + 0.04 * (1 + math.cos(math.pi * e / 4)) for e in range(4)]
    assert [r["lr"] for r in history] == pytest.approx(cosine)


@pytest.mark.parametrize("norm_decay", [True, False])
def test_nesterov_and_decay_of_norms(norm_decay):
    """The first step is (1 + momentum) times gradient and decay."""
    fields = {"weight_decay": 0.5, "nesterov": True, "grad_clip": 0.0, "lr": 0.1}
    run = evaluation(norm_decay=norm_decay, auxiliary=False, **fields)
    before = {name: p.detach().clone() for name, p in run.network.named_parameters()}
    x, y = next(run._batches.iterate(0))
    run.network.train()
    run.trainee.step(x, y)
    bare = [m for m in run.network.modules() if isinstance(m, nn.BatchNorm2d) and m.affine]
    bare = {} if norm_decay else {p for m in bare for p in m.parameters()}
    assert norm_decay or 0 < len(bare) < len(before)
    for name, p in run.network.named_parameters():
        decay = 0.0 if p in bare else 0.5
        expected = before[name] - 0.1 * 1.9 * (p.grad + decay * before[name])
        torch.testing.assert_close(p.detach(), expected, msg=name)


def test_loss_is_smoothed_and_takes_in_the_auxiliary_head(monkeypatch):
    """One batch, one step: the gradient is that of the recipe's formula."""
    run = evaluation(label_smoothing=0.1, auxiliary_weight=0.4, grad_clip=0.0, drop_path=0.0)
    x, y = next(run._batches.iterate(0))
    smooth = torch.full((len(y), CLASSES), 0.1 / CLASSES)
    smooth[torch.arange(len(y)), y] += 0.9
    run.network.train()
    logits, auxiliary = run.network(x)
    main = -(smooth * logits.log_softmax(1)).sum(1).mean()
    total = main - 0.4 * (smooth * auxiliary.log_softmax(1)).sum(1).mean()
    parameters = list(run.network.parameters())
    wanted = torch.autograd.grad(total, parameters)
    monkeypatch.setattr(run.trainee.optimizer, "step", lambda *args, **kwargs: None)
    outcome = run.trainee.step(x, y)
    torch.testing.assert_close(outcome.loss, main.detach())
    for parameter, gradient in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_gradient_norm_is_clipped(monkeypatch):
    run = evaluation(grad_clip=0.01)
    monkeypatch.setattr(run.trainee.optimizer, "step", lambda *args, **kwargs: None)
    run.network.train()
    run.trainee.step(*next(run._batches.iterate(0)))
    gradients = [p.grad for p in run.network.parameters()]
    assert nn.utils.get_total_norm(gradients).item() == pytest.approx(0.01, rel=1e-3)


def test_files_of_a_run(tmp_path):
    out = tmp_path / "run"
    result = evaluation(out=str(out)).run()
    assert read_jsonl(out / "metrics.jsonl") == result.history
    written = read_json(out / "result.json")
    assert written["accuracy"] == result.accuracy
    assert written["macs"] == result.macs
    assert written["genotype"] == read_json(out / "genotype.json")
    assert EvaluateConfig.from_dict(read_json(out / "config.json")).epochs == 2
    names = {p.name for p in out.iterdir()}
    assert names == {
        *("best.pt", "checkpoint.pt", "config.json", "genotype.json"),
        *("metrics.jsonl", "result.json"),
    }


def test_best_network_can_be_loaded(tmp_path):
    out = tmp_path / "run"
    data = images(size=16)
    result = evaluation(epochs=3, out=str(out)).run()
    network = load_network(out)
    assert not network.training
    with torch.no_grad():
        predicted = network((data.test_images / 255 - 0.5) / 0.3).argmax(dim=1)
    assert (predicted == data.test_labels).float().mean().item() == result.best_accuracy
    best = max(record["test_accuracy"] for record in result.history)
    assert result.best_accuracy == best
    assert result.history[result.best_epoch - 1]["test_accuracy"] == best


def test_nan_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    out = tmp_path / "run"

    class Poison(Progress):
        def start(self, evaluation):
            self.evaluation = evaluation

        def epoch(self, record):
            with torch.no_grad():
                next(self.evaluation.network.parameters()).fill_(math.nan)

    run = Evaluation(config(out=str(out)), data=images(size=16), progress=Poison())
    with pytest.raises(
        NonFiniteLossError, match=r"training images became nan in epoch 2, step 1.*from before"
    ):
        run.run()
    state = torch.load(out / "checkpoint.pt", weights_only=True)["state"]
    assert state["epoch"] == 1
    assert all(t.isfinite().all() for t in state["network"].values())


def test_weights_ruined_by_the_last_step_are_not_saved(tmp_path, monkeypatch):
    run = evaluation(out=str(tmp_path / "run"), epochs=1)
    train_step, steps = run.trainee.step, run.steps_per_epoch

    def ruin(x, y):
        outcome = train_step(x, y)
        if run.step == steps - 1:
            with torch.no_grad():
                next(run.network.parameters()).fill_(math.nan)
        return outcome

    monkeypatch.setattr(run.trainee, "step", ruin)
    with pytest.raises(NonFiniteLossError, match="loss of the test images became nan"):
        run.run()
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_writes_nothing_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluation(epochs=1).run()
    assert list(tmp_path.iterdir()) == []


def test_refuses_a_folder_that_holds_a_run(tmp_path):
    evaluation(epochs=1, out=str(tmp_path / "run")).run()
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(FileExistsError, match="--resume, or choose another folder with --out"):
        evaluation(epochs=1, out=str(tmp_path / "run"))
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}


def test_images_that_do_not_fit_are_refused_before_a_folder_is_made(tmp_path):
    with pytest.raises(ValueError, match="multiples of 4"):
        Evaluation(config(out=str(tmp_path / "run")), data=images(size=10), progress=Progress())
    assert not (tmp_path / "run").exists()


def test_text_progress(capsys):
    Evaluation(config(epochs=1), data=images(size=16), progress=TextProgress()).run()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("evaluation: DARTS_V1 on tiny, C 4, 3 layers, ")
    assert lines[1].startswith("epoch 1, loss ")
    assert any(line.startswith("test accuracy: ") for line in lines)
    assert any(line.startswith("MACs per image: ") for line in lines)


def test_result_is_json(tmp_path):
    result = evaluation(epochs=1).run()
    assert json.loads(json.dumps(result.to_dict()))["epochs"] == 1


def test_batches_of_fewer_images_than_asked_for():
    notes = []
    progress = Progress()
    progress.note = notes.append
    run = Evaluation(config(epochs=1, batch_size=100), data=images(size=16), progress=progress)
    run.run()
    assert notes == [
        "batch size: 96 instead of 100 for the training, since there are no more images"
    ]


def test_time_left_counts_the_tests(monkeypatch):
    """Each look at the clock is a second later, so that every batch takes one."""
    seconds = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(seconds)))
    told = []
    progress = Progress()
    progress.step = lambda report: told.append((report.phase, report.seconds_left))
    progress.epoch = lambda record: told.append(("epoch", run.seconds_left))
    # Six batches to train on and two to test on.
    run = Evaluation(config(batch_size=15, log_every=6), data=images(size=16), progress=progress)
    assert run.seconds_left is None
    run.run()
    # The last look, after a test, counts as part of it.
    assert told[:3] == [("train", 6.0), ("validation", 6.0 + 2.0), ("epoch", 6.0 + 3.0)]
    assert told[3:] == [("train", 3.0), ("validation", 0.0), ("epoch", 0.0)]
