# SPDX-License-Identifier: Apache-2.0
"""Layers of MBConv networks (MobileNetV2, arXiv 1801.04381; ProxylessNAS, section 4.2).

The children have the names of the authors' code.
"""

from __future__ import annotations

import math
from collections import OrderedDict

from torch import Tensor, nn

from fastnas.nn.gated import GatedMixedOp
from fastnas.nn.gates import Gate

__all__ = [
    "BN_EPS",
    "BN_MOMENTUM",
    "ConvLayer",
    "LinearLayer",
    "MBConv",
    "MixedBlock",
    "ResidualBlock",
    "init_weights",
    "set_batch_norms",
]

BN_EPS = 1e-3
BN_MOMENTUM = 0.1


def _layer(
    C_in: int, C_out: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True
) -> OrderedDict[str, nn.Module]:
    """Convolution without bias, BatchNorm and, with ``act``, ReLU6."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(C_in, C_out, kernel, stride, kernel // 2, groups=groups, bias=False),
        bn=nn.BatchNorm2d(C_out, eps=BN_EPS, momentum=BN_MOMENTUM),
    )
    if act:
        layers["act"] = nn.ReLU6()
    return layers


class ConvLayer(nn.Sequential):
    """Convolution, BatchNorm, ReLU6: ``(N, C_in, H, W)`` to ``(N, C_out, H / s, W / s)``."""

    def __init__(self, C_in: int, C_out: int, kernel: int, stride: int = 1) -> None:
        """Build; sizes that the stride does not divide are rounded up."""
        super().__init__(_layer(C_in, C_out, kernel, stride))


class LinearLayer(nn.Module):
    """Global average pooling, dropout and a linear classifier."""

    def __init__(self, C: int, num_classes: int, dropout: float = 0.0) -> None:
        """Build; with ``dropout`` 0 nothing is dropped."""
        super().__init__()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.linear = nn.Linear(C, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, num_classes)``."""
        return self.linear(self.dropout(x.mean((2, 3))))


class MBConv(nn.Module):
    """Inverted bottleneck: 1x1 to ``e C_in`` channels, depthwise k x k, 1x1 without activation."""

    def __init__(
        self,
        C_in: int,
        C_out: int,
        kernel: int,
        stride: int,
        expansion: float,
        mid_channels: int | None = None,
    ) -> None:
        """Build; with an expansion of 1 there is no first convolution.

        Args:
            C_in: channels in.
            C_out: channels out.
            kernel: side of the depthwise convolution, odd.
            stride: of the depthwise convolution.
            expansion: e.
            mid_channels: channels between, instead of ``round(e C_in)``.
        """
        super().__init__()
        mid = round(C_in * expansion) if mid_channels is None else mid_channels
        self.inverted_bottleneck = None if expansion == 1 else nn.Sequential(_layer(C_in, mid, 1))
        self.depth_conv = nn.Sequential(_layer(mid, mid, kernel, stride, groups=mid))
        self.point_linear = nn.Sequential(_layer(mid, C_out, 1, act=False))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C_in, H, W)`` to ``(N, C_out, H / s, W / s)``, rounded up."""
        if self.inverted_bottleneck is not None:
            x = self.inverted_bottleneck(x)
        return self.point_linear(self.depth_conv(x))


class ResidualBlock(nn.Module):
    """A block of a derived network: MBConv, with or without a shortcut; without either, x."""

    def __init__(self, mobile_inverted_conv: MBConv | None, residual: bool) -> None:
        """Take the convolution, None where the block is skipped."""
        super().__init__()
        self.mobile_inverted_conv = mobile_inverted_conv
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C_in, H, W)`` to ``(N, C_out, H / s, W / s)``."""
        if self.mobile_inverted_conv is None:
            return x
        y = self.mobile_inverted_conv(x)
        return x + y if self.residual else y


class MixedBlock(nn.Module):
    """A block of the supernet: all candidates, one of which runs."""

    def __init__(self, candidates: list[nn.Module], residual: bool) -> None:
        """Take the candidates in the order of the columns of alpha."""
        super().__init__()
        self.mobile_inverted_conv = GatedMixedOp(candidates)
        self.residual = residual

    def forward(self, x: Tensor, gate: Gate | Tensor) -> Tensor:
        """Map ``(N, C_in, H, W)`` to ``(N, C_out, H / s, W / s)``; ``gate`` as in GatedMixedOp."""
        return self.mobile_inverted_conv(x, gate, residual=self.residual)


def init_weights(module: nn.Module) -> None:
    """Initialise as the released code does.

    Convolutions from N(0, 2 / (k^2 C_out)), He's rule over the outputs; BatchNorm 1 and 0; the
    classifier from U(-1 / sqrt(C), 1 / sqrt(C)), bias 0.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            kernel = layer.kernel_size[0] * layer.kernel_size[1]
            nn.init.normal_(layer.weight, 0.0, math.sqrt(2.0 / (kernel * layer.out_channels)))
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Linear):
            bound = 1 / math.sqrt(layer.in_features)
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.zeros_(layer.bias)


def set_batch_norms(module: nn.Module, momentum: float, eps: float) -> None:
    """Give all BatchNorms these settings."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum, layer.eps = momentum, eps
