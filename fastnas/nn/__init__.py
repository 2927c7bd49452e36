# SPDX-License-Identifier: Apache-2.0
"""Modules of the search: candidates, mixed ops, and ``accelerate`` for supernets that exist."""

from fastnas.nn.accelerate import Report, accelerate, restore
from fastnas.nn.candidates import DARTS_PRIMITIVES, build_candidate, register_candidate
from fastnas.nn.gated import GatedMixedOp
from fastnas.nn.gates import Gate, Gates, draw_gates
from fastnas.nn.mixed_op import MixedOp
from fastnas.nn.partial import PartialMixedOp

__all__ = [
    "DARTS_PRIMITIVES",
    "Gate",
    "GatedMixedOp",
    "Gates",
    "MixedOp",
    "PartialMixedOp",
    "Report",
    "accelerate",
    "build_candidate",
    "draw_gates",
    "register_candidate",
    "restore",
]
