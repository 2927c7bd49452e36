# SPDX-License-Identifier: Apache-2.0
"""Measuring: what is called when, how it is stopped and continued, and the command."""

from __future__ import annotations

import itertools
import json
import signal
from collections import Counter
from typing import ClassVar

import pytest
import torch
from latency_tiny import KEYS, SHAPE, config
from torch import nn

from fastnas.cli import main
from fastnas.latency import LatencyTable, MeasureConfig, Measurement, here, measure
from fastnas.latency.timing import deployed, images, stopwatch
from fastnas.search import RunInterrupted
from fastnas.spaces.darts import DartsShape

TINY = ["--image-size", "8", "--C", "2", "--layers", "3", "--threads", "1", "--device", "cpu"]
FEW = ["--warmup", "0", "--repeats", "2"]


class FakeWatch:
    """Counts calls instead of timing them: the n-th call takes n ms."""

    calls: ClassVar[list[object]] = []

    def __init__(self, device):
        self.pending = []

    def time(self, call):
        call()
        self.calls.append((call.func, *call.args))
        self.pending.append(float(len(self.calls)))

    def read(self):
        found, self.pending = self.pending, []
        return found


@pytest.fixture
def watch(monkeypatch):
    monkeypatch.setattr(FakeWatch, "calls", [])
    monkeypatch.setattr(measure, "stopwatch", FakeWatch)
    return FakeWatch


def test_a_table_of_this_machine(tmp_path):
    path = tmp_path / "new" / "t.json"
    told = []
    found = Measurement(config(out=str(path)), lambda *numbers: told.append(numbers)).run()
    assert LatencyTable.load(path) == found
    assert tuple(found.blocks) == KEYS
    assert found.conditions == here("cpu", 1, 1, "float32", "auto")
    assert found.space == "darts" and found.shape == SHAPE
    for time in found.blocks.values():
        assert len(time.samples) == 3
        assert 0 < time.ms < 1000
    found.check_complete("t.json")
    total = 3 * len(KEYS)
    assert told[0] == (0, total) and told[-1] == (total, total)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_rounds_call_every_block_once_in_an_order_of_their_own(watch):
    Measurement(config(out=None)).run()
    n = len(KEYS)
    modules = [call[0] for call in watch.calls]
    assert len(modules) == 3 * n
    rounds = [modules[start : start + n] for start in (0, n, 2 * n)]
    assert all(set(each) == set(modules) and len(set(each)) == n for each in rounds)
    assert rounds[0] != rounds[1] != rounds[2]


def test_inputs_are_new_tensors_of_the_conditions(watch):
    Measurement(config(out=None, batch=2, dtype="bfloat16", repeats=2)).run()
    inputs = [call[1] for call in watch.calls]
    assert len(set(map(id, inputs))) == len(inputs)
    shapes = Counter(tuple(x.shape) for x in inputs)
    assert (2, 1, 8, 8) in shapes
    for module, x in watch.calls:
        assert x.dtype == torch.bfloat16 and x.is_contiguous(memory_format=torch.channels_last)
        assert all(p.dtype == torch.bfloat16 for p in module.parameters())
        assert not any(m.training for m in module.modules())


def test_no_gradients_and_the_threads_that_were_asked_for(monkeypatch):
    seen = []

    class Watch(FakeWatch):
        def time(self, call):
            seen.append((torch.is_inference_mode_enabled(), torch.get_num_threads()))
            super().time(call)

    monkeypatch.setattr(measure, "stopwatch", Watch)
    before = torch.get_num_threads()
    Measurement(config(out=None, repeats=1)).run()
    assert set(seen) == {(True, 1)}
    assert torch.get_num_threads() == before


def test_random_numbers_are_left_alone():
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    Measurement(config(out=None, repeats=1)).run()
    assert torch.equal(torch.rand(3), wanted)


def test_ctrl_c_keeps_whole_rounds_and_resume_measures_the_rest(tmp_path, watch):
    path, n = str(tmp_path / "t.json"), len(KEYS)

    def stop(done, total):
        if done == n + 5:
            signal.raise_signal(signal.SIGINT)

    message = rf"stopped by Ctrl-C after {n} of {3 * n} calls; continue with: .*--resume --out"
    with pytest.raises(RunInterrupted, match=message):
        Measurement(config(out=path), stop).run()
    begun = LatencyTable.load(path)
    assert {len(time.samples) for time in begun.blocks.values()} == {1}
    with pytest.raises(ValueError, match="1 of 3 rounds"):
        begun.check_complete(path)

    watch.calls.clear()
    told = []
    found = Measurement(config(out=path, resume=True), lambda *numbers: told.append(numbers)).run()
    assert len(watch.calls) == 2 * n
    assert told[0][0] == n
    for key, time in found.blocks.items():
        assert time.samples[0] == begun.blocks[key].samples[0]
        assert len(time.samples) == 3
    assert found.date == begun.date
    assert LatencyTable.load(path) == found


def test_a_kill_loses_seconds_only(tmp_path, watch, monkeypatch):
    path, n = tmp_path / "t.json", len(KEYS)
    clock = itertools.count(0, 6)  # every look at the clock is later than the interval
    monkeypatch.setattr(measure.time, "monotonic", lambda: next(clock))
    seen = []

    def look(done, total):
        if done == 2 * n + 2:
            seen.append(LatencyTable.load(path))

    Measurement(config(out=str(path)), look).run()
    assert {len(time.samples) for time in seen[0].blocks.values()} == {2}


def test_more_rounds_can_be_added(tmp_path, watch):
    path = str(tmp_path / "t.json")
    Measurement(config(out=path)).run()
    watch.calls.clear()
    found = Measurement(config(out=path, resume=True, repeats=4)).run()
    assert len(watch.calls) == len(KEYS)
    found.check_complete(path)
    assert found.procedure.repeats == 4


def test_only_the_same_table_is_continued(tmp_path, watch):
    path = tmp_path / "t.json"
    with pytest.raises(FileNotFoundError, match="no such file"):
        Measurement(config(out=str(path), resume=True))
    Measurement(config(out=str(path))).run()
    with pytest.raises(FileExistsError, match="already exists: continue it with --resume, or"):
        Measurement(config(out=str(path)))
    with pytest.raises(ValueError, match="batch 1, not 2"):
        Measurement(config(out=str(path), resume=True, batch=2))
    text = path.read_text().replace(KEYS[4], "something-else")
    path.write_text(text)
    with pytest.raises(ValueError, match="blocks: the space has none with key 'something-else'"):
        Measurement(config(out=str(path), resume=True))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"space": "nowhere"}, "space: unknown name 'nowhere'"),
        ({"batch": 0}, "batch: expected at least 1"),
        ({"threads": -1}, "threads: expected at least 0"),
        ({"threads": 4096}, "threads: expected at most"),
        ({"repeats": 0}, "repeats: expected at least 1"),
        ({"out": ""}, "out: expected a file"),
        ({"resume": True, "out": None}, "resume: expected a file in out"),
        ({"device": "abacus"}, "device: expected auto"),
    ],
)
def test_wrong_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Measurement(MeasureConfig(**{"out": None, **fields}))


def test_the_shape_is_that_of_the_space():
    assert MeasureConfig().shape == DartsShape()
    with pytest.raises(TypeError, match="shape: expected DartsShape for the space 'darts', but"):
        MeasureConfig(shape=nn.Module())


def test_stopwatch_times_calls_in_order(device):
    small = torch.ones(8, 8, device=device)
    large = torch.ones(1500, 1500, device=device)
    watch = stopwatch(device)
    for x in (small, large):
        x @ x
    for x in (small, large, small):
        watch.time(lambda x=x: x @ x)
    first, middle, last = watch.read()
    assert 0 < first < middle and 0 < last < middle
    assert watch.read() == []


def test_deployed_modules_and_images(device):
    conditions = here(str(device), 1, 3, "bfloat16", "channels_last")
    module = deployed(nn.Conv2d(2, 4, 3), conditions, device)
    x = images((2, 8, 8), conditions, device, torch.Generator().manual_seed(0))
    assert x.shape == (3, 2, 8, 8) and x.dtype == module.weight.dtype == torch.bfloat16
    assert module.weight.is_contiguous(memory_format=torch.channels_last)
    assert not module.training and not module.weight.requires_grad
    assert x.device.type == module.weight.device.type == device.type


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_measure_command(folder, capsys):
    assert main(["latency", "measure", *TINY, *FEW]) == 0
    found = LatencyTable.load("latency.json")
    assert found.shape == SHAPE and found.procedure.repeats == 2
    out, err = capsys.readouterr()
    assert f"{len(KEYS)} blocks of darts" in out
    assert "fastnas latency check --calibrate --seed 0 --table latency.json" in out
    assert f"timing: {2 * len(KEYS)} of {2 * len(KEYS)} calls" in err

    assert main(["latency", "measure", *TINY, *FEW]) == 2
    assert "already exists" in capsys.readouterr().err
    # What is not said comes from the file.
    assert main(["latency", "measure", "--resume", "--repeats", "3"]) == 0
    assert {len(t.samples) for t in LatencyTable.load("latency.json").blocks.values()} == {3}


def test_interrupted_command(folder, capsys, monkeypatch):
    class Stop(FakeWatch):
        def time(self, call):
            super().time(call)
            if len(self.calls) == 3:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(FakeWatch, "calls", [])
    monkeypatch.setattr(measure, "stopwatch", Stop)
    assert main(["latency", "measure", *TINY, *FEW, "--out", "a.json"]) == 130
    assert "continue with: fastnas latency measure --resume --out a.json" in capsys.readouterr().err
    assert main(["latency", "measure", "--resume", "--out", "a.json"]) == 0
    LatencyTable.load("a.json").check_complete("a.json")


def test_images_decide_the_shape_unless_options_do(folder, watch):
    words = ["latency", "measure", "--data", "fashion-mnist-mini", "--C", "2", "--layers", "3"]
    assert main([*words, "--num-classes", "7", *FEW, "--out", "a.json"]) == 0
    shape = LatencyTable.load("a.json").shape
    assert shape == DartsShape(image_size=28, in_channels=1, num_classes=7, C=2, layers=3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mesure"], "expected measure or check, but got 'mesure'"),
        (["measure", "--space", "nowhere"], "space: unknown name 'nowhere'"),
        (["measure", "--image-size", "30"], "cannot be halved"),
        (["measure", "--data", "mnist"], "unknown specification 'mnist'"),
        (["measure", "--resume", "--out", "no.json"], "no.json: no such file"),
        (["check", "--table", "no.json"], "no.json: no such file"),
    ],
)
def test_mistakes_get_a_sentence(words, message, folder, capsys):
    assert main(["latency", *words]) == 2
    out, err = capsys.readouterr()
    assert message in " ".join(err.split()) and not out
    assert not list(folder.iterdir())


def test_help(capsys):
    assert main(["latency"]) == 0
    assert "measure" in capsys.readouterr().out
    assert main(["latency", "measure", "--help"]) == 0
    out = capsys.readouterr().out
    for option in ("--space", "--threads", "--data", "--image-size", "--layers", "--resume"):
        assert option in out
    assert main(["--help"]) == 0
    assert "latency" in capsys.readouterr().out


def test_a_table_is_json_that_anybody_can_read(folder, watch):
    Measurement(config(out="a.json")).run()
    data = json.loads((folder / "a.json").read_text())
    assert data["format"] == "fastnas.latency" and data["version"] == 1
    assert set(data["conditions"]) >= {"machine", "threads", "batch", "dtype", "torch"}
    assert data["blocks"][KEYS[0]]["ms"] > 0
