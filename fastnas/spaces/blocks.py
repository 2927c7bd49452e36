# SPDX-License-Identifier: Apache-2.0
"""The blocks that the networks of a space are made of: what is timed, and what a choice costs.

A *block* is what one choice puts into a derived network (a candidate at its place), or a part that
every network has. Networks of one space repeat few distinct blocks, so that a table of these
predicts them all: the cost of a network is the sum over its blocks (ProxylessNAS, Cai et al., ICLR
2019, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Generator, nn

from fastnas.spaces.base import check_positive

__all__ = ["Block", "BlockPlan", "BlockRules", "MixedEdge", "NetworkShape", "block_key"]


@dataclass(frozen=True)
class Block:
    """One distinct block.

    Attributes:
        key: what tells it from all others of any network of its space, see ``block_key``.
        input_shape: ``(C, H, W)`` of its one input.
        build: a new module as it stands in a derived network, which maps ``(N, *input_shape)``.
    """

    key: str
    input_shape: tuple[int, int, int]
    build: Callable[[], nn.Module] = field(compare=False, repr=False)

    @classmethod
    def of(
        cls,
        kind: str,
        inputs: tuple[int, int, int],
        outputs: tuple[int, ...],
        build: Callable[[], nn.Module],
        **details: int | str,
    ) -> Block:
        """Take the key of these (``block_key``)."""
        return cls(block_key(kind, inputs, outputs, **details), inputs, build)


@dataclass(frozen=True)
class MixedEdge:
    """One place of a network where a choice is made.

    Several places may share one choice: all normal cells of a DARTS network are alike.

    Attributes:
        kind: key of the choice's weights, as in ``supernet.cell_specs``.
        row: the edge within the kind, a row of ``CellWeights.ops``.
        candidates: key of the block that each candidate puts there, in the columns' order; None
            for one that puts nothing there and costs nothing.
        incoming: edges that enter the same node.
        kept: how many of them a derived network keeps.
    """

    kind: str
    row: int
    candidates: tuple[str | None, ...]
    incoming: int = 1
    kept: int = 1


@dataclass(frozen=True)
class BlockPlan:
    """All blocks of the networks of one shape, and where they stand.

    Attributes:
        blocks: every distinct block by key.
        edges: the places where a choice is made.
        fixed: keys of what every network has, each as often as it is there.

    Raises:
        ValueError: a key without its block, or a block under another key.
    """

    blocks: Mapping[str, Block]
    edges: tuple[MixedEdge, ...]
    fixed: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check that every key has its block."""
        for key, block in self.blocks.items():
            if key != block.key:
                raise ValueError(f"blocks: expected the key {block.key!r}, but got {key!r}")
        named = {key for edge in self.edges for key in edge.candidates if key is not None}
        if missing := sorted((named | set(self.fixed)) - set(self.blocks)):
            raise ValueError(f"blocks: there is none for the key {missing[0]!r}")


@dataclass(frozen=True)
class NetworkShape:
    """What decides the shapes in a derived network; a space subclasses this with what it has more.

    Raises:
        ValueError: a number that is not positive.
    """

    image_size: int = 28
    """Side of the images in pixels."""
    in_channels: int = 1
    """Channels of the images."""
    num_classes: int = 10
    """Number of classes."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_positive(
            image_size=self.image_size, in_channels=self.in_channels, num_classes=self.num_classes
        )


@dataclass(frozen=True)
class BlockRules:
    """How a space takes its networks apart; the field ``blocks`` of its ``Space``.

    Attributes:
        shape: the space's ``NetworkShape``; its fields are options of ``fastnas latency``.
        plan: ``(shape) -> BlockPlan``. Nothing is allocated: blocks are built when asked for.
        keys: ``(genotype, shape) -> keys`` of the network's blocks, each as often as it is there;
            all of them are in the plan.
        network: ``(genotype, shape) -> nn.Module``, the network whose blocks these are.
        sample: ``(shape, generator) -> genotype``, a random architecture: every choice is drawn,
            all its candidates alike.
    """

    shape: type[NetworkShape]
    plan: Callable[[Any], BlockPlan]
    keys: Callable[[Any, Any], Sequence[str]]
    network: Callable[[Any, Any], nn.Module]
    sample: Callable[[Any, Generator], Any]


def block_key(
    kind: str, inputs: Sequence[int], outputs: Sequence[int], **details: int | str
) -> str:
    """Write a key: ``sep_conv_3x3-input:28x28x8-output:14x14x8-stride:2``.

    Args:
        kind: what it is; a candidate's name, or that of a fixed part.
        inputs: ``(C, H, W)``.
        outputs: ``(C, H, W)``, or ``(C,)`` of what ends in a vector.
        details: what else tells it from others (kernel, stride, expand, skip), in this order.
    """
    parts = [kind, f"input:{_size(inputs)}", f"output:{_size(outputs)}"]
    return "-".join([*parts, *(f"{name}:{value}" for name, value in details.items())])


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, [*shape[1:], shape[0]]))
