# SPDX-License-Identifier: Apache-2.0
"""What a search tells while it runs."""

from __future__ import annotations

import io
import itertools
import re
from dataclasses import replace

import pytest
import torch
from search_tiny import Recorder, config, images, registered, run

from fastnas.search import (
    Progress,
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


@pytest.mark.parametrize("gap", [False, True])
def test_lines_tell_the_time_that_is_left(gap: bool) -> None:
    stream = io.StringIO()
    run(config(gap=gap), progress=TextProgress(stream))
    _, first, last, *_ = stream.getvalue().splitlines()
    assert re.search(r", \d+\.\d s, \d+:\d\d left$", first)
    assert last.endswith(" s")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"batch_size": 64}, ["48 for the weights", "48 for the architecture"]),
        ({"batch_size": 40, "weight_share": 0.4}, ["38 for the weights"]),
        ({"batch_size": 48}, []),
    ],
)
def test_batches_of_fewer_images_than_asked_for(fields: dict[str, object], told: list[str]) -> None:
    notes: list[str] = []
    progress = Progress()
    progress.note = notes.append
    run(config(epochs=1, validate="never", gap=False, **fields), progress=progress)
    asked = f"instead of {fields['batch_size']} for the"
    assert notes == [
        f"batch size: {part.replace('for the', asked)}, since there are no more images"
        for part in told
    ]


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
    pace.add("test", 9.0)
    assert pace.seconds(plain=3, architecture=3, test=3) is None
    pace.add("plain", 1.0)
    assert pace.seconds(plain=2, architecture=3) == 2 + 6
    pace.add("architecture", 5.0)
    pace.add("architecture", 3.0)
    assert pace.seconds(plain=2, architecture=3) == 2 + 12
    only = Pace()
    only.add("architecture", 4.0)
    assert only.seconds(plain=1, architecture=1, test=5, hessian=5) == 6
    only.add("test", 2.0)
    only.add("test", 1.0, 0)
    only.add("hessian", 10.0)
    assert only.seconds(plain=1, architecture=1, test=5, hessian=2) == 6 + 15 + 20


# Three iterations an epoch, and tests of three batches; new statistics for the gap take three.
@pytest.mark.parametrize(
    ("fields", "tests", "hessians"),
    [
        ({"validate": "every", "gap": False}, 4 * 3, 0),
        ({"validate": "every"}, 4 * 3 + 2 * 3 + 3, 0),
        ({"validate": "last"}, 3 + 2 * 3 + 3, 0),
        ({"validate": "last", "val_batches": 1}, 1 + 2 + 3, 0),
        ({"validate": "never"}, 3 * 3 + 3, 0),
        ({"validate": "never", "gap": False, "hessian_every": 3}, 0, 1),
        ({"validate": "every", "gap": False, "hessian_every": 1}, 4 * 3, 4),
    ],
)
def test_time_left_counts_the_ends_of_epochs(fields, tests, hessians) -> None:
    search = Search(config(epochs=4, **fields), data=images(), progress=Progress())
    assert search.seconds_left is None
    search.pace.add("architecture", 1.0)
    assert search.seconds_left == 12
    search.pace.add("test", 100.0)
    search.pace.add("hessian", 10000.0)
    assert search.seconds_left == 12 + 100 * tests + 10000 * hessians
    # In the second epoch of the four, one iteration done.
    search.epoch, search.step = 1, 1
    tests -= 3 if fields["validate"] == "every" else 0
    hessians -= fields.get("hessian_every") == 1
    assert search.seconds_left == 8 + 100 * tests + 10000 * hessians


class Left(Progress):
    """What is left to do, each time that a search says something."""

    def start(self, search: Search) -> None:
        self.search, self.seconds = search, []

    def step(self, report: StepReport) -> None:
        self.seconds.append((report.phase, report.seconds_left))

    def epoch(self, record: object, genotype: object) -> None:
        self.seconds.append(("epoch", self.search.seconds_left))


def test_ends_of_epochs_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is a second later, so that every batch takes one."""
    seconds = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(seconds)))
    left = Left()
    run(config(epochs=2, hessian_every=1, log_every=3, gap=False), progress=left)
    trained, tested, over = left.seconds[0::3], left.seconds[1::3], left.seconds[2::3]
    # At first an epoch of three iterations is left, then its test and its Hessian as well.
    assert trained == [("train", 3.0), ("train", 5.0)]
    assert tested == [("validation", 6.0), ("validation", 1.0)]
    assert over == [("epoch", 8.0), ("epoch", 0.0)]


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
