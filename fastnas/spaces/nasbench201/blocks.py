# SPDX-License-Identifier: Apache-2.0
"""The blocks of derived networks of the NAS-Bench-201 space."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial, reduce
from operator import add

import torch
from torch import Generator, Tensor, nn

from fastnas.nn.candidates import build_candidate
from fastnas.spaces.blocks import (
    Block,
    BlockPlan,
    BlockRules,
    MixedEdge,
    NetworkShape,
)
from fastnas.spaces.nasbench201.backbone import ResidualReduction, check_size, plan_cells
from fastnas.spaces.nasbench201.genotype import PRIMITIVES, Genotype, check_nodes
from fastnas.spaces.nasbench201.network import Network
from fastnas.spaces.nasbench201.supernet import KIND

__all__ = ["RULES", "NASBench201Shape"]


@dataclass(frozen=True)
class NASBench201Shape(NetworkShape):
    """What decides the shapes in a derived network.

    Raises:
        ValueError: a number out of its range, or images that cannot be halved twice.
    """

    C: int = 16
    """Channels of the first stage."""
    layers: int = 15
    """Number of cells."""
    nodes: int = 4
    """Nodes of the cell, its input among them."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        super().__post_init__()
        check_nodes(self.nodes)
        plan_cells(self.C, self.layers)
        check_size(self.image_size, self.image_size)

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """Node and source of every edge."""
        return tuple((node, source) for node in range(1, self.nodes) for source in range(node))


class NodeSums(nn.Module):
    """What a cell does beside its operations: the sum at every node of several edges."""

    def __init__(self, nodes: int) -> None:
        """Take the number of nodes, the input among them."""
        super().__init__()
        self.nodes = nodes

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to the same shape."""
        for node in range(2, self.nodes):
            x = reduce(add, [x] * node)
        return x


def plan(shape: NASBench201Shape) -> BlockPlan:
    """All blocks of derived networks; the choices are those of a cell, shared by all cells."""
    blocks: dict[str, Block] = {}

    def enter(block: Block | None) -> str | None:
        return None if block is None else blocks.setdefault(block.key, block).key

    fixed = list(_fixed(shape))
    for block in fixed:
        enter(block)
    edges = [
        MixedEdge(KIND, row, tuple(enter(ops[name]) for name in PRIMITIVES), node, node)
        for ops in _operations(shape)
        for row, (node, _) in enumerate(shape.edges)
    ]
    return BlockPlan(blocks, tuple(edges), tuple(block.key for block in fixed))


def keys(genotype: Genotype, shape: NASBench201Shape) -> tuple[str, ...]:
    """The blocks of ``Network(genotype, ...)``.

    Raises:
        ValueError: the genotype has a cell of other nodes.
    """
    if len(genotype.nodes) + 1 != shape.nodes:
        raise ValueError(
            f"genotype: expected a cell of {shape.nodes} nodes, but got {len(genotype.nodes) + 1}"
        )
    found = [block.key for block in _fixed(shape)]
    for ops in _operations(shape):
        chosen = (ops[name] for name in genotype.ops)
        found += [block.key for block in chosen if block is not None]
    return tuple(found)


def network(genotype: Genotype, shape: NASBench201Shape) -> Network:
    """The derived network of a shape, newly initialised."""
    return Network(genotype, shape.C, shape.layers, shape.num_classes, shape.in_channels)


def sample(shape: NASBench201Shape, generator: Generator) -> Genotype:
    """One of the operations on every edge, all alike."""
    chosen = torch.randint(len(PRIMITIVES), (len(shape.edges),), generator=generator).tolist()
    return Genotype.from_ops([PRIMITIVES[k] for k in chosen])


RULES = BlockRules(NASBench201Shape, plan, keys, network, sample)


def _fixed(shape: NASBench201Shape) -> Iterator[Block]:
    """Stem, residual blocks, sums of the cells, classifier."""
    size, classes = shape.image_size, shape.num_classes
    images = (shape.in_channels, size, size)

    def whole() -> Network:
        """A network with nothing in its cells, to take the ends from."""
        return network(Genotype.from_ops(["none"]), shape)

    yield Block.of("stem", images, (shape.C, size, size), lambda: whole().stem)
    for width, reduction in plan_cells(shape.C, shape.layers):
        if reduction:
            before, size = (width // 2, size, size), size // 2
            build = partial(ResidualReduction, width // 2)
            yield Block.of("residual_reduction", before, (width, size, size), build)
        if shape.nodes > 2:
            inside = (width, size, size)
            sums = partial(NodeSums, shape.nodes)
            yield Block.of("node_sums", inside, inside, sums, nodes=shape.nodes)
    last = (width, size, size)

    def head() -> nn.Module:
        n = whole()
        return nn.Sequential(n.lastact, n.global_pooling, nn.Flatten(1), n.classifier)

    yield Block.of("classifier", last, (classes,), head)


def _operations(shape: NASBench201Shape) -> Iterator[dict[str, Block | None]]:
    """For each cell the block of each operation; None for one that computes nothing."""
    size = shape.image_size
    for width, reduction in plan_cells(shape.C, shape.layers):
        size = size // 2 if reduction else size
        inside = (width, size, size)
        found: dict[str, Block | None] = {"none": None, "skip_connect": None}
        for name in PRIMITIVES:
            if name not in found:
                build = partial(build_candidate, name, width, 1, affine=True)
                found[name] = Block.of(name, inside, inside, build)
        yield found
