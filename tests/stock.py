# SPDX-License-Identifier: Apache-2.0
"""The stock formula: mixed ops and supernets of DARTS and PC-DARTS in plain PyTorch.

What fastnas is compared with, in results and in time. Written from the descriptions in the papers
(arXiv 1806.09055 and 1907.05737) in the module tree and with the attribute names that the published
code made common, so that state dicts have the common keys. Known waste of the published code is
fixed here, so that it cannot be counted as a gain: each mixed op runs once per forward, and the
architecture weights are normalised once per forward, not once per cell.

One file without imports from this project: the benchmarks load it by its path.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PRIMITIVES = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)


class Zero(nn.Module):
    """The candidate `none`."""

    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        return x[:, :, :: self.stride, :: self.stride].mul(0.0)


class Identity(nn.Module):
    """The candidate `skip_connect` at stride 1."""

    def forward(self, x):
        return x


class FactorizedReduce(nn.Module):
    """The candidate `skip_connect` at stride 2: every pixel is seen by one of two convolutions."""

    def __init__(self, C_in, C_out, affine=True):
        super().__init__()
        half = C_out // 2
        self.relu = nn.ReLU()
        self.conv_1 = nn.Conv2d(C_in, half, kernel_size=1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(C_in, half, kernel_size=1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(C_out, affine=affine)

    def forward(self, x):
        x = self.relu(x)
        shifted = x[:, :, 1:, 1:]
        return self.bn(torch.cat([self.conv_1(x), self.conv_2(shifted)], 1))


class ReLUConvBN(nn.Module):
    def __init__(self, C_in, C_out, kernel_size, stride, padding, affine=True):
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(C_in, C_out, kernel_size, stride=stride, padding=padding, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )

    def forward(self, x):
        return self.op(x)


def _depthwise(C, kernel_size, stride, dilation):
    padding = dilation * (kernel_size // 2)
    return nn.Conv2d(C, C, kernel_size, stride, padding, dilation=dilation, groups=C, bias=False)


class DilConv(nn.Module):
    """Dilated depthwise and pointwise convolution, once."""

    def __init__(self, C, kernel_size, stride, affine=True):
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            _depthwise(C, kernel_size, stride, dilation=2),
            nn.Conv2d(C, C, kernel_size=1, bias=False),
            nn.BatchNorm2d(C, affine=affine),
        )

    def forward(self, x):
        return self.op(x)


class SepConv(nn.Module):
    """Depthwise and pointwise convolution, twice."""

    def __init__(self, C, kernel_size, stride, affine=True):
        super().__init__()
        layers = []
        for s in (stride, 1):
            layers += [
                nn.ReLU(),
                _depthwise(C, kernel_size, s, dilation=1),
                nn.Conv2d(C, C, kernel_size=1, bias=False),
                nn.BatchNorm2d(C, affine=affine),
            ]
        self.op = nn.Sequential(*layers)

    def forward(self, x):
        return self.op(x)


OPS = {
    "none": lambda C, stride, affine: Zero(stride),
    "max_pool_3x3": lambda C, stride, affine: nn.MaxPool2d(3, stride=stride, padding=1),
    "avg_pool_3x3": lambda C, stride, affine: nn.AvgPool2d(
        3, stride=stride, padding=1, count_include_pad=False
    ),
    "skip_connect": lambda C, stride, affine: (
        Identity() if stride == 1 else FactorizedReduce(C, C, affine)
    ),
    "sep_conv_3x3": lambda C, stride, affine: SepConv(C, 3, stride, affine),
    "sep_conv_5x5": lambda C, stride, affine: SepConv(C, 5, stride, affine),
    "dil_conv_3x3": lambda C, stride, affine: DilConv(C, 3, stride, affine),
    "dil_conv_5x5": lambda C, stride, affine: DilConv(C, 5, stride, affine),
}


def candidates(C, stride, primitives=PRIMITIVES):
    """The ModuleList `_ops` of a mixed op; pools are followed by a BatchNorm, in search only."""
    ops = nn.ModuleList()
    for name in primitives:
        op = OPS[name](C, stride, False)
        if "pool" in name:
            op = nn.Sequential(op, nn.BatchNorm2d(C, affine=False))
        ops.append(op)
    return ops


class MixedOp(nn.Module):
    """The weighted sum of all candidates of an edge."""

    def __init__(self, C, stride, primitives=PRIMITIVES):
        super().__init__()
        self._ops = candidates(C, stride, primitives)

    def forward(self, x, weights):
        return sum(w * op(x) for w, op in zip(weights, self._ops, strict=True))


def channel_shuffle(x, groups):
    """`out[:, o] = x[:, (o % groups) * (C / groups) + o // groups]`; a copy, as published."""
    N, C, H, W = x.shape
    return x.reshape(N, groups, C // groups, H, W).transpose(1, 2).reshape(N, C, H, W)


class PartialMixedOp(nn.Module):
    """The mixed op of PC-DARTS: one channel in k is mixed, the others pass by, then a shuffle."""

    def __init__(self, C, stride, k=4, primitives=PRIMITIVES):
        super().__init__()
        self.mp = nn.MaxPool2d(2, 2)
        self.k = k
        self._ops = candidates(C // k, stride, primitives)

    def forward(self, x, weights):
        c = x.shape[1] // self.k
        part, rest = x[:, :c], x[:, c:]
        mixed = sum(w * op(part) for w, op in zip(weights, self._ops, strict=True))
        if mixed.shape[2] != x.shape[2]:
            rest = self.mp(rest)
        return channel_shuffle(torch.cat([mixed, rest], 1), self.k)


class Cell(nn.Module):
    """Two inputs and `steps` nodes; a node sums a mixed op of every state before it."""

    def __init__(self, steps, multiplier, C_pp, C_p, C, reduction, reduction_prev, k=1):
        super().__init__()
        self.reduction = reduction
        if reduction_prev:
            self.preprocess0 = FactorizedReduce(C_pp, C, affine=False)
        else:
            self.preprocess0 = ReLUConvBN(C_pp, C, 1, 1, 0, affine=False)
        self.preprocess1 = ReLUConvBN(C_p, C, 1, 1, 0, affine=False)
        self._steps = steps
        self._multiplier = multiplier
        self._ops = nn.ModuleList()
        for i in range(steps):
            for j in range(2 + i):
                stride = 2 if reduction and j < 2 else 1
                self._ops.append(PartialMixedOp(C, stride, k) if k > 1 else MixedOp(C, stride))

    def forward(self, s0, s1, weights, edge_weights=None):
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        edge = 0
        for _ in range(self._steps):
            node = 0
            for h in states:
                out = self._ops[edge](h, weights[edge])
                node = node + (out if edge_weights is None else edge_weights[edge] * out)
                edge += 1
            states.append(node)
        return torch.cat(states[-self._multiplier :], dim=1)


class Network(nn.Module):
    """The supernet: DARTS with `k = 1`, PC-DARTS (with edge normalisation) with `k > 1`.

    Alphas and betas are plain attributes, as published: they are in `arch_parameters()`, not in the
    state dict.
    """

    def __init__(self, C=16, num_classes=10, layers=8, k=1, steps=4, multiplier=4, in_channels=3):
        super().__init__()
        self._steps = steps
        self._k = k
        C_stem = 3 * C
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, C_stem, 3, padding=1, bias=False), nn.BatchNorm2d(C_stem)
        )
        C_pp, C_p, C_now = C_stem, C_stem, C
        self.cells = nn.ModuleList()
        reduction_prev = False
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            if reduction:
                C_now *= 2
            cell = Cell(steps, multiplier, C_pp, C_p, C_now, reduction, reduction_prev, k)
            self.cells.append(cell)
            reduction_prev = reduction
            C_pp, C_p = C_p, multiplier * C_now
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(C_p, num_classes)
        edges = sum(2 + i for i in range(steps))
        self.alphas_normal = 1e-3 * torch.randn(edges, len(PRIMITIVES))
        self.alphas_reduce = 1e-3 * torch.randn(edges, len(PRIMITIVES))
        self.betas_normal = 1e-3 * torch.randn(edges)
        self.betas_reduce = 1e-3 * torch.randn(edges)
        for parameter in self.arch_parameters():
            parameter.requires_grad_()

    def arch_parameters(self):
        alphas = [self.alphas_normal, self.alphas_reduce]
        return alphas if self._k == 1 else [*alphas, self.betas_normal, self.betas_reduce]

    def _edge_weights(self, betas):
        if self._k == 1:
            return None
        return torch.cat(
            [F.softmax(b, -1) for b in betas.split([2 + i for i in range(self._steps)])]
        )

    def forward(self, x: Tensor) -> Tensor:
        weights = {
            False: (F.softmax(self.alphas_normal, -1), self._edge_weights(self.betas_normal)),
            True: (F.softmax(self.alphas_reduce, -1), self._edge_weights(self.betas_reduce)),
        }
        s0 = s1 = self.stem(x)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, *weights[cell.reduction])
        return self.classifier(self.global_pooling(s1).flatten(1))
