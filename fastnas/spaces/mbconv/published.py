# SPDX-License-Identifier: Apache-2.0
"""The networks that ProxylessNAS found on ImageNet, one for each kind of hardware."""

from __future__ import annotations

from fastnas.spaces.mbconv.genotype import Genotype
from fastnas.spaces.mbconv.layout import ZERO, Layout, Place

__all__ = ["GENOTYPES"]

_BLOCKS = (4, 4, 4, 4, 4, 1)
_STRIDES = (2, 2, 2, 1, 2, 1)


def _published(ends: tuple[int, int, int], stages: tuple[int, ...], ops: str) -> Genotype:
    """Build from channels of stem, first block and head, those of the stages, and the candidates.

    A candidate is written as kernel and expansion, ``53`` for ``5x5_MBConv3``; ``-`` is a skipped
    block.
    """
    stem, width, head = ends
    first, places = width, []
    for channels, blocks, stride in zip(stages, _BLOCKS, _STRIDES, strict=True):
        for number in range(blocks):
            places.append(Place(width, channels, stride if number == 0 else 1))
            width = channels
    names = [ZERO if op == "-" else f"{op[0]}x{op[0]}_MBConv{op[1]}" for op in ops.split()]
    return Genotype.build(Layout(3, stem, 2, first, tuple(places), head, 1000), names)


_MOBILE = "53 33 - -  73 33 53 53  76 53 53 53  56 53 53 53  76 76 73 73  76"

GENOTYPES: dict[str, Genotype] = {
    "proxyless_cpu": _published(
        (40, 24, 1432),
        (32, 48, 88, 104, 216, 360),
        "36 33 33 33  36 33 33 53  36 - - 33  56 33 33 33  56 53 53 33  56",
    ),
    "proxyless_gpu": _published(
        (40, 24, 1728),
        (32, 56, 112, 128, 256, 432),
        "53 - - -  73 - - 33  76 - - 53  56 - 33 53  76 76 76 56  76",
    ),
    "proxyless_mobile": _published((32, 16, 1280), (32, 40, 80, 96, 192, 320), _MOBILE),
    "proxyless_mobile_14": _published((48, 24, 1792), (40, 56, 112, 136, 256, 448), _MOBILE),
}
"""Published networks by the names under which their weights are known (PyTorch Hub)."""
