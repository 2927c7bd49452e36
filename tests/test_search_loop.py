# SPDX-License-Identifier: Apache-2.0
"""The search loop: what it trains, what it writes, and what may be resumed."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from search_tiny import CLASSES, QUIET, Recorder, config, images, registered, run

from fastnas.data import Augment
from fastnas.methods import METHODS, DartsOptions, PCDarts
from fastnas.search import (
    CheckpointError,
    Search,
    SearchConfig,
    learning_rate,
    load_checkpoint,
    save_checkpoint,
)
from fastnas.search.files import read_json, read_jsonl
from fastnas.search.runtime import runtime
from fastnas.spaces import SPACES


@pytest.fixture(autouse=True, scope="module")
def _space() -> object:
    with registered():
        yield


pytestmark = pytest.mark.usefixtures("one_thread")


# --- what is trained -------------------------------------------------------------------------


def test_architecture_is_frozen_in_the_first_epochs() -> None:
    search = run(config("pc_darts", epochs=3, arch_warmup_epochs=2, arch_lr=0.05))
    losses = [record["arch_loss"] for record in search.history]
    assert losses[:2] == [None, None]
    assert losses[2] is not None
    first, second, third = (record["entropy"]["normal"] for record in search.history)
    assert first == second > third
    # Three iterations with an architecture step have drawn three batches.
    assert search.halves.architecture.position == 3


def test_optimizers_own_their_parameters_only() -> None:
    search = Search(config("pc_darts", arch_lr=0.123), data=images(), progress=QUIET)
    weights = [id(p) for g in search.learner.weight_optimizer.param_groups for p in g["params"]]
    arch = [id(p) for g in search.learner.arch_optimizer.param_groups for p in g["params"]]
    assert weights == [id(p) for p in search.supernet.parameters()]
    assert arch == [id(p) for p in search.arch.parameters()]
    assert not set(weights) & set(arch)
    (group,) = search.learner.arch_optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.123, (0.5, 0.999), 1e-3)
    (group,) = search.learner.weight_optimizer.param_groups
    assert (group["momentum"], group["weight_decay"]) == (0.9, 3e-4)


def test_a_method_may_group_its_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    class Grouped(PCDarts):
        def parameter_groups(self, arch):
            alphas = [arch.alpha(kind) for kind in arch.kinds]
            betas = [arch.beta(kind) for kind in arch.kinds]
            return [{"params": alphas, "lr": 0.0}, {"params": betas}]

    monkeypatch.setitem(METHODS, "pc_darts", Grouped)
    search = Search(config("pc_darts", epochs=1, validate="never"), data=images(), progress=QUIET)
    before = {k: v.clone() for k, v in search.arch.state_dict().items()}
    search.run()
    moved = {k for k, v in search.arch.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"beta_normal", "beta_reduce"}


def test_learning_rate_follows_the_schedule() -> None:
    search = run(config(epochs=3, lr=0.05, lr_min=0.01, lr_warmup_epochs=1, validate="never"))
    rates = [record["lr"] for record in search.history]
    assert rates == [0.05, learning_rate(1, 3, 0.05, 0.01), learning_rate(2, 3, 0.05, 0.01)]
    assert search.learner.weight_optimizer.param_groups[0]["lr"] == rates[-1]


def test_it_learns() -> None:
    search = run(config(epochs=8, lr=0.1, augment=Augment()))
    assert search.history[-1]["train_loss"] < 0.5 * search.history[0]["train_loss"]
    assert search.history[-1]["val_accuracy"] > 2 / CLASSES
    assert search.history[-1]["entropy"]["normal"] < search.history[0]["entropy"]["normal"]


@pytest.mark.parametrize(
    ("validate", "tested"),
    [("every", [True, True]), ("last", [False, True]), ("never", [False, False])],
)
def test_when_the_supernet_is_tested(validate: str, tested: list[bool]) -> None:
    search = run(config(validate=validate))
    assert [r["val_accuracy"] is not None for r in search.history] == tested


def test_validation_is_in_eval_mode_and_capped() -> None:
    search = Search(config(validate="every", val_batches=1, gap=False), data=images())
    modes: list[bool] = []
    sizes: list[int] = []

    def note(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if not module.training:
            sizes.append(len(args[0]))
        modes.append(module.training)

    search.supernet.register_forward_pre_hook(note)
    search.run()
    # Three iterations of two passes, then one batch of validation, twice.
    assert modes == [*[True] * 6, False, *[True] * 6, False]
    assert sizes == [16, 16]


def test_second_order_search_runs() -> None:
    search = run(config(options=DartsOptions("second"), validate="never"))
    first = run(config(validate="never"))
    assert not torch.equal(search.arch.alpha("normal"), first.arch.alpha("normal"))


def test_seed_decides_everything() -> None:
    settings = config("pc_darts", validate="never", epochs=1)
    torch.rand(11)  # what the program draws beside the search changes nothing
    first, second = run(settings), run(settings)
    other = run(replace(settings, seed=5))
    a, b, c = (s.supernet.state_dict() for s in (first, second, other))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert torch.equal(first.arch.alpha("normal"), second.arch.alpha("normal"))
    assert any(not torch.equal(a[k], c[k]) for k in a)


def test_search_leaves_the_programs_settings_alone() -> None:
    torch.manual_seed(4)
    wanted = torch.rand(3)
    torch.manual_seed(4)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    before = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    run(config(epochs=1, validate="never", threads=1, deterministic=True))
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert torch.equal(torch.rand(3), wanted)


def test_runtime_switches() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), runtime(threads=1, deterministic=True):
        assert torch.get_num_threads() == 1
        assert torch.are_deterministic_algorithms_enabled()
        raise KeyError
    assert torch.get_num_threads() == before
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


@pytest.mark.parametrize(
    "fields", [{"amp": "bf16"}, {"amp": "fp16"}, {"memory_format": "channels_last"}]
)
def test_precision_and_layout(fields: dict[str, str]) -> None:
    settings = config("pc_darts", epochs=1, validate="every")
    plain, other = run(settings), run(replace(settings, **fields))
    assert other.history[0]["train_loss"] == pytest.approx(plain.history[0]["train_loss"], rel=0.05)
    assert other.history[0]["train_loss"] != plain.history[0]["train_loss"]
    conv = next(m for m in other.supernet.modules() if isinstance(m, torch.nn.Conv2d))
    assert conv.weight.dtype == torch.float32


# --- what is written -------------------------------------------------------------------------


def test_files_of_a_run(tmp_path: Path) -> None:
    settings = config("pc_darts", out=str(tmp_path / "runs" / "a"))
    search = run(settings)
    assert search.path is not None
    names = {p.name for p in search.path.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "checkpoint.pt", "genotype.json"}
    told = replace(settings, data=search.data.name)  # that it was handed
    assert SearchConfig.from_dict(read_json(search.path / "config.json")) == told
    records = read_jsonl(search.path / "metrics.jsonl")
    assert records == search.history
    assert [r["epoch"] for r in records] == [1, 2]
    assert set(records[0]) == {
        *("epoch", "train_loss", "train_accuracy", "arch_loss", "arch_accuracy"),
        *("val_loss", "val_accuracy", "lr", "entropy", "genotype", "seconds"),
        *("skip_connects", "eigenvalue", "stopped", "gap", "warnings"),
    }
    found = SPACES["darts"].genotype.load(search.path / "genotype.json")
    assert found == search.genotype() == SPACES["darts"].genotype.from_dict(records[1]["genotype"])
    state = load_checkpoint(search.path / "checkpoint.pt", kind="search")
    assert (state["epoch"], state["step"]) == (2, 0)
    assert torch.equal(state["arch"]["beta_normal"], search.arch.beta("normal"))


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    settings = config(out=str(tmp_path), epochs=1, validate="never")
    run(settings)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match=r"already holds a run: .*--resume.*--out"):
        Search(settings, data=images(), progress=QUIET)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_result_is_returned() -> None:
    search = Search(config(epochs=1), data=images(), progress=QUIET)
    result = search.run()
    assert result.genotype == search.genotype()
    assert result.history == search.history
    assert result.path is None


# --- what may be resumed ---------------------------------------------------------------------


def test_resume_needs_the_same_search(tmp_path: Path) -> None:
    settings = config(out=str(tmp_path), epochs=1, validate="never")
    run(settings)
    with pytest.raises(ValueError, match=r"was begun with lr=0.05, not 0.06: continue it with"):
        Search(replace(settings, resume=True, lr=0.06), data=images(), progress=QUIET)
    with pytest.raises(CheckpointError, match="it is of other data") as info:
        Search(replace(settings, resume=True), data=images(128), progress=QUIET)
    assert "\n" not in str(info.value)
    # Where it runs and what it shows may change.
    Search(replace(settings, resume=True, threads=1, log_every=7), data=images(), progress=QUIET)


def test_resume_of_a_checkpoint_from_another_run(tmp_path: Path) -> None:
    for name, fields in (("a", {}), ("b", {"C": 8})):
        run(config(out=str(tmp_path / name), epochs=1, validate="never", **fields))
    (tmp_path / "b" / "checkpoint.pt").replace(tmp_path / "a" / "checkpoint.pt")
    settings = config(out=str(tmp_path / "a"), epochs=1, validate="never", resume=True)
    with pytest.raises(CheckpointError, match=r"does not fit this search: .* C=8, not 4"):
        Search(settings, data=images(), progress=QUIET)


def test_resume_with_damaged_files(tmp_path: Path) -> None:
    settings = config(out=str(tmp_path), epochs=1, validate="never", resume=True)
    with pytest.raises(FileNotFoundError, match="holds no run to continue"):
        Search(settings, data=images(), progress=QUIET)
    run(replace(settings, resume=False))
    checkpoint = tmp_path / "checkpoint.pt"
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[:-20])
    with pytest.raises(CheckpointError, match="truncated, damaged or something else"):
        Search(settings, data=images(), progress=QUIET)
    checkpoint.unlink()
    with pytest.raises(CheckpointError, match=r"is missing, but metrics\.jsonl says"):
        Search(settings, data=images(), progress=QUIET)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": 9}, "epoch: expected 0 to 1, but got 9"),
        ({"epoch": True}, "epoch: expected 0 to 1, but got True"),
        ({"step": -1}, "step: expected 0 to 3, but got -1"),
        ({"step": "2"}, "step: expected 0 to 3, but got '2'"),
        ({"history": []}, "its history is not that of 1 epochs"),
        ({"history": [3]}, "does not fit this search: "),
        ({"seconds": float("nan")}, "seconds: expected 0 or more, but got nan"),
        ({"config": [1]}, "does not fit this search: "),
        ({"arch": {}}, "Missing key"),
        ({"random": {}}, "'python' is missing"),
        ({"random": {"python": [3, [1], None]}}, "does not fit this search: "),
        ({"meters": []}, "does not fit this search: "),
    ],
    ids=str,
)
def test_resume_of_a_checkpoint_that_makes_no_sense(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    settings = config(out=str(tmp_path), epochs=1, validate="never")
    run(settings)
    state = load_checkpoint(tmp_path / "checkpoint.pt", kind="search")
    save_checkpoint(tmp_path / "checkpoint.pt", {**state, **change}, kind="search")
    with pytest.raises(CheckpointError, match=message) as info:
        Search(replace(settings, resume=True), data=images(), progress=QUIET)
    assert "\n" not in str(info.value)


def test_resume_of_a_finished_run(tmp_path: Path) -> None:
    settings = config(out=str(tmp_path), epochs=1, validate="never")
    before = run(settings)
    (tmp_path / "genotype.json").unlink()
    recorder = Recorder()
    after = run(replace(settings, resume=True), progress=recorder)
    assert recorder.events == ["start 1.0", "end"]
    assert after.genotype() == before.genotype()
    assert json.loads((tmp_path / "genotype.json").read_text())["space"] == "darts"
