"""Batches whose order and augmentation are a function of (seed, epoch, position)."""

from __future__ import annotations

import hashlib
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fastnas.data.augment import Augment, Draws
from fastnas.parallel import Share

Batch: TypeAlias = tuple[Tensor, Tensor]
Indices: TypeAlias = Tensor | Sequence[int]


def split(n: int, fraction: float, seed: int | None = None) -> Batch:
    """Split the positions 0 to n - 1 into a first part of floor(n * fraction) and the rest.

    Args:
        n: number of positions.
        fraction: share of the first part, 0 < fraction < 1; both parts must get something.
        seed: None keeps the order, as DARTS does (weights on the first half of the training set,
            alpha on the second); a number shuffles first.

    Returns:
        Two int64 tensors on the CPU.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction: expected more than 0 and less than 1, got {fraction}")
    first = int(n * fraction)
    if not 0 < first < n:
        raise ValueError(
            f"n: {n} positions cannot be split {fraction} to {1 - fraction:g}: a part is empty"
        )
    order = torch.arange(n) if seed is None else torch.randperm(n, generator=generator_of(seed))
    return order[:first], order[first:]


def generator_of(*key: int) -> torch.Generator:
    """Return a CPU generator seeded from all of these numbers.

    The seed is hashed because the CPU generator looks at 32 bits only and similar seeds give it
    similar first numbers.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


class EpochBatches(ABC):
    """What all sources of batches share: the plan of an epoch, augmentation and normalisation.

    Iterating over it gives the epoch of `set_epoch` (0 at first); `iterate` any epoch from any
    batch on. Two loaders with one seed but other `indices` (training and validation part) are
    shuffled independently. Where several processes make one run, each sets its `share` and gets
    that part of every batch.
    """

    def __init__(
        self,
        indices: Tensor,
        batch_size: int,
        image_shape: tuple[int, int, int],
        *,
        augment: Augment | None,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str,
        seed: int,
        shuffle: bool,
        drop_last: bool,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
    ) -> None:
        """Check and keep the settings; `Batches` explains them."""
        if batch_size < 1:
            raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
        if not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")
        channels = image_shape[0]
        if len(mean) != channels or len(std) != channels:
            raise ValueError(
                f"mean and std: expected {channels} numbers each, one a channel, got "
                f"{len(mean)} and {len(std)}"
            )
        if min(std) <= 0:
            raise ValueError(f"std: expected numbers above 0, got {tuple(std)}")
        self.indices = indices
        self.batch_size = batch_size
        self.image_shape = image_shape
        self.augment = augment if augment is not None else Augment()
        if any(self.augment.color_jitter) and channels != 3:
            raise ValueError(f"augment: color_jitter needs 3 channels, the images have {channels}")
        if self.augment.crop_padding > min(image_shape[1:]):
            raise ValueError(
                f"augment: expected a crop_padding of at most the side of the images, which are "
                f"{image_shape[1]} x {image_shape[2]}, got {self.augment.crop_padding}"
            )
        self.device = torch.device(device)
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.dtype = dtype
        self.memory_format = memory_format
        self.epoch = 0
        self.share = Share()
        if len(self) == 0:
            raise ValueError(
                f"batch_size: drop_last leaves nothing of {len(indices)} images, got {batch_size}"
                if len(indices)
                else "indices: expected at least one image, got none"
            )
        # (v / 255 - mean) / std as one multiply-add on the stored value v.
        std_tensor = torch.tensor(std, dtype=torch.float64).view(1, -1, 1, 1)
        mean_tensor = torch.tensor(mean, dtype=torch.float64).view(1, -1, 1, 1)
        self._scale = (1 / (255 * std_tensor)).to(self.device, torch.float32)
        self._shift = (-mean_tensor / std_tensor).to(self.device, torch.float32)
        self._stream = zlib.crc32(indices.numpy().tobytes())

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        full, rest = divmod(len(self.indices), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that iterating over this object gives."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over the epoch of `set_epoch`."""
        return self.iterate(self.epoch)

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from batch number `start` on.

        Yields:
            Images of `dtype` [B, C, H, W], normalised, and labels int64 [B], both on the device.
        """
        if not 0 <= start <= len(self):
            raise ValueError(f"start: expected a batch number from 0 to {len(self)}, got {start}")
        order, draws = self._plan(epoch)
        return self._run(order, draws, epoch, start)

    def _run(self, order: Tensor, draws: Draws, epoch: int, start: int) -> Iterator[Batch]:
        fetched = self.stored(order, epoch, start)
        for number, (images, labels) in enumerate(fetched, start):
            own = self.rows(number)
            # One order of colour changes for a batch, that of its first image.
            whole = slice(number * self.batch_size, None)
            rows = {n: draw[whole if n == "jitter_order" else own] for n, draw in draws.items()}
            yield self._prepare(images, rows), labels

    def rows(self, number: int) -> slice:
        """Where in an epoch the images of a batch are, of those that this process takes."""
        begin = number * self.batch_size
        return self.share.of(begin, min(self.batch_size, len(self.indices) - begin))

    def _plan(self, epoch: int) -> tuple[Tensor, Draws]:
        """Return the positions in the set of an epoch, on the CPU, and its draws, on the device."""
        generator = generator_of(self.seed, epoch, self._stream)
        order = self.indices
        if self.shuffle:
            order = order[torch.randperm(len(order), generator=generator)]
        draws = self._draw(generator)
        # The order of colour changes is read by the host at every batch: on a GPU that would wait
        # for it.
        return order, {
            name: draw if name == "jitter_order" else draw.to(self.device)
            for name, draw in draws.items()
        }

    def _draw(self, generator: torch.Generator) -> Draws:
        return self.augment.draw(len(self.indices), *self.image_shape[1:], generator)

    @abstractmethod
    def stored(self, order: Tensor, epoch: int, start: int) -> Iterator[Batch]:
        """Yield images as they are stored, and labels, of batch `start` on, on the device.

        Of each batch those of `rows`.

        Args:
            order: positions in the set, in the order of the epoch.
            epoch: number of the epoch.
            start: number of the first batch.
        """

    def _prepare(self, images: Tensor, draws: Draws) -> Tensor:
        """Augment and normalise stored images; floating-point ones count as normalised already."""
        normalised = images.is_floating_point()
        images = self.augment.geometry(images, draws)
        if not normalised:
            values = self.augment.colors(images.to(torch.float32), draws)
            images = torch.addcmul(self._shift, values, self._scale)
        images = self.augment.erase(images, draws)
        return images.to(dtype=self.dtype, memory_format=self.memory_format)


class Batches(EpochBatches):
    """Batches from images that lie on the device as one uint8 tensor."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        indices: Indices | None = None,
        augment: Augment | None = None,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str = "cpu",
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        """Check the images and take them to the device (nothing is copied if they are there).

        Args:
            images: uint8 [N, C, H, W].
            labels: int64 [N].
            batch_size: images a batch.
            indices: positions in `images` to use; None uses all.
            augment: what is done to the images; None nothing.
            mean: one number a channel, of images scaled to 0 to 1.
            std: likewise, above 0.
            device: where images are kept and batches are made.
            seed: with the epoch, all that order and augmentation depend on.
            shuffle: a new order each epoch; False keeps that of `indices`.
            drop_last: leave out a last batch that is not full.
            dtype: floating-point dtype of the batches.
            memory_format: `torch.contiguous_format` or `torch.channels_last`.
        """
        check_images(images, labels)
        super().__init__(
            as_indices(indices, len(images)),
            batch_size,
            (images.shape[1], images.shape[2], images.shape[3]),
            augment=augment,
            mean=mean,
            std=std,
            device=device,
            seed=seed,
            shuffle=shuffle,
            drop_last=drop_last,
            dtype=dtype,
            memory_format=memory_format,
        )
        self.images = images.to(self.device)
        self.labels = labels.to(self.device)

    def _draw(self, generator: torch.Generator) -> Draws:
        draws = super()._draw(generator)
        if self.augment.resized_crop:
            draws["boxes"] = self.augment.draw_boxes(
                len(self.indices), *self.image_shape[1:], generator
            )
        return draws

    def stored(self, order: Tensor, epoch: int, start: int) -> Iterator[Batch]:
        """Pick images of the tensor; see `EpochBatches.stored`."""
        order = order.to(self.device)
        for number in range(start, len(self)):
            chosen = order[self.rows(number)]
            yield self.images[chosen], self.labels[chosen]


class Endless:
    """Batches for ever: after the last batch of an epoch comes the first of the next."""

    def __init__(self, batches: EpochBatches) -> None:
        """Start at the first batch of epoch 0."""
        self.batches = batches
        self.position = 0
        self._epoch: Iterator[Batch] = iter(())

    def __iter__(self) -> Iterator[Batch]:
        """Return itself."""
        return self

    def __next__(self) -> Batch:
        """Return the next batch."""
        epoch, start = divmod(self.position, len(self.batches))
        batch = next(self._epoch, None)
        if batch is None:
            self._epoch = self.batches.iterate(epoch, start)
            batch = next(self._epoch)
        self.position += 1
        return batch

    def state_dict(self) -> dict[str, int]:
        """Return the number of batches taken so far and the batches of an epoch."""
        return {"position": self.position, "batches": len(self.batches)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where the state was taken.

        Raises:
            ValueError: the state is of a source with another number of batches.
        """
        if state["batches"] != len(self.batches):
            raise ValueError(
                f"state: was taken with {state['batches']} batches an epoch, here there are "
                f"{len(self.batches)}; data and batch size must be those of the saved run"
            )
        self.position = state["position"]
        self._epoch = iter(())


def check_classes(name: str, classes: Sequence[str] | None, count: int) -> None:
    """Raise a ValueError unless there is a name for each class, or none for any."""
    if classes is not None and len(classes) != count:
        raise ValueError(
            f"{name}: expected the names of {count} classes, or None, but got {len(classes)} names"
        )


def check_images(images: Tensor, labels: Tensor) -> None:
    """Raise unless images are uint8 [N, C, H, W] and labels int64 [N], with N of at least 1."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(
            f"images: expected uint8 [N, C, H, W], got {images.dtype} {list(images.shape)}"
        )
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels: expected int64 [{len(images)}], one an image, got {labels.dtype} "
            f"{list(labels.shape)}"
        )
    if images.numel() == 0:
        raise ValueError(f"images: expected at least one pixel, got {list(images.shape)}")


def as_indices(indices: Indices | None, n: int) -> Tensor:
    """Return positions as int64 on the CPU, checked to lie in 0 to n - 1."""
    if indices is None:
        return torch.arange(n)
    result = torch.as_tensor(indices).cpu()
    if result.ndim != 1 or result.dtype.is_floating_point or result.dtype == torch.bool:
        raise ValueError(
            f"indices: expected one row of integers, got {result.dtype} {list(result.shape)}"
        )
    if len(result) and not 0 <= int(result.min()) <= int(result.max()) < n:
        raise ValueError(
            f"indices: expected 0 to {n - 1}, got {int(result.min())} to {int(result.max())}"
        )
    return result.long().contiguous()
