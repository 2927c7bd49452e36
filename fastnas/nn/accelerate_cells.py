# SPDX-License-Identifier: Apache-2.0
"""Let somebody else's cells run node by node, where that is proved to change nothing.

A cell is found by its shape: mixed ops of ours in a ``ModuleList``, which is called ``_ops`` or is
the only one, and a ``forward`` of two inputs and the weights. It stays the same object with the
same children; its class becomes a subclass of its own whose ``forward`` runs the nodes, and the
original one wherever it is called in another way than was proved.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastnas.nn.batch_norm import hook_tables
from fastnas.nn.cell import count_fits, joins_edges, shares_statistics
from fastnas.nn.mixed_op import MixedOp
from fastnas.nn.proof.cell_parts import (
    arguments_of,
    input_parts,
    mixed_ops,
    named_parts,
    node_sizes,
)
from fastnas.nn.proof.cells import CellVerdict, Joined, run_cell
from fastnas.nn.proof.reading import own_classes
from fastnas.nn.proof.signature import arguments_needed, split_extra

__all__ = ["NodeByNode", "cell_obstacle", "has_cell_shape", "join", "separate"]

_JOINED = "_fastnas_joined"
_ARGUMENTS = "s0, s1, weights and weights of edges"
# What a cell's class may define of what Python and PyTorch call by themselves.
_HARMLESS = frozenset(("__init__", "__repr__", "__annotate__", "__annotate_func__"))
_CALLS = frozenset(("_call_impl", "_wrapped_call_impl", "_slow_forward"))


class NodeByNode:
    """What the class of a joined cell has before its own class."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the nodes; for any call that was not proved, the original ``forward``."""
        # A cell that was made of this class by its own __init__ has not been judged.
        joined: Joined | None = vars(self).get(_JOINED)
        given = None if joined is None else _bind(joined, args, kwargs)
        if joined is None or given is None or not _holds(self, joined, given[2], given[3]):
            return super().forward(*args, **kwargs)  # type: ignore[misc]  # of the cell's class
        s0, s1, weights, edge_weights = given
        if joined.by_node:
            weights = torch.cat(list(weights))
        return run_cell(self, s0, s1, weights, edge_weights, joined.last)  # type: ignore[arg-type]  # it is a module

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made here: a pickle names the one it was made of.
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        return (_blank, (_original(type(self)),), *reduced[2:])


def _bind(
    joined: Joined, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Any, Any, Any, Any] | None:
    """Inputs, weights and weights of edges; None where it has to be the original that is called."""
    names = joined.arguments
    if joined.extra:
        others = split_extra(joined.extra, args[len(names) :], kwargs)
        if others is None:
            return None
        args, kwargs = args[: len(names)], others
    by_name = [kwargs[name] for name in names[len(args) :] if name in kwargs]
    given = [*args, *by_name]
    if len(by_name) != len(kwargs) or not 3 <= len(given) <= len(names):
        return None
    if len(given) == 3 and len(names) > 3:
        given.append(None)
    if len(names) > 3 and given[3] is None and not joined.optional:
        return None
    return given[0], given[1], given[2], given[3] if len(names) > 3 else None


def _holds(cell: Any, joined: Joined, weights: object, edge_weights: object) -> bool:
    """Whether what was proved speaks of ``cell`` as it is now, and of these weights."""
    edges = mixed_ops(cell)
    if any(getattr(cell, name, None) != value for name, value in joined.settings):
        return False
    if tuple(name for name, _ in named_parts(cell)) != joined.parts or not joins_edges(edges):
        return False
    count = len(edges[0]._ops)
    if joined.by_node:
        sizes = node_sizes(len(edges))
        if not isinstance(weights, (list, tuple)) or len(weights) != len(sizes):
            return False
        if not all(map(_is_of_shape, weights, [(size, count) for size in sizes])):
            return False
    elif not _is_of_shape(weights, (len(edges), count)):
        return False
    return edge_weights is None or _is_of_shape(edge_weights, (len(edges),))


def _is_of_shape(weights: object, shape: tuple[int, ...]) -> bool:
    return isinstance(weights, Tensor) and weights.shape == shape and weights.is_floating_point()


def has_cell_shape(module: nn.Module) -> bool:
    """Whether ``module`` looks like a cell of somebody else."""
    if isinstance(module, (NodeByNode, torch.jit.ScriptModule)):
        return False
    if type(module).__module__.split(".")[0] == __name__.split(".")[0]:
        return False  # ours run their nodes already
    if not any(isinstance(edge, MixedOp) for edge in mixed_ops(module)):
        return False
    return (arguments_needed(module) or 0) >= 3


def cell_obstacle(cell: nn.Module) -> str | None:
    """What keeps ``cell`` as it is before anything is run; None if nothing does."""
    edges: list[nn.Module] = [*mixed_ops(cell)]
    others = sum(not isinstance(edge, MixedOp) for edge in edges)
    if others:
        return f"{others} of its {len(edges)} mixed ops are not ours"
    if not count_fits(2, len(edges)):
        return f"{len(edges)} mixed ops are not one from every state to every later one"
    inputs = input_parts(cell)
    if inputs is None:
        return "it has no preprocess0 and preprocess1, nor just two parts besides its mixed ops"
    if cell._modules[inputs[0]] is cell._modules[inputs[1]]:
        return f"its {' and '.join(inputs)} are one module"
    if any(table for name, table in vars(cell).items() if name.endswith("_hooks")):
        return "hooks are registered on it"
    if "forward" in vars(cell):
        return "its forward was replaced on this instance"
    if arguments_of(cell)[1] is None:
        parameters = list(inspect.signature(cell.forward).parameters.values())
        more = ", ".join(p.name for p in parameters[4:]) or "any number of arguments"
        return f"its forward takes more than {_ARGUMENTS}, without a plain default: {more}"
    if any("forward" in vars(m) and not _is_script(m) for m in cell.modules()):
        return "the forward of a part was replaced on that instance, so that it cannot be copied"
    if any(nn.parameter.is_lazy(t) for t in (*cell.parameters(), *cell.buffers())):
        return "some of its parameters have no shape yet"
    return _obstacle_of_edges(edges) or _obstacle_of_class(type(cell))


def _is_script(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule)


def _obstacle_of_edges(edges: Sequence[nn.Module]) -> str | None:
    if len(set(map(id, edges))) < len(edges):
        return "one mixed op is in several places of it"
    if any(edge.skip_zero for edge in edges if isinstance(edge, MixedOp)):
        return "its mixed ops leave out candidates of weight zero, one by one"
    if any(any(hook_tables(edge)) for edge in edges):
        return "hooks are registered on its mixed ops"
    if len({len(edge._ops) for edge in edges if isinstance(edge, MixedOp)}) > 1:
        return "its mixed ops have different numbers of candidates"
    if joins_edges(edges):
        return None
    if shares_statistics([edge for edge in edges if isinstance(edge, MixedOp)]):
        return "two of its mixed ops have a module with running statistics in common"
    return "its mixed ops have to be called one by one"


def _obstacle_of_class(cls: type[nn.Module]) -> str | None:
    """What a subclass might change of what ``cls`` does, or could not change."""
    if type(cls) is not type:
        return f"its class is one of {type(cls).__name__}"
    lost = {
        name
        for owner in own_classes(cls)
        for name, value in vars(owner).items()
        if name in _CALLS
        or (
            name.startswith("__")
            and name.endswith("__")
            and name not in _HARMLESS
            and (callable(value) or isinstance(value, classmethod) or name == "__slots__")
        )
    }
    return f"its class defines {', '.join(sorted(lost))}" if lost else None


def join(cell: nn.Module, verdict: CellVerdict) -> None:
    """Let ``cell`` run node by node from now on."""
    vars(cell)[_JOINED] = verdict.joined
    cls: type = type(cell)
    cell.__class__ = _joined_class(cls)


def separate(cell: nn.Module) -> None:
    """Undo ``join``."""
    cell.__class__ = _original(type(cell))
    vars(cell).pop(_JOINED, None)


@functools.cache
def _joined_class(cls: type) -> type:
    """The subclass of ``cls`` whose cells run node by node; it goes by the same name."""
    forward = functools.wraps(cls.forward)(  # type: ignore[attr-defined]  # signature and text
        lambda self, *args, **kwargs: NodeByNode.forward(self, *args, **kwargs)
    )
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (NodeByNode, cls), {**names, "forward": forward})


def _original(cls: type) -> type:
    """The class that a joined cell's class was made of."""
    return cls.__mro__[2]


def _blank(cls: type) -> Any:
    """A joined cell of class ``cls``, without its state."""
    joined = _joined_class(cls)
    return object.__new__(joined)
