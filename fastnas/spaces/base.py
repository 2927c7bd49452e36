# SPDX-License-Identifier: Apache-2.0
"""What every search space shares: the shape of a cell's choices, and the entry of the registry.

A space knows nothing of methods. It says, per cell kind, how many edges there are and which
candidates stand on them (``CellSpec``), takes the weights a method computed (``CellWeights``) and
reads a genotype off the scores that a method gives to each (edge, candidate).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from fastnas.nn.gates import Gate
from fastnas.spaces.genotype_file import short

if TYPE_CHECKING:
    from fastnas.spaces.blocks import BlockRules

__all__ = [
    "CellGates",
    "CellRoles",
    "CellSelection",
    "CellSpec",
    "CellWeights",
    "Connections",
    "Space",
    "SpaceOptions",
    "Weighting",
    "check_positive",
    "check_weights",
]

_MOST = 1 << 20
"""Of channels, cells, blocks, classes and pixels of a side."""

Connections = tuple[tuple[int, ...], ...]
"""For each edge of a cell the numbers of some of its candidates, ascending: a connection is a
candidate on an edge."""


def check_positive(**values: object) -> None:
    """Raise a ValueError that names the first value that is not a positive integer, or huge.

    A file from elsewhere must not make lists of so many entries.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {short(value)}")
        if value > _MOST:
            raise ValueError(f"{name} must be at most {_MOST}, got {short(value)}")


class CellWeights(NamedTuple):
    """The weights a method hands to a supernet, for one kind of cell.

    Attributes:
        ops: ``[E, K]``, weight of each candidate on each edge, floating point.
        edges: ``[E]``, factor of each edge in its node's sum, or None for a plain sum.
    """

    ops: Tensor
    edges: Tensor | None = None


class CellSelection(NamedTuple):
    """Some connections of one kind of cell: the others are not executed.

    Attributes:
        connections: the candidates of each edge, at least one at each node.
        ops: ``[E, K]``, the weights of these connections, and 0 for all others; None adds them up
            plainly, as the derived network does.
    """

    connections: Connections
    ops: Tensor | None = None


class CellRoles(NamedTuple):
    """What a method hands to a supernet of Engine- and Transit-cells, for one kind of cell.

    Attributes:
        engine: for the Engine-cells, whose weights carry the gradient of the architecture.
        transit: for the Transit-cells, which host what would be derived now.
    """

    engine: CellWeights | CellSelection
    transit: CellSelection


class CellGates(NamedTuple):
    """The paths a method drew, for a supernet that runs one candidate an edge.

    Attributes:
        edges: the gate of each edge, in the order of the rows of alpha.
    """

    edges: tuple[Gate, ...]


Weighting = CellWeights | CellSelection | CellRoles | CellGates
"""What a method may hand to a supernet for one kind of cell; which of them is for both to know."""


@dataclass(frozen=True)
class SpaceOptions:
    """Options that only one space has; a space with options subclasses this."""


@dataclass(frozen=True)
class CellSpec:
    """The choices in one kind of cell.

    Edges are numbered node by node, within a node by source state. A network without cells is one
    cell: a chain of blocks has nodes of one incoming edge.

    Attributes:
        inputs_per_node: number of incoming edges of each intermediate node.
        primitives: names of the candidates on every edge; the order is the columns' order.
        counts: number of candidates of each edge, the first ones of ``primitives``, where not all
            edges have all of them; else None.
        zero: name of the candidate that returns zeros, if there is one.

    Raises:
        ValueError: ``counts`` are not one for each edge, from 1 to the number of candidates.
    """

    inputs_per_node: tuple[int, ...]
    primitives: tuple[str, ...]
    counts: tuple[int, ...] | None = None
    zero: str | None = None

    def __post_init__(self) -> None:
        """Check the counts."""
        if self.counts is None:
            return
        if len(self.counts) != self.edges:
            raise ValueError(
                f"counts: {len(self.counts)} numbers, wanted one for {self.edges} edges"
            )
        if not all(1 <= count <= len(self.primitives) for count in self.counts):
            raise ValueError(f"counts: {self.counts}, wanted 1 to {len(self.primitives)}")

    @property
    def edges(self) -> int:
        """Number of edges in the cell."""
        return sum(self.inputs_per_node)

    @property
    def candidates(self) -> tuple[int, ...]:
        """Number of candidates of each edge; their sum is the number of logits."""
        return (len(self.primitives),) * self.edges if self.counts is None else self.counts

    @property
    def zeros(self) -> tuple[int | None, ...]:
        """For each edge the number of the candidate that returns zeros, None where none does."""
        zero = self.primitives.index(self.zero) if self.zero in self.primitives else None
        return tuple(zero if zero is not None and zero < n else None for n in self.candidates)

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

    def check_selection(self, kind: str, selection: CellSelection) -> None:
        """Check the connections, and the shape of their weights, for the cells of one kind.

        Raises:
            ValueError: not one tuple an edge, a candidate that an edge does not have or has twice,
                a node without connections, or weights that are not ``[edges, candidates]``.
        """
        given = selection.connections
        if len(given) != self.edges:
            raise ValueError(
                f"weights[{kind!r}].connections: {len(given)} edges, wanted {self.edges}"
            )
        for edge, (found, count) in enumerate(zip(given, self.candidates, strict=True)):
            if list(found) != sorted(set(found)) or (
                found and not 0 <= found[0] <= found[-1] < count
            ):
                raise ValueError(
                    f"weights[{kind!r}].connections[{edge}]: {found}, wanted ascending numbers of "
                    f"candidates below {count}"
                )
        # A cell's first node has as many incoming edges as the cell has inputs, which come first.
        for node, rows in enumerate(self.node_slices, self.inputs_per_node[0]):
            if not any(given[rows]):
                raise ValueError(
                    f"weights[{kind!r}].connections: node {node} has none, wanted at least one"
                )
        if selection.ops is not None:
            self.check_weights(kind, CellWeights(selection.ops))


def check_weights(
    weights: Mapping[str, Weighting], specs: Mapping[str, CellSpec], selects: bool
) -> None:
    """Check what is handed to a supernet of mixed ops.

    Args:
        weights: by cell kind.
        specs: cell kind -> choices.
        selects: whether it takes ``CellSelection`` and ``CellRoles`` beside ``CellWeights``.

    Raises:
        ValueError: a missing kind, or a wrong shape.
        TypeError: a value of ``weights`` is none of these.
    """
    for kind, spec in specs.items():
        if kind not in weights:
            raise ValueError(f"weights: the kind {kind!r} is missing, got {sorted(weights)}")
        given = weights[kind]
        for part in given if isinstance(given, CellRoles) else (given,):
            if isinstance(part, CellSelection) and selects:
                spec.check_selection(kind, part)
            elif isinstance(part, CellWeights):
                spec.check_weights(kind, part)
            else:
                also = ", CellSelection or CellRoles" if selects else ""
                raise TypeError(
                    f"weights[{kind!r}]: wanted CellWeights{also}, got {type(part).__name__}"
                )


@dataclass(frozen=True)
class Space:
    """One search space, as the registry ``fastnas.spaces.SPACES`` holds it.

    Attributes:
        name: key in the registry, the value of ``--space``.
        supernet: builds the network that is searched.
        network: builds the network of a genotype; the genotype is its first argument.
        genotype: the class of a derived architecture.
        derive: ``(scores, specs) -> genotype``; ``scores`` maps a cell kind to ``[E, K]``. A third
            argument, from a method that chooses itself, maps it to ``[E]``, bool: the edges that
            stay, or to ``[E, K]``, bool: the connections.
        genotypes: published architectures by name.
        blocks: how its networks fall into blocks, for ``fastnas latency`` and costs; None where
            nobody has said.
        options: dataclass of the options that only this space has; arguments of ``supernet``.
        presets: preset name -> configuration fields in which the space differs from the preset.
        fields: configuration fields of a search that are arguments of ``supernet``.
        network_fields: configuration fields of an evaluation that ``network`` knows.
        features: what methods may need of the supernet: ``gates`` (it takes ``CellGates``),
            ``partial_channels`` (it takes that argument), ``engine_cells`` (it takes that argument
            and ``share``, and ``CellSelection`` and ``CellRoles`` for weights).
        one_hot: ``(genotype, specs) -> weights`` of the supernet pruned to the genotype: 1 for each
            candidate and each edge that stays, else 0. None where a supernet cannot be pruned.
    """

    name: str
    supernet: Callable[..., nn.Module]
    network: Callable[..., nn.Module]
    genotype: type[Any]
    derive: Callable[..., Any]
    genotypes: Mapping[str, Any]
    blocks: BlockRules | None = None
    options: type[SpaceOptions] = SpaceOptions
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    fields: tuple[str, ...] = ("C", "layers", "stem")
    network_fields: tuple[str, ...] = ("C", "layers", "stem", "auxiliary", "drop_path")
    features: frozenset[str] = frozenset({"partial_channels"})
    one_hot: Callable[[Any, Mapping[str, CellSpec]], dict[str, CellWeights]] | None = None
