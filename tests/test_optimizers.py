# SPDX-License-Identifier: Apache-2.0
"""Optimizers of a search: groups as PyTorch takes them, states of other optimizers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastnas.methods.optimizers import adam, load_optimizer, optimizer_state


@pytest.mark.parametrize("as_given", [list, iter, lambda p: p[0]], ids=["list", "iterator", "one"])
def test_a_group_may_be_any_of_what_pytorch_takes(as_given):
    parameters = [nn.Parameter(torch.ones(2))]
    optimizer = adam([{"params": as_given(parameters)}], 0.1, betas=(0.5, 0.999), weight_decay=0.0)
    parameters[0].grad = torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(parameters[0].detach(), torch.full((2,), 0.9))


def test_a_state_of_an_optimizer_without_fused_steps():
    def make():
        parameter = nn.Parameter(torch.ones(3))
        return parameter, torch.optim.RMSprop([parameter], 0.1, momentum=0.9)

    (one, optimizer), (other, restored) = make(), make()
    for _ in range(2):
        one.grad = torch.arange(3.0)
        optimizer.step()
    load_optimizer(restored, copy.deepcopy(optimizer_state(optimizer)))
    other.data.copy_(one.data)
    for parameter, each in ((one, optimizer), (other, restored)):
        parameter.grad = torch.arange(3.0)
        each.step()
    assert torch.equal(one, other)
