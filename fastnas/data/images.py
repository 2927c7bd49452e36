"""Image sets that fit into memory."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnas.data.batches import Batches, check_classes, check_images

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastnas.data.interface import BatchOptions


@dataclass(frozen=True, eq=False)
class ImageData:
    """Training and test images as uint8 tensors.

    Attributes:
        name: the specification it was loaded from.
        train_images: uint8 [N, C, H, W].
        train_labels: int64 [N], 0 to num_classes - 1.
        test_images: uint8 [M, C, H, W].
        test_labels: int64 [M].
        num_classes: number of classes.
        mean: one number a channel, of the training images scaled to 0 to 1.
        std: likewise.
        classes: their names, if they have any.
    """

    name: str
    train_images: Tensor = field(repr=False)
    train_labels: Tensor = field(repr=False)
    test_images: Tensor = field(repr=False)
    test_labels: Tensor = field(repr=False)
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Check shapes, dtypes, labels and names."""
        check_classes(self.name, self.classes, self.num_classes)
        for part, images, labels in (
            ("training", self.train_images, self.train_labels),
            ("test", self.test_images, self.test_labels),
        ):
            check_images(images, labels)
            low, high = int(labels.min()), int(labels.max())
            if not 0 <= low <= high < self.num_classes:
                raise ValueError(
                    f"{self.name}: {part} labels go from {low} to {high}, expected 0 to "
                    f"{self.num_classes - 1}"
                )
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise ValueError(
                f"{self.name}: training images are {list(self.train_images.shape[1:])}, "
                f"test images {list(self.test_images.shape[1:])}; expected the same"
            )
        if not all(deviation > 0 for deviation in self.std):
            raise ValueError(
                f"{self.name}: expected a standard deviation above 0 in each channel, got "
                f"{self.std} (are all pixels the same?)"
            )

    @property
    def image_dtype(self) -> torch.dtype:
        """Of every image: uint8."""
        return torch.uint8

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.train_images.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image."""
        return self.train_images.shape[2], self.train_images.shape[3]

    @property
    def num_train(self) -> int:
        """Number of training images."""
        return len(self.train_images)

    @property
    def num_test(self) -> int:
        """Number of test images."""
        return len(self.test_images)

    def to(self, device: torch.device | str) -> ImageData:
        """Return the set on a device; loaders made from it then share one copy."""
        return replace(
            self,
            train_images=self.train_images.to(device),
            train_labels=self.train_labels.to(device),
            test_images=self.test_images.to(device),
            test_labels=self.test_labels.to(device),
        )

    def subset(self, train: int, test: int | None = None) -> ImageData:
        """Return the first `train` training images and the first `test` test images (None: all)."""
        test = self.num_test if test is None else test
        for name, count, available in (
            ("train", train, self.num_train),
            ("test", test, self.num_test),
        ):
            if not 0 < count <= available:
                raise ValueError(f"{name}: expected 1 to {available} images, got {count}")
        return replace(
            self,
            train_images=self.train_images[:train],
            train_labels=self.train_labels[:train],
            test_images=self.test_images[:test],
            test_labels=self.test_labels[:test],
        )

    def pad_to(self, size: int) -> ImageData:
        """Return the set with a black border that makes every image `size` x `size`.

        Mean and standard deviation stay those of the images without border.
        """
        height, width = self.image_size
        if size < max(height, width):
            raise ValueError(
                f"image_size: {size} is less than the {height} x {width} pixels of {self.name}"
            )
        top, left = (size - height) // 2, (size - width) // 2
        border = (left, size - width - left, top, size - height - top)
        return replace(
            self,
            train_images=F.pad(self.train_images, border),
            test_images=F.pad(self.test_images, border),
        )

    def train_batches(self, batch_size: int, **options: Unpack[BatchOptions]) -> Batches:
        """Return batches of training images, shuffled unless told otherwise."""
        return Batches(
            self.train_images,
            self.train_labels,
            batch_size,
            mean=self.mean,
            std=self.std,
            **options,
        )

    def test_batches(self, batch_size: int, **options: Unpack[BatchOptions]) -> Batches:
        """Return batches of test images, in their order unless told otherwise."""
        options.setdefault("shuffle", False)
        return Batches(
            self.test_images, self.test_labels, batch_size, mean=self.mean, std=self.std, **options
        )


def statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of uint8 [N, C, H, W], scaled to 0 to 1.

    They are taken from a histogram, hence exact and the same on every machine.
    """
    means, deviations = [], []
    values = torch.arange(256, dtype=torch.float64) / 255
    for channel in range(images.shape[1]):
        counts = torch.bincount(images[:, channel].flatten(), minlength=256).to(torch.float64)
        share = counts / counts.sum()
        mean = (share * values).sum()
        means.append(mean.item())
        deviations.append((share * (values - mean).square()).sum().sqrt().item())
    return tuple(means), tuple(deviations)
