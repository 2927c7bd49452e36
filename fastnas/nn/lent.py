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

from torch import Tensor, nn

from fastnas.nn.mixed_op import MixedOp, Weights
from fastnas.nn.proof.reading import nested_codes, own_classes
from fastnas.nn.proof.signature import Defaults, extra_defaults, split_extra

__all__ = ["ORIGINAL", "OURS", "hand_over", "lend", "lent_methods", "lost_names"]

ORIGINAL = "_original"
"""Where a mixed op of ours has the one that it replaced."""

OURS = frozenset(
    (ORIGINAL, "_plan", "_forms", "_channels", "skip_zero", "forward", "_compiled_call_impl")
)
"""Attributes of a mixed op of ours that say nothing of the one it replaced."""

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


def lend(ours: MixedOp, cls: Any, name: str) -> None:
    """Give ``ours`` the methods of ``cls``, its further arguments, and its name for candidates.

    Args:
        ours: has the candidates of a mixed op of class ``cls``.
        cls: somebody's.
        name: what that calls the ``ModuleList`` of its candidates.
    """
    if name != "_ops":
        ours._modules[name] = ours._modules.pop("_ops")
    if name != "_ops" or _defaults(cls) or lent_methods(cls, type(ours)):
        base: type = type(ours)
        ours.__class__ = _lending_class(base, cls, name, cls.forward)


def hand_over(ours: nn.Module, original: nn.Module) -> None:
    """Give ``original`` what ``ours`` was given in its place."""
    own = OURS if "k" in vars(original) else OURS | {"k"}
    kept = {name: value for name, value in vars(ours).items() if name not in own}
    kept["_modules"] = {name: ours._modules[name] for name in original._modules}
    vars(original).update(kept)


def _defaults(cls: type[nn.Module]) -> Defaults:
    """What the ``forward`` of ``cls`` takes besides x and weights."""
    found = inspect.signature(cls.forward, follow_wrapped=False)
    return extra_defaults(list(found.parameters.values())[3:]) or ()


def _forward_of(base: type[MixedOp], defaults: Defaults) -> Any:
    """The forward of ``base``; with other values of further arguments, that of the original."""

    def forward(self: MixedOp, x: Tensor, weights: Weights, *args: Any, **kwargs: Any) -> Any:
        if (args or kwargs) and split_extra(defaults, args, kwargs) != {}:
            return _run_original(self, x, weights, *args, **kwargs)
        return base.forward(self, x, weights)

    return forward


def _run_original(ours: MixedOp, *args: Any, **kwargs: Any) -> Any:
    """What the original would return with the state of ``ours``, which gets what it may set."""
    original: nn.Module = vars(ours)[ORIGINAL]
    # Not the original itself: replicas of ours, in threads of a DataParallel, have one in common.
    twin = object.__new__(type(original))
    vars(twin).update(vars(original))
    hand_over(ours, twin)
    before, parts = dict(vars(twin)), dict(twin._modules)
    try:
        return twin.forward(*args, **kwargs)
    finally:
        after = {name: value for name, value in vars(twin).items() if name != "_modules"}
        _repeat_changes(before, after, vars(ours))
        _repeat_changes(parts, twin._modules, ours._modules)


def _repeat_changes(before: dict[str, Any], after: dict[str, Any], there: dict[str, Any]) -> None:
    """Change ``there`` as ``before`` has become ``after``."""
    for name in before.keys() - after.keys() - {"_modules"}:
        there.pop(name, None)
    for name, value in after.items():
        if name not in before or value is not before[name]:
            there[name] = value


@functools.cache
def _lending_class(base: type, cls: type, name: str, forward: object) -> type:
    """The subclass of ``base`` with the methods of ``cls``; it goes by the name of ``base``.

    One for each ``forward`` that ``cls`` has had: it says what the further arguments are.
    """
    members: dict[str, Any] = {}
    if name != "_ops":
        members["_ops"] = property(lambda self: self._modules[name])
    if defaults := _defaults(cls):
        members["forward"] = _forward_of(base, defaults)
    members |= {
        **lent_methods(cls, base),
        "_lent_to": base,
        "_lent_by": cls,
        "_lent_name": name,
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
    made_of = (members["_lent_to"], members["_lent_by"], members["_lent_name"])
    return (_blank, made_of, *reduced[2:])


def _blank(base: type, cls: type, name: str) -> Any:
    """A module of the class made of these, without its state."""
    return object.__new__(_lending_class(base, cls, name, cls.forward))  # type: ignore[attr-defined]
