# SPDX-License-Identifier: Apache-2.0
"""The cell space of DARTS and of the methods that search it (PC-DARTS, DA2S and others)."""

from __future__ import annotations

from fastnas.spaces.base import Space
from fastnas.spaces.darts.blocks import RULES, DartsShape
from fastnas.spaces.darts.derive import derive, one_hot
from fastnas.spaces.darts.genotype import GENOTYPES, Genotype
from fastnas.spaces.darts.network import Network
from fastnas.spaces.darts.supernet import Supernet

__all__ = [
    "GENOTYPES",
    "SPACE",
    "DartsShape",
    "Genotype",
    "Network",
    "Supernet",
    "derive",
    "one_hot",
]

SPACE = Space(
    name="darts",
    supernet=Supernet,
    network=Network,
    genotype=Genotype,
    derive=derive,
    genotypes=GENOTYPES,
    blocks=RULES,
    features=frozenset({"partial_channels", "engine_cells"}),
    one_hot=one_hot,
)
