# SPDX-License-Identifier: Apache-2.0
"""What the supernet and the derived network of the NAS-Bench-201 space share: all but the cells.

Dong and Yang, "NAS-Bench-201", ICLR 2020, section 2.1: a stem, three stages of cells, between two
of them a residual block that halves the image and doubles the width, and a classifier.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastnas.nn.candidates import ReLUConvBN
from fastnas.spaces.base import check_positive

__all__ = ["STAGES", "Backbone", "ResidualReduction", "check_size", "plan_cells"]

STAGES = 3


def plan_cells(C: int, layers: int) -> list[tuple[int, bool]]:
    """For each cell its width, and whether a residual block stands before it.

    A third of the cells is in each stage; in the paper C is 16 and there are 15 cells. Where they
    are no multiple of three, stages begin at cells floor(L/3) and floor(2L/3).

    Raises:
        ValueError: a number that is not positive, or fewer cells than stages.
    """
    check_positive(C=C, layers=layers)
    if layers < STAGES:
        raise ValueError(f"layers must be at least {STAGES}, one cell a stage, got {layers}")
    starts = [stage * layers // STAGES for stage in range(1, STAGES)]
    return [(C * 2 ** sum(i >= start for start in starts), i in starts) for i in range(layers)]


def check_size(height: int, width: int) -> None:
    """Raise a ValueError unless every residual block can halve such images."""
    multiple = 2 ** (STAGES - 1)
    if height < 1 or width < 1 or height % multiple or width % multiple:
        raise ValueError(
            f"x: images of {height}x{width} cannot be halved as often as the network halves them; "
            f"pad or resize height and width to multiples of {multiple}"
        )


class ResidualReduction(nn.Module):
    """``(N, C, H, W)`` to ``(N, 2 C, H / 2, W / 2)``: two 3x3 convolutions beside a shortcut.

    The shortcut is a 2x2 average and a 1x1 convolution without BatchNorm.
    """

    def __init__(self, C: int) -> None:
        """Build for C channels in; the BatchNorms are affine in search too."""
        super().__init__()
        self.conv_a = ReLUConvBN(C, 2 * C, 3, 2, 1)
        self.conv_b = ReLUConvBN(2 * C, 2 * C, 3, 1, 1)
        self.downsample = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(C, 2 * C, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Height and width must be even."""
        return self.conv_b(self.conv_a(x)) + self.downsample(x)


class Backbone(nn.Module):
    """Stem, cells, residual blocks between the stages, BatchNorm, ReLU, pooling and classifier."""

    def __init__(
        self,
        C: int,
        layers: int,
        num_classes: int,
        in_channels: int,
        build_cell: Callable[[int], nn.Module],
    ) -> None:
        """Build with PyTorch's default initialisation.

        Args:
            C: channels of the first stage.
            layers: number of cells.
            num_classes: width of the classifier.
            in_channels: channels of the images.
            build_cell: makes a cell of so many channels.

        Raises:
            ValueError: a number that is not positive, or fewer than three cells.
        """
        super().__init__()
        check_positive(num_classes=num_classes, in_channels=in_channels)
        plan = plan_cells(C, layers)
        self._in_channels = in_channels
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, C, 3, padding=1, bias=False), nn.BatchNorm2d(C)
        )
        self.cells = nn.ModuleList(build_cell(width) for width, _ in plan)
        #: Before which cell each residual block stands.
        self._reduces = {
            index: number
            for number, index in enumerate(i for i, (_, reduction) in enumerate(plan) if reduction)
        }
        self.reductions = nn.ModuleList(
            ResidualReduction(width // 2) for width, reduction in plan if reduction
        )
        last = plan[-1][0]
        self.lastact = nn.Sequential(nn.BatchNorm2d(last), nn.ReLU())
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(last, num_classes)

    def run(self, x: Tensor, call: Callable[[int, Any, Tensor], Tensor]) -> Tensor:
        """Map images ``(N, in_channels, H, W)`` to logits ``(N, num_classes)``.

        Args:
            x: images, floating point; height and width multiples of 4.
            call: ``(index, cell, x) -> y`` runs a cell.

        Raises:
            ValueError: other images.
        """
        if x.dim() != 4 or x.shape[1] != self._in_channels:
            raise ValueError(
                f"x: wanted (N, {self._in_channels}, H, W), got shape {tuple(x.shape)}"
            )
        check_size(x.shape[2], x.shape[3])
        x = self.stem(x)
        for index, cell in enumerate(self.cells):
            if index in self._reduces:
                x = self.reductions[self._reduces[index]](x)
            x = call(index, cell, x)
        return self.classifier(self.global_pooling(self.lastact(x)).flatten(1))
