# SPDX-License-Identifier: Apache-2.0
"""What the class of somebody's mixed op can do besides its forward, lent to the one of ours.

A search may call methods of its mixed ops: to make them wider, to ask what they cost, to run one
candidate alone. They are functions of the candidates and settings, which ours has as well, so that
they run on ours: its class is then a subclass that has them, of the same name.
"""

from __future__ import annotations

import functools
import inspect
from types import FunctionType
from typing import Any

from torch import nn

from fastnas.nn.proof.reading import nested_codes, own_classes

__all__ = ["lend", "lent_methods", "lost_names"]

# What a mixed op's class may define and lose: what builds it, or shows it to people.
_REPLACEABLE = frozenset(
    ("__init__", "__repr__", "forward", "extra_repr", "_get_name", "__annotate__")
)


def lent_methods(cls: type[nn.Module], ours: type[nn.Module]) -> dict[str, Any]:
    """The functions of ``cls`` that ``ours`` is to have; none if only ``cls`` itself uses them."""
    defined = {
        name: value
        for owner in reversed(own_classes(cls))
        for name, value in vars(owner).items()
        if name not in _REPLACEABLE and _can_be_lent(name, value, ours)
    }
    return defined if any(not name.startswith("_") for name in defined) else {}


def lost_names(cls: type[nn.Module], ours: type[nn.Module]) -> list[str]:
    """What ``cls`` defines that somebody may use, and that ``ours`` would not have."""
    lent = lent_methods(cls, ours)
    return sorted(
        {
            name
            for owner in own_classes(cls)
            for name, value in vars(owner).items()
            if name not in _REPLACEABLE and name not in lent and _may_be_used(name, value, lent)
        }
    )


def _may_be_used(name: str, value: object, lent: dict[str, Any]) -> bool:
    if name.startswith("__"):
        return callable(value)
    if name.startswith("_") and not hasattr(nn.Module, name):
        # By what is lent, if by anybody.
        return bool(lent) and _function(value) is not None
    return True


def _can_be_lent(name: str, value: object, ours: type[nn.Module]) -> bool:
    """Whether ``value`` is a function that does not mind whose method it is."""
    function = _function(value)
    if function is None or name.startswith("__") or hasattr(ours, name):
        return False
    codes = list(nested_codes(inspect.unwrap(function).__code__))
    return not any("super" in code.co_names or "__class__" in code.co_freevars for code in codes)


def _function(value: object) -> FunctionType | None:
    function = value.__func__ if isinstance(value, staticmethod) else value
    return function if isinstance(function, FunctionType) else None


def lend(ours: nn.Module, cls: type) -> None:
    """Give ``ours`` the methods of ``cls``."""
    if lent_methods(cls, type(ours)):
        original: type = type(ours)
        ours.__class__ = _lending_class(original, cls)


@functools.cache
def _lending_class(base: type, cls: type) -> type:
    """The subclass of ``base`` with the methods of ``cls``; it goes by the name of ``base``."""
    members = {
        **lent_methods(cls, base),
        "_lent_to": base,
        "_lent_by": cls,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
    }
    return type(base.__name__, (base,), members)


def _reduce(self: nn.Module, protocol: Any) -> Any:
    # The class is made here: a pickle names the two that it was made of.
    reduced: Any = object.__reduce_ex__(self, max(int(protocol), 2))
    members = vars(type(self))
    return (_blank, (members["_lent_to"], members["_lent_by"]), *reduced[2:])


def _blank(base: type, cls: type) -> Any:
    """A module of the class made of these, without its state."""
    return object.__new__(_lending_class(base, cls))
