# SPDX-License-Identifier: Apache-2.0
"""Forwards of mixed ops: `PROVED` are ways to write the weighted sum, `REFUSED` do something more.

What a refused one does more stays hidden from a few runs on random data: it waits for large values,
another batch, a flag.
"""

from __future__ import annotations

import functools
import random

import stock
import torch
import torch.nn.functional as F
from foreign_registry import Registry

SCALE = 1.0
VERBOSE = False
_REGISTRY = Registry()
PROVED, REFUSED = _REGISTRY.PROVED, _REGISTRY.REFUSED
proved, refused = _REGISTRY.proved, _REGISTRY.refused


def mixed_op(forward, primitives=("none", "skip_connect", "dil_conv_3x3")):
    """A small mixed op with that forward."""
    return type("MixedOp", (stock.MixedOp,), {"forward": forward})(4, 1, primitives)


def weighted_sum(self, x, weights):
    return sum(w * op(x) for w, op in zip(weights, self._ops, strict=True))


# The sum ----------------------------------------------------------------------------------------


@proved
def truncating(self, x, weights):
    return sum(w * op(x) for w, op in zip(weights, self._ops))  # noqa: B905  # as published


@proved
def loop_that_skips(self, inputs, alpha):
    out = 0
    for w, op in zip(alpha, self._ops, strict=True):
        if w == 0:
            continue
        out = out + w * op(inputs)
    return out


@proved
def skips_unless(self, x, weights):
    return sum(w * op(x) for w, op in zip(weights, self._ops, strict=True) if not w == 0)


@proved
def skips_by_truth(self, x, weights):
    return sum(w * op(x) for w, op in zip(weights, self._ops, strict=True) if w)


@proved
def guards_against_nothing(self, x, weights):
    outs = [w * op(x) for w, op in zip(weights, self._ops, strict=True) if w.data != 0]
    return sum(outs) if len(outs) > 0 else torch.zeros_like(x)


@proved
def enumerated(self, x, weights):
    result = None
    for i, (op, w) in enumerate(zip(self._ops, weights, strict=True)):
        y = op(x)
        result = w * y if i == 0 else result + w * y
    return result


@proved
def starts_from_none(self, x, weights):
    result = None
    for w, op in zip(weights, self._ops, strict=True):
        result = w * op(x) if result is None else result + w * op(x)
    return result


@proved
def appended(self, x, weights):
    results = []
    for i, op in enumerate(self._ops):
        results.append(op(x) * weights[i])
    return sum(results)


@proved
def accumulated(self, x, weights):
    y = torch.zeros_like(x)
    for i in range(len(self._ops)):
        y += weights[i] * self._ops[i](x)
    return y


@proved
def first_then_others(self, x, weights):
    y = weights[0] * self._ops[0](x)
    for i in range(1, len(weights)):
        y += weights[i] * self._ops[i](x)
    return y


@proved
def stacked(self, x, weights):
    return torch.stack([w * op(x) for w, op in zip(weights, self._ops, strict=True)]).sum(0)


@proved
def stacked_then_weighted(self, x, weights):
    return (weights.view(-1, 1, 1, 1, 1) * torch.stack([op(x) for op in self._ops])).sum(dim=0)


@proved
def einsum(self, x, weights):
    return torch.einsum("k,knchw->nchw", weights, torch.stack([op(x) for op in self._ops]))


@proved
def checked(self, x, weights):
    assert len(weights) == len(self._ops), f"{len(weights)} weights"
    if x.dim() != 4:
        raise ValueError("x has four dimensions")
    return sum(w * op(x) for w, op in zip(weights, self._ops, strict=True))


def _add_all(terms):
    y = 0
    for term in terms:
        y = y + term
    return y


@proved
def with_a_helper(self, x, weights):
    return _add_all([op(x).mul(w) for w, op in zip(weights, self._ops, strict=True)])


@proved
def another_way_in_evaluation(self, x, weights):
    if self.training:
        return weighted_sum(self, x, weights)
    return torch.stack([w * op(x) for w, op in zip(weights, self._ops, strict=True)]).sum(0)


# More than the sum, by name ---------------------------------------------------------------------


@refused("more than the weighted sum: clamp")
def clamped(self, x, weights):
    return weighted_sum(self, x, weights).clamp(-1e4, 1e4)


def _limit(x):
    return x.clamp(-1e4, 1e4)


@refused("more than the weighted sum: clamp")
def clamped_in_a_helper(self, x, weights):
    return weighted_sum(self, _limit(x), weights)


def _limiting(forward):
    @functools.wraps(forward)
    def limited(self, x, weights):
        return forward(self, x, weights).clamp(-1e4, 1e4)

    return limited


clamped_by_a_decorator = refused("more than the weighted sum: clamp")(_limiting(weighted_sum))
REFUSED["clamped_by_a_decorator"] = REFUSED.pop("weighted_sum")


@refused("more than the weighted sum: getattr")
def clamped_by_getattr(self, x, weights):
    return getattr(weighted_sum(self, x, weights), "cla" + "mp")(-1e4, 1e4)


@refused("more than the weighted sum: threshold")
def clamped_functionally(self, x, weights):
    return F.threshold(weighted_sum(self, x, weights), -1e9, 0.0)


@refused("passes a module on: torch.nn.functional")
def clamped_by_alias(self, x, weights):
    module = F
    return module.threshold(weighted_sum(self, x, weights), -1e9, 0.0)


@refused("more than the weighted sum: abs, max")
def of_small_inputs(self, x, weights):
    y = weighted_sum(self, x, weights)
    if x.abs().max() > 100:
        y = 2 * y
    return y


@refused("more than the weighted sum: is_grad_enabled")
def with_gradients(self, x, weights):
    y = weighted_sum(self, x, weights)
    return y if torch.is_grad_enabled() else 2 * y


@refused("more than the weighted sum: random")
def at_random(self, x, weights):
    y = weighted_sum(self, x, weights)
    return y if random.random() < 2 else 2 * y


@refused("more than the weighted sum: isinstance")
def of_tensors(self, x, weights):
    y = weighted_sum(self, x, weights)
    return 2 * y if isinstance(weights, list) else y


@refused("more than the weighted sum: item")
def with_weights_as_numbers(self, x, weights):
    return sum(w * op(x) for w, op in zip(weights, self._ops, strict=True) if w.item() != 123)


@refused("reads variables from outside: SCALE")
def scaled_globally(self, x, weights):
    return SCALE * weighted_sum(self, x, weights)


@refused("reads variables from outside: VERBOSE")
def verbose(self, x, weights):
    if VERBOSE:
        raise RuntimeError(x.shape)
    return weighted_sum(self, x, weights)


def _make_enclosed():
    factors = [1.0]

    def enclosed(self, x, weights):
        return factors[0] * weighted_sum(self, x, weights)

    return enclosed


refused("reads variables from outside: factors")(_make_enclosed())


def _remember(x, seen=[]):  # noqa: B006  # the point
    seen.append(0)
    return x if len(seen) < 1000 else 2 * x


@refused("keeps values in default arguments: _remember")
def counting(self, x, weights):
    return _remember(weighted_sum(self, x, weights))


@refused("sets attributes: last")
def remembering(self, x, weights):
    self.last = x
    return weighted_sum(self, x, weights)


@refused("has a try or with statement")
def catching(self, x, weights):
    try:
        return weighted_sum(self, x, weights)
    except RuntimeError:
        return x


@refused("computes with the result of a comparison")
def scaled_by_size(self, x, weights):
    return weighted_sum(self, x, weights) * (1 + (len(x) > 200))


@refused("computes with the result of a comparison")
def masked(self, x, weights):
    y = weighted_sum(self, x, weights)
    return y * (y < 1e30)


# More than the sum, by operators ----------------------------------------------------------------


@refused("more than the weighted sum: gt, a branch on values")
def of_a_small_first_entry(self, x, weights):
    y = weighted_sum(self, x, weights)
    return 2 * y if x[0, 0, 0, 0] > 1e6 else y


@refused("more than the weighted sum: ne, a branch on values")
def of_a_first_entry(self, x, weights):
    y = weighted_sum(self, x, weights)
    return y if x[0, 0, 0, 0] != 0 else 2 * y


@refused("more than the weighted sum: ne, a branch on values")
def without_one_weight(self, x, weights):
    return sum(w * op(x) for w, op in zip(weights, self._ops, strict=True) if w != 0.5)


@refused("more than the weighted sum: lt, a branch on values")
def with_other_weights(self, x, weights):
    return sum(w * op(x) for w, op in zip(weights, self._ops, strict=True) if w < 9 or w > 9)


@refused("more than the weighted sum: remainder")
def with_a_remainder(self, x, weights):
    return weighted_sum(self, x, weights) + 0 * (x % 7)


@refused("does not run on random data: RuntimeError: it writes to its input")
def with_other_weights_behind(self, x, weights):
    y = weighted_sum(self, x, weights)
    weights.data.mul_(2)
    return y


# More than the sum, by branches -----------------------------------------------------------------


@refused("batch of 1")
def twice_for_one(self, x, weights):
    y = weighted_sum(self, x, weights)
    return 2 * y if x.shape[0] == 1 else y


@refused("a branch that no run of the proof takes")
def twice_for_many(self, x, weights):
    y = weighted_sum(self, x, weights)
    if len(x) > 100:
        y = 2 * y
    return y


@refused("a branch that no run of the proof takes")
def nothing_for_many(self, x, weights):
    y = 0
    if len(x) < 100:
        y = weighted_sum(self, x, weights)
    return y


@refused("a branch that no run of the proof takes")
def twice_for_large_images(self, x, weights):
    y = weighted_sum(self, x, weights)
    if self.training and x.size(2) == 224:
        y = 2 * y
    return y


@refused("a branch that no run of the proof takes")
def twice_in_half_precision(self, x, weights):
    y = weighted_sum(self, x, weights)
    return 2 * y if x.dtype == torch.float16 else y


@refused("a branch that no run of the proof takes")
def again_for_many(self, x, weights):
    y = weighted_sum(self, x, weights)
    while len(x) > 100:
        x, y = x[100:], 2 * y
    return y


@refused("a branch that no run of the proof takes")
def a_function_inside(self, x, weights):
    double = lambda y: y if len(y) < 100 else 2 * y  # noqa: E731
    return double(weighted_sum(self, x, weights))


@refused("a branch that no run of the proof takes")
def short_circuit(self, x, weights):
    y = weighted_sum(self, x, weights)
    return (len(x) > 100 and 2 * y) or [y][0]


@refused("all weights zero")
def nothing_without_weights(self, x, weights):
    return weighted_sum(self, x, weights) + (x if not [w for w in weights if w != 0] else 0)
