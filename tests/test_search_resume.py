# SPDX-License-Identifier: Apache-2.0
"""A search that is killed, at any moment, and continued equals one that was not, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest
import search_tiny
import torch
from search_tiny import assert_equal, config, images

import fastnas.search.files as files
from fastnas.search import Progress, Search, SearchConfig, load_checkpoint
from fastnas.search.files import read_json, read_jsonl

IMAGES = 96
EPOCHS = 3
FIELDS = {"method": "pc_darts", "epochs": EPOCHS, "arch_warmup_epochs": 1}
# The process that is killed searches in the real space: its kernels must give the same bits again.
REAL = {"method": "pc_darts", "epochs": 2, "space": "darts", "validate": "last", "val_batches": 1}
# It chooses its memory format, once.
AUTO = {**REAL, "memory_format": "auto"}
REAL_IMAGES = 64


pytestmark = pytest.mark.usefixtures("one_thread")


def uninterrupted(fields: dict[str, object], count: int, path: Path) -> Path:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    Search(config(**fields, out=str(path)), data=images(count), progress=Progress()).run()
    torch.set_num_threads(before)
    return path


@pytest.fixture(autouse=True, scope="module")
def _space() -> object:
    with search_tiny.registered():
        yield


@pytest.fixture(scope="module")
def whole(_space: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    return uninterrupted(FIELDS, IMAGES, tmp_path_factory.mktemp("whole") / "run")


def assert_same_run(wanted: Path, found: Path) -> None:
    """Every file of two runs: weights, alphas, optimizers, generators, metrics, genotype."""
    states = [load_checkpoint(p / "checkpoint.pt", kind="search") for p in (wanted, found)]
    assert_equal(*states)
    assert states[0]["epoch"] == states[0]["config"]["epochs"]
    assert states[0]["step"] == 0
    assert_equal(*(read_jsonl(p / "metrics.jsonl") for p in (wanted, found)))
    assert_equal(*(read_json(p / "genotype.json") for p in (wanted, found)))
    assert_equal(*(read_json(p / "config.json") for p in (wanted, found)))


# --- SIGKILL, from outside -------------------------------------------------------------------


def start(out: Path, resume: bool) -> subprocess.Popen[str]:
    # Draws before the search differ from process to process and must not matter.
    fields = {**AUTO, "out": str(out), "resume": resume, "draws": random.randrange(50)}
    code = [sys.executable, search_tiny.__file__, json.dumps(fields), str(REAL_IMAGES)]
    path = os.pathsep.join(sys.path)
    return subprocess.Popen(
        code,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=out.parent,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )


def wait_for(stream: IO[str], lines: int) -> int:
    """Read so many lines, or to the end; how many came."""
    count = 0
    while count < lines and stream.readline():
        count += 1
    return count


def test_killed_at_random_moments(tmp_path: Path) -> None:
    out = tmp_path / "run"
    # Not seeded: each run of the tests tries other moments; the message tells which.
    seed = random.randrange(10**6)
    moments = random.Random(seed)
    kills = 0
    for _ in range(2):
        process = start(out, resume=out.exists())
        assert process.stdout is not None
        wait_for(process.stdout, moments.randint(1, 3))
        # From between two lines to anywhere in the next iteration or in the writing of files.
        try:
            process.wait(moments.uniform(0, 0.15))
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors
    last = start(out, resume=True)
    _, errors = last.communicate(timeout=400)
    assert last.returncode == 0, errors
    assert kills, f"no process lived long enough to be killed (seed {seed})"
    chosen = {**REAL, "memory_format": read_json(out / "config.json")["memory_format"]}
    assert_same_run(uninterrupted(chosen, REAL_IMAGES, tmp_path / "whole"), out)


# --- every moment, from inside ---------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package catches it."""


def run(settings: SearchConfig) -> None:
    Search(settings, data=images(IMAGES), progress=Progress()).run()


def die_at_call(monkeypatch: pytest.MonkeyPatch, name: str, number: int, after: bool) -> None:
    """Make the call ``number`` of a function of os that the writing of files needs fail."""
    original = getattr(os, name)
    calls = 0

    def dying(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == number and not after:
            raise Killed
        result = original(*args)
        if calls == number:
            raise Killed
        return result

    monkeypatch.setattr(files.os, name, dying)


# Calls: 1 config.json; then for every epoch the checkpoint, and the genotype.
@pytest.mark.parametrize("number", [2, 3, 4, 5, 6])
@pytest.mark.parametrize(
    ("name", "after"), [("fsync", False), ("replace", False), ("replace", True)]
)
def test_killed_while_files_are_written(
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    after: bool,
    number: int,
) -> None:
    settings = config(**FIELDS, out=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        die_at_call(patch, name, number, after)
        with pytest.raises(Killed):
            run(settings)
    # What a real kill leaves behind: write_atomic could not clean up.
    (tmp_path / "run" / "checkpoint.pt.tmp").write_bytes(b"half a checkpoint")
    run(replace(settings, resume=True))
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("kept", [0, 1, 30])
def test_killed_while_a_line_is_written(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    settings = config(**FIELDS, out=str(tmp_path / "run"))

    def half(path: Path, record: object) -> None:
        with open(path, "ab") as file:
            file.write(json.dumps(record).encode()[:kept])
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(files, "append_jsonl", half)
        with pytest.raises(Killed):
            run(settings)
    run(replace(settings, resume=True))
    assert_same_run(whole, tmp_path / "run")


def test_killed_before_the_first_checkpoint(whole: Path, tmp_path: Path) -> None:
    settings = config(**FIELDS, out=str(tmp_path / "run"))

    class Dies(Progress):
        def step(self, report: object) -> None:
            raise Killed

    with pytest.raises(Killed):
        Search(settings, data=images(IMAGES), progress=Dies()).run()
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    run(replace(settings, resume=True))
    assert_same_run(whole, tmp_path / "run")


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(**FIELDS, out=str(tmp_path / "run"))
    calls = 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run(settings)
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pt", kind="search")
    assert state["epoch"] == 1
    assert not list((tmp_path / "run").glob("*.tmp"))
