# SPDX-License-Identifier: Apache-2.0
"""What benchmarks/ compares with what."""

from __future__ import annotations

import cases as benchmarks  # benchmarks/cases.py
import pytest
import torch

CPU = torch.device("cpu")


def half_the_gradient(x):
    return [x + x.detach()]


def prepare(monkeypatch, compiled):
    """A case whose compiler gives ``compiled`` for ``2 x``."""

    def build(implementation, setting):
        x = setting.image()
        return benchmarks.Call(lambda x: [2 * x], (x,), (x,))

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: compiled)
    case = benchmarks.Case("double", (2, 3, 4, 4), build)
    return benchmarks.Prepared(case, torch.float32, CPU, benchmarks.Compiler(10.0))


@pytest.mark.parametrize("off", [False, True])
def test_what_the_compiler_gets_wrong_is_no_form(off, monkeypatch):
    prepared = prepare(monkeypatch, half_the_gradient if off else lambda x: [2 * x])
    form = benchmarks.Form("torch loop", run="compiled")
    if not off:
        assert prepared.runner(form, benchmarks.BOTH)
        return
    with pytest.raises(benchmarks.LeftOut, match="double, gradient 0 is off the reference by"):
        prepared.runner(form, benchmarks.BOTH)


def test_any_other_form_that_is_wrong_is_an_error(monkeypatch):
    prepared = prepare(monkeypatch, None)
    form = benchmarks.Form("torch loop")
    assert prepared.runner(form, benchmarks.FORWARD)
    monkeypatch.setattr(prepared, "_build", lambda *_: prepared.case.build("", prepared.setting))
    prepared._calls.clear()
    with pytest.raises(AssertionError, match="torch loop NCHW: output 0 is off the reference by"):
        prepared.call(form)
