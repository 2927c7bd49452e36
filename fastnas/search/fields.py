# SPDX-License-Identifier: Apache-2.0
"""Configurations as JSON: dataclasses written and read back, each field checked by its type."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from fastnas.spaces.genotype_file import short

T = TypeVar("T")

SEEDS = 2**63
"""Seeds lie below: PyTorch's generators take no more."""


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as a dict that JSON can hold: tuples become lists, dataclasses dicts."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def from_dict(cls: type[T], data: Any, where: str = "configuration") -> T:
    """Build a dataclass from what :func:`to_dict` wrote; fields left out keep their defaults.

    Args:
        cls: the dataclass. Its fields are bool, int, float, str, None, Literal, tuples and unions
            of these, and dataclasses.
        data: a dict, as ``json.loads`` gives it.
        where: what the messages begin with, for example the file's name.

    Raises:
        ValueError: an unknown key, a value of the wrong type, or one that the dataclass refuses.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}: expected an object with fields, but got {short(data)}")
    hints = get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cast(Any, cls))]
    values = {}
    for key, value in data.items():
        if key not in names:
            raise ValueError(f"{where}: unknown field {short(key)}; known are {', '.join(names)}")
        values[key] = _convert(hints[key], value, f"{where}: {key}")
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None


def check_range(name: str, value: float, least: float, below: float | None = None) -> None:
    """Raise a ValueError unless a number is finite, at least ``least`` and less than ``below``.

    Integers are less than 2^31 where nothing else is said: what is counted here never comes near
    that, and PyTorch takes no more.
    """
    limit = below if below is not None else 2**31 if isinstance(value, int) else math.inf
    # Written so that nan fails too.
    if not least <= value < limit:
        wanted = f"at least {least}" + (f" and below {limit}" if value >= limit else "")
        raise ValueError(f"{name}: expected {wanted}, but got {value}")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        choices = ", ".join(repr(choice) for choice in arguments)
        raise ValueError(f"{where}: expected one of {choices}, but got {short(value)}")
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _convert(inner, value, where)
    if origin is tuple:
        return _tuple(arguments, value, where)
    if dataclasses.is_dataclass(hint):
        kind = cast(type, hint)
        return value if isinstance(value, kind) else from_dict(kind, value, where)
    return _scalar(hint, value, where)


def _tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where}: expected a list, but got {short(value)}")
    if arguments[-1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(value) != len(arguments):
        raise ValueError(f"{where}: expected {len(arguments)} values, but got {len(value)}")
    return tuple(
        _convert(hint, item, f"{where}[{index}]")
        for index, (hint, item) in enumerate(zip(arguments, value, strict=True))
    )


def _scalar(hint: Any, value: Any, where: str) -> Any:
    # bool is an int to Python, not to a reader of the file; an int is a fine float to both.
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(
                f"{where}: expected a smaller number, but got {short(value)}"
            ) from None
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ValueError(f"{where}: expected {hint.__name__}, but got {short(value)}")
