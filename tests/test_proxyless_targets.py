# SPDX-License-Identifier: Apache-2.0
"""benchmarks/proxyless_targets.py: what it runs, what it goes on with, what it prints."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path

import proxyless_targets
import pytest
import runs

from fastnas.latency import LatencyTable
from fastnas.latency.conditions import here
from fastnas.latency.cost import latency_cost
from fastnas.latency.table import BlockTime, Calibration, Procedure, block_rules
from fastnas.spaces import SPACES, mbconv

SHAPE = mbconv.MBConvShape(**vars(SPACES["mbconv"].presets["demo"]["network"]))


def table() -> LatencyTable:
    """A table of this machine by which each block takes as long as its key."""
    blocks = block_rules("mbconv").plan(SHAPE).blocks
    times = {key: BlockTime.of([len(key) / 100] * 2) for key in blocks}
    conditions = here("cpu", 1, 1, "float32", "channels_last")
    return LatencyTable("mbconv", SHAPE, conditions, Procedure(0, 2, 0), "2026-11-28", times)


@pytest.fixture
def calls(monkeypatch):
    """Commands that were run; each leaves what the real one leaves."""
    made = []

    def run(command, check, stdout):
        assert command[:3] == [sys.executable, "-m", "fastnas"] and check
        words = command[3:]
        made.append(words)
        if words[:2] == ["latency", "measure"]:
            table().save(Path(words[words.index("--out") + 1]))
        elif words[0] == "latency":
            path = Path(words[-1])
            calibration = Calibration(1.0, 50, 0, "2026-11-28")
            dataclasses.replace(LatencyTable.load(path), calibration=calibration).save(path)
        elif words[0] == "search":
            out = Path(words[words.index("--out") + 1])
            out.mkdir()
            ops = [p.candidates[-1] for p in SHAPE.widths.places]
            (out / "genotype.json").write_text(mbconv.Genotype.build(SHAPE.widths, ops).to_json())
            record = {"gap": {"supernet": 1.0}, "latency": {"derived": 1.25}}
            (out / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        else:
            out = Path(words[1]) / "eval"
            out.mkdir()
            result = {"parameters": 1234, "macs": 5678901, "accuracy": 0.875}
            (out / "result.json").write_text(json.dumps(result))

    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setattr(proxyless_targets, "timed", lambda table, found: [1.5] * len(found))
    return made


def test_everything_once(calls, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["proxyless_targets.py", "--out", str(tmp_path)])
    assert proxyless_targets.main() == 0
    largest = latency_cost(LatencyTable.load(tmp_path / "latency.json"))
    largest = largest.fixed + sum(v.amax(dim=1).sum().item() for v in largest.values.values())
    wanted = [f"latency={share * largest:.3f}ms" for share in (0.4, 0.6, 0.8)]
    assert [words[0] for words in calls] == ["latency"] * 2 + ["search"] * 3 + ["eval"] * 3
    assert [w[w.index("--target") + 1] for w in calls if w[0] == "search"] == wanted
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [re.search(r"`(.+)`", line)[1] for line in lines] == wanted
    assert lines[0].endswith("| 1.250 ms | 1.500 ms | 3 | 1,234 | 5,678,901 | 87.5 % |")
    assert proxyless_targets.main() == 0
    assert capsys.readouterr().out.splitlines()[2:] == lines and len(calls) == 8


def test_what_was_begun_is_finished(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(runs, "fastnas", lambda *words: made.append(words))
    run = tmp_path / "run"
    (run / "eval").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    (run / "metrics.jsonl").write_text(json.dumps({"gap": None}) + "\n")
    runs.search(["--method", "darts"], run)
    assert made.pop() == ("search", "--out", str(run), "--resume")
    (run / "eval" / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError):  # as the command left nothing
        runs.evaluate(run)
    assert made.pop() == ("eval", "--resume", "--out", str(run / "eval"))
    table().save(path := tmp_path / "latency.json")
    half = json.loads(path.read_text())
    half["procedure"]["repeats"] = 3
    path.write_text(json.dumps(half))
    monkeypatch.setattr(proxyless_targets, "fastnas", runs.fastnas)
    proxyless_targets.measured_table(tmp_path, 2)
    assert made[0] == ("latency", "measure", "--resume", "--out", str(path))
