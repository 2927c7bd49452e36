# SPDX-License-Identifier: Apache-2.0
"""However a command ends, it ends in one sentence and a code that a shell can use."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from search_tiny import config as search_config
from search_tiny import images, registered
from test_evaluate_train import config as eval_config

import fastnas_command
from fastnas import cli
from fastnas.cli import main
from fastnas.evaluate import Evaluation
from fastnas.search import Progress, Search


@pytest.fixture(autouse=True, scope="module")
def _space() -> object:
    with registered():
        yield


def shell(words: str, **environment: str) -> tuple[int, str]:
    """Run words of a shell, ``fastnas`` being the installed command; its code and its errors."""
    python = sys.executable
    command = f"{python} -c 'import sys, fastnas_command as c; sys.exit(c.main())'"
    path = os.pathsep.join(sys.path)
    process = subprocess.run(
        ["bash", "-c", f'fastnas() {{ {command} "$@"; }}; {words}'],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return process.returncode, process.stderr


# --- what a run or an environment brings -----------------------------------------------------


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (MemoryError(), "there is not enough memory; try a smaller --batch-size"),
        (torch.OutOfMemoryError("CUDA out of memory.\nMore"), "CUDA out of memory.)"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            "--image-size ([enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes)",
        ),
        (
            ValueError("Expected more than 1 value per channel when training, got [1, 4, 1, 1]"),
            "batch_size: one image is too little for BatchNorm here, take more (Expected",
        ),
        (PermissionError(13, "Permission denied", "x/config.json"), "x/config.json: Permission"),
        (BlockingIOError("runs/demo: another process is"), "runs/demo: another process is\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_of_the_environment(monkeypatch, capsys, error, sentence):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("fastnas.cli.search.Search", fail)
    assert main(["search"]) == 2
    captured = capsys.readouterr().err
    assert sentence in captured
    assert captured.count("\n") == 1


def test_other_errors_are_bugs_and_show_their_traceback(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("an assertion failed")

    monkeypatch.setattr("fastnas.cli.search.Search", fail)
    with pytest.raises(RuntimeError, match="an assertion failed"):
        main(["search"])


def _run_instead(monkeypatch, run):
    class Instead:
        def __init__(self, *args, **kwargs):
            pass

        def run(self):
            run()

    monkeypatch.setattr("fastnas.cli.search.Search", Instead)


def test_a_loss_that_is_not_finite(monkeypatch, capsys):
    settings = search_config(lr=1e30, grad_clip=0.0)
    search = Search(settings, data=images(), progress=Progress())
    _run_instead(monkeypatch, search.run)
    assert main(["search"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("the loss of the weights became ")
    assert error.count("\n") == 1


def test_a_run_of_the_other_command(tmp_path, capsys):
    run = Search(search_config(epochs=1, out=str(tmp_path / "s")), data=images()).run()
    Evaluation(eval_config(epochs=1, out=str(tmp_path / "e")), data=images(size=16)).run()
    capsys.readouterr()
    for command, folder, other in (("search", "e", "eval"), ("eval", "s", "search")):
        path = run.path.parent / folder
        assert main([command, "--resume", "--out", str(path)]) == 2
        assert capsys.readouterr().err == (
            f"{path} holds a run of fastnas {other}: "
            f"continue it with: fastnas {other} --resume --out {path}\n"
        )


def test_gap_of_an_evaluation(tmp_path, capsys):
    out = tmp_path / "e"
    Evaluation(eval_config(epochs=1, out=str(out)), data=images(size=16)).run()
    capsys.readouterr()
    assert main(["gap", str(out)]) == 2
    assert capsys.readouterr().err == (
        f"{out} holds a run of fastnas eval: the supernet of a search is tested\n"
    )


def test_a_search_on_datasets_is_not_evaluated_on_other_images(tmp_path, capsys):
    """It would be, on those that a search without --data takes."""
    out = str(tmp_path / "s")
    Search(search_config(epochs=1, out=out), data=images()).run()
    assert json.loads((tmp_path / "s" / "config.json").read_text())["data"] == images().name
    assert f" on {images().name}, " in capsys.readouterr().out
    for command in (["eval", out], ["gap", out], ["search", "--resume", "--out", out]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert f"unknown specification {images().name!r}" in error and "same `data=`" in error


# --- standard output and error ---------------------------------------------------------------


@pytest.mark.parametrize("words", ["genotypes", "--help", "search --help"])
def test_a_reader_that_has_seen_enough(monkeypatch, capsys, words):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            raise BrokenPipeError

        def fileno(self):
            raise io.UnsupportedOperation

    monkeypatch.setattr(sys, "stdout", Closed())
    assert main(words.split()) == 141
    assert capsys.readouterr().err == ""


def test_streams_of_a_shell():
    """Closed, full and narrow-minded streams: what a process really meets."""
    code, error = shell(
        "set -e; cd $(mktemp -d); export PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 LC_ALL=C;"
        # Closed: nothing to say it on, but it works.
        "fastnas search --help >&- 2>&- ; set +e;"
        # Full: told, and once only.
        "fastnas genotypes >/dev/full; echo full $? >&2;"
        # ASCII: what it cannot show is escaped.
        "fastnas genotypes é >/dev/null; echo ascii $? >&2;"
        # No reader: the flush at the end fails, in silence.
        "fastnas genotypes | true; echo pipe ${PIPESTATUS[0]} >&2"
    )
    assert code == 0, error
    lines = error.splitlines()
    assert lines[:2] == ["No space left on device", "full 2"]
    assert "none of these" in lines[2]
    assert lines[3] == "ascii 2"
    assert lines[4] in ("pipe 141", "pipe 0")  # it may have been quicker than the reader
    assert len(lines) == 5, error


def test_text_that_the_streams_cannot_encode(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["--help"]) == 0
    print("läuft \udcff", end="", flush=True)
    assert stream.buffer.getvalue().endswith(rb"l\xe4uft \udcff")


# --- Ctrl-C ----------------------------------------------------------------------------------


def test_an_interrupt_while_a_command_is_imported(monkeypatch, capsys):
    """Held back: numpy, for one, swallows a KeyboardInterrupt in the middle of its import."""
    imported = []

    def load(name):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            pytest.fail("it came in the middle")
        imported.append(name)

    monkeypatch.setattr(cli, "import_module", load)
    assert main(["search"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert imported == ["fastnas.cli.search"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_while_pytorch_is_imported(tmp_path):
    (tmp_path / "torch.py").write_text(
        "print('importing', flush=True)\nimport time\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    pass\n"
    )
    code = "import sys, fastnas_command as c; sys.exit(c.main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "search"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "importing\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "interrupted\n")


def test_kernels_that_do_not_load_are_told_without_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch is\\n broken')\n")
    code, error = shell("fastnas search", PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    assert (code, error) == (2, "torch is broken\n")


def test_a_second_interrupt_while_the_first_is_told(monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", interrupt)
    before = signal.getsignal(signal.SIGINT)
    try:
        assert fastnas_command.main() == 130
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # nothing is left to interrupt
    finally:
        signal.signal(signal.SIGINT, before)


# --- python -m fastnas -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "first"),
    [([], "fastnas "), (["genotypes"], "DARTS_V1"), (["--help"], "usage: fastnas COMMAND")],
)
def test_module_is_the_command(monkeypatch, capsys, words, first):
    from fastnas import __main__ as module

    monkeypatch.setattr(sys, "argv", ["fastnas", *words])
    assert module._command() == 0
    assert capsys.readouterr().out.startswith(first)


def test_it_is_what_the_distribution_installs():
    text = Path(fastnas_command.__file__).read_text()
    assert "from fastnas.cli import main" in text
    assert "import torch" not in text  # nor anything else that takes time before Ctrl-C is minded
