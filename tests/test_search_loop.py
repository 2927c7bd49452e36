# SPDX-License-Identifier: Apache-2.0
"""The search loop: what it trains on what, what it writes, and how it stops."""

from __future__ import annotations

import io
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from search_tiny import CLASSES, config, images, registered

from fastnas.data import Augment, ImageData
from fastnas.methods import METHODS, DartsOptions, PCDarts
from fastnas.search import (
    CheckpointError,
    NonFiniteLossError,
    Progress,
    RunInterrupted,
    Search,
    SearchConfig,
    TextProgress,
    learning_rate,
    load_checkpoint,
)
from fastnas.search.assembly import split_images
from fastnas.search.files import read_json, read_jsonl
from fastnas.search.meters import Meter, Pace
from fastnas.search.runtime import runtime
from fastnas.spaces import SPACES

QUIET = Progress()


@pytest.fixture(autouse=True, scope="module")
def _space() -> object:
    with registered():
        yield


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    # Threads have nothing to do at this size but to wait for each other.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(settings: SearchConfig, **kwargs: object) -> Search:
    search = Search(settings, data=images(), **{"progress": QUIET, **kwargs})
    search.run()
    return search


# --- what is trained on what -----------------------------------------------------------------


def test_halves_are_the_first_and_the_last_images() -> None:
    first, second = split_images(images(96), config())
    assert torch.equal(first, torch.arange(48))
    assert torch.equal(second, torch.arange(48, 96))
    first, second = split_images(images(96), config(weight_share=0.25, arch_share=0.125))
    assert torch.equal(first, torch.arange(24))
    assert torch.equal(second, torch.arange(84, 96))


def test_random_parts_do_not_overlap() -> None:
    parts = [split_images(images(96), config(split="random", seed=s)) for s in (1, 1, 2)]
    (a, b), again, other = parts
    assert len({*a.tolist(), *b.tolist()}) == 96
    assert torch.equal(a, again[0])
    assert not torch.equal(a, other[0])


def sorted_images() -> ImageData:
    data = images(96)
    order = data.train_labels.argsort(stable=True)
    return replace(
        data, train_images=data.train_images[order], train_labels=data.train_labels[order]
    )


def test_images_sorted_by_class_are_noticed() -> None:
    with pytest.raises(ValueError, match=r"for the weights have none of class 2; .* 'random'"):
        split_images(sorted_images(), config())
    split_images(sorted_images(), config(split="random"))
    with pytest.raises(ValueError, match="leave a part empty"):
        split_images(images(96), config(weight_share=0.001))


def test_batches_come_from_their_halves() -> None:
    search = Search(config(), data=images(), progress=QUIET)
    weights, architecture = search.halves.weights, search.halves.architecture.batches
    assert torch.equal(weights.indices.sort().values, torch.arange(48))
    assert torch.equal(architecture.indices.sort().values, torch.arange(48, 96))
    assert torch.equal(search.halves.validation.indices, torch.arange(48, 96))
    assert weights.augment == architecture.augment == search.config.augment
    assert not search.halves.validation.augment.flip
    assert not search.halves.validation.shuffle


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
    search = Search(config(validate="every", val_batches=1), data=images(), progress=QUIET)
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
    assert SearchConfig.from_dict(read_json(search.path / "config.json")) == settings
    records = read_jsonl(search.path / "metrics.jsonl")
    assert records == search.history
    assert [r["epoch"] for r in records] == [1, 2]
    assert set(records[0]) == {
        *("epoch", "train_loss", "train_accuracy", "arch_loss", "arch_accuracy"),
        *("val_loss", "val_accuracy", "lr", "entropy", "genotype", "seconds"),
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


class Recorder(Progress):
    def __init__(self) -> None:
        self.events: list[str] = []

    def start(self, search: Search) -> None:
        self.events.append(f"start {search.epoch}.{search.step}")

    def step(self, report) -> None:
        self.events.append(
            f"{report.phase} {report.epoch}/{report.epochs} {report.step}/{report.steps}"
        )
        assert report.loss > 0
        assert report.seconds_left >= 0

    def epoch(self, record, genotype) -> None:
        self.events.append(f"epoch {record['epoch']}")

    def end(self, result) -> None:
        self.events.append("end")

    def stop(self, reason: BaseException) -> None:
        self.events.append(f"stop {type(reason).__name__}")


def test_progress() -> None:
    recorder = Recorder()
    run(config(log_every=2, validate="last"), progress=recorder)
    assert recorder.events == [
        *("start 0.0", "train 1/2 2/3", "train 1/2 3/3", "epoch 1"),
        *("train 2/2 2/3", "train 2/2 3/3", "validation 2/2 2/3", "validation 2/2 3/3"),
        *("epoch 2", "end"),
    ]


def test_lines_of_text() -> None:
    stream = io.StringIO()
    search = Search(config(), data=images(), progress=TextProgress(stream))
    result = search.run()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "search: tiny by darts on fashion-mnist-mini, cpu"
    assert lines[1].startswith("epoch 1, loss ")
    assert "validation accuracy" in lines[2]
    assert lines[3] == str(result.genotype)
    assert len(lines) == 4


def test_pace() -> None:
    pace = Pace()
    assert pace.seconds(3, 3) is None
    pace.add(False, 1.0)
    assert pace.seconds(2, 3) == 2 + 6
    pace.add(True, 5.0)
    pace.add(True, 3.0)
    assert pace.seconds(2, 3) == 2 + 12
    only = Pace()
    only.add(True, 4.0)
    assert only.seconds(1, 1) == 6


# --- how it stops ----------------------------------------------------------------------------


class Trouble(Progress):
    """Does something at a given report."""

    def __init__(self, at: tuple[str, int, int], action) -> None:
        self.at, self.action = at, action

    def step(self, report) -> None:
        if (report.phase, report.epoch, report.step) == self.at:
            self.action()


def comparable(records: list[dict[str, object]]) -> list[dict[str, object]]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def equal_states(a: object, b: object, where: str = "") -> None:
    """Compare two states bit for bit, apart from times and what names places."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in ("seconds", "config"):
                equal_states(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            equal_states(x, y, f"{where}/{index}")
    else:
        assert a == b, where


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "at", [("train", 1, 2), ("train", 2, 1), ("train", 2, 3), ("validation", 2, 2)]
)
def test_a_signal_stops_between_iterations(
    tmp_path: Path, at: tuple[str, int, int], number: signal.Signals
) -> None:
    whole = run(config("pc_darts", epochs=3, validate="every"))
    settings = config("pc_darts", epochs=3, validate="every", out=str(tmp_path / "r"))
    trouble = Trouble(at, lambda: os.kill(os.getpid(), number))
    with pytest.raises(RunInterrupted) as info:
        Search(settings, data=images(), progress=trouble).run()
    assert info.value.signal == number
    epoch, step = at[1], 3 if at[0] == "validation" else at[2]
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert str(info.value) == (
        f"stopped by {name} in epoch {epoch}, step {step}; "
        f"go on with: fastnas search --resume --out {tmp_path / 'r'}"
    )
    resumed = run(replace(settings, resume=True))
    assert resumed.resumed
    equal_states(whole.state_dict(), resumed.state_dict())
    assert comparable(read_jsonl(tmp_path / "r" / "metrics.jsonl")) == comparable(whole.history)


def test_a_second_signal_is_obeyed_at_once() -> None:
    def twice() -> None:
        # Not os.kill: two signals that another thread takes may be handled as one.
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    search = Search(config(), data=images(), progress=Trouble(("train", 1, 1), twice))
    with pytest.raises(KeyboardInterrupt) as info:
        search.run()
    assert not isinstance(info.value, RunInterrupted)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_between_epochs_stops_there(tmp_path: Path) -> None:
    class AfterFirst(Progress):
        def epoch(self, record, genotype) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    settings = config(out=str(tmp_path / "r"))
    with pytest.raises(RunInterrupted, match="in epoch 2, step 0"):
        Search(settings, data=images(), progress=AfterFirst()).run()
    equal_states(run(config()).state_dict(), run(replace(settings, resume=True)).state_dict())


def test_a_signal_after_the_last_iteration_is_not_lost(tmp_path: Path) -> None:
    class AtTheEnd(Progress):
        def end(self, result) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    search = Search(config(epochs=1, out=str(tmp_path / "r")), data=images(), progress=AtTheEnd())
    with pytest.raises(KeyboardInterrupt) as info:
        search.run()
    assert not isinstance(info.value, RunInterrupted)
    assert (tmp_path / "r" / "genotype.json").exists()


def test_progress_hears_of_the_stop() -> None:
    recorder = Recorder()
    search = Search(config(lr=1e30, grad_clip=0.0), data=images(), progress=recorder)
    with pytest.raises(NonFiniteLossError):
        search.run()
    assert recorder.events[-1] == "stop NonFiniteLossError"


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    settings = config(out=str(tmp_path), epochs=3, log_every=3, validate="never")
    search: Search

    class Poison(Progress):
        def epoch(self, record, genotype) -> None:
            if record["epoch"] == 1:
                with torch.no_grad():
                    next(search.supernet.parameters()).fill_(float("inf"))

    search = Search(settings, data=images(), progress=Poison())
    with pytest.raises(NonFiniteLossError) as info:
        search.run()
    assert "the loss of the weights became nan in epoch 2, step 1;" in str(info.value)
    assert f"({tmp_path / 'checkpoint.pt'} is from before)" in str(info.value)
    state = load_checkpoint(tmp_path / "checkpoint.pt", kind="search")
    assert state["epoch"] == 1
    assert all(v.isfinite().all() for v in state["supernet"].values())
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 1


def test_meter_remembers_the_first_bad_loss() -> None:
    from fastnas.methods import Outcome

    meter = Meter(torch.device("cpu"))
    for step, loss in enumerate([1.0, float("inf"), float("nan"), 2.0], 1):
        meter.add(Outcome(torch.tensor(loss), torch.tensor(3), 4), step)
    assert meter.bad == (2, float("inf"))
    assert meter.loss is None
    assert meter.accuracy == 0.75
    meter.reset()
    assert meter.bad is None
    assert meter.accuracy is None


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
    with pytest.raises(CheckpointError, match="truncated or something else"):
        Search(settings, data=images(), progress=QUIET)
    checkpoint.unlink()
    with pytest.raises(CheckpointError, match=r"is missing, but metrics\.jsonl says"):
        Search(settings, data=images(), progress=QUIET)


def test_resume_of_a_finished_run(tmp_path: Path) -> None:
    settings = config(out=str(tmp_path), epochs=1, validate="never")
    before = run(settings)
    (tmp_path / "genotype.json").unlink()
    recorder = Recorder()
    after = run(replace(settings, resume=True), progress=recorder)
    assert recorder.events == ["start 1.0", "end"]
    assert after.genotype() == before.genotype()
    assert json.loads((tmp_path / "genotype.json").read_text())["space"] == "darts"
