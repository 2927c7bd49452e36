# SPDX-License-Identifier: Apache-2.0
"""The measurement of whole iterations, on a network and images that are small."""

from __future__ import annotations

import json

import pytest
import search_step
import torch

SMALL = ["--channels", "4", "--layers", "3", "--batch-sizes", "4", "--image-size", "8"]


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(search_step, "LEAST", 1)
    monkeypatch.setattr(search_step, "SECONDS", 0.0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_rows_of_a_cpu(tmp_path, capsys, monkeypatch):
    some = [search_step.FORMS[i] for i in (0, 3, 4, 5)]
    monkeypatch.setattr(search_step, "FORMS", some)
    before = torch.backends.cudnn.benchmark
    file = tmp_path / "rows.json"
    arguments = [*SMALL, "--methods", "pc_darts", "--device", "cpu", "--json", str(file)]
    assert search_step.main(arguments) == 1
    found = json.loads(file.read_text())["rows"]
    assert [row["form"] for row in found] == [form.name for form in some]
    left_out = [row["form"] for row in found if "left_out" in row]
    assert left_out == [form.name for form in some if form.graph]
    assert all(row["median_seconds"] > 0 for row in found if "left_out" not in row)
    assert found[0]["faster"] == 1
    said = capsys.readouterr().out
    assert "left out: cuda_graphs: expected auto or off" in said
    assert torch.backends.cudnn.benchmark == before


def test_a_form_that_computes_something_else_is_left_out():
    options = search_step.parse([*SMALL, "--device", "cpu"])
    scene = search_step.Scene("darts", options)
    form = search_step.FORMS[0]
    loss = search_step.measure(scene, form, 4, None)["loss"]
    assert search_step.measure(scene, form, 4, loss)["loss"] == loss
    with pytest.raises(search_step.LeftOut, match="its first loss is"):
        search_step.measure(scene, form, 4, loss * 1.2)


def test_time_that_is_over():
    arguments = ["--methods", "pc_darts", "--device", "cpu", "--seconds", "-1"]
    found = list(search_step.rows(search_step.parse([*SMALL, *arguments])))
    assert len(found) == len(search_step.FORMS)
    assert all("are over" in row["left_out"] for row in found)


@pytest.mark.gpu
def test_rows_of_a_gpu():
    assert search_step.main([*SMALL, "--device", "cuda"]) == 0
