"""The data sets that have a name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastnas.data.idx import read_idx
from fastnas.data.images import ImageData, statistics

DEFAULT = "fashion-mnist-mini"

ASSETS = Path(__file__).parent / "assets"

FASHION_CLASSES = 10


def load(spec: str = DEFAULT, *, image_size: int | None = None) -> ImageData:
    """Load an image set by its specification.

    Args:
        spec: one of

            * ``fashion-mnist-mini``: 5,000 training and 1,000 test images of Fashion-MNIST, in the package;
            * ``fashion-mnist:DIR``: the four IDX files of Fashion-MNIST, with ``.gz`` or without.
        image_size: side of the images wanted; smaller images get a black border.

    Raises:
        ValueError: the specification is unknown, or a file is broken; the file is named.
        FileNotFoundError: a file or directory is missing; it is named.
    """
    kind, colon, rest = spec.partition(":")
    if spec == DEFAULT:
        data = _fashion_mnist(spec, ASSETS / DEFAULT)
    elif kind in _WITH_DIRECTORY and rest:
        directory = Path(rest).expanduser()
        if not directory.is_dir():
            raise FileNotFoundError(f"{spec}: {directory} is not a directory")
        data = _WITH_DIRECTORY[kind](spec, directory)
    else:
        known = ", ".join([DEFAULT, *(f"{name}:DIR" for name in _WITH_DIRECTORY)])
        hint = " (it needs a directory after the name)" if kind in _WITH_DIRECTORY else ""
        raise ValueError(f"data: unknown specification {spec!r}{hint}; there are {known}")
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
    )


def _idx_pair(directory: Path, part: str) -> tuple[Tensor, Tensor]:
    """Read images [N, 1, H, W] and labels [N] of one part and check that they belong together."""
    images_path = _plain_or_gz(directory / f"{part}-images-idx3-ubyte")
    labels_path = _plain_or_gz(directory / f"{part}-labels-idx1-ubyte")
    images = read_idx(images_path, dims=3)
    labels = read_idx(labels_path, dims=1)
    if len(images) != len(labels):
        raise ValueError(
            f"{labels_path}: holds {len(labels)} labels, expected {len(images)}, one for each image of "
            f"{images_path.name}"
        )
    check_labels(labels, FASHION_CLASSES, labels_path)
    return torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels.astype(np.int64))


def _plain_or_gz(path: Path) -> Path:
    """Return `path`, or `path` with ``.gz`` if only that exists."""
    packed = path.with_name(path.name + ".gz")
    if path.is_file() or packed.is_file():
        return path if path.is_file() else packed
    raise FileNotFoundError(
        f"{packed}: no such file (nor {path.name}); expected an IDX file of the set"
    )


def check_labels(labels: NDArray[np.uint8], num_classes: int, path: Path) -> None:
    """Raise a ValueError that names the file unless every label is less than `num_classes`."""
    if (labels >= num_classes).any():
        where = int((labels >= num_classes).argmax())
        raise ValueError(
            f"{path}: label number {where} is {labels[where]}, expected 0 to {num_classes - 1}"
        )


_WITH_DIRECTORY: dict[str, Callable[[str, Path], ImageData]] = {
    "fashion-mnist": _fashion_mnist,
}
