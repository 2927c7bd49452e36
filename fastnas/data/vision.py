"""Sets read with torchvision: CIFAR, and directories with one sub-directory a class."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastnas.data.augment import Augment
from fastnas.data.batches import generator_of
from fastnas.data.images import ImageData
from fastnas.data.stream import Croppable, StreamedData, to_tensor

CIFAR_MEAN = (0.49139968, 0.48215827, 0.44653124)
CIFAR_STD = (0.24703233, 0.24348505, 0.26158768)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

#: Share of the shorter side that the middle square of a test image has (224 of 256 pixels).
MIDDLE = 224 / 256

#: Largest image size chosen by itself, that of ImageNet.
LARGEST_DEFAULT = 224

#: Share of the images of a directory without train/ that is held out as the test set.
HELD_OUT = 0.1


def datasets() -> ModuleType:
    """Return `torchvision.datasets`, or raise an ImportError that says what to install."""
    try:
        import torchvision.datasets
    # A torchvision made for another torch fails with a RuntimeError: its operators are missing.
    except (ImportError, RuntimeError) as error:
        raise ImportError(_what_to_install(error)) from error
    module: ModuleType = torchvision.datasets
    return module


def _what_to_install(error: Exception) -> str:
    try:
        found = importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        return (
            'this data set is read with torchvision: pip install "fastnas[vision]" '
            f"(it must fit torch {torch.__version__}; importing it said: {error})"
        )
    return (
        f"this data set is read with torchvision, but torchvision {found} does not fit torch "
        f"{torch.__version__} (importing it said: {error}): install the one made for it, from "
        "where that torch came from (with the same --index-url, if it was given one)"
    )


def load_cifar(spec: str, directory: Path) -> ImageData:
    """Load CIFAR-10 or CIFAR-100 in its "python version", unpacked in `directory`.

    The files of that version are pickles, which can run code when read. torchvision reads a file
    only if its MD5 sum is that of the published one; the same sums are checked here first, to name
    the file that is missing or differs.
    """
    module = datasets()
    reader = module.CIFAR100 if spec.startswith("cifar100") else module.CIFAR10
    folder = directory / reader.base_folder
    meta = (reader.meta["filename"], reader.meta["md5"])
    for name, md5 in (*reader.train_list, *reader.test_list, meta):
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file; expected {reader.filename} unpacked in {directory}"
            )
        if not module.utils.check_integrity(str(path), md5):
            raise ValueError(
                f"{path}: is not the published file (expected the MD5 sum {md5}); unpack "
                f"{reader.filename} again"
            )
    train = reader(str(directory), train=True, download=False)
    test = reader(str(directory), train=False, download=False)
    return ImageData(
        spec,
        _channels_first(train.data),
        torch.tensor(train.targets, dtype=torch.int64),
        _channels_first(test.data),
        torch.tensor(test.targets, dtype=torch.int64),
        num_classes=len(train.classes),
        mean=CIFAR_MEAN,
        std=CIFAR_STD,
        classes=tuple(train.classes),
    )


def _channels_first(images: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


class FolderImages(Croppable):
    """RGB images of files, brought to one square size when read."""

    def __init__(self, files: list[tuple[str, int]], size: int) -> None:
        """Take paths with labels, and the side of the images wanted."""
        self.files = files
        self.size = size

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return the middle of an image, or the whole if it has the size already, and its label."""
        path, label = self.files[index]
        image = _read(path)
        width, height = image.size
        if (width, height) != (self.size, self.size):
            side = min(width, height) * MIDDLE
            left, top = (width - side) / 2, (height - side) / 2
            image = self._resize(image, (left, top, left + side, top + side))
        return to_tensor(image), label

    def random_crop(self, index: int, augment: Augment, seed: int) -> tuple[Tensor, int]:
        """Return a random part of an image, resized, and its label."""
        path, label = self.files[index]
        image = _read(path)
        boxes = augment.draw_boxes(1, image.height, image.width, generator_of(seed))
        top, left, height, width = boxes[0].tolist()
        return to_tensor(self._resize(image, (left, top, left + width, top + height))), label

    def first(self, count: int) -> FolderImages:
        """Return the set of the first `count` files."""
        return FolderImages(self.files[:count], self.size)

    def _resize(self, image: Any, box: tuple[float, float, float, float]) -> Any:
        from PIL.Image import Resampling

        return image.resize((self.size, self.size), Resampling.BILINEAR, box=box)


def _read(path: str) -> Any:
    """Decode an image file to RGB; a ValueError names the file that cannot be."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    # What Pillow raises for broken files of its many formats.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: expected an image file, cannot decode it ({error})") from error


def load_folder(
    spec: str,
    directory: Path,
    *,
    image_size: int | None = None,
    held_out: float | None = None,
    workers: int | None = None,
) -> StreamedData:
    """Find the images of a directory.

    With a sub-directory ``train``, its sub-directories are the classes, and those of ``test`` or
    else of ``val`` hold the test set. Without it the sub-directories of `directory` are the
    classes. Where no test set is found, a share `held_out` of each class becomes it. Files are
    shuffled once, the same way every time, so that every part of a set has all classes.
    Normalisation is ImageNet's.

    Args:
        spec: name given to the set.
        directory: the directory.
        image_size: side in pixels; None: the shorter side of the first image, at most 224.
        held_out: share of each class held out, where there is no test set; None: 0.1.
        workers: see `StreamedData`.
    """
    has_train = (directory / "train").is_dir()
    root = directory / "train" if has_train else directory
    classes, train = _classes_and_files(root)
    tests = (directory / "test", directory / "val") if has_train else ()
    test_root = next((path for path in tests if _has_directories(path)), None)
    if test_root is None:
        train, test = _hold_out(train, HELD_OUT if held_out is None else held_out, root)
    elif held_out is not None:
        raise ValueError(f"held_out: {test_root} is the test set, so nothing is held out")
    else:
        test_classes, test = _classes_and_files(test_root)
        if test_classes != classes:
            extra, missing = set(test_classes) - set(classes), set(classes) - set(test_classes)
            raise ValueError(
                f"{test_root}: expected the classes of {root}; "
                f"missing {sorted(missing)[:5]}, too many {sorted(extra)[:5]}"
            )
    size = min(LARGEST_DEFAULT, *_read(train[0][0]).size) if image_size is None else image_size
    return StreamedData(
        spec,
        FolderImages(_shuffled(train), size),
        FolderImages(_shuffled(test), size),
        num_classes=len(classes),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        image_shape=(3, size, size),
        workers=workers,
        classes=tuple(classes),
    )


def _classes_and_files(root: Path) -> tuple[list[str], list[tuple[str, int]]]:
    found = datasets().ImageFolder(str(root))
    if len(found.classes) < 2:
        raise ValueError(
            f"{root}: expected a sub-folder for each of at least two classes, but found only "
            f"{found.classes[0]!r}"
        )
    return list(found.classes), list(found.samples)


def _has_directories(path: Path) -> bool:
    return path.is_dir() and any(entry.is_dir() for entry in path.iterdir())


def _shuffled(files: list[tuple[str, int]]) -> list[tuple[str, int]]:
    order = torch.randperm(len(files), generator=generator_of(0))
    return [files[index] for index in order.tolist()]


def _hold_out(
    files: list[tuple[str, int]], share: float, root: Path
) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Move a share of each class, at least one image and not all, to a test set."""
    if not 0 < share < 1:
        raise ValueError(f"held_out: expected more than 0 and less than 1, got {share}")
    train, test = [], []
    for label in sorted({label for _, label in files}):
        members = _shuffled([file for file in files if file[1] == label])
        if len(members) < 2:
            raise ValueError(
                f"{root}: the class of {members[0][0]} has one image, expected at least two"
            )
        count = min(len(members) - 1, max(1, round(share * len(members))))
        test += members[:count]
        train += members[count:]
    return train, test
