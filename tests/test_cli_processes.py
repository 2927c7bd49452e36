# SPDX-License-Identifier: Apache-2.0
"""``--processes``, and torchrun: a command in several processes ends as one does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastnas.cli import main
from fastnas.cli.processes import in_processes
from fastnas.parallel import MEETING, ProcessEndedError
from fastnas.search import load_checkpoint

SEARCH = ["search", "--epochs", "2", "--batch-size", "16", "--weight-share", "0.1", "--no-gap"]
TRAIN = ["--epochs", "1", "--C", "4", "--layers", "3"]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What pip installs as the command ``fastnas``."""
    path = tmp_path_factory.mktemp("bin") / "fastnas"
    path.write_text(
        "import sys\nfrom fastnas_command import main\n"
        'if __name__ == "__main__":\n    sys.exit(main())\n'
    )
    return str(path)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300)


def test_the_words_for_each_process():
    words = ["runs/demo", "--epochs", "1", "--arch-betas", "0.5", "0.9", "--augment.flip"]
    assert in_processes(words) == (1, words)
    assert in_processes([*words[:3], "--processes", "2", *words[3:]]) == (2, words)
    assert in_processes(["--processes=3", *words]) == (3, words)


@pytest.mark.parametrize("command", ["search", "eval"])
def test_the_number_of_processes(command, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    source = ["DARTS_V1"] if command == "eval" else []
    assert main([command, *source, "--processes", "0"]) == 2
    assert capsys.readouterr().err == "processes: expected 1 or more, but got 0\n"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    assert main([command, *source, "--processes", "2"]) == 2
    assert "expected 1 under torchrun, which starts them itself, but got 2" in (
        capsys.readouterr().err
    )
    started = []
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.setattr(
        f"fastnas.cli.{'evaluate' if command == 'eval' else command}.run_in_processes",
        lambda number, words, batch_size: started.append((number, words)) or 0,
    )
    assert main([command, *source, "--processes", "2", "--epochs", "3"]) == 0
    assert started == [(2, [command, *source, "--epochs", "3"])]


def test_errors_name_their_process(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert main(["search", "--processes", "0"]) == 2  # RANK may be of another program
    assert capsys.readouterr().err == "processes: expected 1 or more, but got 0\n"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    assert main(["search", "--processes", "0"]) == 2
    assert capsys.readouterr().err == "process 1: processes: expected 1 or more, but got 0\n"


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        ([(0, ValueError("a")), (1, ValueError("b"))], ["a", ""]),
        ([(1, ValueError("a")), (0, ProcessEndedError("b"))], ["process 1: a", ""]),
        ([(0, ProcessEndedError("a")), (2, ValueError("b"))], ["a", ""]),
        ([(2, ValueError("a")), (0, ValueError("a"))], ["process 2: a", ""]),
    ],
)
def test_one_process_says_why(errors, said, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("fastnas.cli._PATIENCE", 0.1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    monkeypatch.setenv(MEETING, str(tmp_path))
    seen = []
    for rank, error in errors:

        def fail(words, error=error):
            raise error

        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setattr("fastnas.cli.info.main", fail)
        assert main(["info"]) == 2
        seen.append(capsys.readouterr().err.strip())
    assert seen == said


def test_variables_of_torchrun_that_are_set_by_half(capsys, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    for rank in ("", "x"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        assert main(["search", "--out", "None"]) == 2
        assert "start by torchrun, or unset it" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_search_and_train(script, tmp_path):
    """An error of all, a search that is stopped and goes on, and the training of what it found."""
    out = str(tmp_path / "run")
    command = [sys.executable, script]
    words = [*command, *SEARCH, "--processes", "2", "--out", out]
    refused = run(*words, "--batch-size", "15")
    assert refused.returncode == 2
    assert refused.stderr.splitlines() == [
        "batch_size: expected a multiple of 2, the number of processes that share a batch, "
        "but got 15; take another size, or another number of processes"
    ]
    assert not Path(out).exists()

    process = subprocess.Popen(
        words,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics = Path(out) / "metrics.jsonl"
    _wait_for(metrics.exists, process)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "processes: 2, each with 8 images of a batch of 16\n" in output
    assert errors.count("\n") == 1 and "stopped by Ctrl-C in epoch 2" in errors
    assert load_checkpoint(Path(out) / "checkpoint.pt", kind="search")["step"] > 0

    resumed = run(*words, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert [json.loads(line)["epoch"] for line in metrics.read_text().splitlines()] == [1, 2]
    trained = run(*command, "eval", out, *TRAIN, "--processes", "2")
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.count("test accuracy: ") == 1
    assert run(*command, "export", f"{out}/eval").returncode == 0


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_others(script, tmp_path):
    process = _start(script, tmp_path)
    _wait_for((tmp_path / "run" / "metrics.jsonl").exists, process)
    os.kill(_workers(process)[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "another process of this run has ended" in errors
    assert (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_the_start_is_told_in_a_line(script, tmp_path, number):
    """While the processes import what they need, and have handlers for nothing yet."""
    process = _start(script, tmp_path)
    _wait_for(lambda: len(_workers(process)) == 2, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert errors.count("\n") == 1 and "Traceback" not in errors, errors


@pytest.mark.slow
def test_a_signal_to_all_processes_stops_them_once(script, tmp_path):
    """As systemd sends it: to the processes, and to the one that hands it on to them."""
    process = _start(script, tmp_path)
    _wait_for((tmp_path / "run" / "metrics.jsonl").exists, process)
    for worker in _workers(process):
        os.kill(worker, signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert errors.count("\n") == 1 and "--processes 2 --out" in errors, errors
    assert (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.slow
def test_all_processes_pause_and_go_on(script, tmp_path):
    process = _start(script, tmp_path)
    _wait_for((tmp_path / "run" / "metrics.jsonl").exists, process)
    workers = _workers(process)

    def paused():
        stats = [Path(f"/proc/{number}/stat").read_text() for number in (process.pid, *workers)]
        return [stat.rsplit(")", 1)[1].split()[0] == "T" for stat in stats]

    process.send_signal(signal.SIGTSTP)
    _wait_for(lambda: all(paused()), process)
    process.send_signal(signal.SIGCONT)
    _wait_for(lambda: not any(paused()), process)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


@pytest.mark.slow
def test_nothing_is_left_where_the_first_process_is_killed_at_the_start(script, tmp_path):
    process = _start(script, tmp_path)
    _wait_for(lambda: len(_workers(process)) == 2, process)
    workers = _workers(process)
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{worker}/cmdline").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_torchrun(script, tmp_path):
    out = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = run(*launcher, script, *SEARCH, "--epochs", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "processes: 2, each with 8 images" in done.stdout
    assert (out / "genotype.json").exists()


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_two_gpus(script, tmp_path):
    out = tmp_path / "run"
    words = ["--device", "cuda", "--processes", "2", "--out", str(out)]
    done = run(sys.executable, script, *SEARCH, *words)
    assert done.returncode == 0, done.stderr
    assert (out / "genotype.json").exists()


def _start(script, path: Path) -> subprocess.Popen[str]:
    """Two processes that search for a while, in ``run``."""
    return subprocess.Popen(
        [sys.executable, script, *SEARCH, "--processes", "2", "--out", str(path / "run")],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _workers(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]


def _wait_for(there, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not there():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
