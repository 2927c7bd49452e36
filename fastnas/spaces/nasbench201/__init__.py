# SPDX-License-Identifier: Apache-2.0
"""The topology space of NAS-Bench-201: one cell, one operation on each of its edges."""

from __future__ import annotations

from fastnas.spaces.base import Space
from fastnas.spaces.nasbench201.blocks import RULES, NASBench201Shape
from fastnas.spaces.nasbench201.derive import derive, one_hot
from fastnas.spaces.nasbench201.genotype import GENOTYPES, PRIMITIVES, Genotype
from fastnas.spaces.nasbench201.network import Network
from fastnas.spaces.nasbench201.supernet import NASBench201Options, Supernet

__all__ = [
    "GENOTYPES",
    "PRIMITIVES",
    "SPACE",
    "Genotype",
    "NASBench201Options",
    "NASBench201Shape",
    "Network",
    "Supernet",
    "derive",
    "one_hot",
]

SPACE = Space(
    name="nasbench201",
    supernet=Supernet,
    network=Network,
    genotype=Genotype,
    derive=derive,
    genotypes=GENOTYPES,
    blocks=RULES,
    options=NASBench201Options,
    presets={
        # The size of the benchmark's networks.
        "cifar10": {"C": 16, "layers": 15},
        "imagenet": {"C": 16, "layers": 15, "image_size": 16},
    },
    fields=("C", "layers"),
    network_fields=("C", "layers"),
    features=frozenset({"gates", "partial_channels", "engine_cells"}),
    one_hot=one_hot,
)
