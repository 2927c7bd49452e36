# SPDX-License-Identifier: Apache-2.0
"""What a search tells while it runs."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
import torch
from search_tiny import Recorder, config, images, registered, run

from fastnas.search import (
    Search,
    StepReport,
    TextProgress,
)
from fastnas.search.meters import Meter, Pace
from fastnas.search.progress import Lines


@pytest.fixture(autouse=True, scope="module")
def _space() -> object:
    with registered():
        yield


pytestmark = pytest.mark.usefixtures("one_thread")


def test_time_left_of_a_search_that_is_all_warm_up() -> None:
    # The recorder finds that no time left is negative.
    run(config(epochs=2, arch_warmup_epochs=5, validate="never"), progress=Recorder())


def test_progress() -> None:
    recorder = Recorder()
    run(config(log_every=2, validate="last"), progress=recorder)
    assert recorder.events == [
        *("start 0.0", "train 1/2 2/3", "train 1/2 3/3", "epoch 1"),
        *("train 2/2 2/3", "train 2/2 3/3", "validation 2/2 2/3", "validation 2/2 3/3"),
        *("epoch 2", "end"),
    ]


def test_lines_of_text() -> None:
    stream = io.StringIO()
    search = Search(config(gap=False), data=images(), progress=TextProgress(stream))
    result = search.run()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "search: tiny by darts on tiny, cpu"
    assert lines[1].startswith("epoch 1, loss ")
    assert "validation accuracy" in lines[2]
    assert lines[-1] == str(result.genotype)
    assert [line for line in lines[3:-1] if not line.startswith("warning: ")] == []


def test_lines_tell_the_time_that_is_left() -> None:
    stream = io.StringIO()
    run(config(gap=False), progress=TextProgress(stream))
    _, first, last, *_ = stream.getvalue().splitlines()
    assert re.search(r", \d+\.\d s, \d+:\d\d left$", first)
    assert last.endswith(" s")


def test_long_epochs_get_a_line_now_and_then() -> None:
    stream = io.StringIO()
    lines = Lines(stream, every=60.0)
    report = StepReport("train", 2, 50, 10, 390, 1.25, 0.5, None, 0.1, 3723.4)
    lines.step(report)
    assert stream.getvalue() == ""
    lines = Lines(stream, every=0.0)
    lines.step(report)
    lines.step(replace(report, phase="validation", loss=None, seconds_left=None))
    assert stream.getvalue().splitlines() == [
        "epoch 2/50, step 10/390, loss 1.2500, accuracy 50.0%, 1:02:03 left",
        "epoch 2/50, test step 10/390",
    ]


def test_pace() -> None:
    pace = Pace()
    assert pace.seconds(3, 3) is None
    pace.add(False, 1.0)
    assert pace.seconds(2, 3) == 2 + 6
    pace.add(True, 5.0)
    pace.add(True, 3.0)
    assert pace.seconds(2, 3) == 2 + 12
    only = Pace()
    only.add(True, 4.0)
    assert only.seconds(1, 1) == 6


def test_meter_remembers_the_first_bad_loss() -> None:
    from fastnas.methods import Outcome

    meter = Meter(torch.device("cpu"))
    for step, loss in enumerate([1.0, float("inf"), float("nan"), 2.0], 1):
        meter.add(Outcome(torch.tensor(loss), torch.tensor(3), 4), step)
    assert meter.bad == (2, float("inf"))
    assert meter.loss is None
    assert meter.accuracy == 0.75
    meter.reset()
    assert meter.bad is None
    assert meter.accuracy is None
