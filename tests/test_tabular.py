# SPDX-License-Identifier: Apache-2.0
"""benchmarks/tabular.py and benchmarks/quality.py: what they run, go on with, write and print."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import quality
import runs
import search_tiny
import tabular

from fastnas.data import sources
from fastnas.spaces.nasbench201 import PRIMITIVES, Genotype

CELLS = [str(genotype) for genotype in Genotype.all(3)]


@pytest.fixture
def trained(monkeypatch):
    """Tasks that were trained; a cell is the better the later it is, and the seed adds a little."""
    made = []

    def run(tasks, workers):
        assert workers == 2
        for cell, seed in tasks:
            made.append((cell, seed))
            accuracy = (CELLS.index(cell) + 0.1 * seed) / 200
            yield {"cell": cell, "seed": seed, "accuracy": accuracy, "parameters": 7, "macs": 8}

    monkeypatch.setattr(tabular, "run", run)
    return made


def words(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, words)])


def test_every_architecture_with_every_seed_and_none_twice(trained, tmp_path, monkeypatch, capsys):
    out, results = tmp_path / "run", tmp_path / "table.json"
    words(monkeypatch, "--out", out, "--results", results, "--seeds", 2)
    assert tabular.main() == 0
    assert trained == [(cell, seed) for seed in (0, 1) for cell in CELLS]
    table = json.loads(results.read_text())
    assert list(table["cells"]) == CELLS and table["seeds"] == [0, 1]
    assert table["cells"][CELLS[3]] == {"accuracy": [0.015, 0.0155], "parameters": 7, "macs": 8}
    assert table["recipe"]["epochs"] == tabular.RECIPE["epochs"]
    assert len(results.read_text().splitlines()) < 200  # an architecture a line
    printed = capsys.readouterr()
    assert "125 architectures, 2 seeds" in printed.out and CELLS[-1] in printed.out
    assert "seed 1, 125 of 125" in printed.err
    # Stopped while it wrote: the half line is made anew.
    log = out / "trainings.jsonl"
    log.write_bytes(log.read_bytes()[:-10])
    assert tabular.main() == 0
    assert trained[250:] == [(CELLS[-1], 1)]
    assert json.loads(results.read_text()) == table


def test_another_recipe_is_refused(trained, tmp_path, monkeypatch):
    words(monkeypatch, "--out", tmp_path, "--results", tmp_path / "table.json", "--seeds", 1)
    assert tabular.main() == 0
    monkeypatch.setitem(tabular.RECIPE, "lr", 0.2)
    with pytest.raises(ValueError, match="of another recipe"):
        tabular.main()


def test_a_training(monkeypatch):
    monkeypatch.setitem(tabular.RECIPE, "epochs", 1)
    monkeypatch.setitem(sources.__dict__, "load", None)
    monkeypatch.setattr("fastnas.evaluate.train.load", lambda *_, **__: search_tiny.images())
    record = tabular.train(tabular.Task(CELLS[31], 5))
    assert (record["cell"], record["seed"]) == (CELLS[31], 5)
    assert 0 <= record["accuracy"] <= 1 and record["parameters"] > 0 and record["macs"] > 0


def ranks() -> quality.Table:
    """The later the better, the last two alike."""
    rows = {cell: {"accuracy": [n / 200]} for n, cell in enumerate(CELLS)}
    rows[CELLS[-2]] = rows[CELLS[-1]]
    return quality.Table({"cells": rows, "seeds": [0]})


def test_percentile_and_regret():
    table = ranks()
    assert table.percentile(CELLS[0]) == 0 and table.regret(CELLS[0]) == pytest.approx(62)
    assert table.percentile(CELLS[31]) == pytest.approx(25)
    assert table.percentile(CELLS[-1]) == table.percentile(CELLS[-2]) == pytest.approx(123.5 / 1.24)
    assert table.regret(table.best) == 0
    mean = sum(map(table.percentile, CELLS)) / 125
    assert mean == pytest.approx(50)
    assert quality.counts([CELLS[93], CELLS[1]]) == "nor_conv_3x3 3, none 2, skip_connect 1"


def test_every_method_with_every_seed(tmp_path, monkeypatch, capsys):
    made = []

    def search(words, out):
        name, seed = out.name.rsplit("-", 1)
        assert words[:2] == ["--method", name.removesuffix("-none")]
        assert words[-2:] == ["--seed", seed]
        made.append((name, int(seed)))
        cell = CELLS[21 + int(seed)]
        return {"genotype": Genotype.parse(cell).to_dict(), "gap": {}}

    monkeypatch.setattr(quality, "search", search)
    content = {
        "seeds": [0],
        "cells": {cell: {"accuracy": [n / 200]} for n, cell in enumerate(CELLS)},
    }
    (tmp_path / "table.json").write_text(json.dumps(content))
    words(monkeypatch, "--out", tmp_path, "--results", tmp_path / "table.json", "--seeds", 2)
    assert quality.main() == 0
    assert made == [(name, seed) for name in quality.SEARCHES for seed in (10, 11)]
    printed = capsys.readouterr().out
    assert "| `darts` | 25.4 | 25.0 | 46.25 | 15.75 | skip_connect 5, nor_conv_1x1 1 |" in printed
    assert "| random choice, expected | 50.0 | 0.0 | 31.00 | 31.00 |" in printed
    assert "| the best | 100.0 | 100.0 | 0.00 | 62.00 |" in printed


def test_the_committed_table_is_complete():
    content = json.loads(Path(tabular.RESULTS).read_text())
    assert list(content["cells"]) == CELLS and tuple(PRIMITIVES) == PRIMITIVES
    seeds = len(content["seeds"])
    for row in content["cells"].values():
        assert len(row["accuracy"]) == seeds and all(0 < a < 1 for a in row["accuracy"])
    for key, value in tabular.recipe(0).to_dict().items():
        if key in tabular.RECIPE:
            assert content["recipe"][key] == value


def test_runs_are_those_of_the_other_benchmarks():
    assert quality.search is runs.search
