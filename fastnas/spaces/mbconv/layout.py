# SPDX-License-Identifier: Apache-2.0
"""Where the blocks of an MBConv network stand, and how wide they are.

ProxylessNAS (Cai et al., ICLR 2019), section 4.2: a stem, a fixed block, stages of blocks that are
searched, and a head. The numbers that are not in the paper are those of its released code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from fastnas.spaces.base import SpaceOptions, check_positive

__all__ = [
    "PRIMITIVES",
    "ZERO",
    "Layout",
    "MBConvOptions",
    "Place",
    "kernel_and_expansion",
    "round_width",
]

ZERO = "Zero"
"""The candidate that skips a block."""

PRIMITIVES: tuple[str, ...] = (
    "3x3_MBConv3",
    "3x3_MBConv6",
    "5x5_MBConv3",
    "5x5_MBConv6",
    "7x7_MBConv3",
    "7x7_MBConv6",
    ZERO,
)
"""The candidates of a block, kernel and expansion ratio; the order is the column order of alpha.

``Zero`` comes last: blocks that cannot be skipped do without it.
"""


def kernel_and_expansion(name: str) -> tuple[int, int]:
    """``(5, 3)`` for ``5x5_MBConv3``."""
    kernel, _, expansion = name.partition("_MBConv")
    return int(kernel.partition("x")[0]), int(expansion)


def round_width(channels: float) -> int:
    """The nearest multiple of 8, at least 8, and not more than a tenth below ``channels``."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class Place(NamedTuple):
    """One block that is searched.

    Attributes:
        in_channels: channels that enter.
        out_channels: channels that leave.
        stride: 1 or 2.
    """

    in_channels: int
    out_channels: int
    stride: int

    @property
    def residual(self) -> bool:
        """Whether the block has a shortcut, and may be skipped: its output has its input's form."""
        return self.stride == 1 and self.in_channels == self.out_channels

    @property
    def candidates(self) -> tuple[str, ...]:
        """Names of the candidates that may stand here."""
        return PRIMITIVES if self.residual else PRIMITIVES[:-1]


@dataclass(frozen=True)
class Layout:
    """All widths of a network; only the candidates are open.

    Attributes:
        in_channels: channels of the images.
        stem_channels: channels that leave the stem, a 3x3 convolution.
        stem_stride: its stride.
        first_channels: channels that leave the fixed block, a 3x3 MBConv without expansion.
        places: the blocks that are searched.
        head_channels: channels of the 1x1 convolution before the classifier.
        num_classes: width of the classifier.
    """

    in_channels: int
    stem_channels: int
    stem_stride: int
    first_channels: int
    places: tuple[Place, ...]
    head_channels: int
    num_classes: int


@dataclass(frozen=True)
class MBConvOptions(SpaceOptions):
    """What can be chosen of the space ``mbconv``; the defaults are those for ImageNet.

    Raises:
        ValueError: a number out of its range, or stages of different numbers.
    """

    width_multiplier: float = 1.0
    """Factor of all channels; the head's only where it is above 1."""
    stem_channels: int = 32
    """Channels of the stem, a 3x3 convolution, before the multiplier."""
    stem_stride: int = 2
    """Stride of the stem; 1 for small images."""
    first_channels: int = 16
    """Channels of the fixed block behind the stem."""
    stage_channels: tuple[int, ...] = (24, 40, 80, 96, 192, 320)
    """Channels of each stage."""
    stage_blocks: tuple[int, ...] = (4, 4, 4, 4, 4, 1)
    """Blocks of each stage, all of them searched."""
    stage_strides: tuple[int, ...] = (2, 2, 2, 1, 2, 1)
    """Stride of the first block of each stage."""
    head_channels: int = 1280
    """Channels of the 1x1 convolution before the classifier."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not 0 < self.width_multiplier < math.inf:
            raise ValueError(
                f"width_multiplier must be a positive number, got {self.width_multiplier!r}"
            )
        for name in ("stem_channels", "stem_stride", "first_channels", "head_channels"):
            check_positive(**{name: getattr(self, name)})
        stages = len(self.stage_channels)
        for name in ("stage_channels", "stage_blocks", "stage_strides"):
            values = getattr(self, name)
            for number, value in enumerate(values):
                check_positive(**{f"{name}[{number}]": value})
            if len(values) != stages or not stages:
                raise ValueError(
                    "stage_channels, stage_blocks and stage_strides must have one number for each "
                    f"stage, got {stages}, {len(self.stage_blocks)} and {len(self.stage_strides)}"
                )
        for name, value in (
            ("stem_stride", self.stem_stride),
            *((f"stage_strides[{i}]", s) for i, s in enumerate(self.stage_strides)),
        ):
            if value > 2:
                raise ValueError(f"{name} must be 1 or 2, got {value}")

    def layout(self, in_channels: int, num_classes: int) -> Layout:
        """All widths of a network for such images.

        Raises:
            ValueError: a number that is not positive.
        """
        check_positive(in_channels=in_channels, num_classes=num_classes)

        def scaled(channels: int) -> int:
            return round_width(channels * self.width_multiplier)

        places = []
        width = first = scaled(self.first_channels)
        stages = zip(self.stage_channels, self.stage_blocks, self.stage_strides, strict=True)
        for channels, blocks, stride in stages:
            for number in range(blocks):
                out = scaled(channels)
                places.append(Place(width, out, stride if number == 0 else 1))
                width = out
        head = self.head_channels
        return Layout(
            in_channels,
            scaled(self.stem_channels),
            self.stem_stride,
            first,
            tuple(places),
            round_width(head * max(1.0, self.width_multiplier)),
            num_classes,
        )
