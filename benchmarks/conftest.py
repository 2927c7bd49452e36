# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the benchmarks: one form of a case in a row, all its forms in turns as a ratio."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BOTH, Case, Compiler, Form, LeftOut, Prepared

from fastnas import _extension
from fastnas._timing import synchronize, timed
from fastnas.bench.machine import Machine, describe_machine, device_name
from fastnas.bench.measure import Interleaved, flusher, interleave, peak_memory

_DEFAULTS: dict[str, Any] = {
    "bench_device": "cuda" if torch.cuda.is_available() else "cpu",
    "bench_threads": None,
    "bench_seconds": 0.3,
    "compile_seconds": 20.0,
    "ratios_json": None,
}


@dataclass
class Session:
    """Options of the session, and the ratios it has measured."""

    device: torch.device
    seconds: float
    compiler: Compiler
    ratios_json: Path | None
    #: False under --benchmark-disable: everything runs once on small images and nothing is timed.
    measuring: bool
    command: str
    ratios: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    load_average: float = field(default_factory=lambda: os.getloadavg()[0])

    @cached_property
    def machine(self) -> Machine:
        return describe_machine(self.device, self.load_average)

    def forms(self, case: Case) -> list[Form]:
        compiling = self.compiler.budget > 0
        return [f for f in case.forms(self.device) if compiling or f.run != "compiled"]

    def keep(self, record: dict[str, Any]) -> None:
        """Add a ratio, and to the file at once: a session that is cut off leaves what it has."""
        self.ratios.append(record)
        if self.ratios_json is None:
            return
        content = {
            "machine": self.machine.as_dict(),
            "command": self.command,
            "ratios": self.ratios,
            "left_out": self.left_out,
        }
        temporary = self.ratios_json.with_name(f"{self.ratios_json.name}.tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.ratios_json)

    def leave_out(self, reason: LeftOut, case: Case) -> None:
        cases = self.left_out.setdefault(str(reason), [])
        if case.id not in cases:
            cases.append(case.id)


_SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastnas benchmarks")

    def add(name: str, kind: Callable[[str], Any], text: str) -> None:
        default = _DEFAULTS[name.strip("-").replace("-", "_")]
        group.addoption(name, type=kind, default=default, help=f"{text} (default: {default})")

    add("--bench-device", str, "device to measure on")
    add("--bench-threads", int, "threads of PyTorch; unless given 2, or 1 if nothing is timed")
    add("--bench-seconds", float, "seconds for each form of a ratio; a row gets half of it")
    add("--compile-seconds", float, "seconds of torch.compile per op; 0 leaves it out")
    add("--ratios-json", Path, "file for the interleaved ratios")


def pytest_configure(config: pytest.Config) -> None:
    # Options are unknown when another folder was named first: then the defaults hold.
    options = {name: config.getoption(name, default) for name, default in _DEFAULTS.items()}
    if options["bench_device"] not in ("cpu", "cuda"):
        raise pytest.UsageError(
            f"--bench-device: expected cpu or cuda, but got {options['bench_device']}"
        )
    device, path = torch.device(options["bench_device"]), options["ratios_json"]
    measuring = not config.getoption("benchmark_disable", False)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--bench-device=cuda: PyTorch finds no CUDA device")
    if device.type == "cuda" and not _extension.CUDA_VERSION:
        reason = _extension.CUDA_MISSING_REASON
        raise pytest.UsageError(f"fastnas was built without CUDA kernels ({reason})")
    threads = options["bench_threads"] or (2 if measuring else 1)
    if threads < 1:
        raise pytest.UsageError(f"--bench-threads: expected 1 or more, but got {threads}")
    if path is not None and not measuring:
        raise pytest.UsageError("--ratios-json needs measurements: drop --benchmark-disable")
    if path is not None and not path.absolute().parent.is_dir():
        raise pytest.UsageError(f"--ratios-json: there is no folder {path.parent}")
    torch.set_num_threads(threads)
    budget = options["compile_seconds"] if measuring else 0.0
    config.stash[_SESSION] = Session(
        device,
        options["bench_seconds"],
        Compiler(budget),
        None if path is None else path.absolute(),
        measuring,
        _command(config),
    )


def _command(config: pytest.Config) -> str:
    """What was measured with: without folders of this machine and where results went."""
    words, given = ["pytest"], iter(map(str, config.invocation_params.args))
    for word in given:
        if word == "--ratios-json":
            next(given, None)
        elif not word.startswith("--ratios-json="):
            path = Path(word)
            inside = path.is_absolute() and path.is_relative_to(config.rootpath)
            words.append(str(path.relative_to(config.rootpath)) if inside else word)
    return shlex.join(words)


def pytest_report_header(config: pytest.Config) -> list[str]:
    session = config.stash[_SESSION]
    how = "timed" if session.measuring else "each form once, nothing is timed"
    return [
        f"benchmarks: {session.device.type}, {device_name(session.device)}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"CPU capability {torch.backends.cpu.get_cpu_capability()}; {how}"
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "prepared" not in metafunc.fixturenames:
        return
    session, cases = metafunc.config.stash[_SESSION], metafunc.module.CASES
    dtypes = [torch.float32]
    if session.device.type == "cuda" and cases[0].images:
        dtypes.append(torch.bfloat16)
    # Module scope: what one case needs is measured together, and one case is in memory at a time.
    metafunc.parametrize(
        "prepared",
        [(case, dtype) for case in cases for dtype in dtypes],
        ids=[_label(case, dtype) for case in cases for dtype in dtypes],
        indirect=True,
        scope="module",
    )
    metafunc.parametrize("mode", cases[0].modes)
    if "form" in metafunc.fixturenames:
        metafunc.parametrize("form", session.forms(cases[0]), ids=lambda form: form.name)


def _label(case: Case, dtype: torch.dtype) -> str:
    return case.id if dtype == torch.float32 else f"{case.id} {str(dtype).removeprefix('torch.')}"


@pytest.fixture(scope="session")
def session(pytestconfig: pytest.Config) -> Session:
    return pytestconfig.stash[_SESSION]


@pytest.fixture(scope="module")
def prepared(request: pytest.FixtureRequest, session: Session) -> Iterator[Prepared]:
    """A case with its tensors."""
    case, dtype = request.param
    yield Prepared(case, dtype, session.device, session.compiler, reduced=not session.measuring)
    if session.device.type == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture
def row(benchmark: Any, session: Session) -> Callable[[Prepared, str, Form], None]:
    """Check one form of a case and time it."""

    def measure(prepared: Prepared, mode: str, form: Form) -> None:
        benchmark.group = f"{_label(prepared.case, prepared.dtype)}, {mode}, {session.device.type}"
        benchmark.name = form.name
        try:
            run = prepared.runner(form, mode)
        except LeftOut as reason:
            session.leave_out(reason, prepared.case)
            pytest.skip(str(reason))
        work = prepared.work(mode)
        before = flusher(session.device, work)

        def finished() -> None:
            run()
            synchronize(session.device)

        rounds = 1
        if session.measuring:
            once = min(timed(run, session.device) for _ in range(3))
            rounds = int(min(max(session.seconds / 2 / once, 3), 200))
        warmup = int(session.measuring)
        benchmark.pedantic(finished, setup=before, rounds=rounds, warmup_rounds=warmup)
        if session.measuring:
            seconds = benchmark.stats.stats.median
            benchmark.extra_info.update(_extra(session, prepared, mode, form, seconds))

    return measure


def _extra(
    session: Session, prepared: Prepared, mode: str, form: Form, seconds: float
) -> dict[str, Any]:
    """What a row says of itself in --benchmark-json."""
    machine, work = session.machine, prepared.work(mode)
    extra = {
        "device": machine.name,
        "cpu_capability": machine.cpu_capability,
        "torch": machine.torch,
        "threads": machine.threads,
        "dtype": str(prepared.dtype).removeprefix("torch."),
    }
    if work is not None:
        rate = work.bytes / seconds
        extra |= {
            "bytes_moved": work.bytes,
            "gigabytes_per_second": rate / 1e9,
            "share_of_copy_bandwidth": rate / machine.copy_bandwidth,
            "share_of_floor": machine.floor(work) / seconds,
        }
    if BOTH in prepared.case.modes and prepared.case.images and form.run == "eager":
        extra["saved_bytes"] = prepared.saved_bytes(form)
    if session.device.type == "cuda" and form.run != "graph":  # a graph has memory of its own
        run = prepared.runner(form, mode)
        extra["peak_memory_bytes"] = peak_memory(run, session.device)
    return extra


@pytest.fixture
def ratio(session: Session) -> Callable[[Prepared, str], None]:
    """Time all forms of a case in turns and keep how they compare."""

    def measure(prepared: Prepared, mode: str) -> None:
        case, runs, left_out = prepared.case, {}, {}
        forms = session.forms(case)
        for form in forms:
            try:
                runs[form] = prepared.runner(form, mode)
            except LeftOut as reason:
                session.leave_out(reason, case)
                left_out[form.name] = str(reason)
        saved = {}
        if BOTH in case.modes and case.images:
            saved = {f.name: prepared.saved_bytes(f) for f in runs if f.run == "eager"}
            ours = max(saved[f.name] for f in runs if f.fused and f.name in saved)
            stock = min(saved[f.name] for f in runs if not f.fused and f.name in saved)
            assert ours <= stock, f"more bytes are saved than by stock: {saved}"
        if not session.measuring:
            for run in runs.values():
                run()
            return
        times = interleave(
            {form.name: run for form, run in runs.items()},
            session.device,
            session.seconds * len(runs),
            flusher(session.device, prepared.work(mode)),
        )
        record = _record(session, prepared, mode, list(runs), times)
        session.keep(record | {"saved_bytes": saved, "left_out": left_out})

    return measure


def _record(
    session: Session, prepared: Prepared, mode: str, forms: list[Form], times: Interleaved
) -> dict[str, Any]:
    """One entry of --ratios-json and one line of the table."""
    stock = min((f.name for f in forms if not f.fused), key=times.median)
    fused = min((f.name for f in forms if f.fused), key=times.median)
    eager = (f.name for f in forms if f.run == "eager" and not f.fused)
    work = prepared.work(mode)
    keys = ("ratio", "lower_quartile", "upper_quartile")
    return {
        "op": prepared.case.op,
        "size": prepared.case.size,
        "dtype": str(prepared.dtype).removeprefix("torch."),
        "mode": mode,
        "rounds": times.rounds,
        "median_seconds": {f.name: times.median(f.name) for f in forms},
        "best_stock": stock,
        "best_eager_stock": min(eager, key=times.median),
        "best_fastnas": fused,
        # How many times faster than the best stock form each of ours is.
        "faster": {
            f.name: dict(zip(keys, times.ratio(stock, f.name), strict=True))
            for f in forms
            if f.fused
        },
        "bytes_moved": work.bytes if work else None,
        "flops": work.flops if work else None,
        "floor_seconds": session.machine.floor(work) if work else None,
    }


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    session = config.stash[_SESSION]
    if session.measuring:
        machine_info["fastnas"] = session.machine.as_dict()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    session = config.stash[_SESSION]
    if not session.ratios:
        return
    machine = session.machine
    load = machine.load_average
    terminalreporter.section("fastnas against the best stock form, measured in turns")
    terminalreporter.write_line(
        f"{machine.name}, {machine.threads} threads, torch {machine.torch}, fastnas "
        f"{machine.fastnas}, CPU capability {machine.cpu_capability}, {machine.date}; copy "
        f"{machine.copy_bandwidth / 1e9:.1f} GB/s, GEMM {machine.gemm_rate / 1e9:.0f} GFLOP/s"
    )
    if load > 0.5:
        terminalreporter.write_line(
            f"load average {load:.1f} before the session: not alone on this machine, do not quote"
        )
    head = ["op and size", "mode", "best stock", "ms", "best fastnas", "ms", "faster", "quartiles"]
    head += ["eager", "floor", "saved MB", "fastnas"]
    for line in table(head, [_line(record) for record in session.ratios]):
        terminalreporter.write_line(line)
    for reason, cases in session.left_out.items():
        terminalreporter.write_line(f"left out: {reason}: {', '.join(cases)}")


def _line(record: dict[str, Any]) -> list[str]:
    """The cells of one ratio; "-" where there is nothing to say."""
    stock, fused = record["best_stock"], record["best_fastnas"]
    seconds, best = record["median_seconds"], record["faster"][fused]
    dtype = "" if record["dtype"] == "float32" else f" {record['dtype']}"
    floor = record["floor_seconds"]
    saved = {
        ours: min(b for name, b in record["saved_bytes"].items() if ("fastnas" in name) == ours)
        for ours in (False, True)
        if record["saved_bytes"]
    }
    return [
        f"{record['op']} {record['size']}{dtype}",
        record["mode"],
        stock,
        f"{seconds[stock] * 1e3:.3f}",
        fused,
        f"{seconds[fused] * 1e3:.3f}",
        f"{best['ratio']:.2f}x",
        f"{best['lower_quartile']:.2f}..{best['upper_quartile']:.2f}",
        f"{seconds[record['best_eager_stock']] / seconds[fused]:.2f}x",
        "-" if floor is None else f"{floor / seconds[fused]:.0%}",
        f"{saved[False] / 1e6:.2f}" if saved else "-",
        f"{saved[True] / 1e6:.2f}" if saved else "-",
    ]


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table, columns aligned: text to the left, the rest to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    number = [all(row[i][:1] in "0123456789-" for row in rows) for i in range(len(head))]
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, number, strict=True)
        ).rstrip()
        for row in [head, ["-" * width for width in widths], *rows]
    ]
