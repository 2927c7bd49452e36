# SPDX-License-Identifier: Apache-2.0
"""Options that do nothing as the others are: who sets one expects something of it.

Only switches count, not lengths: what a short run never gets to (the architecture while it is
frozen, a delayed schedule) is no mistake of who tries a long run out.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from fastnas.data.interface import Data
from fastnas.methods import METHODS
from fastnas.search.config import CELL_FIELDS, PRESETS, SearchConfig
from fastnas.spaces import SPACES, Space, get_space

__all__ = ["idle_options", "refuse_idle", "refuse_idle_values", "with_data"]

C = TypeVar("C")


def idle_options(config: SearchConfig) -> dict[str, str]:
    """The fields that do nothing in a search, those of method and space among them.

    Returns:
        Name of a field -> what would make it do something, and what there is instead.
    """
    space, method = get_space(config.space), METHODS[config.method]
    idle = {**_target(config), **method.idle(config)}
    for name in (*CELL_FIELDS, "memory"):
        if not _has(space, name):
            others = ", ".join(other.name for other in SPACES.values() if _has(other, name))
            idle[name] = f"a space that has it ({others}), but got {space.name!r}"
    if "gates" in method.needs and "memory" not in idle:
        idle["memory"] = f"a method that runs more than one path, but got {method.name!r}"
    if not method.supernet_options(config.options).get("none", True):
        idle["derive_none"] = f"a method with the candidate none, but got {method.name!r}"
    return idle


def _has(space: Space, name: str) -> bool:
    return name in (*space.fields, *inspect.signature(space.supernet).parameters)


def _target(config: SearchConfig) -> dict[str, str]:
    """What is said of a target that is not there, or is another one."""
    found = f"but got {config.target!r}"
    if config.target is None:
        names = ("target_loss", "target_weight", "target_rate", "latency_table", "foreign_table")
        return dict.fromkeys(names, f"a target as well, {found}")
    idle = {}
    if not config.target.startswith("latency="):
        idle = dict.fromkeys(("latency_table", "foreign_table"), f"a target of latency, {found}")
    if config.target_loss != "constraint":
        idle["target_rate"] = f"target_loss 'constraint', but got {config.target_loss!r}"
    return idle


def refuse_idle_values(config: SearchConfig) -> None:
    """Refuse values that do nothing, but for defaults and those of presets.

    Raises:
        ValueError: there is one; it is named, and what would make it do something.
    """
    method, space = METHODS[config.method], get_space(config.space)
    presets = [*PRESETS.values(), *method.presets.values(), *space.presets.values()]
    idle = idle_options(config)
    refuse_idle(config, idle, presets)
    for name in ("options", "network"):
        own = [vars(preset[name]) for preset in presets if name in preset]
        refuse_idle(getattr(config, name), idle, own)


def refuse_idle(part: Any, idle: Mapping[str, str], presets: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a value of a dataclass that does nothing, is no default, and of no preset.

    Args:
        part: the dataclass.
        idle: name of a field -> what would make it do something.
        presets: values that a field may have without anybody's asking for them.

    Raises:
        ValueError: there is one.
    """
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        usual = [field.default, *(p[field.name] for p in presets if field.name in p)]
        if field.name in idle and value not in usual:
            raise ValueError(
                f"{field.name}: {value!r} does nothing here: expected {idle[field.name]}"
            )


def with_data(config: C, data: Data) -> C:
    """The configuration of a run on images that the caller gives, by their name.

    They are taken as they are: only images that the run loads itself are brought to a size. A size
    that they do not have is refused also where a preset says it, for it stands in the record of the
    run. A run that goes on is left as it was begun.

    Args:
        config: of a search or of an evaluation.
        data: the images.

    Raises:
        ValueError: ``image_size`` is not that of the images.
    """
    run: Any = config
    size, (height, width) = run.image_size, data.image_size
    if not run.resume and size is not None and (height, width) != (size, size):
        wanted = f"None or {height}" if height == width else "None"
        raise ValueError(
            f"image_size: {size} does nothing here: expected {wanted}, for the images in data are "
            f"{height} x {width} pixels and are taken as they are"
        )
    return dataclasses.replace(run, data=data.name)
