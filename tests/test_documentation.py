# SPDX-License-Identifier: Apache-2.0
"""What the documentation shows is what happens: docstring examples, the README's set-up."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import fastnas

ROOT = Path(__file__).resolve().parents[1]


def _modules() -> list[str]:
    found = pkgutil.walk_packages(fastnas.__path__, "fastnas.")
    return sorted(m.name for m in found if m.name not in ("fastnas._C", "fastnas.__main__"))


def _examples() -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = {}
    for name in _modules():
        module = importlib.import_module(name)
        for test in finder.find(module, extraglobs={"torch": torch, "fastnas": fastnas}):
            if test.examples:
                found[test.name] = test
    return list(found.values())


@pytest.mark.parametrize("example", _examples(), ids=lambda test: test.name)
def test_example(example):
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    report: list[str] = []
    runner.run(example, out=report.append)
    assert runner.failures == 0, "".join(report)


def test_there_are_examples():
    names = {test.name for test in _examples()}
    for name in ("mixed_sum", "MixedOp", "PartialMixedOp"):
        assert any(found.endswith(f".{name}") for found in names), name


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)


def test_readme_python_runs():
    names: dict[str, object] = {}
    blocks = _blocks("python")
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


def test_readme_has_the_two_set_up_commands():
    commands = [line for block in _blocks("sh") for line in block.splitlines() if "pip" in line]
    assert commands == ["pip install . && fastnas search", 'pip install ".[test]" && pytest']
