# SPDX-License-Identifier: Apache-2.0
"""The supernet of ProxylessNAS (Cai et al., ICLR 2019, section 4.2): every block has a mixed op."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastnas.nn.candidates import Zero
from fastnas.spaces.base import CellGates, CellSpec, CellWeights
from fastnas.spaces.mbconv.layers import (
    ConvLayer,
    LinearLayer,
    MBConv,
    MixedBlock,
    ResidualBlock,
    init_weights,
)
from fastnas.spaces.mbconv.layout import (
    ZERO,
    Layout,
    MBConvOptions,
    Place,
    kernel_and_expansion,
)

__all__ = ["KIND", "ChainSpec", "Supernet"]

KIND = "block"
"""Key of the mixed blocks' weights; they are all of one kind."""


@dataclass(frozen=True)
class ChainSpec(CellSpec):
    """The choices in a chain of blocks, with the widths that a genotype of it has.

    Attributes:
        layout: where the blocks stand.
    """

    layout: Layout = field(kw_only=True)

    @classmethod
    def of(cls, layout: Layout) -> ChainSpec:
        """The choices of a layout."""
        names = [place.candidates for place in layout.places]
        counts = tuple(map(len, names))
        return cls((1,) * len(names), max(names, key=len), counts, ZERO, layout=layout)


class Supernet(nn.Module):
    """Stem, a fixed block, mixed blocks, 1x1 convolution, global pooling, a linear classifier.

    With gates one candidate of each block runs (ProxylessNAS); with weights all of them do, and
    their weighted sum goes on (DARTS). Both come with every call and are no part of the module.

    Attributes:
        cell_specs: of the one kind ``block``: a mixed op for each block, with six or seven
            candidates.
    """

    def __init__(self, num_classes: int = 1000, in_channels: int = 3, **options: Any) -> None:
        """Build with the initialisation of the released code.

        Args:
            num_classes: width of the classifier.
            in_channels: channels of the images.
            options: fields of ``MBConvOptions``: width multiplier, channels, blocks and strides of
                the stages, channels of stem and head.

        Raises:
            ValueError: a number out of its range.
            TypeError: an unknown option.
        """
        super().__init__()
        layout = MBConvOptions(**options).layout(in_channels, num_classes)
        self._in_channels = in_channels
        self.cell_specs: dict[str, CellSpec] = {KIND: ChainSpec.of(layout)}
        self.first_conv = ConvLayer(in_channels, layout.stem_channels, 3, layout.stem_stride)
        first = MBConv(layout.stem_channels, layout.first_channels, 3, 1, 1)
        self.blocks = nn.ModuleList(
            [ResidualBlock(first, False), *(_mixed_block(place) for place in layout.places)]
        )
        self.feature_mix_layer = ConvLayer(layout.places[-1].out_channels, layout.head_channels, 1)
        self.classifier = LinearLayer(layout.head_channels, num_classes)
        init_weights(self)

    def uniform_weights(self) -> dict[str, CellWeights]:
        """Return equal weights that sum to 1 on each block, as before any search."""
        spec = self.cell_specs[KIND]
        ops = torch.zeros(spec.edges, len(spec.primitives))
        for row, count in zip(ops, spec.candidates, strict=True):
            row[:count] = 1 / count
        return {KIND: CellWeights(ops.to(self.classifier.linear.weight))}

    def forward(self, x: Tensor, weights: Mapping[str, CellWeights | CellGates]) -> Tensor:
        """Map images ``(N, in_channels, H, W)`` to logits ``(N, num_classes)``.

        Args:
            x: images, floating point, of the parameters' device.
            weights: under ``block`` the gates of all mixed blocks, or weights: ``ops`` ``[B, K]``
                and ``edges`` ``[B]`` or None.

        Raises:
            ValueError: wrong shape of ``x`` or of the weights, or a missing kind.
            TypeError: neither gates nor weights.
        """
        if x.dim() != 4 or x.shape[1] != self._in_channels:
            raise ValueError(
                f"x: shape {tuple(x.shape)}, wanted images (N, {self._in_channels}, H, W)"
            )
        rows = self._rows(weights)
        first, *mixed = self.blocks
        x = first(self.first_conv(x))
        for block, row in zip(mixed, rows, strict=True):
            x = block(x, row)
        return self.classifier(self.feature_mix_layer(x))

    def _rows(self, weights: Mapping[str, CellWeights | CellGates]) -> Sequence[Any]:
        """What goes to each mixed block: a gate, or one weight for each candidate it has."""
        if KIND not in weights:
            raise ValueError(f"weights: the kind {KIND!r} is missing, got {sorted(weights)}")
        given, spec = weights[KIND], self.cell_specs[KIND]
        if isinstance(given, CellGates):
            if len(given.edges) != spec.edges:
                raise ValueError(
                    f"weights[{KIND!r}].edges: {len(given.edges)} gates, wanted {spec.edges}"
                )
            return given.edges
        if not isinstance(given, CellWeights):
            raise TypeError(
                f"weights[{KIND!r}]: wanted CellGates or CellWeights, got {type(given).__name__}"
            )
        spec.check_weights(KIND, given)
        ops = given.ops if given.edges is None else given.ops * given.edges.unsqueeze(1)
        return [row[:count] for row, count in zip(ops.unbind(0), spec.candidates, strict=True)]


def _mixed_block(place: Place) -> MixedBlock:
    candidates: list[nn.Module] = []
    for name in place.candidates:
        if name == ZERO:
            candidates.append(Zero(place.stride))
        else:
            kernel, expansion = kernel_and_expansion(name)
            candidates.append(
                MBConv(place.in_channels, place.out_channels, kernel, place.stride, expansion)
            )
    return MixedBlock(candidates, place.residual)
