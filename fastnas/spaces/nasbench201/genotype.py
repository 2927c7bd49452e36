# SPDX-License-Identifier: Apache-2.0
"""Genotypes of the NAS-Bench-201 space: one cell, as a value, a line of text and a JSON file.

The text is that of the benchmark, ``|op~0|+|op~0|op~1|+|op~0|op~1|op~2|``: between the plus signs
stand the nodes 1, 2 and 3, and ``op~i`` is the operation on the edge from node i.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fastnas.spaces.base import check_positive
from fastnas.spaces.genotype_file import JSONGenotype, check_length, short

__all__ = ["GENOTYPES", "PRIMITIVES", "Genotype"]

PRIMITIVES: tuple[str, ...] = (
    "none",
    "skip_connect",
    "nor_conv_1x1",
    "nor_conv_3x3",
    "avg_pool_3x3",
)
"""The candidates of an edge; the order is the column order of alpha."""

_FORMAT, _VERSION, _SPACE = "fastnas.genotype", 1, "nasbench201"
_MAX_NODES = 16
_EDGE = re.compile(r"([a-z0-9_]{1,20})~(\d{1,2})", re.ASCII)


@dataclass(frozen=True)
class Genotype(JSONGenotype):
    """A cell in which every node has one operation from each node before it.

    Node 0 is the input, the last node the output. The operation ``none`` is that an edge is not
    there.

    Attributes:
        nodes: for node 1, 2, ... the operations on the edges from node 0, 1, ...

    Raises:
        ValueError: a node that has not one operation from each node before it, or an unknown one.
    """

    nodes: tuple[tuple[str, ...], ...]

    MAX_TEXT: ClassVar[int] = 10_000
    """One of 16 nodes has about 2,000."""

    def __post_init__(self) -> None:
        """Check every entry and turn lists into tuples."""
        if not isinstance(self.nodes, (list, tuple)) or not 1 <= len(self.nodes) < _MAX_NODES:
            raise ValueError(
                f"genotype: wanted the operations of 1 to {_MAX_NODES - 1} nodes behind the input, "
                f"got {short(self.nodes)}"
            )
        for number, node in enumerate(self.nodes, 1):
            if not isinstance(node, (list, tuple)) or len(node) != number:
                raise ValueError(
                    f"genotype: node {number} is {short(node)}, wanted {number} operations, one "
                    "from each node before it"
                )
            for op in node:
                if op not in PRIMITIVES:
                    raise ValueError(
                        f"genotype: node {number} has the unknown operation {short(op)}, "
                        f"known are {', '.join(PRIMITIVES)}"
                    )
        object.__setattr__(self, "nodes", tuple(map(tuple, self.nodes)))

    @classmethod
    def from_ops(cls, ops: Sequence[str]) -> Genotype:
        """Build from the operations of all edges, node by node and within a node by source.

        Raises:
            ValueError: so many edges that no cell has, or an unknown operation.
        """
        rest, nodes = list(ops), list[tuple[str, ...]]()
        while rest:
            count = len(nodes) + 1
            nodes.append(tuple(rest[:count]))
            rest = rest[count:]
        return cls(tuple(nodes))

    @classmethod
    def all(cls, nodes: int) -> Iterator[Genotype]:
        """Every cell of so many nodes, the input among them; the last edge changes fastest.

        Raises:
            ValueError: fewer than 2 nodes.
        """
        check_nodes(nodes)
        edges = nodes * (nodes - 1) // 2
        for number in range(len(PRIMITIVES) ** edges):
            digits = [number // len(PRIMITIVES) ** (edges - 1 - e) for e in range(edges)]
            yield cls.from_ops([PRIMITIVES[d % len(PRIMITIVES)] for d in digits])

    @property
    def ops(self) -> tuple[str, ...]:
        """The operations of all edges, node by node and within a node by source."""
        return tuple(op for node in self.nodes for op in node)

    def __str__(self) -> str:
        """The text of the benchmark; ``parse`` reads it back."""
        return "+".join(
            "".join(f"|{op}~{source}" for source, op in enumerate(node)) + "|"
            for node in self.nodes
        )

    @classmethod
    def parse(cls, text: str) -> Genotype:
        """Read ``|op~0|+|op~0|op~1|+|op~0|op~1|op~2|``; sources stand in their order.

        Raises:
            ValueError: the text is anything else.
        """
        check_length(text, cls.MAX_TEXT)
        nodes = []
        for number, part in enumerate(text.strip().split("+"), 1):
            found = [_EDGE.fullmatch(edge) for edge in part[1:-1].split("|")]
            if len(part) < 2 or part[0] != "|" or part[-1] != "|" or None in found:
                raise ValueError(
                    f"genotype: node {number} is {short(part)}, wanted |op~0|op~1|...| with plus "
                    "signs between the nodes"
                )
            pairs = [match.groups() for match in found if match is not None]
            if [source for _, source in pairs] != [str(source) for source in range(number)]:
                raise ValueError(
                    f"genotype: node {number} is {short(part)}, wanted one operation from each of "
                    f"the nodes 0 to {number - 1}, in this order"
                )
            nodes.append(tuple(op for op, _ in pairs))
        return cls(tuple(nodes))

    def to_dict(self) -> dict[str, Any]:
        """Return plain strings and an integer."""
        return {"format": _FORMAT, "version": _VERSION, "space": _SPACE, "cell": str(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Genotype:
        """Build from what ``to_dict`` returned.

        Raises:
            ValueError: another format, version or space, a missing or unknown key, or a wrong cell.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"genotype: wanted a JSON object, got {type(data).__name__}")
        for key, wanted in (("format", _FORMAT), ("version", _VERSION), ("space", _SPACE)):
            found = data.get(key)
            if type(found) is not type(wanted) or found != wanted:
                raise ValueError(f"genotype: {key} is {short(found)}, wanted {wanted!r}")
        if unknown := sorted(map(str, set(data) - {"format", "version", "space", "cell"})):
            raise ValueError(f"genotype: unknown field {short(unknown[0])}")
        if "cell" not in data:
            raise ValueError("genotype: cell is missing")
        return cls.parse(data["cell"])


def check_nodes(nodes: int) -> None:
    """Raise a ValueError unless a cell may have so many nodes."""
    check_positive(nodes=nodes)
    if not 2 <= nodes <= _MAX_NODES:
        raise ValueError(f"nodes must be from 2 (input and output) to {_MAX_NODES}, got {nodes}")


_NONE, _SKIP, _C1, _C3, _AVG = PRIMITIVES

GENOTYPES: dict[str, Genotype] = {
    # The number is the architecture's index in the benchmark.
    "NASBench201_1835": Genotype.from_ops([_SKIP] * 6),
    "NASBench201_857": Genotype.from_ops([_C1, _C1, _C3, _SKIP, _C3, _C3]),
    "NASBench201_6111": Genotype.from_ops([_C3, _C3, _C3, _SKIP, _C3, _C1]),
    "NASBench201_9930": Genotype.from_ops([_C3, _C3, _C3, _SKIP, _C3, _C3]),
    "NASBench201_13714": Genotype.from_ops([_C3, _C3, _C3, _SKIP, _C1, _C3]),
}
"""Cells of the benchmark by name: where DARTS ends (1835), the best on ImageNet16-120 (857), on
CIFAR-10 (6111 and 13714) and on CIFAR-100 (9930)."""
