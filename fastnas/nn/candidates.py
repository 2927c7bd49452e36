# SPDX-License-Identifier: Apache-2.0
"""Candidate operations of the DARTS cell, and the registry that builds them by name.

Structure as in DARTS (Liu et al., ICLR 2019, section 3.1.1): convolutions carry no bias, a
separable convolution is applied twice, a dilated one once. The child names (``op``, ``conv_1``,
``conv_2``, ``bn``) are those of the published code, so that its state dicts load strictly.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastnas.nn.pool import AvgPool2d

__all__ = [
    "DARTS_PRIMITIVES",
    "DilConv",
    "FactorizedReduce",
    "ReLUConvBN",
    "SepConv",
    "Zero",
    "build_candidate",
    "candidate_names",
    "register_candidate",
]

DARTS_PRIMITIVES: tuple[str, ...] = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
"""The eight candidates of an edge; the order is the column order of alpha."""

CandidateFactory = Callable[[int, int, bool], nn.Module]
"""Builds a candidate from (channels, stride, affine)."""

_FACTORIES: dict[str, CandidateFactory] = {}


class Zero(nn.Module):
    """The candidate ``none``: zeros of the shape that the other candidates return.

    It multiplies by zero instead of creating zeros, as the published code does: a NaN or an
    infinity in the input stays visible.
    """

    def __init__(self, stride: int) -> None:
        """Take the stride: 1, or 2 to keep rows and columns 0, 2, 4, ... only."""
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to zeros ``(N, C, ceil(H / stride), ceil(W / stride))``."""
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        return x.mul(0.0)

    def extra_repr(self) -> str:
        """Show the stride."""
        return f"stride={self.stride}"


class FactorizedReduce(nn.Module):
    """Halve height and width without losing every second pixel.

    Two 1x1 convolutions of stride 2, the second on the input shifted by one row and one column,
    concatenated on the channels, then BatchNorm. Height and width must be even.
    """

    def __init__(self, C_in: int, C_out: int, affine: bool = True) -> None:
        """Build for ``C_in`` input and ``C_out`` (even) output channels.

        Raises:
            ValueError: ``C_out`` is odd.
        """
        super().__init__()
        if C_out % 2:
            raise ValueError(
                f"FactorizedReduce: C_out must be even (two halves are concatenated), got {C_out}"
            )
        self.relu = nn.ReLU()
        self.conv_1 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(C_out, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C_in, H, W)`` to ``(N, C_out, H / 2, W / 2)``.

        Raises:
            ValueError: height or width is odd.
        """
        if x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(
                "FactorizedReduce: height and width must be even, got "
                f"{x.shape[2]}x{x.shape[3]}; pad or resize the images"
            )
        x = self.relu(x)
        out = torch.cat([self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])], dim=1)
        return self.bn(out)


class ReLUConvBN(nn.Module):
    """ReLU, convolution, BatchNorm: ``(N, C_in, H, W)`` to ``(N, C_out, H', W')``."""

    def __init__(
        self,
        C_in: int,
        C_out: int,
        kernel_size: int,
        stride: int,
        padding: int,
        affine: bool = True,
        bias: bool = False,
    ) -> None:
        """Build; ``affine`` says whether the BatchNorm learns a scale and a shift."""
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(C_in, C_out, kernel_size, stride=stride, padding=padding, bias=bias),
            nn.BatchNorm2d(C_out, affine=affine),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the three layers."""
        return self.op(x)


class DilConv(nn.Module):
    """ReLU, dilated depthwise convolution, pointwise convolution, BatchNorm; applied once."""

    def __init__(
        self,
        C_in: int,
        C_out: int,
        kernel_size: int,
        stride: int,
        padding: int,
        dilation: int,
        affine: bool = True,
    ) -> None:
        """Build; ``padding = dilation * (kernel_size // 2)`` keeps the size at stride 1."""
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(
                C_in,
                C_in,
                kernel_size,
                stride=stride,
                padding=padding,
                dilation=dilation,
                groups=C_in,
                bias=False,
            ),
            nn.Conv2d(C_in, C_out, 1, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C_in, H, W)`` to ``(N, C_out, ceil(H / stride), ceil(W / stride))``."""
        return self.op(x)


class SepConv(nn.Module):
    """Depthwise separable convolution, applied twice; the stride is that of the first only."""

    def __init__(
        self,
        C_in: int,
        C_out: int,
        kernel_size: int,
        stride: int,
        padding: int,
        affine: bool = True,
    ) -> None:
        """Build; ``padding = kernel_size // 2`` keeps the size at stride 1."""
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(
                C_in, C_in, kernel_size, stride=stride, padding=padding, groups=C_in, bias=False
            ),
            nn.Conv2d(C_in, C_in, 1, bias=False),
            nn.BatchNorm2d(C_in, affine=affine),
            nn.ReLU(),
            nn.Conv2d(C_in, C_in, kernel_size, padding=padding, groups=C_in, bias=False),
            nn.Conv2d(C_in, C_out, 1, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C_in, H, W)`` to ``(N, C_out, ceil(H / stride), ceil(W / stride))``."""
        return self.op(x)


def register_candidate(name: str) -> Callable[[CandidateFactory], CandidateFactory]:
    """Decorate a factory ``(C, stride, affine) -> nn.Module`` to make it buildable by name.

    The module maps ``(N, C, H, W)`` to ``(N, C, ceil(H / stride), ceil(W / stride))``.

    Raises:
        ValueError: the name is empty or already taken.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"register_candidate: name must be a non-empty string, got {name!r}")
    if name in _FACTORIES:
        raise ValueError(f"register_candidate: the name {name!r} is already taken")

    def register(factory: CandidateFactory) -> CandidateFactory:
        _FACTORIES[name] = factory
        return factory

    return register


def candidate_names() -> tuple[str, ...]:
    """Return the names that ``build_candidate`` knows, in order of registration."""
    return tuple(_FACTORIES)


def build_candidate(name: str, C: int, stride: int, affine: bool = False) -> nn.Module:
    """Build one candidate operation for an edge of ``C`` channels.

    Pools come bare: a mixed op follows them by a BatchNorm, a derived network does not
    (DARTS, section 3.1.1 and appendix A.1.1).

    Args:
        name: a registered name, see ``candidate_names``.
        C: channels, in and out; even where ``skip_connect`` has stride 2.
        stride: 1, or 2 for the edges of a reduction cell that leave the cell's inputs.
        affine: whether BatchNorms learn scale and shift (no in search, yes in evaluation).

    Raises:
        ValueError: unknown name, ``C`` below 1, a stride other than 1 and 2.
    """
    factory = _FACTORIES.get(name) if isinstance(name, str) else None
    if factory is None:
        raise ValueError(
            f"build_candidate: unknown candidate {name!r}, known are {', '.join(_FACTORIES)}"
        )
    if isinstance(C, bool) or not isinstance(C, int) or C < 1:
        raise ValueError(f"build_candidate: C must be a positive integer, got {C!r}")
    if stride not in (1, 2):
        raise ValueError(f"build_candidate: stride must be 1 or 2, got {stride!r}")
    return factory(C, stride, affine)


@register_candidate("none")
def _none(C: int, stride: int, affine: bool) -> nn.Module:
    return Zero(stride)


@register_candidate("max_pool_3x3")
def _max_pool_3x3(C: int, stride: int, affine: bool) -> nn.Module:
    return nn.MaxPool2d(3, stride=stride, padding=1)


@register_candidate("avg_pool_3x3")
def _avg_pool_3x3(C: int, stride: int, affine: bool) -> nn.Module:
    return AvgPool2d(3, stride=stride, padding=1, count_include_pad=False)


@register_candidate("skip_connect")
def _skip_connect(C: int, stride: int, affine: bool) -> nn.Module:
    return nn.Identity() if stride == 1 else FactorizedReduce(C, C, affine=affine)


@register_candidate("sep_conv_3x3")
def _sep_conv_3x3(C: int, stride: int, affine: bool) -> nn.Module:
    return SepConv(C, C, 3, stride, 1, affine=affine)


@register_candidate("sep_conv_5x5")
def _sep_conv_5x5(C: int, stride: int, affine: bool) -> nn.Module:
    return SepConv(C, C, 5, stride, 2, affine=affine)


@register_candidate("sep_conv_7x7")
def _sep_conv_7x7(C: int, stride: int, affine: bool) -> nn.Module:
    return SepConv(C, C, 7, stride, 3, affine=affine)


@register_candidate("dil_conv_3x3")
def _dil_conv_3x3(C: int, stride: int, affine: bool) -> nn.Module:
    return DilConv(C, C, 3, stride, 2, 2, affine=affine)


@register_candidate("dil_conv_5x5")
def _dil_conv_5x5(C: int, stride: int, affine: bool) -> nn.Module:
    return DilConv(C, C, 5, stride, 4, 2, affine=affine)


@register_candidate("conv_7x1_1x7")
def _conv_7x1_1x7(C: int, stride: int, affine: bool) -> nn.Module:
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(C, C, (1, 7), stride=(1, stride), padding=(0, 3), bias=False),
        nn.Conv2d(C, C, (7, 1), stride=(stride, 1), padding=(3, 0), bias=False),
        nn.BatchNorm2d(C, affine=affine),
    )


# Those of NAS-Bench-201 (Dong and Yang, ICLR 2020): convolutions with a bias exactly where the
# BatchNorm has no shift of its own, which is in search.
@register_candidate("nor_conv_1x1")
def _nor_conv_1x1(C: int, stride: int, affine: bool) -> nn.Module:
    return ReLUConvBN(C, C, 1, stride, 0, affine=affine, bias=not affine)


@register_candidate("nor_conv_3x3")
def _nor_conv_3x3(C: int, stride: int, affine: bool) -> nn.Module:
    return ReLUConvBN(C, C, 3, stride, 1, affine=affine, bias=not affine)
