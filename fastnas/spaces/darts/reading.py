# SPDX-License-Identifier: Apache-2.0
"""The checks of a genotype and the reading of its text; all errors are one-sentence ValueErrors."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from fastnas.nn.candidates import candidate_names
from fastnas.spaces.genotype_file import check_length, short

__all__ = [
    "FIELDS",
    "MAX_TEXT",
    "Pair",
    "check_concat",
    "check_distinct",
    "check_inputs",
    "check_keys",
    "check_pairs",
    "flatten",
    "is_nested",
    "parse_call",
]

FIELDS = ("normal", "normal_concat", "reduce", "reduce_concat")
MAX_TEXT = 100_000
"""Characters of a genotype's text or file; a real one has about 600."""
_MAX_NODES = 64
_MAX_INPUTS = 64

Pair = tuple[str, int]


def check_keys(keys: set[Any]) -> None:
    """Refuse a field that is missing or unknown."""
    missing = [field for field in FIELDS if field not in keys]
    if missing:
        raise ValueError(f"genotype: {missing[0]} is missing")
    unknown = sorted(str(key) for key in keys - set(FIELDS))
    if unknown:
        raise ValueError(f"genotype: unknown field {short(unknown[0])}")


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_nested(cell: object) -> bool:
    """Whether each node has a list of its own: whether the first entry is no (op, source) pair."""
    return (
        isinstance(cell, list)
        and bool(cell)
        and isinstance(cell[0], list)
        and (not cell[0] or isinstance(cell[0][0], list))
    )


def flatten(cell: str, nodes: object) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """All pairs of a cell, and how many each node has; neither is checked yet."""
    if not isinstance(nodes, (list, tuple)) or not nodes:
        raise ValueError(f"genotype: {cell} must be a list of nodes")
    for position, node in enumerate(nodes):
        if not isinstance(node, (list, tuple)):
            raise ValueError(
                f"genotype: {cell}[{position}] is {short(node)}, wanted the list of a node's pairs"
            )
    return tuple(pair for node in nodes for pair in node), tuple(map(len, nodes))


def check_inputs(cell: str, pairs: object, inputs: object) -> tuple[int, ...]:
    """How many pairs each node of a cell has; two where ``inputs`` is empty."""
    if not isinstance(pairs, (list, tuple)):
        raise ValueError(f"genotype: {cell} must be a list of (op, source) pairs")
    if not isinstance(inputs, (list, tuple)):
        raise ValueError(f"genotype: {cell}_inputs must be a list of integers")
    if not inputs:
        if not pairs or len(pairs) % 2 or len(pairs) > 2 * _MAX_NODES:
            raise ValueError(
                f"genotype: {cell} has {len(pairs)} pairs, wanted two per node "
                f"(an even number from 2 to {2 * _MAX_NODES})"
            )
        return (2,) * (len(pairs) // 2)
    if len(inputs) > _MAX_NODES:
        raise ValueError(f"genotype: {cell} has {len(inputs)} nodes, wanted up to {_MAX_NODES}")
    for node, count in enumerate(inputs, 2):
        if not _is_index(count) or not 1 <= count <= _MAX_INPUTS:
            raise ValueError(
                f"genotype: node {node} of {cell} has {short(count)} pairs, "
                f"wanted 1 to {_MAX_INPUTS}"
            )
    if sum(inputs) != len(pairs):
        raise ValueError(
            f"genotype: {cell} has {len(pairs)} pairs, but its nodes have {sum(inputs)}"
        )
    return tuple(inputs)


def check_pairs(cell: str, pairs: Any, inputs: tuple[int, ...]) -> tuple[Pair, ...]:
    """The pairs of a cell whose nodes have so many ``inputs``."""
    known = [name for name in candidate_names() if name != "none"]
    checked: list[Pair] = []
    states = [state for state, count in enumerate(inputs, 2) for _ in range(count)]
    for position, (pair, state) in enumerate(zip(pairs, states, strict=True)):
        where = f"{cell}[{position}]"
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f"genotype: {where} is {short(pair)}, wanted (op, source)")
        op, source = pair
        if op not in known:
            raise ValueError(
                f"genotype: {where} has the unknown operation {short(op)}, "
                f"known are {', '.join(known)}"
            )
        if not _is_index(source) or not 0 <= source < state:
            raise ValueError(
                f"genotype: {where} has source {short(source)}, "
                f"wanted an integer from 0 to {state - 1} (states before node {state})"
            )
        checked.append((op, source))
    return tuple(checked)


def check_distinct(cell: str, nodes: Sequence[Sequence[Pair]]) -> None:
    """Refuse a connection that a node has twice."""
    for node, pairs in enumerate(nodes, 2):
        for position, pair in enumerate(pairs):
            if pair in pairs[:position]:
                raise ValueError(
                    f"genotype: node {node} of {cell} has {pair} twice, wanted each pair once"
                )


def check_concat(name: str, concat: object, nodes: int) -> tuple[int, ...]:
    """The states that make up the output of a cell of so many nodes."""
    last = nodes + 1
    if not isinstance(concat, (list, tuple, range)) or not concat:
        raise ValueError(f"genotype: {name} must be a non-empty list of states")
    for state in concat:
        if not _is_index(state) or not 2 <= state <= last:
            raise ValueError(f"genotype: {name} has {short(state)}, wanted states from 2 to {last}")
    if len(set(concat)) != len(concat):
        raise ValueError(f"genotype: {name} is {short(concat)}, wanted each state at most once")
    return tuple(concat)


def parse_call(text: str) -> dict[str, Any]:
    """The fields of ``Genotype(name=value, ...)``: lists, strings and integers."""
    check_length(text, MAX_TEXT)
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"genotype: not of the form Genotype(...): {short(text)}") from None
    if (
        not isinstance(node, ast.Call)
        or not isinstance(node.func, ast.Name)
        or node.func.id != "Genotype"
        or node.args
    ):
        raise ValueError(f"genotype: not of the form Genotype(name=value, ...): {short(text)}")
    names = [keyword.arg for keyword in node.keywords]
    if None in names or len(set(names)) != len(names):
        raise ValueError("genotype: each field must be given once, by name")
    check_keys(set(names))
    return {str(keyword.arg): _literal(keyword.value) for keyword in node.keywords}


def _literal(node: ast.expr) -> str | int | list[object]:
    """Return the value of a string, an integer, a list or tuple of these, or ``range(a, b)``."""
    if isinstance(node, ast.Constant) and type(node.value) is str:
        return node.value
    if isinstance(node, ast.Constant) and type(node.value) is int:
        if node.value > MAX_TEXT:
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
