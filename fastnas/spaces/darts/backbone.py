# SPDX-License-Identifier: Apache-2.0
"""What the supernet and the derived network of the DARTS space share: stems and stack of cells."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from fastnas.nn.candidates import FactorizedReduce, ReLUConvBN
from fastnas.spaces.base import check_positive

__all__ = [
    "STEMS",
    "LayerPlan",
    "Stemmed",
    "check_images",
    "check_positive",
    "plan_layers",
    "preprocess_layers",
    "reduction_layers",
]

STEMS = ("cifar", "imagenet")


class LayerPlan(NamedTuple):
    """Widths and kind of one cell.

    Attributes:
        C_prev_prev: channels of the output of the cell before the previous one.
        C_prev: channels of the previous cell's output.
        C: channels of the cell's nodes.
        reduction: whether this cell halves the image.
        reduction_prev: whether the layer before halved it.
    """

    C_prev_prev: int
    C_prev: int
    C: int
    reduction: bool
    reduction_prev: bool


def reduction_layers(layers: int) -> tuple[int, ...]:
    """Return the indices of the reduction cells: floor(L/3) and floor(2L/3).

    They coincide for L = 1 (cell 0); with L = 2 both cells reduce.
    """
    return tuple(sorted({layers // 3, 2 * layers // 3}))


def plan_layers(
    C: int, layers: int, stem_width: int, stem: str, widths: tuple[int, int]
) -> list[LayerPlan]:
    """Lay out the cells; the width doubles at every reduction cell.

    Args:
        C: channels of the first cell's nodes.
        layers: number of cells.
        stem_width: channels that leave the stem.
        stem: ``cifar`` or ``imagenet``; the latter halves the image between its two outputs, so
            that the first cell stands behind a reduction.
        widths: number of concatenated states in a normal and in a reduction cell.
    """
    plan = []
    C_prev_prev = C_prev = stem_width
    reduction_prev = stem == "imagenet"
    reductions = reduction_layers(layers)
    for index in range(layers):
        reduction = index in reductions
        if reduction:
            C *= 2
        plan.append(LayerPlan(C_prev_prev, C_prev, C, reduction, reduction_prev))
        C_prev_prev, C_prev = C_prev, C * widths[reduction]
        reduction_prev = reduction
    return plan


def preprocess_layers(plan: LayerPlan, affine: bool) -> tuple[nn.Module, nn.Module]:
    """Build the two layers that bring a cell's inputs to its width and size."""
    preprocess0: nn.Module
    if plan.reduction_prev:
        preprocess0 = FactorizedReduce(plan.C_prev_prev, plan.C, affine=affine)
    else:
        preprocess0 = ReLUConvBN(plan.C_prev_prev, plan.C, 1, 1, 0, affine=affine)
    return preprocess0, ReLUConvBN(plan.C_prev, plan.C, 1, 1, 0, affine=affine)


class Stemmed(nn.Module):
    """A network that begins with one of the two stems, under the names of the published code.

    ``cifar`` is one convolution and BatchNorm, ``stem``, which keeps the image size. ``imagenet``
    is ``stem0``, a quarter of the size, and ``stem1`` behind it, an eighth. Their BatchNorms are
    affine in search too.
    """

    stem: nn.Sequential
    stem0: nn.Sequential
    stem1: nn.Sequential

    def __init__(self, stem: str, in_channels: int, C: int, multiplier: int, layers: int) -> None:
        """Build the stem of ``multiplier * C`` channels for a network of ``layers`` cells.

        Raises:
            ValueError: an unknown stem, or an odd width with ``imagenet``.
        """
        super().__init__()
        width = multiplier * C
        if stem not in STEMS:
            raise ValueError(f"stem must be one of {', '.join(STEMS)}, got {stem!r}")
        if stem == "imagenet" and width % 2:
            raise ValueError(
                f"C must be even with the imagenet stem, got {C} (half its width comes first)"
            )
        self._stem_kind = stem
        self._in_channels = in_channels
        self._layers = layers
        if stem == "cifar":
            self.stem = nn.Sequential(_conv3x3(in_channels, width, 1), nn.BatchNorm2d(width))
            return
        self.stem0 = nn.Sequential(
            _conv3x3(in_channels, width // 2, 2),
            nn.BatchNorm2d(width // 2),
            nn.ReLU(),
            _conv3x3(width // 2, width, 2),
            nn.BatchNorm2d(width),
        )
        self.stem1 = nn.Sequential(nn.ReLU(), _conv3x3(width, width, 2), nn.BatchNorm2d(width))

    def stem_outputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two inputs of the first cell.

        Raises:
            ValueError: images that the network cannot take, see ``check_images``.
        """
        check_images(x, self._in_channels, self._stem_kind, self._layers)
        if self._stem_kind == "cifar":
            out = self.stem(x)
            return out, out
        s0 = self.stem0(x)
        return s0, self.stem1(s0)


def _conv3x3(C_in: int, C_out: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(C_in, C_out, 3, stride=stride, padding=1, bias=False)


def check_images(x: Tensor, in_channels: int, stem: str, layers: int) -> None:
    """Check a batch of images before the first layer sees it.

    Every reduction needs an even height and width (``FactorizedReduce``), so the size must be a
    multiple of 4 for two reductions behind the ``cifar`` stem and of 32 behind ``imagenet``,
    whose own convolutions round up (221 to 224 all leave 56).

    Raises:
        ValueError: not ``(N, in_channels, H, W)``, or a size that cannot be halved often enough.
    """
    if x.dim() != 4 or x.shape[1] != in_channels:
        raise ValueError(f"x: wanted (N, {in_channels}, H, W), got shape {tuple(x.shape)}")
    halvings = len(reduction_layers(layers))
    sizes = (x.shape[2], x.shape[3])
    multiple = 2**halvings
    if stem == "imagenet":
        multiple *= 2
        sizes = ((sizes[0] + 3) // 4, (sizes[1] + 3) // 4)
    if sizes[0] < 1 or sizes[1] < 1 or sizes[0] % multiple or sizes[1] % multiple:
        wanted = multiple * 4 if stem == "imagenet" else multiple
        raise ValueError(
            f"x: images of {x.shape[2]}x{x.shape[3]} cannot be halved as often as the network "
            f"halves them; pad or resize height and width to multiples of {wanted}"
        )
