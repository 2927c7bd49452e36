# SPDX-License-Identifier: Apache-2.0
"""pytest -p pytest_plugin --outcomes FILE: counts kept while the tests run, and stand-ins.

The machines with a GPU are not always those with everything installed. Options and markers of
plugins that are not there are accepted and mean nothing; test files that import what is not there
are left out and counted.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from needs import OPTIONAL
from phase import write

_EVERY = 1.0  # seconds between two writes
_FAILURES = 30  # kept in the record


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="file for the counts, as JSON")
    if find_spec("pytest_timeout") is None:
        parser.addini("timeout", "of pytest-timeout, which is not installed")
    if find_spec("pytest_benchmark") is None:
        parser.addoption("--benchmark-disable", action="store_true", default=False)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "timeout(seconds): of pytest-timeout")
    path = config.getoption("--outcomes")
    if path is not None and not hasattr(config, "workerinput"):  # not in a process of xdist
        config.pluginmanager.register(Outcomes(path))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that use the GPU come first: if time runs out, they have run."""
    items.sort(key=lambda item: item.get_closest_marker("gpu") is None)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """A file that imports what is known to be missing is skipped, not an error."""
    report = yield
    if report.outcome == "failed":
        error = r"ModuleNotFoundError: (?:No module named '|import of )(\w+)"
        names = re.findall(error, str(report.longrepr))[-1:]
        if any(name in OPTIONAL and find_spec(name) is None for name in names):
            report.outcome = "skipped"
            path = str(getattr(collector, "path", collector.name))
            report.longrepr = (path, 0, f"left out: {names[0]} is not installed")
    return report


class Outcomes:
    """Writes what has happened so far, now and then and at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        self.failures: list[dict[str, str]] = []
        self.left_out: dict[str, str] = {}  # the processes of xdist say the same
        self.written = 0.0

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that could not be read, or was left out."""
        if report.outcome == "failed":
            self._failed("errors", report.nodeid, report.longrepr)
        elif report.outcome == "skipped":
            self.left_out[report.nodeid] = _last_line(report.longrepr)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A step of a test has ended."""
        if report.outcome == "failed":
            kind = "failed" if report.when == "call" else "errors"
            self._failed(kind, report.nodeid, report.longrepr)
        elif report.outcome == "skipped" or report.when == "call":
            self.counts[report.outcome] += 1
        if time.monotonic() - self.written > _EVERY:
            self._write()

    def pytest_sessionfinish(self) -> None:
        """All have."""
        self._write()

    def _failed(self, kind: str, nodeid: str, longrepr: Any) -> None:
        self.counts[kind] += 1
        if len(self.failures) < _FAILURES:
            self.failures.append({"test": nodeid, "error": _last_line(longrepr)})

    def _write(self) -> None:
        self.written = time.monotonic()
        content = {"counts": self.counts, "failures": self.failures, "left_out": self.left_out}
        write(self.path, content)


def _last_line(longrepr: Any) -> str:
    if isinstance(longrepr, tuple):
        return str(longrepr[2])
    crash = getattr(longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(longrepr)
    lines = [line for line in text.splitlines() if line.strip()]
    return (lines[0] if crash is not None and lines else lines[-1] if lines else "")[:300]
