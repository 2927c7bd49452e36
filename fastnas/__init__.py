# SPDX-License-Identifier: Apache-2.0
"""Fused mixed ops for differentiable neural architecture search, and the search around them.

``MixedOp`` and ``PartialMixedOp`` take the place of the mixed op of a DARTS or PC-DARTS code base;
``accelerate(model)`` does that in a finished supernet. The packages ``spaces``, ``methods``,
``search``, ``evaluate`` and ``data`` are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

# First of all: without the kernels nothing below can work, and this says why they are missing.
from fastnas import _extension  # noqa: F401  # isort: skip

from fastnas import nn, ops
from fastnas._version import __version__
from fastnas.nn import MixedOp, PartialMixedOp, accelerate, restore

__all__ = [
    "MixedOp",
    "PartialMixedOp",
    "__version__",
    "accelerate",
    "nn",
    "ops",
    "restore",
]

_LAZY = ("data", "evaluate", "methods", "search", "spaces")


def __getattr__(name: str) -> ModuleType:
    """Import a sub-package at its first use: a drop-in mixed op should not wait for them."""
    if name in _LAZY:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
