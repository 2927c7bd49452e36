# SPDX-License-Identifier: Apache-2.0
"""How an architecture is searched: one short file a paper.

``METHODS`` maps the name of a method to its class; ``register_method`` enters one of your own.
"""

from __future__ import annotations

from fastnas.methods.base import METHODS, Method, MethodOptions, Moment, Phase, register_method
from fastnas.methods.da2s import DA2S, DA2SOptions
from fastnas.methods.darts import Darts, DartsOptions
from fastnas.methods.entrannas import EnTranNAS, EnTranNASOptions
from fastnas.methods.entrannas_dst import EnTranNASDST, EnTranNASDSTOptions
from fastnas.methods.learner import Batch, Learner, Outcome
from fastnas.methods.parameters import ArchParameters
from fastnas.methods.pc_darts import PCDarts, PCDartsOptions
from fastnas.methods.proxyless import Proxyless, ProxylessOptions
from fastnas.methods.target import CostTerm, Target

__all__ = [
    "DA2S",
    "METHODS",
    "ArchParameters",
    "Batch",
    "CostTerm",
    "DA2SOptions",
    "Darts",
    "DartsOptions",
    "EnTranNAS",
    "EnTranNASDST",
    "EnTranNASDSTOptions",
    "EnTranNASOptions",
    "Learner",
    "Method",
    "MethodOptions",
    "Moment",
    "Outcome",
    "PCDarts",
    "PCDartsOptions",
    "Phase",
    "Proxyless",
    "ProxylessOptions",
    "Target",
    "register_method",
]
