# SPDX-License-Identifier: Apache-2.0
"""Forwards of other people's cells: `PROVED` are the cell of DARTS, `REFUSED` do something more."""

from __future__ import annotations

import stock
import torch
from foreign_registry import Registry
from torch import nn

from fastnas import MixedOp

_REGISTRY = Registry()
PROVED, REFUSED = _REGISTRY.PROVED, _REGISTRY.REFUSED
proved, refused = _REGISTRY.proved, _REGISTRY.refused


def make_cell(forward=None, k=1, reduction=False, reduction_prev=False, steps=2, **attributes):
    """A small cell with that forward: two nodes of 4 channels, its inputs have 6 and 8."""
    members = attributes if forward is None else {"forward": forward, **attributes}
    cls = type("Cell", (stock.Cell,), members)
    return cls(steps, 2, 6, 8, 4, reduction, reduction_prev, k)


class Cells(nn.Module):
    """A few cells: the least that can be a supernet of them."""

    def __init__(self, *cells):
        super().__init__()
        self.cells = nn.ModuleList(cells)

    def forward(self, *arguments):
        return torch.cat([cell(*arguments).flatten() for cell in self.cells])


def of_ours(**options):
    cell = make_cell()
    for number, edge in enumerate(cell._ops):
        cell._ops[number] = MixedOp.from_candidates(edge._ops, **options)
    return cell


def kinds(report):
    return [s.kind for s in report.swapped]


# The cell ---------------------------------------------------------------------------------------


@proved
def darts(self, s0, s1, weights):
    """As published."""
    s0 = self.preprocess0(s0)
    s1 = self.preprocess1(s1)
    states = [s0, s1]
    offset = 0
    for _ in range(self._steps):
        s = sum(self._ops[offset + j](h, weights[offset + j]) for j, h in enumerate(states))
        offset += len(states)
        states.append(s)
    return torch.cat(states[-self._multiplier :], dim=1)


@proved
def pc_darts(self, s0, s1, weights, weights2):
    """As published."""
    s0 = self.preprocess0(s0)
    s1 = self.preprocess1(s1)
    states = [s0, s1]
    offset = 0
    for _ in range(self._steps):
        s = sum(
            weights2[offset + j] * self._ops[offset + j](h, weights[offset + j])
            for j, h in enumerate(states)
        )
        offset += len(states)
        states.append(s)
    return torch.cat(states[-self._multiplier :], dim=1)


@proved
def edges_may_have_weights(self, prev_prev, prev, alphas, betas=None):
    """As in DA2S: one network for both."""
    states = [self.preprocess0(prev_prev), self.preprocess1(prev)]
    rows, offset = alphas.unbind(0), 0
    for _ in range(self._steps):
        outputs = []
        for j, h in enumerate(states):
            out = self._ops[offset + j](h, rows[offset + j])
            if betas is not None:
                out = out * betas[offset + j]
            outputs.append(out)
        states.append(torch.stack(outputs).sum(0))
        offset += len(outputs)
    return torch.cat(states[2:], 1)


@proved
def inputs_too(self, s0, s1, weights):
    """The preprocessed inputs are part of the output."""
    states = [self.preprocess0(s0), self.preprocess1(s1)]
    for start, stop in ((0, 2), (2, 5)):
        pairs = zip(self._ops[start:stop], states, weights[start:stop], strict=True)
        states.append(sum(op(h, w) for op, h, w in pairs))
    return torch.cat(states, 1)


# Something more ---------------------------------------------------------------------------------


def states_of(self, s0, s1, weights, factor=1):
    states, edge = [self.preprocess0(s0), self.preprocess1(s1)], 0
    for _ in range(self._steps):
        node = 0
        for h in states:
            node = node + factor * self._ops[edge](h, weights[edge])
            edge += 1
        states.append(node)
    return states


@refused("it computes something else: the output differs")
def in_another_order(self, s0, s1, weights):
    return torch.cat(states_of(self, s0, s1, weights)[:1:-1], 1)


@refused("not the concatenation of its last states")
def added(self, s0, s1, weights):
    y = sum(states_of(self, s0, s1, weights)[2:])
    return y[:, :3]


@refused("it computes something else: the output differs")
def other_states(self, s0, s1, weights):
    return torch.cat(states_of(self, s0, s1, weights)[1:3], 1)


@refused("it computes something else: the output differs")
def scaled(self, s0, s1, weights):
    return torch.cat(states_of(self, s0, s1, weights, 2)[2:], 1)


@refused("reads settings that may change: fade")
def fading(self, s0, s1, weights):
    return torch.cat(states_of(self, s0, s1, weights, self.fade)[2:], 1)


@refused("it computes something else: the output differs")
def casting(self, s0, s1, weights):
    return torch.cat(states_of(self, s0, s1, weights)[2:], 1).to(torch.float64)


@refused("does more than the weighted sum: dropout")
def dropping_path(self, s0, s1, weights, drop_prob):
    y = torch.cat(states_of(self, s0, s1, weights)[2:], 1)
    return nn.functional.dropout(y, drop_prob) if self.training and drop_prob > 0 else y


@refused("takes more than s0, s1, weights and weights of edges, without a plain default: drop_prob")
def with_another_argument(self, s0, s1, weights, weights2, drop_prob):
    return torch.cat(states_of(self, s0, s1, weights)[2:], 1)


@refused("it computes something else: the output differs")
def ignoring_its_fourth_argument(self, s0, s1, weights, weights2):
    return torch.cat(states_of(self, s0, s1, weights)[2:], 1)


@refused("it computes something else: the output differs (training, random maps, batch of 1)")
def doubled_without_weights_of_edges(self, s0, s1, weights, weights2=None):
    if weights2 is not None:
        return edges_may_have_weights(self, s0, s1, weights, weights2)
    return torch.cat(states_of(self, s0, s1, weights, 2)[2:], 1)


@refused("it computes something else: the gradient of weights differs")
def detaching(self, s0, s1, weights):
    return torch.cat(states_of(self, s0, s1, weights.detach())[2:], 1)


@refused("it computes something else")
def swapping_inputs(self, s0, s1, weights):
    states = states_of(self, s0, s1, weights)
    return torch.cat([states[2], states[3] + 0 * self._ops[4](states[1], weights[4])], 1)


@refused("it computes something else: the output differs (evaluation")
def in_evaluation(self, s0, s1, weights):
    y = torch.cat(states_of(self, s0, s1, weights)[2:], 1)
    return y if self.training else 2 * y


@refused("a branch that no run of the proof takes")
def for_large_batches(self, s0, s1, weights):
    y = torch.cat(states_of(self, s0, s1, weights)[2:], 1)
    if len(s0) > 100:
        y = 2 * y
    return y


@refused("does more than the weighted sum: clamp")
def clamped(self, s0, s1, weights):
    return torch.cat(states_of(self, s0, s1, weights)[2:], 1).clamp(-1e6, 1e6)


@refused("its forward does not call _ops.4")
def leaving_one_out(self, s0, s1, weights):
    states = [self.preprocess0(s0), self.preprocess1(s1)]
    for offset, count in ((0, 2), (2, 2)):
        states.append(sum(self._ops[offset + j](states[j], weights[j]) for j in range(count)))
    return torch.cat(states[2:], 1)


@refused("sets attributes")
def keeping_its_states(self, s0, s1, weights):
    self.states = states_of(self, s0, s1, weights)
    return torch.cat(self.states[2:], 1)
