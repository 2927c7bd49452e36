"""Sets too large for memory: torch Datasets read by the workers of a DataLoader."""

from __future__ import annotations

import atexit
import mmap
import os
import random
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from traceback import clear_frames
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from fastnas.data.augment import Augment, Draws
from fastnas.data.batches import (
    Batch,
    EpochBatches,
    Indices,
    as_indices,
    check_classes,
    generator_of,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastnas.data.interface import BatchOptions

#: Workers of a loader where nothing else is asked for, if there are as many processors.
MAX_WORKERS = 8


#: Seconds a worker lives on after SIGTERM, while the main process does.
GRACE = 15

# Memory shared with the workers, which are forked: 1 from when the main process ends.
_ENDING = mmap.mmap(-1, 1)
atexit.register(_ENDING.__setitem__, 0, 1)


class Croppable(Dataset[Any], ABC):
    """A Dataset that can resize a random part of an image from the image's own full resolution."""

    @abstractmethod
    def first(self, count: int) -> Croppable:
        """Return the set of the first `count` items."""

    @abstractmethod
    def random_crop(self, index: int, augment: Augment, seed: int) -> tuple[Tensor, int]:
        """Return uint8 [C, H, W] of the set's image size and the label."""


@dataclass(frozen=True)
class StreamedData:
    """Training and test images that are read, decoded and brought to one size as they are used.

    Attributes:
        name: the specification it was loaded from.
        train: Dataset of (image, label); images uint8 [C, H, W] (or PIL, or HWC arrays), or
            floating-point and normalised already.
        test: likewise.
        num_classes: number of classes; labels are 0 to num_classes - 1.
        mean: one number a channel, of images scaled to 0 to 1; not used for floating-point images.
        std: likewise.
        image_shape: (C, H, W) of every image.
        image_dtype: dtype of every image.
        workers: processes that read images; None: one a processor, at most 8; 0: the calling
            process.
        classes: the names of the classes, if they have any.
    """

    name: str
    train: Dataset[Any]
    test: Dataset[Any]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_shape: tuple[int, int, int]
    image_dtype: torch.dtype = torch.uint8
    workers: int | None = None
    classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Check the names."""
        check_classes(self.name, self.classes, self.num_classes)

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.image_shape[0]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image."""
        return self.image_shape[1:]

    @property
    def num_train(self) -> int:
        """Number of training images."""
        return length(self.train)

    @property
    def num_test(self) -> int:
        """Number of test images."""
        return length(self.test)

    def to(self, device: torch.device | str) -> StreamedData:
        """Return itself: nothing of it is in memory."""
        return self

    def subset(self, train: int, test: int | None = None) -> StreamedData:
        """Return the first `train` training images and the first `test` test images (None: all)."""
        test = self.num_test if test is None else test
        for name, count, available in (
            ("train", train, self.num_train),
            ("test", test, self.num_test),
        ):
            if not 0 < count <= available:
                raise ValueError(f"{name}: expected 1 to {available} images, got {count}")
        return replace(
            self, train=first_items(self.train, train), test=first_items(self.test, test)
        )

    def train_batches(self, batch_size: int, **options: Unpack[BatchOptions]) -> StreamedBatches:
        """Return batches of training images, shuffled unless told otherwise."""
        return StreamedBatches(self.train, self, batch_size, **options)

    def test_batches(self, batch_size: int, **options: Unpack[BatchOptions]) -> StreamedBatches:
        """Return batches of test images, in their order unless told otherwise."""
        options.setdefault("shuffle", False)
        return StreamedBatches(self.test, self, batch_size, **options)


class StreamedBatches(EpochBatches):
    """Batches read from a Dataset by the workers of a DataLoader, then treated like any others."""

    def __init__(
        self,
        dataset: Dataset[Any],
        data: StreamedData,
        batch_size: int,
        *,
        indices: Indices | None = None,
        augment: Augment | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        """Take images from `dataset`, what they are like from `data`; options as `Batches`."""
        super().__init__(
            as_indices(indices, length(dataset)),
            batch_size,
            data.image_shape,
            augment=augment,
            mean=data.mean,
            std=data.std,
            device=device,
            seed=seed,
            shuffle=shuffle,
            drop_last=drop_last,
            dtype=dtype,
            memory_format=memory_format,
        )
        if any(self.augment.color_jitter) and data.image_dtype.is_floating_point:
            raise ValueError(
                "augment: color_jitter needs uint8 images, these are normalised already"
            )
        self.items = Items(dataset, data, self.augment)
        self.workers = default_workers() if data.workers is None else data.workers

    def _draw(self, generator: torch.Generator) -> Draws:
        draws = super()._draw(generator)
        if self.augment.resized_crop and not self.items.crops:
            draws["boxes"] = self.augment.draw_boxes(
                len(self.indices), *self.image_shape[1:], generator
            )
        return draws

    def stored(self, order: Tensor, epoch: int, start: int) -> Iterator[Batch]:
        """Read images in the workers; see `EpochBatches.stored`."""
        # A seed a position: what a Dataset draws does not depend on which worker reads an image.
        generator = generator_of(self.seed, epoch, self._stream, 1)
        seeds = torch.randint(2**31, (len(order),), generator=generator)
        loader = DataLoader(
            self.items,
            batch_sampler=_Keys(order, seeds, [self.rows(n) for n in range(start, len(self))]),
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=outlive_signals,
            # Its own generator, or every epoch would take a number from the global one.
            generator=torch.Generator(),
        )
        batches = iter(loader)
        for _ in range(start, len(self)):
            try:
                images, labels = next(batches)
            except (ValueError, OSError) as error:
                sentence = without_traceback(error)
                if sentence is None:
                    raise
                # The error and frames of the loader hold each other. Let go, the loader ends its
                # workers now; a garbage collection, or the end of Python, would wait for them.
                clear_frames(error.__traceback__)
                del batches
                raise type(error)(sentence) from error
            yield (
                images.to(self.device, non_blocking=True),
                labels.to(self.device, non_blocking=True),
            )


class Items(Dataset[tuple[Tensor, int]]):
    """A Dataset seen through (index, seed) keys, its images and labels checked."""

    def __init__(self, dataset: Dataset[Any], data: StreamedData, augment: Augment) -> None:
        """Crops are made by the dataset where it can, from the images' full resolution."""
        self.dataset = dataset
        self.data = data
        self.augment = augment
        self.crops = bool(augment.resized_crop) and isinstance(dataset, Croppable)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        """Return the image and label of an index, with all global generators at a seed."""
        index, seed = key
        if self.crops and isinstance(self.dataset, Croppable):
            image, label = self.dataset.random_crop(index, self.augment, seed)
        else:
            with seeded(seed):
                item, label = self.dataset[index]
            image = to_tensor(item)
        data = self.data
        if tuple(image.shape) != data.image_shape or image.dtype != data.image_dtype:
            raise ValueError(
                f"{data.name}: image {index} is {image.dtype} {list(image.shape)}, expected "
                f"{data.image_dtype} {list(data.image_shape)} like the first one"
            )
        if not 0 <= int(label) < data.num_classes:
            raise ValueError(
                f"{data.name}: image {index} has label {int(label)}, expected 0 to "
                f"{data.num_classes - 1}"
            )
        return image, int(label)


class _Keys:
    """The keys of batches, made as they are needed; `rows`: where in the order each batch is."""

    def __init__(self, order: Tensor, seeds: Tensor, rows: list[slice]) -> None:
        self.order = order
        self.seeds = seeds
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for rows in self.rows:
            yield list(zip(self.order[rows].tolist(), self.seeds[rows].tolist(), strict=True))


def outlive_signals(worker: int) -> None:
    """In a worker, leave it to the main process what a signal to all processes of a run means.

    The main process ends its step and saves its state, and needs the workers for that. When it
    ends, or a worker hangs, it sends SIGTERM as well, which is obeyed at once or in the end.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: FrameType | None) -> None:
    if _ENDING[0]:
        os._exit(0)
    signal.alarm(GRACE)


def without_traceback(error: Exception) -> str | None:
    """What was said in a worker, without the traceback that DataLoader puts before it; else None.

    A broken image among thousands is the user's to mend, and needs the name of the file alone.
    """
    text, before = str(error), f"\n{type(error).__name__}: "
    if not text.startswith("Caught ") or before not in text:
        return None
    return text.rsplit(before, 1)[1].strip()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Set the CPU generators of torch, Python and numpy to a seed, and back at the end."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    # Not torch.manual_seed, which would reset the generators of all devices as well.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def to_tensor(image: Any) -> Tensor:
    """Return an image as [C, H, W]: tensors as they are, PIL images and arrays as uint8."""
    if isinstance(image, Tensor):
        return image
    if getattr(image, "mode", "RGB") not in ("L", "RGB"):
        image = image.convert("RGB")
    array = np.array(image)
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise TypeError(
            "image: expected a tensor [C, H, W], a PIL image or a uint8 array [H, W] or [H, W, C], "
            f"got {type(image).__name__} with {array.dtype} {list(array.shape)}"
        )
    tensor = torch.from_numpy(array)
    return tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1).contiguous()


def length(dataset: Dataset[Any]) -> int:
    """Return the number of items of a Dataset; a TypeError says that it must have one."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"dataset: expected one with __len__ and __getitem__, got {type(dataset).__name__}"
        )
    return len(dataset)


def first_items(dataset: Dataset[Any], count: int) -> Dataset[Any]:
    """Return the first items of a Dataset; one that can crop still can."""
    return dataset.first(count) if isinstance(dataset, Croppable) else Subset(dataset, range(count))


def default_workers() -> int:
    """Return one worker a processor this process may use, at most `MAX_WORKERS`.

    Processes of one run share the processors, and each has at least one.
    """
    usable = getattr(os, "sched_getaffinity", None)
    processors = len(usable(0)) if usable else os.cpu_count() or 1
    if "TORCHELASTIC_RUN_ID" in os.environ:
        processors //= max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return min(MAX_WORKERS, max(1, processors))
