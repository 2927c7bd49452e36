# SPDX-License-Identifier: Apache-2.0
"""What every search space shares: the shape of a cell's choices, and the entry of the registry.

A space knows nothing of methods. It says, per cell kind, how many edges there are and which
candidates stand on them (``CellSpec``), takes the weights a method computed (``CellWeights``) and
reads a genotype off the scores that a method gives to each (edge, candidate).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

if TYPE_CHECKING:
    from fastnas.spaces.blocks import BlockRules

__all__ = ["CellSpec", "CellWeights", "Space", "check_positive"]


def check_positive(**values: object) -> None:
    """Raise a ValueError that names the first value that is not a positive integer."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


class CellWeights(NamedTuple):
    """The weights a method hands to a supernet, for one kind of cell.

    Attributes:
        ops: ``[E, K]``, weight of each candidate on each edge, floating point.
        edges: ``[E]``, factor of each edge in its node's sum, or None for a plain sum.
    """

    ops: Tensor
    edges: Tensor | None = None


@dataclass(frozen=True)
class CellSpec:
    """The choices in one kind of cell.

    Edges are numbered node by node, within a node by source state.

    Attributes:
        inputs_per_node: number of incoming edges of each intermediate node.
        primitives: names of the candidates on every edge; the order is the columns' order.
    """

    inputs_per_node: tuple[int, ...]
    primitives: tuple[str, ...]

    @property
    def edges(self) -> int:
        """Number of edges in the cell."""
        return sum(self.inputs_per_node)

    @property
    def node_slices(self) -> tuple[slice, ...]:
        """The rows of each node's incoming edges, e.g. 0:2, 2:5, 5:9, 9:14 in DARTS."""
        slices = []
        start = 0
        for count in self.inputs_per_node:
            slices.append(slice(start, start + count))
            start += count
        return tuple(slices)

    def check_weights(self, kind: str, weights: CellWeights) -> None:
        """Check the shapes of the weights for the cells of one kind.

        Raises:
            ValueError: ``ops`` is not ``[edges, candidates]`` or ``edges`` not ``[edges]``.
        """
        wanted = (self.edges, len(self.primitives))
        if tuple(weights.ops.shape) != wanted:
            raise ValueError(
                f"weights[{kind!r}].ops: shape {tuple(weights.ops.shape)}, "
                f"wanted {wanted} (edges, candidates)"
            )
        if weights.edges is not None and tuple(weights.edges.shape) != wanted[:1]:
            raise ValueError(
                f"weights[{kind!r}].edges: shape {tuple(weights.edges.shape)}, "
                f"wanted {wanted[:1]} (edges)"
            )


@dataclass(frozen=True)
class Space:
    """One search space, as the registry ``fastnas.spaces.SPACES`` holds it.

    Attributes:
        name: key in the registry, the value of ``--space``.
        supernet: builds the network that is searched.
        network: builds the network of a genotype; the genotype is its first argument.
        genotype: the class of a derived architecture.
        derive: ``(scores, specs) -> genotype``; ``scores`` maps a cell kind to ``[E, K]``.
        genotypes: published architectures by name.
        blocks: how its networks fall into blocks, for ``fastnas latency`` and costs; None where
            nobody has said.
    """

    name: str
    supernet: Callable[..., nn.Module]
    network: Callable[..., nn.Module]
    genotype: type[Any]
    derive: Callable[[Mapping[str, Tensor], Mapping[str, CellSpec]], Any]
    genotypes: Mapping[str, Any]
    blocks: BlockRules | None = None
