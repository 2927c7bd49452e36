# SPDX-License-Identifier: Apache-2.0
"""How somebody's mixed op or cell is called, and where its parts are."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fastnas.nn.proof.settled import PLAIN

__all__ = [
    "Defaults",
    "arguments_needed",
    "extra_defaults",
    "is_default",
    "list_name",
    "parts_in_list",
    "positional",
    "split_extra",
]

Defaults = tuple[tuple[str, object], ...]
"""The last arguments of a forward, in their order, with the values they have if left out."""


def list_name(module: nn.Module) -> str | None:
    """The name of the ``ModuleList`` in ``module``: ``_ops``, or the only one there is."""
    lists = [name for name, child in module._modules.items() if isinstance(child, nn.ModuleList)]
    if "_ops" in lists:
        return "_ops"
    return lists[0] if len(lists) == 1 else None


def parts_in_list(module: nn.Module) -> nn.ModuleList:
    """What is in that list; empty if there is none."""
    name = list_name(module)
    found = module._modules[name] if name is not None else nn.ModuleList()
    assert isinstance(found, nn.ModuleList)
    return found


def positional(module: nn.Module) -> list[inspect.Parameter] | None:
    """The arguments of its ``forward``; None if it has others than ordinary ones."""
    forward = getattr(module.forward, "__func__", None)
    # A decorator may tell of other arguments, or other defaults, than it takes.
    if forward is None or hasattr(forward, "__signature__"):
        return None
    try:
        found = inspect.signature(module.forward, follow_wrapped=False)
    except (TypeError, ValueError):  # a forward that is not Python
        return None
    parameters = list(found.parameters.values())
    ordinary = all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    return parameters if ordinary else None


def arguments_needed(module: nn.Module) -> int | None:
    """How many arguments its ``forward`` cannot do without; None if it is not Python."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    ordinary = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return sum(p.default is p.empty for p in ordinary)


def extra_defaults(parameters: Sequence[inspect.Parameter]) -> Defaults | None:
    """Names and defaults of all these; None if one has to be given, or may be of any kind."""
    if not all(isinstance(p.default, PLAIN) for p in parameters):
        return None
    return tuple((p.name, p.default) for p in parameters)


def split_extra(
    defaults: Defaults, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Whether a call leaves the last arguments at their defaults, and what else it names.

    Args:
        defaults: of the last arguments.
        args: what is given for them by position.
        kwargs: what is given by name, for any argument.

    Returns:
        ``kwargs`` without them, unless they were given by position as well; None where one has
        another value, or there are too many.
    """
    if len(args) > len(defaults):
        return None
    rest = dict(kwargs)
    for number, (name, default) in enumerate(defaults):
        if number < len(args):
            if not is_default(args[number], default):
                return None
        elif not is_default(rest.pop(name, default), default):
            return None
    return rest


def is_default(value: object, default: object) -> bool:
    """Whether ``value`` stands for ``default``: the same, or an equal number."""
    if value is default:
        return True
    if type(value) in (int, float) and type(default) in (int, float):
        return value == default
    return type(value) is type(default) and isinstance(default, PLAIN) and value == default
