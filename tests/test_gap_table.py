# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gap_table.py: what it runs, what it goes on with, what it prints."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gap_table.py"


@pytest.fixture
def calls(monkeypatch):
    """Commands that were run; each leaves a gap that follows from method and seed."""
    made = []

    def run(command, check, stdout):
        made.append(command)
        out = Path(command[command.index("--out") + 1])
        method, _, seed = out.name.rpartition("-")
        out.mkdir(exist_ok=True)
        (out / "config.json").write_text("{}")
        pruned = 60.0 + len(method) + int(seed)
        gap = {"supernet": 80.0, "pruned": pruned, "pruned_bn": 79.0}
        (out / "metrics.jsonl").write_text(
            json.dumps({"gap": None}) + "\n" + json.dumps({"gap": gap})
        )

    monkeypatch.setattr("subprocess.run", run)
    return made


def table(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return ended.value.code, capsys.readouterr()


def test_every_method_with_every_seed_and_none_twice(calls, tmp_path, monkeypatch, capsys):
    code, printed = table(monkeypatch, capsys, "--out", str(tmp_path), "--seeds", "3")
    assert code == 0 and len(calls) == 21
    assert sorted({c[c.index("--seed") + 1] for c in calls}) == ["0", "1", "2"]
    darts = next(line for line in printed.out.splitlines() if "`--method darts`" in line)
    assert darts == (
        "| `--method darts` | 80.0 ± 0.0 | 66.0 ± 1.0 | 79.0 ± 0.0 | 14.0 ± 1.0 | 1.0 ± 0.0 |"
    )
    assert table(monkeypatch, capsys, "--out", str(tmp_path))[1].out == printed.out
    assert len(calls) == 21
    (tmp_path / "darts-1" / "metrics.jsonl").unlink()  # stopped before its first epoch had ended
    table(monkeypatch, capsys, "--out", str(tmp_path))
    assert calls[-1][-1] == "--resume" and len(calls) == 22


def test_one_seed_has_no_deviation(calls, monkeypatch, capsys):
    code, printed = table(monkeypatch, capsys, "--seeds", "1")
    assert code == 2 and "at least 2" in printed.err and not calls
