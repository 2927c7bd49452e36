# SPDX-License-Identifier: Apache-2.0
"""Derived networks of the MBConv space."""

from __future__ import annotations

from torch import Tensor, nn

from fastnas.spaces.mbconv.genotype import Genotype, MBBlock
from fastnas.spaces.mbconv.layers import (
    ConvLayer,
    LinearLayer,
    MBConv,
    ResidualBlock,
    init_weights,
    set_batch_norms,
)

__all__ = ["Network", "build_block"]


def build_block(block: MBBlock) -> ResidualBlock:
    """Build one block; a skipped one is the identity."""
    if block.skipped:
        return ResidualBlock(None, block.residual)
    conv = MBConv(
        block.in_channels,
        block.out_channels,
        block.kernel_size,
        block.stride,
        block.expand_ratio,
        block.mid_channels,
    )
    return ResidualBlock(conv, block.residual)


class Network(nn.Module):
    """Stem, blocks, 1x1 convolution, global average pooling and a linear classifier."""

    def __init__(
        self,
        genotype: Genotype,
        num_classes: int | None = None,
        in_channels: int | None = None,
    ) -> None:
        """Build with the initialisation of the released code.

        Args:
            genotype: the architecture.
            num_classes: width of the classifier; None: that of the genotype.
            in_channels: channels of the images; None: those of the genotype.

        Raises:
            TypeError: ``genotype`` is not a Genotype of this space.
        """
        if not isinstance(genotype, Genotype):
            raise TypeError(f"genotype: wanted a Genotype, got {type(genotype).__name__}")
        super().__init__()
        images = genotype.in_channels if in_channels is None else in_channels
        classes = genotype.num_classes if num_classes is None else num_classes
        width = genotype.blocks[-1].out_channels
        self.first_conv = ConvLayer(images, genotype.stem_channels, 3, genotype.stem_stride)
        self.blocks = nn.ModuleList(build_block(block) for block in genotype.blocks)
        self.feature_mix_layer = ConvLayer(width, genotype.head_channels, 1)
        self.classifier = LinearLayer(genotype.head_channels, classes, genotype.dropout)
        set_batch_norms(self, genotype.bn_momentum, genotype.bn_eps)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, in_channels, H, W)`` to logits ``(N, num_classes)``."""
        x = self.first_conv(x)
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.feature_mix_layer(x))
