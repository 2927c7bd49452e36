# SPDX-License-Identifier: Apache-2.0
"""How a search stops, and that nothing is lost then: signals, closed outputs, errors."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from search_tiny import config, images, registered
from test_search_loop import Recorder

from fastnas.parallel import Group
from fastnas.search import (
    NonFiniteLossError,
    Progress,
    RunDirectory,
    RunInterrupted,
    Search,
    SearchConfig,
    load_checkpoint,
)
from fastnas.search.files import read_jsonl
from fastnas.search.interrupts import Interrupts

QUIET = Progress()


@pytest.fixture(autouse=True, scope="module")
def _space() -> object:
    with registered():
        yield


def run(settings: SearchConfig, progress: Progress = QUIET) -> Search:
    search = Search(settings, data=images(), progress=progress)
    search.run()
    return search


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


NAMES = {
    signal.SIGINT: "Ctrl-C",
    signal.SIGTERM: "SIGTERM",
    signal.SIGHUP: "a closed terminal",
}


@pytest.mark.parametrize("number", NAMES)
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
    assert str(info.value) == (
        f"stopped by {NAMES[number]} in epoch {epoch}, step {step}; "
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


# --- signals ---------------------------------------------------------------------------------


def test_a_terminal_may_close_twice() -> None:
    """Both the shell and the kernel send SIGHUP; the second must not prevent the checkpoint."""
    with Interrupts() as interrupts:
        for _ in range(3):
            signal.raise_signal(signal.SIGHUP)
        assert interrupts.received == signal.SIGHUP
        interrupts.received = None  # obeyed
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGHUP)
            assert interrupts.received is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_one_signal_may_come_twice_where_there_are_several_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From whoever started them, beside the process that hands it on."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    passed = False
    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        passed = interrupts.received == signal.SIGINT
        monkeypatch.setattr("fastnas.search.interrupts._REPEATED", -1.0)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second one was not obeyed")
    assert passed


@dataclass(frozen=True)
class _Late(Group):
    """The signal comes while the processes ask each other, when this one has said its part."""

    sent: list[int] = field(default_factory=list)

    def largest(self, number: int) -> int:
        if not self.sent:
            self.sent.append(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        return number


def test_a_signal_that_comes_too_late_for_the_others_waits_for_the_next_step(
    tmp_path: Path,
) -> None:
    search = Search(config(out=str(tmp_path / "run")), data=images(), progress=Recorder())
    search.group = _Late()
    with pytest.raises(RunInterrupted, match="step 1;") as stop:
        search.run()
    assert stop.value.signal == signal.SIGTERM


def test_the_first_signal_counts() -> None:
    received = None
    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGINT)  # waits too: nobody has asked twice
        received = interrupts.received
        signal.raise_signal(signal.SIGINT)
    assert received == signal.SIGHUP


# --- an output that is gone ------------------------------------------------------------------


class Deaf(Progress):
    """Raises what a write to a closed pipe does, at one kind of event."""

    def __init__(self, event: str, error: OSError | None = None) -> None:
        def fail(*facts: object) -> None:
            raise BrokenPipeError if error is None else error

        setattr(self, event, fail)


@pytest.mark.parametrize("event", ["start", "step", "epoch"])
def test_a_closed_output_stops_like_a_signal(tmp_path: Path, event: str) -> None:
    settings = config("pc_darts", out=str(tmp_path / "r"))
    with pytest.raises(RunInterrupted, match="stopped by a closed output in epoch") as info:
        run(settings, Deaf(event))
    assert info.value.signal == signal.SIGPIPE
    equal_states(
        run(config("pc_darts")).state_dict(), run(replace(settings, resume=True)).state_dict()
    )


def test_a_closed_output_at_the_end_loses_nothing(tmp_path: Path) -> None:
    run(config(epochs=1, out=str(tmp_path / "r")), Deaf("end"))
    assert (tmp_path / "r" / "genotype.json").exists()


def test_what_cannot_be_told_does_not_hide_the_reason(tmp_path: Path) -> None:
    class Lost(Deaf):
        def step(self, report: object) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(config(), Lost("stop"))


def test_other_errors_of_the_progress_are_errors() -> None:
    with pytest.raises(OSError, match="log is full"):
        run(config(), Deaf("step", OSError("the log is full")))


# --- errors before anything is saved ---------------------------------------------------------


def test_a_search_that_fails_at_once_leaves_no_folder(tmp_path: Path) -> None:
    settings = config(lr=1e30, grad_clip=0.0, out=str(tmp_path / "runs" / "a"))
    with pytest.raises(NonFiniteLossError, match="there is no checkpoint from before"):
        run(settings)
    assert not list(tmp_path.iterdir())
    run(replace(settings, lr=0.05, epochs=1))  # the same folder again


def test_a_folder_that_was_there_stays_with_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(NonFiniteLossError):
        run(config(lr=1e30, grad_clip=0.0, out=str(tmp_path)))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    "error",
    [
        ValueError("images of 28x28 cannot be halved"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_that_come_again_leave_no_folder(tmp_path: Path, error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        run(config(out=str(tmp_path / "r")), Trouble(("train", 1, 1), fail))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
def test_a_crash_before_the_first_checkpoint_can_be_resumed(
    tmp_path: Path, error: type[BaseException]
) -> None:
    def crash() -> None:
        raise error

    settings = config(out=str(tmp_path / "r"))
    with pytest.raises(error):
        run(settings, Trouble(("train", 1, 1), crash))
    equal_states(run(config()).state_dict(), run(replace(settings, resume=True)).state_dict())


# --- two at once -----------------------------------------------------------------------------


def test_one_process_a_folder(tmp_path: Path) -> None:
    settings = config(epochs=1, out=str(tmp_path / "r"))
    second: Search

    class Meanwhile(Progress):
        def step(self, report: object) -> None:
            with pytest.raises(BlockingIOError, match="another process is running there"):
                second.run()

    first = Search(settings, data=images(), progress=Meanwhile())
    second = Search(settings, data=images(), progress=QUIET)
    first.run()
    with pytest.raises(FileExistsError, match="already holds a run"):
        second.run()
    assert len(read_jsonl(tmp_path / "r" / "metrics.jsonl")) == 1


def test_a_run_that_went_on_elsewhere_is_not_taken_back(tmp_path: Path) -> None:
    settings = config(epochs=2, out=str(tmp_path / "r"))
    trouble = Trouble(("train", 1, 2), lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(RunInterrupted):
        run(settings, trouble)
    one, other = (
        Search(replace(settings, resume=True), data=images(), progress=QUIET) for _ in range(2)
    )
    one.run()
    with pytest.raises(BlockingIOError, match="has gone on in another process meanwhile"):
        other.run()
    one.run()  # its own checkpoint is no surprise


def test_a_lock_ends_with_its_process_though_its_children_live_on(tmp_path: Path) -> None:
    """A worker that reads images outlives a killed run by seconds, and must not stop a resume."""
    directory = RunDirectory(tmp_path)
    ready, done = os.pipe(), os.pipe()
    with directory.lock():
        child = os.fork()
        if child == 0:
            os.write(ready[1], b"x")
            os.read(done[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
    try:
        with directory.lock():
            pass
    finally:
        os.write(done[1], b"x")
        os.waitpid(child, 0)
        for end in (*ready, *done):
            os.close(end)
