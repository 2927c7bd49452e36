# SPDX-License-Identifier: Apache-2.0
"""`fastnas bench`: what it measures, what it leaves out and says so, and how it is stopped."""

from __future__ import annotations

import io
import json
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from fastnas.bench import forms, session
from fastnas.bench.config import BenchConfig, parse_bytes
from fastnas.bench.forms import Form, LeftOut, compiled, make_forms, make_scene
from fastnas.bench.machine import Machine
from fastnas.bench.work import step_work
from fastnas.cli import main
from fastnas.cli.bench import show

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SMALL = {"channels": 8, "layers": 3, "batch_size": 4, "image_size": 16, "seconds": 0.0}
WORDS = ["bench", "--device", "cpu"]
WORDS += [w for k, v in SMALL.items() for w in (f"--{k.replace('_', '-')}", str(v))]


@pytest.fixture(autouse=True)
def _machine(monkeypatch):
    """Facts of a machine at once: measuring them takes seconds."""
    facts = dict.fromkeys(("name", "torch", "fastnas", "cpu_capability", "python", "date"), "x")
    machine = Machine(
        **facts, device="cpu", threads=2, load_average=0.0, copy_bandwidth=1e10, gemm_rate=1e10
    )
    monkeypatch.setattr(session, "describe_machine", lambda device, load: machine)


def test_table_and_json(tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert main([*WORDS, "--json", str(path), "--memory-limit", "8GB"]) == 0
    text = capsys.readouterr().out
    found = json.loads(path.read_text())
    assert found["finished"] and found["memory_limit"] == 8 * 10**9
    assert set(found["methods"]) == {"darts", "pc_darts"}
    for name, figures in found["methods"].items():
        stock = {form for form in figures["forms"] if form.startswith("stock")}
        ours = set(figures["forms"]) - stock
        assert stock == {"stock, contiguous", "stock, channels_last"}, name
        assert {form.rpartition(", ")[0] for form in ours} == {"fastnas", "fastnas, low memory"}
        assert len(ours) == 2 and figures["best_stock"] in stock
        assert figures["left_out"] == {"stock, torch.compile": "no seconds were given to it"}
        for form, values in figures["forms"].items():
            assert form in text
            assert len(values["seconds"]) == 3
            assert 0 < values["share_of_floor"]
            saved = values["saved_bytes"]
            assert saved > 0
            if form in ours:
                assert saved < min(figures["forms"][s]["saved_bytes"] for s in stock)
    assert "Largest batch: in 8.00 GB, estimated from the peak." in text
    assert text.count("Not measured: stock, torch.compile: no seconds were given to it.") == 2


def test_ctrl_c_leaves_the_table(tmp_path, capsys, monkeypatch):
    calls, step = [], Form.step

    def interrupted(self):
        calls.append(self.name)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Form, "step", interrupted)
    assert main([*WORDS, "--json", str(tmp_path / "b.json"), "--method", "darts"]) == 130
    output = capsys.readouterr()
    assert "Stopped: this is what was measured until then." in output.out
    assert "stock, contiguous" in output.out
    found = json.loads((tmp_path / "b.json").read_text())
    assert not found["finished"]
    seconds = found["methods"]["darts"]["forms"]["stock, contiguous"]["seconds"]
    assert len(seconds) == 1


@pytest.mark.parametrize("terminal", [False, True])
def test_no_figure_is_cut(terminal):
    names = ["stock, channels_last", "fastnas, low memory, channels_last"]
    measured = [
        SimpleNamespace(name=n, stock=n.startswith("stock"), peak=9.63e9, saved=803.4e6)
        for n in names
    ]
    seconds = dict(zip(names, (13.6, 2.2), strict=True))
    times = SimpleNamespace(rounds=3, seconds=seconds, median=seconds.__getitem__)
    comparison = SimpleNamespace(
        method="darts", batch_size=64, times=times, measured=lambda: measured,
        best_stock=lambda: measured[0], left_out={},
    )  # fmt: skip
    run = SimpleNamespace(
        machine=session.describe_machine(CPU, 0.0), config=BenchConfig(), finished=True,
        comparisons=[comparison], memory_limit=None, largest_batch=lambda c, f: 1049,
        share_of_floor=lambda c, f: 0.55,
    )  # fmt: skip
    stream = io.StringIO()
    show(run, Console(file=stream, width=80, force_terminal=terminal, color_system=None))
    text = stream.getvalue()
    for figure in ("13600 ms", "2200 ms", "1.00x", "6.18x", "9.63 GB", "803.4 MB", "1049", "55%"):
        assert figure in text
    assert terminal or all(name in text for name in names)


def test_sigterm_before_anything_is_measured(capsys, monkeypatch):
    def ended(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Form, "first_step", ended)
    assert main([*WORDS, "--method", "darts"]) == 128 + signal.SIGTERM
    output = capsys.readouterr()
    assert "Stopped before anything was measured.\nstopped by SIGTERM\n" in output.err
    assert "stock, contiguous, memory (1 of 6 forms)" in output.err
    assert output.out == ""
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("name", ["darts", "pc_darts"])
def test_all_forms_have_the_same_numbers(name):
    scene = make_scene(name, BenchConfig(**SMALL), CPU)
    found = [form.first_step() for form in make_forms(scene, BenchConfig(**SMALL))]
    assert len(found) == 6
    assert len(found[0]) == (3 if name == "darts" else 5)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-4)


def test_a_form_with_other_results_is_left_out(capsys, monkeypatch):
    first = Form.first_step

    def wrong(self):
        return [x * 1.2 if not self.stock else x for x in first(self)]

    monkeypatch.setattr(Form, "first_step", wrong)
    assert main([*WORDS, "--method", "pc_darts"]) == 0
    text = capsys.readouterr().out
    assert "Not measured: fastnas, contiguous: its results are off the plain formula's by" in text


def test_nan_among_the_results_is_left_out(capsys, monkeypatch):
    first = Form.first_step

    def spoiled(self):
        return [x * float("nan") if k and not self.stock else x for k, x in enumerate(first(self))]

    monkeypatch.setattr(Form, "first_step", spoiled)
    assert main([*WORDS, "--method", "pc_darts"]) == 0
    assert "Not measured: fastnas, contiguous: its results are off" in capsys.readouterr().out


def test_the_compiler_is_stopped_when_its_time_is_up(monkeypatch):
    monkeypatch.setattr(forms.Form, "step", lambda self: time.sleep(30))
    config = BenchConfig(**SMALL)
    with pytest.raises(LeftOut, match="it was not ready after 0 s; with a larger --seconds"):
        compiled(make_scene("darts", config, CPU), config, 0.2)


def test_no_import_is_cut_in_two(monkeypatch, tmp_path):
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(0.5)\nREADY = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    begun = time.perf_counter()
    with pytest.raises(forms._Expired), forms._limited(0.1):
        import slow_to_import

        time.sleep(30)
    assert slow_to_import.READY and time.perf_counter() - begun < 10


def test_work_grows_with_images_and_shrinks_with_partial_channels():
    darts = step_work(16, 8, 1, 64, 32)
    assert step_work(16, 8, 1, 128, 32) == (2 * darts.bytes, 2 * darts.flops)
    assert darts.flops == pytest.approx(6 * 64 * 0.300e9, rel=0.02)  # multiply-adds an image
    partial = step_work(16, 8, 4, 64, 32)
    assert partial.flops == pytest.approx(6 * 64 * 0.0566e9, rel=0.02)
    assert 0.25 * darts.bytes < partial.bytes < 0.6 * darts.bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8 * 10**9), ("512 MiB", 2**29), ("1.5g", 15 * 10**8), ("1e9", 10**9), ("7B", 7)],
)
def test_amounts_of_memory(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "8XB", "0", "1e40GB", "8iB"])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(ValueError, match="memory_limit: expected an amount such as 8GB"):
        BenchConfig(memory_limit=text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--channels", "0"], "channels: expected at least 1, but got 0"),
        (["--batch-size", "1"], "batch_size: expected at least 2 for BatchNorm"),
        (["--layers", "2"], "layers must be at least 3"),
        (["--json", "/nowhere/x.json"], "json: there is no folder /nowhere"),
        (["--device", "abacus"], "device: expected auto or cpu"),
        (["--channels", "6", "--method", "pc_darts"], "C must be a multiple of partial_channels"),
    ],
)
def test_mistakes_are_named(words, message, capsys):
    assert main(["bench", "--seconds", "0", *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
