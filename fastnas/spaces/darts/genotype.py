# SPDX-License-Identifier: Apache-2.0
"""Genotypes of the DARTS space: what a search finds, as a value, a JSON file and a line of text."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fastnas.spaces.darts.reading import (
    FIELDS,
    MAX_TEXT,
    Pair,
    check_concat,
    check_distinct,
    check_inputs,
    check_keys,
    check_pairs,
    flatten,
    is_nested,
    parse_call,
)
from fastnas.spaces.genotype_file import JSONGenotype, short

__all__ = ["GENOTYPES", "Genotype"]

_FORMAT = "fastnas.genotype"
_VERSIONS = (1, 2)
"""1: two pairs a node, in one list. 2: a list for every node."""
_SPACE = "darts"
_CELLS = ("normal", "reduce")
Node = tuple[Pair, ...]


@dataclass(frozen=True)
class Genotype(JSONGenotype):
    """A normal and a reduction cell: for each intermediate node its (op, source) pairs.

    Sources are states: 0 and 1 are the outputs of the two cells before, 2, 3, ... the
    intermediate nodes in order. The pairs stand node by node; of a derived genotype the higher
    scored of a node comes first. A source may occur twice in a node, with another operation; the
    same pair only where all nodes have two (format version 1).

    Attributes:
        normal: pairs of the normal cell.
        normal_concat: states whose concatenation is the normal cell's output.
        reduce: pairs of the reduction cell.
        reduce_concat: states whose concatenation is the reduction cell's output.
        normal_inputs: how many pairs each node of the normal cell has; if left out two each, as in
            the papers.
        reduce_inputs: the same of the reduction cell.

    Raises:
        ValueError: an unknown operation, a number of pairs that is not that of the nodes, a node
            without pairs or with the same one twice, a source that does not stand before its node,
            a concatenation of other than intermediate nodes.
    """

    normal: tuple[Pair, ...]
    normal_concat: tuple[int, ...]
    reduce: tuple[Pair, ...]
    reduce_concat: tuple[int, ...]
    normal_inputs: tuple[int, ...] = ()
    reduce_inputs: tuple[int, ...] = ()

    MAX_TEXT: ClassVar[int] = MAX_TEXT

    def __post_init__(self) -> None:
        """Check every entry and turn lists and ranges into tuples."""
        for cell in _CELLS:
            pairs = getattr(self, cell)
            inputs = check_inputs(cell, pairs, getattr(self, f"{cell}_inputs"))
            object.__setattr__(self, f"{cell}_inputs", inputs)
            object.__setattr__(self, cell, check_pairs(cell, pairs, inputs))
            concat = check_concat(f"{cell}_concat", getattr(self, f"{cell}_concat"), len(inputs))
            object.__setattr__(self, f"{cell}_concat", concat)
        if self._version == 2:
            self._check_distinct()

    def _check_distinct(self) -> None:
        for cell in _CELLS:
            check_distinct(cell, self.nodes(cell))

    @classmethod
    def from_nodes(
        cls,
        normal: Sequence[Sequence[Pair]],
        normal_concat: Sequence[int],
        reduce: Sequence[Sequence[Pair]],
        reduce_concat: Sequence[int],
    ) -> Genotype:
        """Build from a list of pairs for every node.

        Raises:
            ValueError: as the class.
        """
        cells = {"normal": normal, "reduce": reduce}
        flat = {cell: flatten(cell, nodes) for cell, nodes in cells.items()}
        return cls(
            flat["normal"][0],
            tuple(normal_concat),
            flat["reduce"][0],
            tuple(reduce_concat),
            flat["normal"][1],
            flat["reduce"][1],
        )

    def nodes(self, cell: str) -> tuple[Node, ...]:
        """The pairs of the cell ``normal`` or ``reduce``, by intermediate node."""
        pairs = iter(getattr(self, cell))
        inputs = getattr(self, f"{cell}_inputs")
        return tuple(tuple(next(pairs) for _ in range(count)) for count in inputs)

    def _layout(self, cell: str) -> list[Any]:
        """The pairs in one list where every node has two, as the papers have it; else by node."""
        if self._version == 1:
            return list(getattr(self, cell))
        return [list(node) for node in self.nodes(cell)]

    @property
    def _version(self) -> int:
        return 1 if set(self.normal_inputs + self.reduce_inputs) == {2} else 2

    def __str__(self) -> str:
        """Return the text that DARTS and its relatives print; ``parse`` reads it back.

        Where a node has other than two pairs each node's stand in a list of their own.
        """
        parts = []
        for field in FIELDS:
            concat = field.endswith("_concat")
            text = _concat_text(getattr(self, field)) if concat else str(self._layout(field))
            parts.append(f"{field}={text}")
        return f"Genotype({', '.join(parts)})"

    @classmethod
    def parse(cls, text: str) -> Genotype:
        """Read ``Genotype(normal=[('sep_conv_3x3', 1), ...], normal_concat=range(2, 6), ...)``.

        The text is parsed, never evaluated: literals and ``range(a, b)`` are all that is taken.

        Raises:
            ValueError: the text is anything else, or the genotype is wrong.
        """
        fields = parse_call(text)
        return cls._from_fields(fields, any(map(is_nested, map(fields.get, _CELLS))))

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, strings and integers.

        Format version 1 where every node has two pairs, so that older readers understand what they
        can; else version 2, in which each node has a list of its own.
        """
        cells = {c: json.loads(json.dumps(self._layout(c))) for c in _CELLS}
        return {
            "format": _FORMAT,
            "version": self._version,
            "space": _SPACE,
            "normal": cells["normal"],
            "normal_concat": list(self.normal_concat),
            "reduce": cells["reduce"],
            "reduce_concat": list(self.reduce_concat),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Genotype:
        """Build from what ``to_dict`` returned, in format version 1 or 2.

        Raises:
            ValueError: another format, version or space, a missing or unknown key, or a wrong
                genotype.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"genotype: wanted a JSON object, got {type(data).__name__}")
        for key, wanted in (("format", (_FORMAT,)), ("version", _VERSIONS), ("space", (_SPACE,))):
            found = data.get(key)
            if type(found) is not type(wanted[0]) or found not in wanted:
                choices = " or ".join(map(repr, wanted))
                raise ValueError(f"genotype: {key} is {short(found)}, wanted {choices}")
        check_keys(set(data) - {"format", "version", "space"})
        return cls._from_fields(data, data["version"] == 2)

    @classmethod
    def _from_fields(cls, fields: Mapping[str, Any], nested: bool) -> Genotype:
        values = {field: fields[field] for field in FIELDS}
        if nested:
            for cell in _CELLS:
                values[cell], values[f"{cell}_inputs"] = flatten(cell, values[cell])
        genotype = cls(**values)
        if nested:
            genotype._check_distinct()
        return genotype

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON file; a reader sees the old file or the whole new one, never a part."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(self.to_json())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _concat_text(concat: tuple[int, ...]) -> str:
    if concat == tuple(range(concat[0], concat[-1] + 1)):
        return f"range({concat[0]}, {concat[-1] + 1})"
    return str(list(concat))


_SEP3, _SEP5 = "sep_conv_3x3", "sep_conv_5x5"
_DIL3, _DIL5 = "dil_conv_3x3", "dil_conv_5x5"
_MAX, _AVG, _SKIP = "max_pool_3x3", "avg_pool_3x3", "skip_connect"


def _four_nodes(normal: tuple[Pair, ...], reduce: tuple[Pair, ...]) -> Genotype:
    return Genotype(normal, (2, 3, 4, 5), reduce, (2, 3, 4, 5))


# One line a node, in the order in which the papers' code lists the pairs.
GENOTYPES: dict[str, Genotype] = {
    # DARTS (ICLR 2019): first order, second order.
    "DARTS_V1": _four_nodes(
        normal=(
            *((_SEP3, 1), (_SEP3, 0)),
            *((_SKIP, 0), (_SEP3, 1)),
            *((_SKIP, 0), (_SEP3, 1)),
            *((_SEP3, 0), (_SKIP, 2)),
        ),
        reduce=(
            *((_MAX, 0), (_MAX, 1)),
            *((_SKIP, 2), (_MAX, 0)),
            *((_MAX, 0), (_SKIP, 2)),
            *((_SKIP, 2), (_AVG, 0)),
        ),
    ),
    "DARTS_V2": _four_nodes(
        normal=(
            *((_SEP3, 0), (_SEP3, 1)),
            *((_SEP3, 0), (_SEP3, 1)),
            *((_SEP3, 1), (_SKIP, 0)),
            *((_SKIP, 0), (_DIL3, 2)),
        ),
        reduce=(
            *((_MAX, 0), (_MAX, 1)),
            *((_SKIP, 2), (_MAX, 1)),
            *((_MAX, 0), (_SKIP, 2)),
            *((_SKIP, 2), (_MAX, 1)),
        ),
    ),
    # PC-DARTS (ICLR 2020): searched on CIFAR-10, searched on ImageNet.
    "PC_DARTS_cifar": _four_nodes(
        normal=(
            *((_SEP3, 1), (_SKIP, 0)),
            *((_SEP3, 0), (_DIL3, 1)),
            *((_SEP5, 0), (_SEP3, 1)),
            *((_AVG, 0), (_DIL3, 1)),
        ),
        reduce=(
            *((_SEP5, 1), (_MAX, 0)),
            *((_SEP5, 1), (_SEP5, 2)),
            *((_SEP3, 0), (_SEP3, 3)),
            *((_SEP3, 1), (_SEP3, 2)),
        ),
    ),
    "PC_DARTS_image": _four_nodes(
        normal=(
            *((_SKIP, 1), (_SEP3, 0)),
            *((_SEP3, 0), (_SKIP, 1)),
            *((_SEP3, 1), (_SEP3, 3)),
            *((_SEP3, 1), (_DIL5, 4)),
        ),
        reduce=(
            *((_SEP3, 0), (_SKIP, 1)),
            *((_DIL5, 2), (_MAX, 1)),
            *((_SEP3, 2), (_SEP3, 1)),
            *((_SEP5, 0), (_SEP3, 3)),
        ),
    ),
}
"""Published genotypes by name."""
