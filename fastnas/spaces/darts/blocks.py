# SPDX-License-Identifier: Apache-2.0
"""The blocks of derived networks of the DARTS space."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn

from fastnas.nn.candidates import DARTS_PRIMITIVES, build_candidate
from fastnas.spaces.base import check_positive
from fastnas.spaces.blocks import (
    Block,
    BlockPlan,
    BlockRules,
    MixedEdge,
    NetworkShape,
)
from fastnas.spaces.darts.backbone import (
    LayerPlan,
    Stemmed,
    check_images,
    plan_layers,
    preprocess_layers,
)
from fastnas.spaces.darts.derive import EDGES_PER_NODE
from fastnas.spaces.darts.genotype import Genotype
from fastnas.spaces.darts.network import STEM_MULTIPLIER, Network
from fastnas.spaces.darts.supernet import STEPS

__all__ = ["RULES", "DartsShape"]

_CONCAT = tuple(range(2, 2 + STEPS))


@dataclass(frozen=True)
class DartsShape(NetworkShape):
    """What decides the shapes in a derived network; the defaults are those of ``fastnas eval``.

    Raises:
        ValueError: a number that is not positive, an odd C with the ``imagenet`` stem, or images
            that cannot be halved as often as the network halves them.
    """

    C: int = 8
    """Channels of the first cell's nodes."""
    layers: int = 5
    """Number of cells."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """First layers: cifar keeps the image size, imagenet divides it by eight."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        super().__post_init__()
        check_positive(C=self.C, layers=self.layers)
        if self.stem == "imagenet" and self.C % 2:
            raise ValueError(f"C must be even with the imagenet stem, got {self.C}")
        images = torch.empty(1, self.in_channels, self.image_size, self.image_size, device="meta")
        check_images(images, self.in_channels, self.stem, self.layers)


class NodeSums(nn.Module):
    """What a cell does beside its operations: the sum of two for each node, and their stack."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, 4 C, H, W)``."""
        return torch.cat([x + x for _ in range(STEPS)], dim=1)


class _CellBlocks(NamedTuple):
    """The blocks of one cell.

    Attributes:
        kind: ``normal`` or ``reduce``.
        fixed: what the cell has whatever its operations are.
        ops: for edges out of the cell's inputs, and for those out of its nodes, the block of each
            operation; None for one that does nothing.
    """

    kind: str
    fixed: tuple[Block, ...]
    ops: tuple[dict[str, Block | None], dict[str, Block | None]]


def plan(shape: DartsShape) -> BlockPlan:
    """All blocks of derived networks; the choices are those of a cell, shared by its likes."""
    blocks: dict[str, Block] = {}
    edges: list[MixedEdge] = []

    def enter(block: Block | None) -> str | None:
        return None if block is None else blocks.setdefault(block.key, block).key

    cells = list(_cells(shape))
    fixed = [*_ends(shape), *(block for cell in cells for block in cell.fixed)]
    for block in fixed:
        enter(block)
    for cell in cells:
        sources = [(node, source) for node in range(STEPS) for source in range(2 + node)]
        for row, (node, source) in enumerate(sources):
            ops = cell.ops[source >= 2]
            candidates = tuple(enter(ops[name]) for name in DARTS_PRIMITIVES)
            edges.append(MixedEdge(cell.kind, row, candidates, 2 + node, EDGES_PER_NODE))
    return BlockPlan(blocks, tuple(edges), tuple(block.key for block in fixed))


def keys(genotype: Genotype, shape: DartsShape) -> tuple[str, ...]:
    """The blocks of ``Network(genotype, ...)``.

    Raises:
        ValueError: the genotype has cells of another form, or operations, than a search finds.
    """
    pairs = {"normal": genotype.normal, "reduce": genotype.reduce}
    concats = {"normal": genotype.normal_concat, "reduce": genotype.reduce_concat}
    for kind in pairs:
        nodes = len(genotype.nodes(kind))
        if nodes != STEPS or sorted(concats[kind]) != list(_CONCAT):
            raise ValueError(
                f"genotype: expected {STEPS} nodes in the {kind} cell, all of them its output, but "
                f"got {nodes} and the output {concats[kind]}"
            )
    found = [block.key for block in _ends(shape)]
    for cell in _cells(shape):
        found += [block.key for block in cell.fixed]
        for name, source in pairs[cell.kind]:
            ops = cell.ops[source >= 2]
            if name not in ops:
                raise ValueError(f"genotype: expected one of {', '.join(ops)}, but got {name!r}")
            block = ops[name]
            found += [] if block is None else [block.key]
    return tuple(found)


def network(genotype: Genotype, shape: DartsShape) -> Network:
    """The derived network of a shape, newly initialised."""
    return Network(
        genotype,
        shape.C,
        shape.layers,
        shape.num_classes,
        stem=shape.stem,
        in_channels=shape.in_channels,
    )


def sample(shape: DartsShape, generator: Generator) -> Genotype:
    """Two edges a node, and an operation on each, ``none`` left out: all alike."""
    names = [name for name in DARTS_PRIMITIVES if name != "none"]
    cells = []
    for _ in range(2):
        pairs = []
        for node in range(STEPS):
            sources = torch.randperm(2 + node, generator=generator)[:EDGES_PER_NODE].tolist()
            chosen = torch.randint(len(names), (EDGES_PER_NODE,), generator=generator).tolist()
            pairs += [(names[op], source) for op, source in zip(chosen, sources, strict=True)]
        cells.append(tuple(pairs))
    return Genotype(cells[0], _CONCAT, cells[1], _CONCAT)


RULES = BlockRules(DartsShape, plan, keys, network, sample)


def _multiplier(shape: DartsShape) -> int:
    return 1 if shape.stem == "imagenet" else STEM_MULTIPLIER


def _layers(shape: DartsShape) -> list[LayerPlan]:
    multiplier = _multiplier(shape)
    return plan_layers(
        shape.C, shape.layers, multiplier * shape.C, shape.stem, (len(_CONCAT), len(_CONCAT))
    )


def _ends(shape: DartsShape) -> list[Block]:
    """Stem and classifier."""

    def stem() -> Stemmed:
        multiplier = _multiplier(shape)
        return Stemmed(shape.stem, shape.in_channels, shape.C, multiplier, shape.layers)

    size, width = shape.image_size, _multiplier(shape) * shape.C
    images = (shape.in_channels, size, size)
    if shape.stem == "cifar":
        blocks = [Block.of("stem", images, (width, size, size), lambda: stem().stem)]
    else:
        quarter, eighth = (size + 3) // 4, (size + 7) // 8
        first, second = (width, quarter, quarter), (width, eighth, eighth)
        blocks = [
            Block.of("stem0", images, first, lambda: stem().stem0),
            Block.of("stem1", first, second, lambda: stem().stem1),
        ]
        size = eighth
    layers = _layers(shape)
    size >>= sum(layer.reduction for layer in layers)
    channels = len(_CONCAT) * layers[-1].C
    head = (channels, size, size)
    blocks.append(
        Block.of(
            "classifier",
            head,
            (shape.num_classes,),
            lambda: nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(channels, shape.num_classes)
            ),
        )
    )
    return blocks


def _cells(shape: DartsShape) -> Iterator[_CellBlocks]:
    size = shape.image_size if shape.stem == "cifar" else (shape.image_size + 7) // 8
    for layer in _layers(shape):
        before = 2 * size if layer.reduction_prev else size
        inside = size // 2 if layer.reduction else size
        nodes = (layer.C, inside, inside)
        stride = 2 if layer.reduction else 1
        inputs = _operations((layer.C, size, size), nodes, stride)
        yield _CellBlocks(
            "reduce" if layer.reduction else "normal",
            (
                *_preprocess(layer, before, size),
                Block.of("node_sums", nodes, (len(_CONCAT) * layer.C, inside, inside), NodeSums),
            ),
            (inputs, inputs if stride == 1 else _operations(nodes, nodes, 1)),
        )
        size = inside


def _preprocess(layer: LayerPlan, before: int, size: int) -> tuple[Block, Block]:
    kind = "factorized_reduce" if layer.reduction_prev else "relu_conv_bn"
    out = (layer.C, size, size)
    return (
        Block.of(
            kind,
            (layer.C_prev_prev, before, before),
            out,
            lambda: preprocess_layers(layer, affine=True)[0],
        ),
        Block.of(
            "relu_conv_bn",
            (layer.C_prev, size, size),
            out,
            lambda: preprocess_layers(layer, affine=True)[1],
        ),
    )


def _operations(
    inputs: tuple[int, int, int], outputs: tuple[int, int, int], stride: int
) -> dict[str, Block | None]:
    """The block of each operation of an edge."""
    found: dict[str, Block | None] = {}
    for name in DARTS_PRIMITIVES:
        # An identity is the tensor itself, and ``none`` never reaches a derived network.
        empty = name == "none" or (name == "skip_connect" and stride == 1)
        build = partial(build_candidate, name, inputs[0], stride, affine=True)
        found[name] = None if empty else Block.of(name, inputs, outputs, build, stride=stride)
    return found
