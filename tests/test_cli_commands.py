# SPDX-License-Identifier: Apache-2.0
"""The command ``fastnas`` as its users meet it: output, files, mistakes, Ctrl-C."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from search_tiny import config as search_config
from search_tiny import images, registered
from test_evaluate_train import config as eval_config

import fastnas
from fastnas.cli import main
from fastnas.cli.progress import evaluation_progress, search_progress
from fastnas.evaluate import Evaluation
from fastnas.search import Search
from fastnas.spaces import SPACES
from fastnas.spaces.darts import GENOTYPES, Genotype

TINY = ["--epochs", "2", "--C", "4", "--layers", "3", "--batch-size", "16", "--threads", "1"]


@pytest.fixture(autouse=True, scope="module")
def _space() -> object:
    with registered():
        yield


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder, with small images in the folder ``images``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    data = images(64, size=16)
    for part, x, y in (
        ("train", data.train_images, data.train_labels),
        ("t10k", data.test_images, data.test_labels),
    ):
        n, _, height, width = x.shape
        _write_idx(f"images/{part}-images-idx3-ubyte", (n, height, width), x.numpy().tobytes())
        _write_idx(f"images/{part}-labels-idx1-ubyte", (n,), bytes(y.tolist()))
    return tmp_path


def _write_idx(path: str, shape: tuple[int, ...], content: bytes) -> None:
    header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
    Path(f"{path}.gz").write_bytes(gzip.compress(header + content))


# The tiny images have four of the ten classes, which a split in order would refuse.
SEARCH = ["search", "--data", "fashion-mnist:images", "--split", "random", *TINY]
EVAL = ["eval", "--data", "fashion-mnist:images", *TINY]


@pytest.mark.parametrize("words", [["--derive", "pairs"], ["--norm", "node", "--beta-init", "-1"]])
def test_engine_and_transit_cells(folder, capsys, words):
    method = "entrannas" if "--derive" in words else "entrannas_dst"
    assert main([*SEARCH, "--method", method, "--engine-cells", "0,1", *words]) == 0
    assert main(["gap", "runs/demo", "--json"]) == 0
    assert '"pruned_bn"' in capsys.readouterr().out.splitlines()[-1]
    found = json.loads(Path("runs/demo/genotype.json").read_text())
    assert found["version"] == (1 if method == "entrannas" else 2)
    assert main([*EVAL, "--no-auxiliary"]) == 0
    assert json.loads(Path("runs/demo/eval/result.json").read_text())["epochs"] == 2
    again = [*SEARCH, "--method", method, "--out", "runs/other", "--engine-cells", "0,3"]
    assert main(again) == 2
    assert "engine_cells: wanted different numbers from 0 to 2" in capsys.readouterr().err


def test_search_and_eval(folder, capsys):
    assert main(SEARCH) == 0
    out = capsys.readouterr().out
    assert "Train it with: fastnas eval runs/demo" in out
    assert out.count("\nepoch ") == 2
    found = {p.name for p in Path("runs/demo").iterdir()}
    assert found == {"checkpoint.pt", "config.json", "genotype.json", "metrics.jsonl"}

    assert main(EVAL) == 0
    out, error = capsys.readouterr()
    assert error == ""
    assert "\ntest accuracy: " in out
    assert "\nparameters: " in out
    assert "\nMACs per image: " in out
    result = json.loads(Path("runs/demo/eval/result.json").read_text())
    assert result["genotype"] == json.loads(Path("runs/demo/genotype.json").read_text())
    assert f"test accuracy: {result['accuracy']:.2%}" in out
    assert "fastnas export runs/demo/eval" in out

    assert main(["export"]) == 0
    assert "runs/demo/eval/network.pt2" in capsys.readouterr().out
    assert Path("runs/demo/eval/network.pt2").is_file()


def test_eval_of_an_unfinished_search_says_so(folder, capsys):
    Path("found").mkdir()
    Path("found/genotype.json").write_text(GENOTYPES["DARTS_V1"].to_json())
    Path("found/config.json").write_text(json.dumps({"epochs": 9}))
    Path("found/metrics.jsonl").write_text('{"epoch": 1}\n')
    assert main([*EVAL, "found", "--epochs", "1"]) == 0
    assert "The search in found is not over (8 epochs to go)" in capsys.readouterr().err


def test_a_run_is_never_overwritten(folder, capsys):
    for words, out in ((SEARCH, "runs/demo"), ([*EVAL, "DARTS_V1"], "runs/eval-DARTS_V1")):
        assert main(words) == 0
        before = {p: p.read_bytes() for p in Path(out).iterdir() if p.is_file()}
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error == (
            f"{out} already holds a run: continue it with --resume, "
            "or choose another folder with --out\n"
        )
        assert before == {p: p.read_bytes() for p in Path(out).iterdir() if p.is_file()}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_says_how_to_go_on(folder, capsys, number):
    words = [*EVAL, "DARTS_V1", "--epochs", "40"]
    code = "import sys; from fastnas.cli import main; sys.exit(main(sys.argv[1:]))"
    path = os.pathsep.join([str(Path(fastnas.__file__).parents[1]), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    checkpoint = Path("runs/eval-DARTS_V1/checkpoint.pt")
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number, error
    assert "go on with: fastnas eval --resume --out runs/eval-DARTS_V1" in error
    assert "Traceback" not in error

    assert main(["eval", "--resume", "--out", "runs/eval-DARTS_V1"]) == 0
    assert json.loads(Path("runs/eval-DARTS_V1/result.json").read_text())["epochs"] == 40


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["frob"],
            "expected a command (search, eval, export, gap, genotypes, latency, bench, info), "
            "but got 'frob'",
        ),
        (["search", "--preset", "big"], "preset: expected one of demo, cifar10, imagenet"),
        (
            ["search", "--method", "magic"],
            "method: unknown name 'magic', known are da2s, darts, entrannas",
        ),
        (["search", "--space", "outer"], "space: unknown name 'outer', known are darts"),
        (["search", "--epochs", "0"], "epochs: expected at least 1, but got 0"),
        (["search", "--data", "mnist"], "unknown specification 'mnist'"),
        (["search", "--data", "fashion-mnist:nowhere"], "nowhere"),
        (["search", "--device", "abacus"], "device: expected auto or cpu"),
        (["search", "--device", "meta"], "that can train here), but got 'meta'"),
        (["search", "--device", "cuda:99"], "that can train here), but got 'cuda:99'"),
        (["eval", "DARTS_V1", "--device", "meta"], "that can train here), but got 'meta'"),
        (["eval", "DARTS_V1", "--threads", "9999"], "threads: expected at most"),
        (["search", "--out", ""], "out: expected a folder, but got an empty name"),
        (["search", "--out=", "--resume"], "out: expected a folder, but got an empty name"),
        (["search", "--resume"], "runs/demo holds no run to continue"),
        (["search", "--out", "images/train-images-idx3-ubyte.gz"], "is a file: choose another"),
        (["eval"], "runs/demo: expected the folder of a search"),
        (["eval", "DARTS_V3"], "a published name (DARTS_V1, DARTS_V2, PC_DARTS_cifar"),
        (["eval", "DARTS_V1", "--resume"], "runs/eval-DARTS_V1 holds no run to continue"),
        (["eval", "DARTS_V1", "--drop-path", "1"], "drop_path: expected at least 0 and below 1"),
        (["eval", "images/train-labels-idx1-ubyte.gz"], "images/train-labels-idx1-ubyte.gz: "),
        (["genotypes", "DARTS_V3"], "a published name (DARTS_V1, DARTS_V2, PC_DARTS_cifar"),
        (["gap", "nope"], "nope: expected the folder of a search, but there is no config.json"),
        (
            ["search", "--keep", "1,2,2,3"],
            "--keep: an option of --method da2s, and this is a search by --method pc_darts",
        ),
        (
            ["search", "--method", "entrannas", "--sparsity_lambda=3"],
            "--sparsity_lambda: an option of --method entrannas_dst, and this",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_told_in_one_sentence(folder, capsys, words, message):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["search", "--epoch", "3"], "--epochs"),
        (["search", "--epochs", "many"], "--epochs"),
        (["search", "--preset"], "--preset"),
        (["eval", "a", "b"], "b"),
        (["genotypes", "DARTS_V1", "--format", "xml"], "--format"),
        (["info", "--all"], "--all"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_option_is_named(folder, capsys, words, message):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not Path("runs").exists()


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("FASTNAS_DEBUG", "1")
    with pytest.raises(ValueError, match="epochs: expected at least 1"):
        main(["search", "--epochs", "0"])


def test_interrupt_outside_a_run(monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastnas.cli.search.Search", interrupt)
    assert main(["search"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_no_space_left(monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "runs/demo/checkpoint.pt")

    monkeypatch.setattr("fastnas.cli.search.Search", full)
    assert main(["search"]) == 2
    assert capsys.readouterr().err == "runs/demo/checkpoint.pt: No space left on device\n"


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_command(words, capsys):
    assert main(words) == 0
    text = capsys.readouterr().out
    for command in ("search", "eval", "genotypes", "info"):
        assert f"\n  {command} " in text


@pytest.mark.parametrize("command", ["search", "eval", "genotypes", "info"])
def test_help_of_a_command(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"usage: fastnas {command} " in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastnas {fastnas.__version__}\n"


def test_info(capsys):
    assert main(["info"]) == 0
    assert "torch" in capsys.readouterr().out


def test_genotypes(capsys):
    assert main(["genotypes"]) == 0
    names = capsys.readouterr().out.split()
    assert names == [name for space in SPACES.values() for name in space.genotypes]
    for name in GENOTYPES:
        assert main(["genotypes", name]) == 0
        assert Genotype.from_json(capsys.readouterr().out) == GENOTYPES[name]
        assert main(["genotypes", name, "--format", "text"]) == 0
        assert Genotype.parse(capsys.readouterr().out) == GENOTYPES[name]
    assert main(["genotypes", "DARTS_V2", "--format", "table"]) == 0
    assert "skip_connect(0) + dil_conv_3x3(2)" in capsys.readouterr().out


def test_printed_genotype_can_be_trained(folder, capsys):
    assert main(["genotypes", "DARTS_V2"]) == 0
    Path("genotype.json").write_text(capsys.readouterr().out)
    assert main([*EVAL, "genotype.json", "--epochs", "1"]) == 0
    assert Path("runs/eval-genotype/result.json").is_file()


def _terminal(width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)


def _frames(screen: Console) -> list[str]:
    """What the live part of a terminal showed, one text a change."""
    text = screen.file.getvalue()
    return [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", part) for part in text.split("\x1b[2K")]


def test_search_on_a_terminal():
    screen = _terminal()
    progress = search_progress(screen)
    result = Search(search_config(), data=images(), progress=progress).run()
    text = screen.file.getvalue()
    assert re.search(r" {6}1/2 +\d+\.\d{3} +\d+\.\d%", text)
    assert " left" in text
    (op, source), *_ = result.genotype.normal
    assert f"{op}({source})" in text[text.index("What was found") :]
    assert text.endswith("\x1b[?25h") or "\x1b[?25h" in text  # the cursor is back


def test_search_on_a_narrow_terminal():
    """Epoch, time left and losses are what a user waits for: they stay; the bar gets shorter."""
    screen = _terminal(width=44)
    result = Search(search_config(), data=images(), progress=search_progress(screen)).run()
    lines = [line.rstrip() for frame in _frames(screen) for line in frame.splitlines()]
    assert any(re.match(r"epoch 2/2 \S+ +\d+% \d:\d\d left$", line) for line in lines)
    # Which steps are drawn depends on how fast they are: of training, or of testing.
    assert any(re.search(r"loss \d\.\d{3}  accuracy \d+\.\d%", line) for line in lines)
    found = "".join(lines[lines.index("What was found:") :])
    for op, source in (*result.genotype.normal, *result.genotype.reduce):
        assert f"{op}({source})" in found  # in two lines rather than cut off


def test_evaluation_on_a_terminal():
    screen = _terminal()
    progress = evaluation_progress(screen)
    result = Evaluation(eval_config(), data=images(size=16), progress=progress).run()
    text = screen.file.getvalue()
    assert re.search(r" {6}2/2 +\d+\.\d{3} +\d+\.\d%", text)
    assert f"test accuracy   {result.accuracy:.2%}" in text
    assert f"parameters      {result.parameters:,}" in text
    assert f"MACs per image  {result.macs:,}" in text


def test_terminal_is_given_back_after_a_crash():
    screen = _terminal()
    progress = evaluation_progress(screen)

    def crash(report):
        raise MemoryError

    progress.step = crash
    with pytest.raises(MemoryError):
        Evaluation(eval_config(), data=images(size=16), progress=progress).run()
    text = screen.file.getvalue()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_plain_lines_without_a_terminal(capsys):
    progress = search_progress(Console(file=io.StringIO()))
    Search(search_config(), data=images(), progress=progress).run()
    lines = capsys.readouterr().out.splitlines()
    begins = ["search:", "epoch 1", "epoch 2", "warning", "discret", "Genotyp"]
    assert [line[:7] for line in lines] == begins
    assert "\x1b" not in "".join(lines)
