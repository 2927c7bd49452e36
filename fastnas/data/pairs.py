"""Any two torch Datasets as an image set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from fastnas.data.batches import Batch
from fastnas.data.images import ImageData, statistics
from fastnas.data.interface import Data
from fastnas.data.stream import StreamedBatches, StreamedData, length, seeded, to_tensor

#: Most bytes of a set that is kept in memory unless told otherwise.
MEMORY_LIMIT = 1 << 30

#: Images a batch while a set is read into memory.
READ_BATCH = 256


def from_datasets(
    train: Dataset[Any],
    test: Dataset[Any],
    *,
    num_classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    in_memory: bool = False,
    workers: int | None = None,
    name: str = "datasets",
) -> Data:
    """Make an image set of two Datasets of (image, label).

    Random transforms of a Dataset may draw from the global generators of torch, Python and numpy:
    they are set to a number that depends on seed, epoch and position before an item is asked for.

    Args:
        train: has ``__len__`` and ``__getitem__``; all images have one shape. uint8 images (tensors
            [C, H, W], arrays [H, W, C] or PIL) are augmented and normalised here; floating-point
            tensors count as normalised.
        test: likewise.
        num_classes: labels are 0 to num_classes - 1; None: the length of ``train.classes``, which
            are the names of the classes where there are as many.
        mean: one number a channel of uint8 images scaled to 0 to 1; None with `in_memory`:
            computed.
        std: likewise.
        in_memory: read every (uint8) image once, now, and keep it.
        workers: processes that read images; None: one a processor, at most 8; 0: the calling
            process.
        name: what messages call the set.

    Raises:
        TypeError: a Dataset has no length or items, or an image is of another kind.
        ValueError: a Dataset is empty, an argument is missing or does not apply.
    """
    for argument, dataset in (("train", train), ("test", test)):
        if length(dataset) == 0:
            raise ValueError(f"{argument}: expected at least one item, the Dataset is empty")
    if num_classes is None:
        if not hasattr(train, "classes"):
            raise ValueError("num_classes: needed, as the Dataset has no attribute `classes`")
        num_classes = len(train.classes)
    if num_classes < 2:
        raise ValueError(f"num_classes: expected at least 2, got {num_classes}")
    with seeded(0):
        sample = to_tensor(train[0][0])
    if sample.ndim != 3:
        raise ValueError(f"train: expected images [C, H, W], got {list(sample.shape)}")
    stored = sample.dtype == torch.uint8
    if not stored and (in_memory or mean is not None or std is not None):
        raise ValueError(
            f"in_memory, mean and std apply to uint8 images, those of `train` are {sample.dtype}"
        )
    if (mean is None) != (std is None) or (stored and not in_memory and mean is None):
        raise ValueError(
            "mean and std: expected both for uint8 images, or neither with in_memory=True, which "
            "computes them"
        )
    names: Any = getattr(train, "classes", None)
    named = isinstance(names, (list, tuple)) and len(names) == num_classes
    channels, height, width = sample.shape
    data = StreamedData(
        name,
        train,
        test,
        num_classes=num_classes,
        mean=(0.0,) * channels if mean is None else tuple(mean),
        std=(1.0,) * channels if std is None else tuple(std),
        image_shape=(channels, height, width),
        image_dtype=sample.dtype,
        workers=workers,
        classes=tuple(map(str, names)) if named else None,
    )
    return keep_in_memory(data, compute_statistics=mean is None) if in_memory else data


def fits(data: StreamedData) -> bool:
    """Tell whether a set takes at most `MEMORY_LIMIT` bytes."""
    return (data.num_train + data.num_test) * math.prod(data.image_shape) <= MEMORY_LIMIT


def keep_in_memory(data: StreamedData, compute_statistics: bool = False) -> ImageData:
    """Read every image of a set once; mean and std stay, or are those of the training images."""
    train_images, train_labels = _read_all(data.train, data)
    test_images, test_labels = _read_all(data.test, data)
    mean, std = statistics(train_images) if compute_statistics else (data.mean, data.std)
    return ImageData(
        data.name,
        train_images,
        train_labels,
        test_images,
        test_labels,
        num_classes=data.num_classes,
        mean=mean,
        std=std,
        classes=data.classes,
    )


def _read_all(dataset: Dataset[Any], data: StreamedData) -> Batch:
    batches = StreamedBatches(dataset, data, READ_BATCH, shuffle=False)
    images = torch.empty(length(dataset), *data.image_shape, dtype=torch.uint8)
    labels = torch.empty(length(dataset), dtype=torch.int64)
    begin = 0
    # Straight into place: a list of batches joined at the end would take the memory twice.
    for some_images, some_labels in batches.stored(batches.indices, epoch=0, start=0):
        end = begin + len(some_labels)
        images[begin:end], labels[begin:end] = some_images, some_labels
        begin = end
    return images, labels
