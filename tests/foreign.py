# SPDX-License-Identifier: Apache-2.0
"""Mixed ops of other people, all of the same shape: some compute the sum, some something else."""

from __future__ import annotations

import stock
import torch
from torch import nn


class Skipping(stock.MixedOp):
    """Runs only candidates with a weight, as darts-pt does."""

    def forward(self, x, weights):
        return sum(w * op(x) for w, op in zip(weights, self._ops, strict=True) if w != 0)


class Indexed(nn.Module):
    """Another way to write the sum, with argument names and a private helper of its own."""

    def __init__(self, C, stride):
        super().__init__()
        self._ops = stock.candidates(C, stride, stock.PRIMITIVES[1:])
        self.stride = stride

    def _one(self, k, x, w):
        return self._ops[k](x) * w[k]

    def forward(self, inputs, alphas):
        y = self._one(0, inputs, alphas)
        for k in range(1, len(self._ops)):
            y = y + self._one(k, inputs, alphas)
        return y


class Twice(stock.MixedOp):
    """Evaluates every candidate once too often: the statistics move twice."""

    def forward(self, x, weights):
        super().forward(x, weights)
        return super().forward(x, weights)


class Auxiliary(stock.MixedOp):
    """Adds a skip connection, as DARTS- does."""

    def forward(self, x, weights):
        y = super().forward(x, weights)
        return y + x if y.shape == x.shape else y


class Normalised(stock.MixedOp):
    """Takes logits."""

    def forward(self, x, weights):
        return super().forward(x, torch.softmax(weights, 0))


class Detached(stock.MixedOp):
    """The same output, but no gradient for the weights."""

    def forward(self, x, weights):
        return super().forward(x, weights.detach())


class InTraining(stock.MixedOp):
    """Differs in evaluation only."""

    def forward(self, x, weights):
        y = super().forward(x, weights)
        return y if self.training else 2 * y


class Fading(stock.MixedOp):
    """Equal today; its factor is meant to change."""

    def __init__(self, C, stride):
        super().__init__(C, stride)
        self.fade = 0.0

    def forward(self, x, weights):
        return super().forward(x, weights) + self.fade * x.sum()


class Shared(stock.MixedOp):
    """Equal today; the factor belongs to the class."""

    fade = 0.0

    def forward(self, x, weights):
        return super().forward(x, weights) + self.fade * x.sum()


class Extended(stock.MixedOp):
    def forward(self, x, weights, selected=()):
        return super().forward(x, weights)


class WithParts(stock.MixedOp):
    def __init__(self, C, stride):
        super().__init__(C, stride)
        self.scale = nn.Parameter(torch.ones(1))


class Failing(stock.MixedOp):
    def forward(self, x, weights):
        raise RuntimeError("needs a mask\nand more")


class NoK(stock.MixedOp):
    def __init__(self, C, stride):
        super().__init__(C, stride)
        self.mp = nn.MaxPool2d(2, 2)


class Unshuffled(stock.PartialMixedOp):
    def forward(self, x, weights):
        c = x.shape[1] // self.k
        mixed = sum(w * op(x[:, :c]) for w, op in zip(weights, self._ops, strict=True))
        rest = x[:, c:] if mixed.shape[2] == x.shape[2] else self.mp(x[:, c:])
        return torch.cat([mixed, rest], 1)


class AveragePool(stock.PartialMixedOp):
    """Another pool for the bypass; it is part of the module, so ours uses it as well."""

    def __init__(self, C, stride):
        super().__init__(C, stride)
        self.mp = nn.AvgPool2d(2)


class Edges(nn.Module):
    """A few mixed ops in a row: the least that can be a supernet."""

    def __init__(self, *ops):
        super().__init__()
        self.ops = nn.ModuleList(ops)

    def forward(self, x, weights):
        for op in self.ops:
            x = op(x, weights[: len(op._ops)])
        return x
