"""What every image set offers, kept in memory or read while it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypedDict

import torch

from fastnas.data.augment import Augment
from fastnas.data.batches import EpochBatches, Indices

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class BatchOptions(TypedDict, total=False):
    """Keyword options of `train_batches` and `test_batches`; `Batches` explains them."""

    indices: Indices | None
    augment: Augment | None
    device: torch.device | str
    seed: int
    shuffle: bool
    drop_last: bool
    dtype: torch.dtype
    memory_format: torch.memory_format


class Data(Protocol):
    """An image set: `ImageData` in memory, or `StreamedData` that reads images as they are used."""

    @property
    def name(self) -> str:
        """The specification it was loaded from."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes, if they have any."""

    @property
    def mean(self) -> tuple[float, ...]:
        """One number a channel, of images scaled to 0 to 1; not used for floating-point images."""

    @property
    def std(self) -> tuple[float, ...]:
        """Likewise."""

    @property
    def image_dtype(self) -> torch.dtype:
        """Of an image: uint8, or floating-point where images are normalised already."""

    @property
    def channels(self) -> int:
        """Channels of an image."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image."""

    @property
    def num_train(self) -> int:
        """Number of training images."""

    @property
    def num_test(self) -> int:
        """Number of test images."""

    def to(self, device: torch.device | str) -> Self:
        """Return the set with what it keeps in memory on a device."""

    def subset(self, train: int, test: int | None = None) -> Self:
        """Return the first `train` training images and the first `test` test images (None: all)."""

    def train_batches(self, batch_size: int, **options: Unpack[BatchOptions]) -> EpochBatches:
        """Return batches of training images, shuffled unless told otherwise."""

    def test_batches(self, batch_size: int, **options: Unpack[BatchOptions]) -> EpochBatches:
        """Return batches of test images, in their order unless told otherwise."""
