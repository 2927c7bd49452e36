# SPDX-License-Identifier: Apache-2.0
"""DARTS' factorized reduce: every second pixel of every second row, twice, in a 1x1 convolution.

The convolutions of stride 2 read two of four pixels, those at (even, even) and at (odd, odd). Here
these are picked and rectified first, once for all candidates that read a state, and what is left
are dense products of matrices, all of them in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastnas.ops._common import memory_format

__all__ = ["SharedHalves", "TwoHalves", "picked_pixels"]


def _check_even(x: Tensor) -> None:
    """Raise a ValueError unless height and width of ``x`` can be halved."""
    if x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(
            "FactorizedReduce: height and width must be even, got "
            f"{x.shape[2]}x{x.shape[3]}; pad or resize the images"
        )


class TwoHalves:
    """What enters the BatchNorm of a factorized reduce, from the rectified state.

    Two strided convolutions, the second of the image shifted by one pixel.
    """

    def __init__(self, module: Any) -> None:
        """Take the factorized reduce; what it holds is read at every call."""
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, C', H / 2, W / 2)``."""
        _check_even(x)
        return torch.cat([conv(x[:, :, i:, i:]) for i, conv in enumerate(self.convs)], dim=1)

    @property
    def convs(self) -> tuple[nn.Conv2d, nn.Conv2d]:
        """Both convolutions, called `conv_1` and `conv_2`, or without the underscore."""
        children = self.module._modules
        infix = "_" if "conv_1" in children else ""
        return children[f"conv{infix}1"], children[f"conv{infix}2"]

    def is_plain(self) -> bool:
        """Whether both are 1x1 convolutions of stride 2, alike, and nothing else."""
        first, second = self.convs
        return (
            all(map(_is_plain, self.convs))
            and first.in_channels == second.in_channels
            and first.out_channels == second.out_channels
        )


def _is_plain(conv: nn.Conv2d) -> bool:
    return (
        type(conv) is nn.Conv2d
        and "forward" not in vars(conv)
        and conv.kernel_size == (1, 1)
        and conv.stride == (2, 2)
        and conv.padding == (0, 0)
        and conv.groups == 1
        and conv.bias is None
    )


def picked_pixels(x: Tensor) -> Tensor:
    """The rectified pixels at (even, even) and (odd, odd).

    Args:
        x: ``(N, C, H, W)``, H and W even.

    Returns:
        ``(2, N, C, H / 2, W / 2)``, or, if ``x`` is in channels_last, ``(2, N, H / 2, W / 2, C)``;
        dense.

    Raises:
        ValueError: an odd height or width.
    """
    _check_even(x)
    blocks = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    pixels = blocks.diagonal(dim1=3, dim2=5).movedim(-1, 0)
    if memory_format(x) is torch.channels_last:
        pixels = pixels.permute(0, 1, 3, 4, 2)
    return pixels.contiguous().relu()


class SharedHalves:
    """The convolutions of several factorized reduces of one state, as one product of matrices."""

    def __init__(self, halves: Sequence[TwoHalves], format: torch.memory_format) -> None:
        """Take what the modules hold now; their convolutions are plain and of one shape.

        Args:
            halves: the factorized reduces.
            format: memory format of the state.
        """
        self.weights = [conv.weight for half in halves for conv in half.convs]
        self.product = shared_rows if format is torch.channels_last else shared_images

    def __call__(self, pixels: Tensor) -> list[Tensor]:
        """Map ``picked_pixels`` to what each factorized reduce's BatchNorm takes."""
        return self.product(pixels, *self.weights)


def shared_images(pixels: Tensor, *weights: Tensor) -> list[Tensor]:
    """Even pixels times one weight and odd pixels times another, on the channels, for each two.

    Args:
        pixels: ``(2, N, C, H, W)``, contiguous.
        weights: ``(C', C, 1, 1)`` of the even pixels and of the odd ones, in turns.

    Returns:
        For each two weights ``(N, 2 C', H, W)``, contiguous.
    """
    _, N, _, H, W = pixels.shape
    table, count, C = _table(weights)
    y = torch.matmul(table.unsqueeze(1), pixels.flatten(3)).view(2, N, count, C, H, W)
    return list(y.permute(2, 1, 0, 3, 4, 5).reshape(count, N, 2 * C, H, W).unbind(0))


def shared_rows(pixels: Tensor, *weights: Tensor) -> list[Tensor]:
    """The same for ``(2, N, H, W, C)``; ``(N, 2 C', H, W)`` in channels_last."""
    _, N, H, W, C_in = pixels.shape
    table, count, C = _table(weights)
    rows = torch.bmm(pixels.view(2, N * H * W, C_in), table.transpose(1, 2))
    y = rows.view(2, N, H, W, count, C).permute(4, 1, 2, 3, 0, 5)
    return list(y.reshape(count, N, H, W, 2 * C).permute(0, 1, 4, 2, 3).unbind(0))


def _table(weights: Sequence[Tensor]) -> tuple[Tensor, int, int]:
    """``(2, count * C', C)``: for either half all weights below one another; count and ``C'``."""
    table = torch.stack([torch.cat(list(weights[i::2])) for i in (0, 1)]).flatten(2)
    return table, len(weights) // 2, weights[0].shape[0]
