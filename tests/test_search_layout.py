# SPDX-License-Identifier: Apache-2.0
"""The memory format of a run: chosen by trial, once, and without a trace in the run."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from search_tiny import config, images, registered
from test_evaluate_train import config as evaluate_config
from test_search_resume import assert_equal, assert_same_run

import fastnas.evaluate as evaluate
from fastnas.evaluate import Evaluation
from fastnas.search import Progress, RunInterrupted, Search, layout
from fastnas.search.files import read_json
from fastnas.search.layout import LEAST_STEPS, choose_layout
from fastnas.search.runtime import memory_layout

CPU = torch.device("cpu")
FORMATS = ("contiguous", "channels_last")


@pytest.fixture(autouse=True)
def _registered(one_thread: None) -> Iterator[None]:
    with registered():
        yield


class Clock:
    """Takes the place of ``timed``: a step takes what ``seconds`` says, in turn, of its format."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **seconds: list[float]) -> None:
        self.seconds = {name: iter(values) for name, values in seconds.items()}
        self.spent: list[tuple[str, float]] = []
        monkeypatch.setattr(layout, "timed", lambda step, device: self.take(step()))

    def take(self, name: str) -> float:
        self.spent.append((name, next(self.seconds[name])))
        return self.spent[-1][1]

    @staticmethod
    def begin(format: torch.memory_format):
        name = "channels_last" if format == torch.channels_last else "contiguous"
        return lambda: name

    @property
    def total(self) -> float:
        return sum(seconds for _, seconds in self.spent)


# --- the trial -------------------------------------------------------------------------------


def test_a_short_run_gets_no_trial():
    def begin(format: torch.memory_format):
        raise AssertionError

    assert choose_layout(begin, LEAST_STEPS - 1, CPU) == ("channels_last", None)
    assert choose_layout(begin, 1, torch.device("cuda")) == ("contiguous", None)


def test_the_faster_one_is_taken(monkeypatch):
    clock = Clock(monkeypatch, channels_last=[3.0] + [1.2] * 9, contiguous=[3.0] + [1.0] * 9)
    choice = choose_layout(clock.begin, 10**4, CPU)
    assert choice == ("contiguous", "contiguous, 1 s a step against 1.2 s a step in channels_last")
    # One step to warm up, then five in turns, however long the run.
    assert [name for name, _ in clock.spent].count("contiguous") == 6
    assert [name for name, _ in clock.spent][4:] == ["channels_last", "contiguous"] * 4


def test_one_slow_step_decides_nothing(monkeypatch):
    clock = Clock(monkeypatch, channels_last=[1.0, 1.0, 9.0, 1.0, 1.0, 1.0], contiguous=[1.2] * 6)
    assert choose_layout(clock.begin, 10**4, CPU).name == "channels_last"


def test_a_clear_case_ends_early(monkeypatch):
    clock = Clock(monkeypatch, channels_last=[1.5, 1.0], contiguous=[2.5, 2.0])
    assert choose_layout(clock.begin, 10**4, CPU).name == "channels_last"
    assert len(clock.spent) == 4
    clock = Clock(monkeypatch, channels_last=[1.5, 1.0], contiguous=[4.0])
    _, found = choose_layout(clock.begin, 10**4, CPU)
    assert found == "channels_last, 1 s a step against 4 s the first step in contiguous"


@pytest.mark.parametrize("ratio", [1.0, 1.1, 1.3, 1.6, 1.9, 2.5, 4.0])
@pytest.mark.parametrize("steps", [LEAST_STEPS, 500, 1000, 10**5])
def test_a_trial_is_a_small_part_of_its_run(monkeypatch, steps, ratio):
    clock = Clock(monkeypatch, channels_last=[1.0] * 9, contiguous=[ratio] * 9)
    assert choose_layout(clock.begin, steps, CPU).name == "channels_last"
    assert clock.total <= 0.02 * steps


@pytest.mark.parametrize("short", ["contiguous", "channels_last"])
def test_no_memory_for_two_copies(monkeypatch, short):
    clock = Clock(monkeypatch, channels_last=[1.0] * 9, contiguous=[1.0] * 9)

    def begin(format: torch.memory_format):
        if clock.begin(format)() == short:
            raise torch.OutOfMemoryError("no")
        return clock.begin(format)

    if short == "channels_last":  # the first: it is too much by itself
        with pytest.raises(torch.OutOfMemoryError):
            choose_layout(begin, 10**4, CPU)
        return
    name, found = choose_layout(begin, 10**4, CPU)
    assert name == "channels_last" and "no memory to try contiguous" in found


def test_a_trial_can_be_stopped():
    asked = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) == 3

    assert choose_layout(lambda format: lambda: None, 10**4, CPU, stop) is None
    assert len(asked) == 3


# --- in a search -----------------------------------------------------------------------------


class Chosen:
    """Makes trials even for the shortest run, with real steps, and decides what they find."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.trials = 0
        monkeypatch.setattr(layout, "LEAST_STEPS", 0)
        monkeypatch.setattr(layout, "timed", self.timed)
        self.order = ["channels_last", "channels_last", "contiguous", "contiguous"]
        self.name = name

    def timed(self, step, device) -> float:
        step()
        name = self.order[self.trials % 4]
        self.trials += 1
        return 1.0 if name == self.name else 1.9


class Notes(Progress):
    """Keeps the notes, and does something at the first step."""

    def __init__(self, action=lambda: None) -> None:
        self.notes: list[str] = []
        self.action = action

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, report: object) -> None:
        action, self.action = self.action, lambda: None
        action()


def search(settings, progress=None):
    return Search(settings, data=images(), progress=progress or Progress())


@pytest.mark.parametrize("amp", ["off", "fp16"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_trial_leaves_no_trace(tmp_path, monkeypatch, name, amp):
    """Weights, statistics, optimizers, generators, batches: all as in a run of that format."""
    settings = config("pc_darts", memory_format=name, out=str(tmp_path / "a"), amp=amp)
    search(settings).run()
    chosen, progress = Chosen(monkeypatch, name), Notes()
    auto = search(replace(settings, memory_format="auto", out=str(tmp_path / "b")), progress)
    auto.run()
    assert chosen.trials == 4
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert progress.notes[0].startswith(f"memory format: {name}, 1 s a step against 1.9 s")
    assert read_json(tmp_path / "b" / "config.json")["memory_format"] == name
    weight = auto.supernet.stem[0].weight
    assert weight.is_contiguous(memory_format=memory_layout(name, CPU))
    batch, _ = next(auto.halves.architecture)
    assert batch.is_contiguous(memory_format=memory_layout(name, CPU))


@pytest.mark.parametrize("name", FORMATS)
def test_a_run_that_goes_on_keeps_its_format(tmp_path, monkeypatch, name):
    settings = config("pc_darts", memory_format=name, out=str(tmp_path / "a"))
    search(settings).run()
    Chosen(monkeypatch, name)
    auto = replace(settings, memory_format="auto", out=str(tmp_path / "b"))
    with pytest.raises(RunInterrupted):
        search(auto, Notes(lambda: os.kill(os.getpid(), signal.SIGINT))).run()
    other = Chosen(monkeypatch, next(f for f in FORMATS if f != name))
    resumed = search(replace(auto, resume=True))
    assert resumed.resumed
    assert resumed.config.memory_format == name
    resumed.run()
    assert other.trials == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_killed_between_the_choice_and_the_first_checkpoint(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def die() -> None:
        raise Killed

    settings = config("pc_darts", memory_format="contiguous", out=str(tmp_path / "a"))
    search(settings).run()
    Chosen(monkeypatch, "contiguous")
    auto = replace(settings, memory_format="auto", out=str(tmp_path / "b"))
    with pytest.raises(Killed):
        search(auto, Notes(die)).run()
    assert not (tmp_path / "b" / "checkpoint.pt").exists()
    Chosen(monkeypatch, "channels_last")
    search(replace(auto, resume=True)).run()
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_a_signal_ends_the_trial(tmp_path, monkeypatch):
    settings = config("pc_darts", memory_format="auto", out=str(tmp_path / "a"))
    chosen = Chosen(monkeypatch, "contiguous")
    plain = chosen.timed

    def interrupted(step, device) -> float:
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(step, device)

    monkeypatch.setattr(layout, "timed", interrupted)
    with pytest.raises(RunInterrupted, match="epoch 1, step 0; go on with: fastnas search --res"):
        search(settings).run()
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"config.json"}
    assert read_json(tmp_path / "a" / "config.json")["memory_format"] == "auto"
    Chosen(monkeypatch, "contiguous")
    search(replace(settings, resume=True)).run()
    assert read_json(tmp_path / "a" / "config.json")["memory_format"] == "contiguous"


def test_a_state_brings_its_format(monkeypatch):
    settings = config("pc_darts", memory_format="contiguous")
    done = search(settings)
    done.run()
    other = search(replace(settings, memory_format="auto"))
    other.load_state_dict(done.state_dict())
    assert other.config.memory_format == "contiguous"
    assert other.supernet.stem[0].weight.is_contiguous()
    assert_equal(done.state_dict(), other.state_dict())


def test_a_format_that_was_asked_for_is_no_choice(tmp_path):
    settings = config("pc_darts", memory_format="contiguous", out=str(tmp_path))
    search(settings).run()
    with pytest.raises(ValueError, match="begun with memory_format='contiguous', not 'channels_l"):
        search(replace(settings, memory_format="channels_last", resume=True))


# --- in an evaluation ------------------------------------------------------------------------


class Said(evaluate.Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def evaluation(progress=None, **fields: object) -> Evaluation:
    progress = progress or evaluate.Progress()
    return Evaluation(evaluate_config(**fields), data=images(size=16), progress=progress)


@pytest.mark.parametrize("name", FORMATS)
def test_an_evaluation_chooses_too(tmp_path: Path, monkeypatch, name):
    evaluation(memory_format=name, out=str(tmp_path / "a")).run()
    chosen, progress = Chosen(monkeypatch, name), Said()
    auto = evaluation(progress, memory_format="auto", out=str(tmp_path / "b"))
    auto.run()
    assert chosen.trials == 4
    assert len(progress.notes) == 1
    assert read_json(tmp_path / "b" / "config.json")["memory_format"] == name
    states = [torch.load(tmp_path / f / "checkpoint.pt", weights_only=True) for f in "ab"]
    assert_equal(*states)
    batch, _ = next(iter(auto._tests))
    assert batch.is_contiguous(memory_format=memory_layout(name, CPU))
    resumed = evaluation(memory_format="auto", resume=True, epochs=2, out=str(tmp_path / "b"))
    assert resumed.config.memory_format == name
