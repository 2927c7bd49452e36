"""Augmentation of whole batches on the device.

Every random number of an epoch is drawn beforehand, one row a position of the epoch
(`Augment.draw`); what happens to an image therefore depends on its position only, not on where an
epoch was resumed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnas.data import color

#: Aspect ratios (width over height) that a random resized crop may have.
RATIOS = (3 / 4, 4 / 3)

#: Boxes tried by a random resized crop before it falls back to the middle of the image.
TRIES = 10

#: The random numbers of an epoch by name, each with one row a position.
Draws = dict[str, Tensor]


@dataclass(frozen=True)
class Augment:
    """What is done to training images, in this order; a value of 0 or False leaves a step out.

    Attributes:
        crop_padding: pixels of black added on every side before a random crop of the old size.
        resized_crop: smallest share of the area (0 to 1) of a random crop that is resized to the
            image size; 0.08 for ImageNet. Excludes `crop_padding`.
        flip: mirror half of the images left to right.
        color_jitter: strengths of brightness, contrast, saturation and hue; (0.4, 0.4, 0.4, 0.2)
            for ImageNet.
        cutout: side in pixels of the square set to 0 after normalisation, centred on a random pixel
            and clipped at the border (DeVries and Taylor 2017, arXiv:1708.04552); 16 for CIFAR.
    """

    crop_padding: int = 0
    resized_crop: float = 0.0
    flip: bool = False
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    cutout: int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        if self.crop_padding < 0 or self.cutout < 0:
            raise ValueError(
                f"crop_padding and cutout: expected 0 or more pixels, got {self.crop_padding} and "
                f"{self.cutout}"
            )
        if not 0 <= self.resized_crop <= 1:
            raise ValueError(f"resized_crop: expected a share from 0 to 1, got {self.resized_crop}")
        if self.resized_crop and self.crop_padding:
            raise ValueError(
                "resized_crop and crop_padding exclude each other: set one of them to 0"
            )
        # A configuration read from JSON brings a list; a frozen dataclass must stay hashable.
        object.__setattr__(self, "color_jitter", tuple(self.color_jitter))
        limits = (math.inf, math.inf, math.inf, 0.5 + 1e-9)
        if len(self.color_jitter) != 4 or not all(
            0 <= strength < limit for strength, limit in zip(self.color_jitter, limits, strict=True)
        ):
            raise ValueError(
                "color_jitter: expected brightness, contrast and saturation of 0 or more and a hue "
                f"from 0 to 0.5, got {self.color_jitter}"
            )

    @classmethod
    def cifar(cls, cutout: int = 0) -> Augment:
        """The recipe of DARTS on CIFAR-10 (A.1.1); evaluation has a `cutout` of 16."""
        return cls(crop_padding=4, flip=True, cutout=cutout)

    @classmethod
    def imagenet(cls) -> Augment:
        """The recipe of DARTS on ImageNet (A.2.3): resized crop, flip, colour jitter."""
        return cls(resized_crop=0.08, flip=True, color_jitter=(0.4, 0.4, 0.4, 0.2))

    def draw(self, count: int, height: int, width: int, generator: torch.Generator) -> Draws:
        """Draw what happens at each of `count` positions to images of this size, on the CPU.

        A resized crop is drawn by `draw_boxes` where the images' own sizes are known.
        """
        draws: Draws = {}

        def integers(high: int, columns: int) -> Tensor:
            return torch.randint(high, (count, columns), generator=generator)

        if self.crop_padding:
            draws["crop"] = integers(2 * self.crop_padding + 1, 2)
        if self.flip:
            draws["flip"] = integers(2, 1).bool().squeeze(1)
        if any(self.color_jitter):
            unit = torch.rand(count, 4, generator=generator) * 2 - 1
            draws["jitter"] = unit * torch.tensor(self.color_jitter)
            draws["jitter_order"] = integers(math.factorial(4), 1).squeeze(1)
        if self.cutout:
            rows = torch.randint(height, (count,), generator=generator)
            columns = torch.randint(width, (count,), generator=generator)
            draws["cutout"] = torch.stack((rows, columns), dim=1)
        return draws

    def draw_boxes(self, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Draw boxes (top, left, height, width) of a random resized crop: int64 [count, 4]."""
        area = torch.empty(count, TRIES).uniform_(self.resized_crop, 1, generator=generator)
        log_ratio = torch.empty(count, TRIES).uniform_(
            math.log(RATIOS[0]), math.log(RATIOS[1]), generator=generator
        )
        corner = torch.rand(count, 2, generator=generator)
        return _boxes(area * (height * width), log_ratio.exp(), corner, height, width)

    def geometry(self, images: Tensor, draws: Draws) -> Tensor:
        """Crop and flip a batch [N, C, H, W] of any dtype; a resized crop gives float32."""
        if self.crop_padding:
            images = crop(images, draws["crop"], self.crop_padding)
        if "boxes" in draws:
            images = resize_boxes(images, draws["boxes"])
        if self.flip:
            images = torch.where(draws["flip"].view(-1, 1, 1, 1), images.flip(3), images)
        return images

    def colors(self, images: Tensor, draws: Draws) -> Tensor:
        """Jitter the colours of a float batch [N, 3, H, W] in 0 to 255.

        The four changes come in a random order, one order a batch (that of its first image): each
        image sees the distribution of an order of its own.
        """
        if not any(self.color_jitter):
            return images
        order = ORDERS[int(draws["jitter_order"][0])]
        return color.jitter(images / 255, draws["jitter"], order) * 255

    def erase(self, images: Tensor, draws: Draws) -> Tensor:
        """Set the cutout squares of a normalised batch [N, C, H, W] to 0, in place."""
        return cutout_(images, draws["cutout"], self.cutout) if self.cutout else images


#: Every order of the four changes of colour.
ORDERS: tuple[tuple[int, ...], ...] = tuple(permutations(range(4)))


def crop(images: Tensor, offsets: Tensor, padding: int) -> Tensor:
    """Cut windows [H, W] out of [N, C, H, W] padded with zeros, at `offsets` [N, 2] from 0 on."""
    height, width = images.shape[2:]
    padded = F.pad(images, (padding,) * 4)
    # A view of every window: [N, C, 2 * padding + 1, 2 * padding + 1, H, W]; indexing copies one an
    # image.
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    rows = torch.arange(len(images), device=images.device)
    return windows[rows, :, offsets[:, 0], offsets[:, 1]]


def cutout_(images: Tensor, centres: Tensor, side: int) -> Tensor:
    """Zero in place a square with this side around each centre [N, 2], clipped at the border."""
    corner = centres - side // 2
    inside = []
    for axis, size in enumerate(images.shape[2:]):
        pixel = torch.arange(size, device=images.device)
        first = corner[:, axis, None]
        inside.append((pixel >= first) & (pixel < first + side))
    return images.masked_fill_((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0)


def resize_boxes(images: Tensor, boxes: Tensor) -> Tensor:
    """Resize the box (top, left, height, width) of each image to the full size: float32."""
    height, width = images.shape[2:]
    top, left, box_height, box_width = boxes.to(torch.float32).unbind(1)
    # Output coordinates in -1 to 1 are scaled to the box and moved to its centre.
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0] = box_width / width
    theta[:, 0, 2] = (2 * left + box_width) / width - 1
    theta[:, 1, 1] = box_height / height
    theta[:, 1, 2] = (2 * top + box_height) / height - 1
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(
        images.to(torch.float32), grid, mode="bilinear", padding_mode="border", align_corners=False
    )


def _boxes(area: Tensor, ratio: Tensor, corner: Tensor, height: int, width: int) -> Tensor:
    """Take the first of the tries [n, t] that fits into the image, else the middle of the image."""
    tried = torch.stack(((area / ratio).sqrt(), (area * ratio).sqrt()), dim=2).round().long()
    limit = torch.tensor((height, width))
    fits = ((tried >= 1) & (tried <= limit)).all(dim=2)
    first = fits.int().argmax(dim=1)
    chosen = tried[torch.arange(len(tried)), first]
    middle = torch.tensor(
        (min(height, round(width / RATIOS[0])), min(width, round(height * RATIOS[1])))
    )
    found = fits.any(dim=1, keepdim=True)
    size = torch.where(found, chosen, middle)
    room = limit - size
    start = torch.where(found, (corner * (room + 1)).long().minimum(room), room // 2)
    return torch.cat((start, size), dim=1)
