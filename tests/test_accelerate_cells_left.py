# SPDX-License-Identifier: Apache-2.0
"""accelerate() leaves cells that do more than those of DARTS, and says why."""

from __future__ import annotations

import pytest
import stock
import torch
from foreign_cells import REFUSED, Cells, kinds, make_cell, of_ours
from torch import nn

import fastnas


def reason_of(cell):
    """Why ``cell`` is left as it is."""
    cls = type(cell)
    report = fastnas.accelerate(Cells(cell))
    assert "Cell" not in kinds(report)
    (left,) = [item for item in report.left if item.name == "cells.0"]
    assert type(cell) is cls
    assert "\n" not in left.reason
    return left.reason


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_more_than_a_cell(name):
    forward, reason = REFUSED[name]
    assert reason in reason_of(make_cell(forward, fade=1.0))


def _with_hook():
    cell = make_cell()
    cell.register_forward_hook(lambda *_: None)
    return cell


def _with_hooked_mixed_op():
    cell = of_ours()
    cell._ops[1].register_forward_pre_hook(lambda *_: None)
    return cell


def _with_forward():
    cell = make_cell()
    cell.forward = lambda s0, s1, weights: s0
    return cell


def _with_compiled_call():
    cell = make_cell()
    cell._compiled_call_impl = cell._call_impl
    return cell


def _with_candidate(candidate):
    cell = make_cell()
    cell._ops[2]._ops[3] = candidate
    return cell


def _with_shared_mixed_op():
    cell = make_cell()
    cell._ops[4] = cell._ops[3]
    return cell


def _with_shared_candidate():
    cell = make_cell()
    cell._ops[2]._ops[4] = cell._ops[1]._ops[4]
    return cell


def _with_mixed_op_of_another_kind():
    cell = make_cell()
    cell._ops[2].register_forward_hook(lambda *_: None)
    return cell


def _with_mixed_op_that_writes():
    cell = of_ours()
    cell._ops[2]._ops[3] = nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm2d(4))
    return cell


def _with_one_more():
    cell = make_cell()
    cell._ops.append(stock.MixedOp(4, 1))
    return cell


def _with_one_preprocess():
    cell = make_cell()
    cell.preprocess0 = cell.preprocess1
    return cell


def _with_a_list_of_steps():
    cell = make_cell(_list_of_steps)
    cell._steps = [0, 1]
    return cell


def _list_of_steps(self, s0, s1, weights):
    states = [self.preprocess0(s0), self.preprocess1(s1)]
    offset = 0
    for _ in self._steps:
        s = sum(self._ops[offset + j](h, weights[offset + j]) for j, h in enumerate(states))
        offset += len(states)
        states.append(s)
    return torch.cat(states[2:], dim=1)


class Registry(type):
    pass


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_with_hook, "hooks are registered on it"),
        (_with_hooked_mixed_op, "hooks are registered on its mixed ops"),
        (_with_forward, "its forward was replaced on this instance"),
        (_with_compiled_call, "it is compiled"),
        (_with_one_preprocess, "its preprocess0 and preprocess1 are one module"),
        (_with_a_list_of_steps, "reads settings that may change: _steps"),
        (lambda: _with_candidate(nn.Dropout(0.0)), "it draws random numbers"),
        (lambda: _with_candidate(Noise()), "it draws random numbers"),
        (_with_mixed_op_that_writes, "have to be called one by one"),
        (_with_shared_candidate, "have a module with running statistics in common"),
        (_with_shared_mixed_op, "one mixed op is in several places of it"),
        (_with_mixed_op_of_another_kind, "1 of its 5 mixed ops are not ours"),
        (lambda: of_ours(skip_zero=True), "leave out candidates of weight zero"),
        (_with_one_more, "6 mixed ops are not one from every state to every later one"),
        (lambda: of_ours().to("meta"), "its parameters hold no numbers yet"),
        (lambda: make_cell(__getattr__=nn.Module.__getattr__), "its class defines __getattr__"),
        (lambda: make_cell(_call_impl=nn.Module._call_impl), "its class defines _call_impl"),
    ],
)
def test_obstacles(make, reason):
    assert reason in reason_of(make())


def test_a_class_that_cannot_have_a_subclass_like_any_other():
    cls = Registry("Cell", (stock.Cell,), {})
    assert "its class is one of Registry" in reason_of(cls(2, 2, 6, 8, 4, False, False))
