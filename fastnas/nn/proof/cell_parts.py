# SPDX-License-Identifier: Apache-2.0
"""Where somebody's cell has its parts, and how it is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor, nn

from fastnas.nn.cell import node_starts
from fastnas.nn.mixed_op import MixedOp
from fastnas.nn.proof.signature import (
    Defaults,
    extra_defaults,
    list_name,
    parts_in_list,
    positional,
)

__all__ = [
    "INPUTS",
    "Way",
    "arguments_of",
    "input_parts",
    "mixed_ops",
    "named_edges",
    "named_parts",
    "node_sizes",
]

INPUTS = 2


class Way(NamedTuple):
    """A way to call a cell."""

    name: str
    #: The arguments that are given.
    arguments: tuple[str, ...]
    #: What follows them.
    more: tuple[None, ...] = ()
    #: Whether the weights come as a list, with a matrix for each node.
    by_node: bool = False

    def of(self, cell: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """``cell``, to be called with one matrix of weights."""
        if not self.by_node:
            return cell

        def call(s0: Tensor, s1: Tensor, weights: Tensor, *more: Tensor | None) -> Tensor:
            matrices = list(weights.split(node_sizes(len(weights))))
            given = list(matrices)
            y = cell(s0, s1, given, *more)
            if list(map(id, given)) != list(map(id, matrices)):
                raise RuntimeError("it changes the list of its weights")
            return y

        return call


def node_sizes(edges: int) -> list[int]:
    """How many edges each node has."""
    return [INPUTS + number for number in range(len(node_starts(INPUTS, edges)))]


def input_parts(cell: nn.Module) -> tuple[str, str] | None:
    """The names of what its two inputs go through first; None if it cannot be told.

    These are ``preprocess0`` and ``preprocess1``, or the only two children beside lists, in the
    order in which they were assigned.
    """
    names = [n for n, child in cell._modules.items() if not isinstance(child, nn.ModuleList)]
    published = [f"preprocess{number}" for number in range(INPUTS)]
    names = published if set(published) <= set(names) else names
    found = [name for name in names if isinstance(cell._modules[name], nn.Module)]
    return (found[0], found[1]) if len(found) == len(names) == INPUTS else None


def named_edges(cell: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The edges of a cell with their names: of its list, or of lists in it, one for each node."""
    name = list_name(cell)
    for number, edge in enumerate(parts_in_list(cell)):
        if isinstance(edge, nn.ModuleList):
            yield from ((f"{name}.{number}.{j}", inner) for j, inner in enumerate(edge))
        else:
            yield f"{name}.{number}", edge


def mixed_ops(cell: nn.Module) -> list[MixedOp]:
    """The edges of a cell whose mixed ops are ours."""
    return [edge for _, edge in named_edges(cell)]  # type: ignore[misc]  # whose these are


def named_parts(cell: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What a DARTS cell calls; only the names of edges have a dot in them."""
    for name in input_parts(cell) or ():
        yield name, cell.get_submodule(name)
    yield from named_edges(cell)


def arguments_of(cell: nn.Module) -> tuple[list[inspect.Parameter], Defaults | None]:
    """The arguments of its ``forward`` that are tensors, and the defaults of those after them.

    These are None if they are not arguments with plain defaults.
    """
    found = positional(cell)
    if found is None:
        return list(inspect.signature(cell.forward).parameters.values()), None
    # A fourth one is weights of edges, which may be left out, unless it is a number or a name.
    tensors = 3 if len(found) > 3 and isinstance(found[3].default, (int, float, str)) else 4
    return found[:tensors], extra_defaults(found[tensors:])
