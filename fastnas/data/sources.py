"""The data sets that have a name."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastnas.data.idx import read_idx
from fastnas.data.images import ImageData, statistics
from fastnas.data.interface import Data
from fastnas.data.pairs import fits, keep_in_memory
from fastnas.data.vision import load_cifar, load_folder

DEFAULT = "fashion-mnist-mini"

ASSETS = Path(__file__).parent / "assets"

#: Of Fashion-MNIST, by label.
FASHION_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
FASHION_CLASSES = len(FASHION_NAMES)

_WITH_DIRECTORY = ("fashion-mnist", "cifar10", "cifar100", "folder")


def load(
    spec: str = DEFAULT,
    *,
    image_size: int | None = None,
    held_out: float | None = None,
    in_memory: bool | None = None,
    workers: int | None = None,
) -> Data:
    """Load an image set by its specification.

    Args:
        spec: one of

            * ``fashion-mnist-mini``: 5,000 training and 1,000 test images, in the package;
            * ``fashion-mnist:DIR``: the four IDX files of Fashion-MNIST, with ``.gz`` or without;
            * ``cifar10:DIR``, ``cifar100:DIR``: the unpacked "python version" in DIR (torchvision);
            * ``folder:DIR``: one sub-directory a class, in DIR/train and DIR/test (or DIR/val) or
              in DIR itself (torchvision).
        image_size: side of the images wanted. Images of ``folder`` are resized to it (None: the
            shorter side of the first, at most 224); others get a black border (None: as they are).
        held_out: share of each class of a ``folder`` without test set that becomes it; None: 0.1.
        in_memory: keep the images of a ``folder`` in memory; None: if they take 1 GiB at most. They
            are then brought to `image_size` before any augmentation.
        workers: processes that read the images of a ``folder``; None: one a processor, at most 8.

    Returns:
        An `ImageData`, or a `StreamedData` for a ``folder`` that is not kept in memory.

    Raises:
        ValueError: the specification is unknown, an option does not apply to it, or a file is
            broken; the file is named.
        FileNotFoundError: a file or directory is missing; it is named.
        ImportError: torchvision is needed and missing.
    """
    kind, _, rest = spec.partition(":")
    if spec != DEFAULT and not (kind in _WITH_DIRECTORY and rest):
        known = ", ".join([DEFAULT, *(f"{name}:DIR" for name in _WITH_DIRECTORY)])
        hint = " (a directory must follow its colon)" if kind in _WITH_DIRECTORY else ""
        raise ValueError(
            f"data: unknown specification {spec!r}{hint}; there are {known}. If it is the name of "
            "Datasets that a run had from Python, go on with that run there, with the same `data=`"
        )
    # Path.expanduser raises where there is no such user.
    directory = ASSETS / DEFAULT if spec == DEFAULT else Path(os.path.expanduser(rest))
    if not directory.is_dir():
        raise FileNotFoundError(f"{spec}: expected a directory at {directory}")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size: expected 1 or more pixels, got {image_size}")
    if workers is not None and workers < 0:
        raise ValueError(f"workers: expected 0 or more processes, got {workers}")
    if kind == "folder":
        folder = load_folder(
            spec, directory, image_size=image_size, held_out=held_out, workers=workers
        )
        return (
            keep_in_memory(folder) if in_memory or (in_memory is None and fits(folder)) else folder
        )
    options = {"held_out": held_out, "in_memory": in_memory, "workers": workers}
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{given[0]}: applies to folder:DIR only, not to {spec}")
    data = (
        _fashion_mnist(spec, directory)
        if kind.startswith("fashion")
        else load_cifar(spec, directory)
    )
    return data if image_size is None else data.pad_to(image_size)


def _fashion_mnist(name: str, directory: Path) -> ImageData:
    train_images, train_labels = _idx_pair(directory, "train")
    test_images, test_labels = _idx_pair(directory, "t10k")
    mean, std = statistics(train_images)
    return ImageData(
        name,
        train_images,
        train_labels,
        test_images,
        test_labels,
        num_classes=FASHION_CLASSES,
        mean=mean,
        std=std,
        classes=FASHION_NAMES,
    )


def _idx_pair(directory: Path, part: str) -> tuple[Tensor, Tensor]:
    """Read images [N, 1, H, W] and labels [N] of one part and check that they belong together."""
    images_path = _plain_or_gz(directory / f"{part}-images-idx3-ubyte")
    labels_path = _plain_or_gz(directory / f"{part}-labels-idx1-ubyte")
    images = read_idx(images_path, dims=3)
    labels = read_idx(labels_path, dims=1)
    if len(images) != len(labels):
        raise ValueError(
            f"{labels_path}: holds {len(labels)} labels, expected {len(images)}, one for each "
            f"image of {images_path.name}"
        )
    check_labels(labels, FASHION_CLASSES, labels_path)
    return torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels.astype(np.int64))


def _plain_or_gz(path: Path) -> Path:
    """Return `path`, or `path` with ``.gz`` if only that exists."""
    packed = path.with_name(path.name + ".gz")
    if path.is_file() or packed.is_file():
        return path if path.is_file() else packed
    raise FileNotFoundError(f"{packed}: no such file (nor {path.name}); expected an IDX file")


def check_labels(labels: NDArray[np.uint8], num_classes: int, path: Path) -> None:
    """Raise a ValueError that names the file unless every label is less than `num_classes`."""
    if (labels >= num_classes).any():
        where = int((labels >= num_classes).argmax())
        raise ValueError(
            f"{path}: label number {where} is {labels[where]}, expected 0 to {num_classes - 1}"
        )
