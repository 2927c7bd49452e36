# SPDX-License-Identifier: Apache-2.0
"""Architectures of the MBConv space: what a search finds, as a value and as a JSON file.

The file is the ``net.config`` of the released code of ProxylessNAS, see ``form``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from fastnas.spaces.genotype_file import JSONGenotype
from fastnas.spaces.mbconv.form import read_network, write_network
from fastnas.spaces.mbconv.layers import BN_EPS, BN_MOMENTUM
from fastnas.spaces.mbconv.layout import ZERO, Layout, Place, kernel_and_expansion

__all__ = ["Genotype", "MBBlock"]


@dataclass(frozen=True)
class MBBlock:
    """One block: an MBConv, or nothing.

    Attributes:
        in_channels: channels in.
        out_channels: channels out.
        stride: 1 or 2.
        kernel_size: side of the depthwise convolution; 0 where the block is skipped.
        expand_ratio: channels between by channels in; 0 where the block is skipped.
        residual: whether there is a shortcut around it.
        mid_channels: channels between, where they are not ``round(expand_ratio in_channels)``.
    """

    in_channels: int
    out_channels: int
    stride: int
    kernel_size: int
    expand_ratio: float
    residual: bool
    mid_channels: int | None = None

    @classmethod
    def at(cls, place: Place, name: str) -> MBBlock:
        """The block that a candidate makes at a place."""
        kernel, expansion = (0, 0) if name == ZERO else kernel_and_expansion(name)
        return cls(*place, kernel, expansion, place.residual)

    @property
    def skipped(self) -> bool:
        """Whether the block is the identity."""
        return self.kernel_size == 0

    @property
    def op(self) -> str:
        """Name of the candidate: ``5x5_MBConv3``, or ``Zero`` for a skipped block."""
        k = self.kernel_size
        return ZERO if self.skipped else f"{k}x{k}_MBConv{self.expand_ratio:g}"


@dataclass(frozen=True)
class Genotype(JSONGenotype):
    """A whole network: stem, blocks, head, with all widths.

    Attributes:
        in_channels: channels of the images.
        stem_channels: channels that leave the stem.
        stem_stride: its stride.
        blocks: all blocks; the first one is not searched.
        head_channels: channels of the 1x1 convolution before the classifier.
        num_classes: width of the classifier.
        dropout: rate before the classifier.
        bn_momentum: momentum of all BatchNorms.
        bn_eps: their epsilon.

    Raises:
        ValueError: a block does not take what the one before gives, or has a shortcut (or is
            skipped) where its output differs in shape from its input.
    """

    in_channels: int
    stem_channels: int
    stem_stride: int
    blocks: tuple[MBBlock, ...]
    head_channels: int
    num_classes: int
    dropout: float = 0.0
    bn_momentum: float = BN_MOMENTUM
    bn_eps: float = BN_EPS

    MAX_TEXT: ClassVar[int] = 1_000_000
    """A real one has about 15,000."""

    def __post_init__(self) -> None:
        """Check that the blocks fit each other."""
        width = self.stem_channels
        for number, block in enumerate(self.blocks):
            if block.in_channels != width:
                raise ValueError(
                    f"genotype: blocks[{number}] takes {block.in_channels} channels, "
                    f"but gets {width}"
                )
            width = block.out_channels
            same = block.stride == 1 and block.in_channels == block.out_channels
            if (block.residual or block.skipped) and not same:
                what = "is skipped" if block.skipped else "has a shortcut"
                raise ValueError(
                    f"genotype: blocks[{number}] {what}, but maps {block.in_channels} to "
                    f"{block.out_channels} channels with stride {block.stride}"
                )

    @classmethod
    def build(cls, layout: Layout, ops: Sequence[str]) -> Genotype:
        """The architecture with these candidates at the places of a layout.

        Args:
            layout: all widths.
            ops: names of candidates, one a place.

        Raises:
            ValueError: another number of names than of places, or one that cannot stand there.
        """
        if len(ops) != len(layout.places):
            raise ValueError(
                f"genotype: expected {len(layout.places)} candidates, but got {len(ops)}"
            )
        first = MBBlock(layout.stem_channels, layout.first_channels, 1, 3, 1, False)
        blocks = [first]
        for number, (place, name) in enumerate(zip(layout.places, ops, strict=True)):
            if name not in place.candidates:
                raise ValueError(
                    f"genotype: ops[{number}]: expected one of {', '.join(place.candidates)}, "
                    f"but got {name!r}"
                )
            blocks.append(MBBlock.at(place, name))
        return cls(
            layout.in_channels,
            layout.stem_channels,
            layout.stem_stride,
            tuple(blocks),
            layout.head_channels,
            layout.num_classes,
        )

    @property
    def ops(self) -> tuple[str, ...]:
        """Names of the candidates of all blocks but the first."""
        return tuple(block.op for block in self.blocks[1:])

    def adapt(self, in_channels: int, num_classes: int) -> Genotype:
        """The same architecture for other images."""
        return replace(self, in_channels=in_channels, num_classes=num_classes)

    def __str__(self) -> str:
        """A line: ``stem 32/2, 3x3_MBConv1 16, 5x5_MBConv3 32/2, Zero, ..., head 1280``."""
        stem = f"stem {self.stem_channels}{_stride(self.stem_stride)}"
        blocks = (
            b.op if b.skipped else f"{b.op} {b.out_channels}{_stride(b.stride)}"
            for b in self.blocks
        )
        return ", ".join([stem, *blocks, f"head {self.head_channels}"])

    def to_dict(self, mid_channels: bool = False) -> dict[str, Any]:
        """Return the form of the published files, new dicts and lists throughout.

        Args:
            mid_channels: write ``mid_channels`` also where it is null, as the released search does
                and the published files do not.
        """
        return write_network(self, mid_channels)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Genotype:
        """Build from what ``to_dict``, or the released code, wrote; ``data`` stays as it is.

        Raises:
            ValueError: a key is missing or has a value that no network of this space has; one
                sentence that names the key.
        """
        fields, blocks = read_network(data)
        return cls(blocks=tuple(MBBlock(**block) for block in blocks), **fields)


def _stride(stride: int) -> str:
    return "" if stride == 1 else f"/{stride}"
