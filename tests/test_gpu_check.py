# SPDX-License-Identifier: Apache-2.0
"""tools/gpu_check without a GPU: its phases' logic, its record, and what can be rehearsed."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import report
import torch

from fastnas.bench import measure

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "gpu_check"


@pytest.fixture
def tool(monkeypatch):
    """Imports a module of the tool; they are gone afterwards."""
    monkeypatch.syspath_prepend(str(TOOL))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(TOOL) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def main(tool, monkeypatch):
    """The command as a module."""
    spec = importlib.util.spec_from_file_location("gpu_check_main", TOOL / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(tool, name, code, seconds=20.0, passed=None, **more):
    """A phase that runs a few lines of Python."""
    phase = tool("phase")

    def judge(end):
        good = end.returncode == 0 if passed is None else passed(end)
        return phase.Verdict(good, f"said {end.output.strip()!r}", end.result)

    return phase.Phase(name, "a test", seconds, (sys.executable, "-c", code), judge, **more)


def run(tool, phase, tmp_path, limit=20.0, stop=None):
    return tool("phase").run(phase, limit, tmp_path, stop or threading.Event())


def test_all_boxes_together_are_under_nine_minutes(tool, tmp_path):
    phases = tool("phases").make_phases("cuda", tmp_path)
    groups = itertools.groupby(phases, key=lambda p: p.group or p.name)
    assert sum(max(p.seconds for p in members) for _, members in groups) < 540
    assert tuple(p.name for p in phases) == report.PHASES
    names = {p.name for p in phases}
    assert all(set(p.after) <= names and p.about for p in phases)
    rehearsal = {p.name for p in tool("phases").make_phases("cpu", tmp_path)}
    assert names - rehearsal == {"memcheck", "racecheck", "initcheck", "synccheck"}


def test_a_phase_that_passes(tool, tmp_path):
    code = "import json, os; json.dump({'a': os.environ['A']}, open('r.json', 'w')); print('hello')"
    phase = script(tool, "x", code, environment={"A": "b"}, result=tmp_path / "r.json")
    entry = run(tool, phase, tmp_path)
    assert (entry["status"], entry["summary"]) == ("passed", "said 'hello'")
    assert entry["data"] == {"a": "b"} and entry["log"] == "" and entry["limit"] == 20.0


def test_an_old_result_is_not_taken_for_a_new_one(tool, tmp_path):
    (tmp_path / "r.json").write_text('{"old": 1}')
    entry = run(tool, script(tool, "x", "pass", result=tmp_path / "r.json"), tmp_path)
    assert entry["data"] is None


def test_a_phase_that_fails_keeps_its_output(tool, tmp_path):
    entry = run(tool, script(tool, "x", "print('y' * 9000 + 'why'); exit(3)"), tmp_path)
    assert entry["status"] == "failed"
    assert entry["log"].endswith("why\n") and len(entry["log"]) == 6000


def test_output_that_is_not_understood_is_a_failure(tool, tmp_path):
    entry = run(tool, script(tool, "x", "pass", passed=lambda end: end.result["no"]), tmp_path)
    assert entry["status"] == "failed" and "not understood (TypeError" in entry["summary"]


def test_a_phase_whose_time_is_up_is_ended_with_all_it_started(tool, tmp_path):
    child = "import time; time.sleep(2); open('late', 'w')"
    code = f"""if True:
        import subprocess, sys, time
        subprocess.Popen([sys.executable, "-c", {child!r}])
        print("started", flush=True)
        time.sleep(60)
    """
    start = time.monotonic()
    entry = run(tool, script(tool, "x", code), tmp_path, limit=1.0)
    assert time.monotonic() - start < 10
    assert entry["status"] == "timed out"
    assert entry["summary"] == "stopped after 1 s; until then: said 'started'"
    time.sleep(2)
    assert not (tmp_path / "late").exists()


def test_a_phase_that_cannot_be_run_says_why(tool, tmp_path):
    phase = tool("phase").Phase("x", "", 1, (), lambda end: None, missing="no such tool")
    entry = run(tool, phase, tmp_path)
    assert (entry["status"], entry["summary"]) == ("failed", "no such tool")


def test_the_others_go_on_after_a_failure(tool, main, tmp_path, monkeypatch, capsys):
    phases = [
        script(tool, "first", "exit(1)", seconds=5),
        script(tool, "second", "print('ran')"),
        script(tool, "third", "pass", after=("first",)),
        script(tool, "fourth", "pass", after=("third",)),
        script(tool, "left", "import time; time.sleep(1)", group="side"),
        script(tool, "right", "import time; time.sleep(1); exit(1)", group="side"),
    ]
    monkeypatch.setattr(main, "make_phases", lambda device, work: phases)
    monkeypatch.setattr(main, "ROOT", tmp_path)
    out = tmp_path / "gpu.json"
    start = time.monotonic()
    assert main.main(["--out", str(out), "--device", "cpu"]) == 1
    assert time.monotonic() - start < 10
    record = json.loads(out.read_text())
    found = {p["name"]: (p["status"], p["summary"]) for p in record["phases"]}
    assert list(found) == ["first", "second", "third", "fourth", "left", "right"]
    assert found["first"][0] == "failed" and found["second"] == ("passed", "said 'ran'")
    assert found["third"] == ("skipped", "first failed")
    assert found["fourth"] == ("skipped", "third skipped")
    assert (found["left"][0], found["right"][0]) == ("passed", "failed")
    assert record["phases"][1]["limit"] > 20  # what the first one did not use
    assert record["format"] == main.FORMAT and record["command"].endswith("--device cpu")
    assert str(tmp_path) not in record["command"]
    assert "not passed: first, third, fourth, right" in capsys.readouterr().out

    assert main.main(["--out", str(out), "--phases", "second"]) == 0
    assert [p["name"] for p in json.loads(out.read_text())["phases"]] == ["second"]
    assert main.main(["--out", str(out), "--phases", "second,nothing"]) == 2
    assert "no phase nothing: there are first, second" in capsys.readouterr().err


def test_help_names_every_phase(main, capsys):
    with pytest.raises(SystemExit):
        main.parse(["--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in (*report.PHASES, "--out", "--phases", "--device"))
    with pytest.raises(SystemExit):
        main.parse(["--out", "/nowhere/at/all.json"])
    assert "there is no folder /nowhere/at" in capsys.readouterr().err


CLEAN = """\
========= COMPUTE-SANITIZER
small cases: 130 calls done
========= ERROR SUMMARY: 0 errors
"""
INVALID = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at void fastnas::cuda::combine_kernel<float, 4, true>(fastnas::cuda::Plan)+0x1a0
=========     by thread (3,0,0) in block (0,0,0)
=========     Address 0x7f0000000100 is out of bounds
small cases: 130 calls done
========= ERROR SUMMARY: 1 error
"""
UNINITIALISED = """\
========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<4>(int)+0x90
=========     by thread (0,0,0) in block (0,0,0)
=========
========= Uninitialized __global__ memory read of size 2 bytes
=========     at void at::native::other_kernel(int)+0x90
small cases: 130 calls done
========= ERROR SUMMARY: 2 errors
"""
RACES = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at void fastnas::cuda::dots_kernel<float>+0x10
=========     and Read access at void fastnas::cuda::dots_kernel<float>+0x20 [64 hazards]
small cases: 130 calls done
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


@pytest.mark.parametrize(
    ("kind", "output", "passed", "summary"),
    [
        ("memcheck", CLEAN, True, "0 reports on 130 calls"),
        ("memcheck", INVALID, False, "1 reports on 130 calls"),
        ("initcheck", UNINITIALISED, True, "0 reports on 130 calls, 2 of other kernels"),
        (
            "initcheck",
            UNINITIALISED.replace("at::native::other", "fastnas::other"),
            False,
            "1 reports on 130 calls, 2 of other kernels",
        ),
        ("racecheck", RACES, False, "1 reports on 130 calls"),
        ("racecheck", CLEAN.replace("ERROR", "RACECHECK").replace("errors", "hazards displayed"),
         True, "0 reports on 130 calls"),
        ("synccheck", "========= Error: Device not supported\n", False, "did not come to its end"),
        ("synccheck", CLEAN.replace("small cases: 130 calls done\n", ""), False,
         "did not come to its end"),
    ],
)  # fmt: skip
def test_reports_of_the_sanitizers(tool, kind, output, passed, summary):
    finished = tool("phase").Finished(0, output, None)
    verdict = tool("verdicts").sanitizer(kind, finished)
    assert (verdict.passed, summary in verdict.summary) == (passed, True), verdict
    if "fastnas" in output:
        assert "fastnas" in verdict.data["reports"][0] and verdict.data["ours"] == 1


def test_a_sanitizer_that_ends_with_an_error_has_not_passed(tool):
    verdict = tool("verdicts").sanitizer("memcheck", tool("phase").Finished(1, CLEAN, None))
    assert not verdict.passed


def test_the_sanitizers_get_the_program_and_its_folders(tool, tmp_path, monkeypatch):
    fake = tmp_path / "compute-sanitizer"
    fake.write_text('#!/bin/sh\necho "$@"; echo "========= ERROR SUMMARY: 0 errors"\n')
    fake.chmod(0o755)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    phases = {p.name: p for p in tool("phases").make_phases("cuda", tmp_path)}
    assert phases["memcheck"].command[:3] == (str(fake), "--tool", "memcheck")
    assert "kns=fastnas" not in phases["initcheck"].command
    entry = run(tool, phases["racecheck"], tmp_path)
    assert entry["status"] == "failed"  # nothing was run
    assert "small_cases.py" in entry["log"] and "kns=fastnas" in entry["log"]


def test_needs(tool, tmp_path):
    phases = {p.name: p for p in tool("phases").make_phases("cpu", tmp_path)}
    entry = run(tool, phases["needs"], tmp_path)
    assert entry["status"] == "passed" and entry["data"]["machine"]["python"]
    verdicts, end = tool("verdicts"), tool("phase").Finished
    missing = {"missing": ["pytest is not installed: pip install pytest"], "absent": {}}
    verdict = verdicts.needs(end(1, "", missing | {"machine": {}}))
    assert (verdict.passed, verdict.summary) == (False, missing["missing"][0])
    absent = {"missing": [], "absent": {"tyro": "left out"}, "machine": {"torch": "2.11"}}
    assert verdicts.needs(end(0, "", absent)).summary == "2.11; no tyro: left out"


def blocked(folder: Path, *names: str) -> dict[str, str]:
    """An environment in which these modules are not installed, and no plugin loads by itself."""
    lines = [f"sys.modules[{name!r}] = None" for name in names]
    (folder / "sitecustomize.py").write_text("\n".join(["import sys", *lines]) + "\n")
    path = os.pathsep.join([str(folder), str(TOOL), os.environ["PYTHONPATH"]])
    return {**os.environ, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def pytest_in(environment, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "-q", "-p", "pytest_plugin", "-p", "no:cacheprovider"]
    return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)


def test_outcomes_are_counted_and_the_gpu_goes_first(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.gpu\n@pytest.mark.timeout(5)\ndef test_gpu(): pass\n"
        "def test_skip(): pytest.skip('no')\n"
        "@pytest.fixture\ndef broken(): raise OSError('disk')\n"
        "def test_error(broken): pass\n"
    )
    lost = "raise ModuleNotFoundError(\"No module named 'tyro'\")\n"
    (tmp_path / "test_lost.py").write_text(lost)
    (tmp_path / "test_wrong.py").write_text("raise ModuleNotFoundError(\"No module named 'abc1'\")")
    ini = "[pytest]\naddopts = --strict-config\ntimeout = 60\nmarkers = gpu: x\n"
    (tmp_path / "pytest.ini").write_text(ini)
    environment = blocked(tmp_path, "pytest_timeout", "tyro")
    arguments = (str(tmp_path), "--outcomes", str(tmp_path / "o.json"), "-vv")
    done = pytest_in(environment, *arguments, "--continue-on-collection-errors")
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.index("::test_gpu") < done.stdout.index("::test_good")
    outcomes = json.loads((tmp_path / "o.json").read_text())
    counts = {"passed": 2, "failed": 1, "skipped": 1, "errors": 2}
    assert outcomes["counts"] == counts, done.stdout
    assert any("assert 1 == 2" in f["error"] for f in outcomes["failures"])
    assert outcomes["left_out"] == {"test_lost.py": "left out: tyro is not installed"}


def test_the_suite_and_the_benchmarks_run_without_their_plugins(tmp_path):
    absent = ("pytest_timeout", "pytest_benchmark", "hypothesis", "tyro")
    environment = blocked(tmp_path, *absent)
    suite = [str(ROOT / "tests" / f"test_{name}.py") for name in ("search_schedule", "build")]
    done = pytest_in(environment, *suite, "-k", "schedule or heavy_header")
    assert done.returncode == 0, done.stdout + done.stderr
    where = str(ROOT / "benchmarks" / "bench_sample_paths.py")
    done = pytest_in(environment, where, "-k", "test_ratio", "--benchmark-disable")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


def test_the_l2_is_emptied_by_reading(monkeypatch):
    read = []
    monkeypatch.setattr(torch, "sum", lambda x, **how: read.append(x.nbytes))
    measure.evictor(torch.device("cpu"), 1 << 10)()
    assert read == [1 << 10]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paths", "bandwidth"])
def test_rehearsal(name, tool, tmp_path):
    phases = {p.name: p for p in tool("phases").make_phases("cpu", tmp_path)}
    environment = {**phases[name].environment}
    environment["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
    phase = tool("phase")
    entry = phase.run(
        dataclasses.replace(phases[name], environment=environment), 300, tmp_path, threading.Event()
    )
    assert entry["status"] == "passed", entry
    if name == "paths":
        assert entry["data"]["different"] == 0 and entry["data"]["draws"] > 100_000
        return
    record = {**GPU_LIKE, "phases": [entry]}
    text = report.gpu_section(record)
    assert text.count("| mixed_batch_norm 64x16x32x32 |") == 4  # two formats, two dtypes
    assert all(0 < row["share"] for row in entry["data"]["rows"])


GPU_LIKE = {"format": 1, "command": "c", "date": "2026-01-01T00:00:00", "device": "cpu"}


def test_small_cases_run(tool, tmp_path):
    path = os.pathsep.join([str(ROOT / "tests"), os.environ["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, str(TOOL / "small_cases.py"), "--device", "cpu"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (
        tool("verdicts")
        .sanitizer(
            "memcheck", tool("phase").Finished(0, done.stdout + CLEAN.splitlines()[-1], None)
        )
        .passed
    )
