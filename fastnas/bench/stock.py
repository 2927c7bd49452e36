# SPDX-License-Identifier: Apache-2.0
"""The supernets of DARTS and PC-DARTS as the papers write them, in plain PyTorch.

What fastnas is measured against: every edge computes ``sum_k w_k * candidate_k(x)``, every node
sums its edges (arXiv 1806.09055, equation 2; 1907.05737, equations 1 and 3). Known waste of the
published code is left out, so that no gain is its removal: a mixed op runs once per forward, the
architecture weights are normalised once per forward and not once per cell, and sums do not start
from zero. State dicts interchange with ``fastnas.spaces.darts.Supernet``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor, nn

from fastnas.nn.candidates import DARTS_PRIMITIVES, build_candidate
from fastnas.spaces.base import CellWeights
from fastnas.spaces.darts.backbone import LayerPlan, Stemmed, plan_layers, preprocess_layers

__all__ = ["StockMixedOp", "StockPartialMixedOp", "StockSupernet"]

_STEPS = 4
_STEM_MULTIPLIER = 3


class StockMixedOp(nn.Module):
    """All candidates of an edge, each multiplied by its weight, added up."""

    def __init__(self, C: int, stride: int) -> None:
        """Build the eight candidates of DARTS; pools are followed by a BatchNorm."""
        super().__init__()
        self._ops = nn.ModuleList()
        for name in DARTS_PRIMITIVES:
            candidate = build_candidate(name, C, stride)
            if "pool" in name:
                candidate = nn.Sequential(candidate, nn.BatchNorm2d(C, affine=False))
            self._ops.append(candidate)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` and ``[8]`` to ``(N, C, H', W')``."""
        return reduce(add, [w * op(x) for w, op in zip(weights, self._ops, strict=True)])


class StockPartialMixedOp(StockMixedOp):
    """One channel in k is mixed, the others pass by, pooled at stride 2; then a channel shuffle."""

    def __init__(self, C: int, stride: int, k: int) -> None:
        """Build the candidates for ``C / k`` channels."""
        super().__init__(C // k, stride)
        self.k = k
        self.mp = nn.MaxPool2d(2, 2)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` and ``[8]`` to ``(N, C, H', W')``."""
        c = x.shape[1] // self.k
        mixed, rest = super().forward(x[:, :c], weights), x[:, c:]
        if mixed.shape[2] != x.shape[2]:
            rest = self.mp(rest)
        z = torch.cat([mixed, rest], 1)
        N, C, H, W = z.shape
        return z.reshape(N, self.k, C // self.k, H, W).transpose(1, 2).reshape(N, C, H, W)


class _Cell(nn.Module):
    """Two inputs and four nodes, each the sum of a mixed op of every state before it."""

    def __init__(self, plan: LayerPlan, partial_channels: int) -> None:
        super().__init__()
        self.reduction = plan.reduction
        self.preprocess0, self.preprocess1 = preprocess_layers(plan, affine=False)
        self._ops = nn.ModuleList()
        for node in range(_STEPS):
            for source in range(2 + node):
                stride = 2 if plan.reduction and source < 2 else 1
                self._ops.append(
                    StockMixedOp(plan.C, stride)
                    if partial_channels == 1
                    else StockPartialMixedOp(plan.C, stride, partial_channels)
                )

    def forward(self, s0: Tensor, s1: Tensor, weights: CellWeights) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        rows, ops = weights.ops.unbind(0), list(self._ops)
        factors = None if weights.edges is None else weights.edges.unbind(0)
        for _ in range(_STEPS):
            states.append(self._node(states, ops, rows, factors))
            done = len(states) - 1
            ops, rows = ops[done:], rows[done:]
            factors = None if factors is None else factors[done:]
        return torch.cat(states[-_STEPS:], dim=1)

    @staticmethod
    def _node(
        states: Sequence[Tensor],
        ops: Sequence[nn.Module],
        rows: Sequence[Tensor],
        factors: Sequence[Tensor] | None,
    ) -> Tensor:
        outputs = [op(x, w) for x, op, w in zip(states, ops, rows, strict=False)]
        if factors is not None:
            outputs = [b * y for b, y in zip(factors, outputs, strict=False)]
        return reduce(add, outputs)


class StockSupernet(Stemmed):
    """The supernet on images of CIFAR's kind; called and built as the one of fastnas is."""

    def __init__(
        self,
        C: int = 16,
        layers: int = 8,
        num_classes: int = 10,
        in_channels: int = 3,
        partial_channels: int = 1,
    ) -> None:
        """Build with PyTorch's default initialisation; see ``fastnas.spaces.darts.Supernet``."""
        super().__init__("cifar", in_channels, C, _STEM_MULTIPLIER, layers)
        plans = plan_layers(C, layers, _STEM_MULTIPLIER * C, "cifar", (_STEPS, _STEPS))
        self.cells = nn.ModuleList(_Cell(plan, partial_channels) for plan in plans)
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(_STEPS * plans[-1].C, num_classes)

    def forward(self, x: Tensor, weights: Mapping[str, CellWeights]) -> Tensor:
        """Map images ``(N, in_channels, H, W)`` to logits ``(N, num_classes)``.

        Args:
            x: images.
            weights: for ``normal`` and ``reduce``, ``ops`` ``[14, 8]`` and ``edges`` ``[14]`` or
                None.
        """
        s0, s1 = self.stem_outputs(x)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, weights["reduce" if cell.reduction else "normal"])
        return self.classifier(self.global_pooling(s1).flatten(1))
