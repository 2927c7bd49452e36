# SPDX-License-Identifier: Apache-2.0
"""The space of ProxylessNAS: a chain of MBConv blocks, each with a choice of its own."""

from __future__ import annotations

from fastnas.spaces.base import Space
from fastnas.spaces.mbconv.blocks import RULES, MBConvShape
from fastnas.spaces.mbconv.derive import derive
from fastnas.spaces.mbconv.genotype import Genotype, MBBlock
from fastnas.spaces.mbconv.layout import PRIMITIVES, MBConvOptions
from fastnas.spaces.mbconv.network import Network
from fastnas.spaces.mbconv.published import GENOTYPES
from fastnas.spaces.mbconv.supernet import ChainSpec, Supernet

__all__ = [
    "GENOTYPES",
    "PRIMITIVES",
    "SPACE",
    "ChainSpec",
    "Genotype",
    "MBBlock",
    "MBConvOptions",
    "MBConvShape",
    "Network",
    "Supernet",
    "derive",
]

SPACE = Space(
    name="mbconv",
    supernet=Supernet,
    network=Network,
    genotype=Genotype,
    derive=derive,
    genotypes=GENOTYPES,
    blocks=RULES,
)
