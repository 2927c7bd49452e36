# SPDX-License-Identifier: Apache-2.0
"""The blocks of derived networks of the MBConv space."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Generator

from fastnas.spaces.blocks import (
    Block,
    BlockPlan,
    BlockRules,
    MixedEdge,
    NetworkShape,
)
from fastnas.spaces.mbconv.genotype import Genotype, MBBlock
from fastnas.spaces.mbconv.layers import ConvLayer, LinearLayer
from fastnas.spaces.mbconv.layout import Layout, MBConvOptions
from fastnas.spaces.mbconv.network import Network, build_block
from fastnas.spaces.mbconv.supernet import KIND

__all__ = ["RULES", "MBConvShape"]

_BEFORE, _BEHIND = 2, 2
"""Fixed parts before and behind the blocks that are searched."""


@dataclass(frozen=True)
class MBConvShape(MBConvOptions, NetworkShape):
    """What decides the shapes in a derived network.

    Raises:
        ValueError: a number out of its range.
    """

    def __post_init__(self) -> None:
        """Check the numbers."""
        NetworkShape.__post_init__(self)
        MBConvOptions.__post_init__(self)

    @property
    def widths(self) -> Layout:
        """All widths."""
        return self.layout(self.in_channels, self.num_classes)


def plan(shape: MBConvShape) -> BlockPlan:
    """All blocks of derived networks: a mixed edge for each block that is searched."""
    layout, size = shape.widths, shape.image_size
    blocks: dict[str, Block] = {}

    def enter(block: Block | None) -> str | None:
        return None if block is None else blocks.setdefault(block.key, block).key

    # The fixed parts, and where the blocks are, do not depend on the candidates.
    chain = list(_chain(Genotype.build(layout, [p.candidates[0] for p in layout.places]), size))
    fixed = [block for block in (*chain[:_BEFORE], *chain[-_BEHIND:]) if block is not None]
    for block in fixed:
        enter(block)
    edges = []
    size = _strided(size, layout.stem_stride)
    for row, place in enumerate(layout.places):
        candidates = (_mb_block(MBBlock.at(place, name), size) for name in place.candidates)
        edges.append(MixedEdge(KIND, row, tuple(map(enter, candidates))))
        size = _strided(size, place.stride)
    return BlockPlan(blocks, tuple(edges), tuple(block.key for block in fixed))


def keys(genotype: Genotype, shape: MBConvShape) -> tuple[str, ...]:
    """The blocks of ``Network(genotype)``.

    Raises:
        ValueError: the genotype has other widths than networks of this shape.
    """
    genotype = genotype.adapt(shape.in_channels, shape.num_classes)
    layout = shape.widths
    if replace(genotype, dropout=0.0) != Genotype.build(layout, genotype.ops):
        raise ValueError(
            "genotype: its widths are not those of these options (width_multiplier, "
            "stage_channels, stage_blocks, ...)"
        )
    found = _chain(genotype, shape.image_size)
    return tuple(block.key for block in found if block is not None)


def network(genotype: Genotype, shape: MBConvShape) -> Network:
    """The derived network for images of a shape, newly initialised."""
    return Network(genotype, shape.num_classes, shape.in_channels)


def sample(shape: MBConvShape, generator: Generator) -> Genotype:
    """One of the candidates of every block, all alike."""
    layout = shape.widths
    ops = [
        place.candidates[int(torch.randint(len(place.candidates), (), generator=generator))]
        for place in layout.places
    ]
    return Genotype.build(layout, ops)


RULES = BlockRules(MBConvShape, plan, keys, network, sample)


def _chain(genotype: Genotype, size: int) -> Iterator[Block | None]:
    """Stem, blocks (None for a skipped one), 1x1 convolution, classifier."""
    stem, head = genotype.stem_channels, genotype.head_channels
    inputs = (genotype.in_channels, size, size)
    size = _strided(size, genotype.stem_stride)
    yield Block.of(
        "stem",
        inputs,
        (stem, size, size),
        partial(ConvLayer, genotype.in_channels, stem, 3, genotype.stem_stride),
    )
    for block in genotype.blocks:
        yield _mb_block(block, size)
        size = _strided(size, block.stride)
    width = genotype.blocks[-1].out_channels
    yield Block.of(
        "feature_mix", (width, size, size), (head, size, size), partial(ConvLayer, width, head, 1)
    )
    yield Block.of(
        "classifier",
        (head, size, size),
        (genotype.num_classes,),
        partial(LinearLayer, head, genotype.num_classes),
    )


def _mb_block(block: MBBlock, size: int) -> Block | None:
    if block.skipped:
        return None
    after = _strided(size, block.stride)
    return Block.of(
        "mbconv",
        (block.in_channels, size, size),
        (block.out_channels, after, after),
        partial(build_block, block),
        expand=f"{block.expand_ratio:g}",
        kernel=block.kernel_size,
        stride=block.stride,
        skip=int(block.residual),
    )


def _strided(size: int, stride: int) -> int:
    """Rows that a convolution with an odd kernel and half of it as padding leaves."""
    return (size - 1) // stride + 1
