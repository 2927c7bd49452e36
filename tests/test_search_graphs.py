# SPDX-License-Identifier: Apache-2.0
"""Searches with recorded steps: the same run, on a CPU with a tape in place of the graphs."""

from __future__ import annotations

import dataclasses
import os
import signal
from dataclasses import replace

import pytest
import torch
from graph_cases import Tape
from search_tiny import QUIET, assert_equal, config, images, registered

import fastnas.search.loop as loop
from fastnas.methods import DartsOptions, Learner, PCDartsOptions
from fastnas.methods.graphs import GraphedLearner
from fastnas.methods.optimizers import rates_as_tensors
from fastnas.search import Progress, RunInterrupted, Search, layout, load_checkpoint
from fastnas.search.meters import Meter

GPU = pytest.mark.gpu


@pytest.fixture(autouse=True, scope="module")
def _space() -> object:
    with registered():
        yield


class Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def taped(learner: Learner, mode: str, tell) -> Learner:
    """In place of ``with_graphs``: a tape for the device."""
    if mode == "off":  # on a GPU the rates are tensors in any case
        for optimizer in (learner.weight_optimizer, learner.arch_optimizer):
            rates_as_tensors(optimizer)
        return learner
    values = {f.name: getattr(learner, f.name) for f in dataclasses.fields(learner)}
    return GraphedLearner(**values, recorder=Tape(), tell=tell)


@pytest.fixture
def tape(monkeypatch) -> None:
    monkeypatch.setattr(loop, "with_graphs", taped)


def run(settings, progress: Progress = QUIET) -> Search:
    search = Search(settings, data=images(), progress=progress)
    search.run()
    return search


def state(search: Search) -> dict:
    found = search.state_dict()
    return {key: found[key] for key in found if key != "config"}


@pytest.mark.parametrize("method", ["darts", "pc_darts", "da2s"])
def test_the_same_search(tape, method) -> None:
    settings = config(method, epochs=3, arch_warmup_epochs=int(method != "da2s"))
    recorded, eager = run(settings), run(replace(settings, cuda_graphs="off"))
    assert recorded.learner.recorder.replays > 0
    assert_equal(state(recorded), state(eager))


def test_the_same_search_after_it_was_stopped(tape, tmp_path) -> None:
    class Stop(Progress):
        def step(self, report) -> None:
            if (report.epoch, report.step, report.phase) == (2, 2, "train"):
                os.kill(os.getpid(), signal.SIGINT)

    settings = config("pc_darts", epochs=4, out=str(tmp_path / "a"))
    whole = run(replace(settings, out=str(tmp_path / "b")))
    with pytest.raises(RunInterrupted):
        run(settings, Stop())
    resumed = Search(replace(settings, resume=True), data=images(), progress=QUIET)
    assert resumed.learner.recorder.recorded == 0
    resumed.run()
    assert resumed.learner.recorder.replays > 0
    assert_equal(state(whole), state(resumed))
    saved = load_checkpoint(tmp_path / "a" / "checkpoint.pt", kind="search")
    assert type(saved["arch_optimizer"]["param_groups"][0]["lr"]) is float


def test_it_may_go_on_without(tape, tmp_path) -> None:
    settings = config("darts", epochs=1, out=str(tmp_path))
    run(settings)
    # The number of epochs is the run's own; how its steps are made is not.
    other = replace(settings, resume=True, cuda_graphs="off")
    assert type(Search(other, data=images(), progress=QUIET).learner) is Learner


def test_the_reason_is_a_note(tape) -> None:
    progress = Notes()
    run(config("darts", options=DartsOptions("second"), epochs=1), progress)
    assert len(progress.notes) == 1
    assert progress.notes[0].startswith("CUDA graphs: off, the second order")


def test_a_trial_of_formats_times_replays(tape, monkeypatch) -> None:
    monkeypatch.setattr(layout, "LEAST_STEPS", 0)
    timed: list[int] = []
    tapes: list[Tape] = []

    def another(self, memo) -> Tape:
        tapes.append(Tape())
        return tapes[-1]

    def counted(step, device) -> float:
        before = sum(tape.replays for tape in tapes)
        step()
        timed.append(sum(tape.replays for tape in tapes) - before)
        return 1.0

    monkeypatch.setattr(Tape, "__deepcopy__", another)
    monkeypatch.setattr(layout, "timed", counted)
    search = Search(config("darts", memory_format="auto"), data=images(), progress=QUIET)
    search._choose_layout()
    assert timed and set(timed) == {2}
    assert search.learner.recorder.recorded == 0
    # A run of 2 epochs of 3 steps, of which the first ones of a trial are eager.
    for least, trials in ((1, True), (2, False)):
        monkeypatch.setattr(layout, "LEAST_STEPS", least)
        timed.clear()
        again = Search(config("darts", memory_format="auto"), data=images(), progress=QUIET)
        again._choose_layout()
        assert bool(timed) == trials


def test_on_a_cpu() -> None:
    progress = Notes()
    search = run(config("darts", epochs=1), progress)
    assert type(search.learner) is Learner and progress.notes == []
    with pytest.raises(ValueError, match="cuda_graphs: expected auto or off, but got 'on'"):
        Search(config("darts", cuda_graphs="on"), data=images(), progress=QUIET)
    with pytest.raises(ValueError, match="configuration: cuda_graphs"):
        type(search.config).from_dict({"cuda_graphs": "yes"})


# --- on a GPU --------------------------------------------------------------------------------


@GPU
@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("method", ["darts", "pc_darts"])
def test_a_search_on_a_gpu(monkeypatch, method, amp) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    options = {"options": PCDartsOptions(partial_channels=2)} if method == "pc_darts" else {}
    settings = config(method, "darts", epochs=4, device="cuda", amp=amp, **options)
    progress = Notes()
    recorded, eager = run(settings, progress), run(replace(settings, cuda_graphs="off"))
    assert recorded.learner._weights._recorded is not None
    assert [note for note in progress.notes if "graphs" in note] == []
    for a, b in zip(recorded.history, eager.history, strict=True):
        for name in ("train_loss", "arch_loss", "val_loss"):
            assert a[name] == pytest.approx(b[name], rel=0.02), name


@GPU
def test_the_reasons_on_a_gpu() -> None:
    for fields in ({"amp": "fp16"}, {"options": DartsOptions("second")}):
        progress = Notes()
        run(config("darts", epochs=1, device="cuda", **fields), progress)
        assert [note.partition(", ")[0] for note in progress.notes] == ["CUDA graphs: off"]


@GPU
def test_no_number_is_waited_for() -> None:
    settings = config("pc_darts", "darts", epochs=2, device="cuda")
    search = Search(settings, data=images(), progress=QUIET)
    meter, learner = Meter(search.device), search.learner
    train, val = ([next(search.halves.architecture) for _ in range(9)] for _ in range(2))
    search.supernet.train()

    def iteration(number: int) -> None:
        learner.set_rate(0.1 / (1 + number))
        draw = lambda: val[number]  # noqa: E731
        outcomes = search.method.iteration(learner, train[number], draw, search.moment("weights"))
        for outcome in outcomes:
            meter.add(outcome, number + 1)

    for number in range(5):
        iteration(number)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(5, 9):
            iteration(number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert meter.loss is not None
