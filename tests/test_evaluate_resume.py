# SPDX-License-Identifier: Apache-2.0
"""An evaluation that is stopped or killed, and continued, equals one that was not, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import search_tiny
import torch
from search_tiny import images
from test_evaluate_train import config

from fastnas.evaluate import Evaluation, Progress
from fastnas.search import CheckpointError, RunInterrupted, load_checkpoint
from fastnas.search.files import read_json, read_jsonl
from fastnas.spaces.darts import GENOTYPES

EPOCHS = 3
STEPS = 6  # of an epoch: 96 images, 16 a batch


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(out)
    return out


def evaluation(out: Path, progress: Progress | None = None, **fields: object) -> Evaluation:
    values = {"epochs": EPOCHS, "label_smoothing": 0.1, **fields}
    return Evaluation(
        config(out=str(out), **values), data=images(size=16), progress=progress or Progress()
    )


def run(out: Path, progress: Progress | None = None, **fields: object) -> None:
    evaluation(out, progress, **fields).run()


class Signal(Progress):
    """Sends this process a signal after so many reports, in training or in the test."""

    def __init__(self, reports: int, number: int = signal.SIGINT) -> None:
        self.reports = reports
        self.number = number

    def step(self, report: object) -> None:
        self.reports -= 1
        if self.reports == 0:
            os.kill(os.getpid(), self.number)


class Crash(Progress):
    """Raises after so many reports, as a full disk or a driver would."""

    def __init__(self, reports: int) -> None:
        self.reports = reports

    def step(self, report: object) -> None:
        self.reports -= 1
        if self.reports == 0:
            raise RuntimeError


def assert_equal(a: object, b: object, where: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in ("seconds", "out", "resume"):
                assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}/{index}")
    else:
        assert a == b, where


def assert_same_run(wanted: Path, found: Path) -> None:
    for name, kind in (("checkpoint.pt", "evaluation"), ("best.pt", "network")):
        assert_equal(*(load_checkpoint(p / name, kind=kind) for p in (wanted, found)))
    assert_equal(*(read_jsonl(p / "metrics.jsonl") for p in (wanted, found)))
    for name in ("config.json", "genotype.json", "result.json"):
        assert_equal(*(read_json(p / name) for p in (wanted, found)))


# Reports of an epoch: one a batch, then one of the test (16 images, one batch).
@pytest.mark.parametrize("reports", [1, STEPS, STEPS + 1, STEPS + 3, 3 * (STEPS + 1)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_the_run_goes_on(whole, tmp_path, reports, number):
    out = tmp_path / "run"
    torch.rand(reports)  # what the caller draws must not matter
    with pytest.raises(RunInterrupted) as stopped:
        run(out, Signal(reports, number))
    assert stopped.value.signal == number
    assert f"go on with: fastnas eval --resume --out {out}" in str(stopped.value)
    torch.rand(3)
    run(out, resume=True)
    assert_same_run(whole, out)


@pytest.mark.parametrize("reports", [2, STEPS + 2, 2 * (STEPS + 1) + 2])
def test_crash_goes_on_from_the_last_epoch(whole, tmp_path, reports):
    out = tmp_path / "run"
    with pytest.raises(RuntimeError):
        run(out, Crash(reports))
    run(out, resume=True)
    assert_same_run(whole, out)


def test_lost_and_half_written_metrics_come_back(whole, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(RunInterrupted):
        run(out, Signal(2 * (STEPS + 1) + 2))
    text = (out / "metrics.jsonl").read_text()
    (out / "metrics.jsonl").write_text(text[: len(text) // 2])
    run(out, resume=True)
    assert_same_run(whole, out)


def test_resume_of_a_finished_run_changes_nothing(whole, tmp_path):
    out = tmp_path / "run"
    run(out)
    result = evaluation(out, resume=True).run()
    assert result.epochs == EPOCHS
    assert_same_run(whole, out)


@pytest.mark.slow
def test_sigkill(whole, tmp_path):
    """Killed from outside in its second epoch, twice."""
    out = tmp_path / "run"
    for resume in (False, True):
        process = subprocess.Popen(
            [sys.executable, __file__, json.dumps({"out": str(out), "resume": resume})],
            cwd=Path(search_tiny.__file__).parents[1],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line == "2 3\n":
                process.kill()
                break
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
    run(out, resume=True)
    assert_same_run(whole, out)


def test_another_configuration_is_refused(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(RunInterrupted):
        run(out, Signal(1))
    with pytest.raises(ValueError, match=r"was begun with lr=0\.05, not 0\.1: continue it with"):
        evaluation(out, resume=True, lr=0.1)


def test_another_genotype_is_refused(tmp_path):
    out, file = tmp_path / "run", tmp_path / "genotype.json"
    file.write_text(GENOTYPES["DARTS_V1"].to_json())
    with pytest.raises(RunInterrupted):
        run(out, Signal(1), source=str(file))
    file.write_text(GENOTYPES["DARTS_V2"].to_json())
    with pytest.raises(CheckpointError, match="another genotype"):
        evaluation(out, resume=True, source=str(file))


def test_other_data_are_refused(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(RunInterrupted):
        run(out, Signal(1))
    fields = config(out=str(out), epochs=EPOCHS, label_smoothing=0.1, resume=True)
    with pytest.raises(CheckpointError, match="other data"):
        Evaluation(fields, data=images(count=112, size=16), progress=Progress())


def test_damaged_checkpoint(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(RunInterrupted):
        run(out, Signal(1))
    whole_file = (out / "checkpoint.pt").read_bytes()
    (out / "checkpoint.pt").write_bytes(whole_file[: len(whole_file) // 2])
    with pytest.raises(CheckpointError, match="truncated, damaged or something else"):
        evaluation(out, resume=True)


def test_a_search_that_was_moved_is_not_needed(tmp_path):
    """The folder of the evaluation has the genotype: it can be moved along with the search."""
    search, out = tmp_path / "search", tmp_path / "run"
    search.mkdir()
    (search / "genotype.json").write_text(GENOTYPES["DARTS_V1"].to_json())
    with pytest.raises(RunInterrupted):
        run(out, Signal(2), source=str(search))
    shutil.rmtree(search)
    with pytest.raises(FileNotFoundError, match="search: expected the folder of a search"):
        evaluation(tmp_path / "other", source=str(search))
    run(out, resume=True, source=str(search))
    assert read_json(out / "result.json")["source"] == str(search)


def test_nothing_to_resume(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run to continue"):
        evaluation(tmp_path / "run", resume=True)


class _Announce(Progress):
    def step(self, report):
        print(report.epoch, report.step, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    fields = json.loads(sys.argv[1])
    run(Path(fields.pop("out")), _Announce(), **fields)
