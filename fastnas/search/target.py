# SPDX-License-Identifier: Apache-2.0
"""What the options of a target must have in common."""

from __future__ import annotations

from typing import Any

from fastnas.methods import Target
from fastnas.search.fields import check_range

__all__ = ["check_target"]


def check_target(config: Any) -> None:
    """Check what a search's configuration says of its target.

    Raises:
        ValueError: no such target, or an option that does nothing with it or without one.
    """
    if config.target is None:
        for name in ("target_weight", "latency_table"):
            if getattr(config, name) is not None:
                raise ValueError(f"{name}: expected a target as well, but got none")
        for name in ("target_loss", "target_rate", "foreign_table"):
            if getattr(config, name) != _default(config, name):
                raise ValueError(f"{name}: expected a target as well, but got none")
        return
    target = Target.parse(config.target)
    if (target.name == "latency") != (config.latency_table is not None):
        raise ValueError(
            "latency_table: expected a table with a target of latency, and with no other "
            "(fastnas latency measure makes one), "
            f"but got {config.latency_table!r} with the target {config.target!r}"
        )
    if config.foreign_table and target.name != "latency":
        raise ValueError(f"foreign_table: expected a target of latency, but got {config.target!r}")
    if config.target_loss != "constraint" and config.target_rate != _default(config, "target_rate"):
        raise ValueError(
            "target_rate: expected it with the loss 'constraint' alone, which has a multiplier, "
            f"but got {config.target_rate} with {config.target_loss!r}"
        )
    for name in ("target_weight", "target_rate"):
        check_range(name, getattr(config, name) or 0.0, 0)


def _default(config: Any, name: str) -> Any:
    return type(config).__dataclass_fields__[name].default
