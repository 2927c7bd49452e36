"""Colour jitter of float RGB batches in 0 to 1, one strength an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: Weights of red, green and blue in the brightness of a grey image (ITU-R BT.601).
LUMA = (0.299, 0.587, 0.114)


def jitter(images: Tensor, amounts: Tensor, order: Sequence[int]) -> Tensor:
    """Change brightness (0), contrast (1), saturation (2) and hue (3) in this order.

    Args:
        images: [N, 3, H, W], float, values in 0 to 1.
        amounts: [N, 4]; 0 changes nothing. The first three are added to a factor of 1 that is at
            least 0, the last turns the hue by that part of the full circle.
        order: the four numbers above, in the order of application.
    """
    for index in order:
        images = _CHANGES[index](images, amounts[:, index].view(-1, 1, 1, 1))
    return images


def grey(images: Tensor) -> Tensor:
    """Brightness as seen by the eye: [N, 1, H, W]."""
    weights = torch.tensor(LUMA, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
    return (images * weights).sum(dim=1, keepdim=True)


def _blend(images: Tensor, other: Tensor | float, amount: Tensor) -> Tensor:
    factor = (1 + amount).clamp(min=0)
    return (factor * images + (1 - factor) * other).clamp(0, 1)


def _brightness(images: Tensor, amount: Tensor) -> Tensor:
    return _blend(images, 0.0, amount)


def _contrast(images: Tensor, amount: Tensor) -> Tensor:
    return _blend(images, grey(images).mean(dim=(1, 2, 3), keepdim=True), amount)


def _saturation(images: Tensor, amount: Tensor) -> Tensor:
    return _blend(images, grey(images), amount)


def _hue(images: Tensor, amount: Tensor) -> Tensor:
    red, green, blue = images.unbind(dim=1)
    value, largest = images.max(dim=1)
    spread = value - images.amin(dim=1)
    safe = torch.where(spread == 0, 1.0, spread)
    # The hue in sixths of the circle, from the channel that is largest.
    sixths = torch.stack(
        ((green - blue) / safe, (blue - red) / safe + 2, (red - green) / safe + 4), dim=1
    )
    hue = sixths.gather(1, largest[:, None]) + 6 * amount
    # Each channel is value minus the spread times a trapezium of the hue, displaced by 5, 3 and 1
    # sixths.
    shift = torch.tensor((5.0, 3.0, 1.0), dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
    position = (hue + shift).remainder(6)
    drop = torch.minimum(position, 4 - position).clamp(0, 1)
    return value[:, None] - spread[:, None] * drop


_CHANGES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    _brightness,
    _contrast,
    _saturation,
    _hue,
)
