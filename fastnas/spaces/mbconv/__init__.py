# SPDX-License-Identifier: Apache-2.0
"""The space of ProxylessNAS: a chain of MBConv blocks, each with a choice of its own."""

from __future__ import annotations

from fastnas.spaces.base import Space
from fastnas.spaces.mbconv.blocks import RULES, MBConvShape
from fastnas.spaces.mbconv.derive import derive, one_hot
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
    "one_hot",
]

SPACE = Space(
    name="mbconv",
    supernet=Supernet,
    network=Network,
    genotype=Genotype,
    derive=derive,
    genotypes=GENOTYPES,
    blocks=RULES,
    options=MBConvOptions,
    presets={
        # For images of 28x28. Nine of the twelve blocks may be skipped: the cheapest network takes
        # a third of the time of the largest.
        "demo": {
            "network": MBConvOptions(
                stem_channels=16,
                stem_stride=1,
                first_channels=8,
                stage_channels=(16, 24, 40),
                stage_blocks=(4, 4, 4),
                stage_strides=(2, 2, 2),
                head_channels=160,
            ),
        },
        # Images of 32x32 are halved three times: the widths are those for ImageNet.
        "cifar10": {
            "network": MBConvOptions(stem_stride=1, stage_strides=(1, 2, 2, 1, 2, 1)),
        },
    },
    fields=(),
    network_fields=(),
    features=frozenset({"gates"}),
    one_hot=one_hot,
)
