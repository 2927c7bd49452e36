# SPDX-License-Identifier: Apache-2.0
"""Genotypes of the DARTS space: what a search finds, as a value, a JSON file and a line of text."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastnas.nn.candidates import candidate_names

__all__ = ["GENOTYPES", "Genotype"]

_FORMAT = "fastnas.genotype"
_VERSION = 1
_SPACE = "darts"
_FIELDS = ("normal", "normal_concat", "reduce", "reduce_concat")
_MAX_TEXT = 100_000
"""Characters of a genotype's text or file; a real one has about 600."""
_MAX_NODES = 64

Pair = tuple[str, int]


@dataclass(frozen=True)
class Genotype:
    """A normal and a reduction cell, two (op, source) pairs per intermediate node.

    Sources are states: 0 and 1 are the outputs of the two cells before, 2, 3, ... the
    intermediate nodes in order. Pairs 2i and 2i+1 belong to node i (state i + 2); of a derived
    genotype the higher scored comes first.

    Attributes:
        normal: pairs of the normal cell.
        normal_concat: states whose concatenation is the normal cell's output.
        reduce: pairs of the reduction cell.
        reduce_concat: states whose concatenation is the reduction cell's output.

    Raises:
        ValueError: an unknown operation, an odd number of pairs, a source that does not stand
            before its node, a concatenation of other than intermediate nodes.
    """

    normal: tuple[Pair, ...]
    normal_concat: tuple[int, ...]
    reduce: tuple[Pair, ...]
    reduce_concat: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check every entry and turn lists and ranges into tuples."""
        for cell in ("normal", "reduce"):
            pairs = _check_pairs(cell, getattr(self, cell))
            concat = _check_concat(f"{cell}_concat", getattr(self, f"{cell}_concat"), len(pairs))
            object.__setattr__(self, cell, pairs)
            object.__setattr__(self, f"{cell}_concat", concat)

    def __str__(self) -> str:
        """Return the text that DARTS and its relatives print; ``parse`` reads it back."""
        parts = []
        for field in _FIELDS:
            value = getattr(self, field)
            text = _concat_text(value) if field.endswith("_concat") else str(list(value))
            parts.append(f"{field}={text}")
        return f"Genotype({', '.join(parts)})"

    @classmethod
    def parse(cls, text: str) -> Genotype:
        """Read ``Genotype(normal=[('sep_conv_3x3', 1), ...], normal_concat=range(2, 6), ...)``.

        The text is parsed, never evaluated: literals and ``range(a, b)`` are all that is taken.

        Raises:
            ValueError: the text is anything else, or the genotype is wrong.
        """
        return cls(**_parse_call(text))

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, strings and integers, format version 1."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "space": _SPACE,
            "normal": [list(pair) for pair in self.normal],
            "normal_concat": list(self.normal_concat),
            "reduce": [list(pair) for pair in self.reduce],
            "reduce_concat": list(self.reduce_concat),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Genotype:
        """Build from what ``to_dict`` returned.

        Raises:
            ValueError: another format, version or space, a missing or unknown key, or a wrong
                genotype.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"genotype: wanted a JSON object, got {type(data).__name__}")
        for key, wanted in (("format", _FORMAT), ("version", _VERSION), ("space", _SPACE)):
            found = data.get(key)
            if found != wanted or isinstance(found, bool):
                raise ValueError(f"genotype: {key} is {_short(found)}, wanted {wanted!r}")
        _check_keys(set(data) - {"format", "version", "space"})
        return cls(**{field: data[field] for field in _FIELDS})

    def to_json(self) -> str:
        """Return ``to_dict`` as JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Genotype:
        """Read what ``to_json`` returned.

        Raises:
            ValueError: not JSON, too long, or not a genotype.
        """
        _check_length(text)
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"genotype: not JSON ({error})") from None
        return cls.from_dict(data)

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

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Genotype:
        """Read a JSON file that ``save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a genotype; the message names it.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"genotype file {str(path)!r} does not exist")
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(_MAX_TEXT + 1)
        try:
            return cls.from_json(text)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_length(text: object) -> None:
    if not isinstance(text, str):
        raise ValueError(f"genotype: wanted text, got {type(text).__name__}")
    if len(text) > _MAX_TEXT:
        raise ValueError(f"genotype: text of more than {_MAX_TEXT} characters")


def _check_keys(keys: set[Any]) -> None:
    missing = [field for field in _FIELDS if field not in keys]
    if missing:
        raise ValueError(f"genotype: {missing[0]} is missing")
    unknown = sorted(str(key) for key in keys - set(_FIELDS))
    if unknown:
        raise ValueError(f"genotype: unknown field {_short(unknown[0])}")


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_pairs(cell: str, pairs: object) -> tuple[Pair, ...]:
    if not isinstance(pairs, (list, tuple)):
        raise ValueError(f"genotype: {cell} must be a list of (op, source) pairs")
    if not pairs or len(pairs) % 2 or len(pairs) > 2 * _MAX_NODES:
        raise ValueError(
            f"genotype: {cell} has {len(pairs)} pairs, wanted two per node "
            f"(an even number from 2 to {2 * _MAX_NODES})"
        )
    known = [name for name in candidate_names() if name != "none"]
    checked: list[Pair] = []
    for position, pair in enumerate(pairs):
        where = f"{cell}[{position}]"
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f"genotype: {where} is {_short(pair)}, wanted (op, source)")
        op, source = pair
        if op not in known:
            raise ValueError(
                f"genotype: {where} has the unknown operation {_short(op)}, "
                f"known are {', '.join(known)}"
            )
        state = position // 2 + 2
        if not _is_index(source) or not 0 <= source < state:
            raise ValueError(
                f"genotype: {where} has source {_short(source)}, "
                f"wanted an integer from 0 to {state - 1} (states before node {state})"
            )
        checked.append((op, source))
    return tuple(checked)


def _check_concat(name: str, concat: object, pairs: int) -> tuple[int, ...]:
    last = pairs // 2 + 1
    if not isinstance(concat, (list, tuple, range)) or not concat:
        raise ValueError(f"genotype: {name} must be a non-empty list of states")
    if len(concat) > last - 1 or len(set(map(repr, concat))) != len(concat):
        raise ValueError(f"genotype: {name} is {_short(concat)}, wanted each state at most once")
    for state in concat:
        if not _is_index(state) or not 2 <= state <= last:
            raise ValueError(
                f"genotype: {name} has {_short(state)}, wanted states from 2 to {last}"
            )
    return tuple(concat)


def _concat_text(concat: tuple[int, ...]) -> str:
    if concat == tuple(range(concat[0], concat[-1] + 1)):
        return f"range({concat[0]}, {concat[-1] + 1})"
    return str(list(concat))


def _parse_call(text: str) -> dict[str, Any]:
    _check_length(text)
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"genotype: not of the form Genotype(...): {_short(text)}") from None
    if (
        not isinstance(node, ast.Call)
        or not isinstance(node.func, ast.Name)
        or node.func.id != "Genotype"
        or node.args
    ):
        raise ValueError(f"genotype: not of the form Genotype(name=value, ...): {_short(text)}")
    names = [keyword.arg for keyword in node.keywords]
    if None in names or len(set(names)) != len(names):
        raise ValueError("genotype: each field must be given once, by name")
    _check_keys(set(names))
    return {str(keyword.arg): _literal(keyword.value) for keyword in node.keywords}


def _literal(node: ast.expr) -> str | int | list[object]:
    """Return the value of a string, an integer, a list or tuple of these, or ``range(a, b)``."""
    if isinstance(node, ast.Constant) and type(node.value) is str:
        return node.value
    if isinstance(node, ast.Constant) and type(node.value) is int:
        if node.value > _MAX_TEXT:
            raise ValueError("genotype: an integer is too large for a state")
        return node.value
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_literal(element) for element in node.elts]
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "range"
        and not node.keywords
        and len(node.args) == 2
    ):
        first, stop = (_literal(argument) for argument in node.args)
        if isinstance(first, int) and isinstance(stop, int) and stop <= _MAX_NODES + 2:
            return list(range(first, stop))
        raise ValueError(f"genotype: range wants two integers up to {_MAX_NODES + 2}")
    raise ValueError(
        "genotype: only strings, integers, lists, tuples and range(a, b) are taken, "
        f"found {type(node).__name__}"
    )


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
