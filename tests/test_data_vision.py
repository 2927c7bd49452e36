"""CIFAR and directories of images, written tiny and read with torchvision."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from fastnas.data import Augment, ImageData, StreamedData, load, split
from fastnas.data.color import jitter

try:
    import torchvision.datasets
    from PIL import Image
# A torchvision that was made for another torch raises a RuntimeError.
except (ImportError, RuntimeError) as error:
    pytest.skip(f"torchvision cannot be imported: {error}", allow_module_level=True)


def write_cifar(root: Path, reader: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write four images a file in the layout of `reader`, which is told their sums."""
    folder = root / reader.base_folder
    folder.mkdir()
    key = "fine_labels" if reader is torchvision.datasets.CIFAR100 else "labels"

    def write(name: str, content: dict) -> list[str]:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    for attribute in ("train_list", "test_list"):
        entries = []
        for number, (name, _) in enumerate(getattr(reader, attribute)):
            pixels = np.full((4, 3, 32, 32), number, dtype=np.uint8)
            pixels[:, 1] = 100
            pixels[:, :, 0, 1] = 200
            entries.append(write(name, {"data": pixels.reshape(4, -1), key: [0, 1, 2, 3]}))
        monkeypatch.setattr(reader, attribute, entries)
    names = {reader.meta["key"]: [str(number) for number in range(10)]}
    md5 = write(reader.meta["filename"], names)[1]
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": md5})


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_cifar(tmp_path, monkeypatch, kind):
    reader = getattr(torchvision.datasets, kind.upper())
    write_cifar(tmp_path, reader, monkeypatch)
    data = load(f"{kind}:{tmp_path}")
    assert isinstance(data, ImageData)
    files = len(reader.train_list)
    assert data.train_images.shape == (4 * files, 3, 32, 32)
    assert data.train_images.is_contiguous()
    assert data.train_labels.tolist() == [0, 1, 2, 3] * files
    assert data.test_images.shape == (4, 3, 32, 32)
    assert data.train_images[-1, 0, 5, 5] == files - 1
    assert data.train_images[-1, 1, 5, 5] == 100
    assert (data.train_images[:, :, 0, 1] == 200).all()
    assert data.num_classes == 10
    assert data.mean == (0.49139968, 0.48215827, 0.44653124)
    assert data.std == (0.24703233, 0.24348505, 0.26158768)


def test_cifar_names_what_is_missing_or_changed(tmp_path, monkeypatch):
    reader = torchvision.datasets.CIFAR10
    with pytest.raises(FileNotFoundError, match=r"data_batch_1: no such file; expected cifar-10"):
        load(f"cifar10:{tmp_path}")
    write_cifar(tmp_path, reader, monkeypatch)
    changed = tmp_path / reader.base_folder / "data_batch_3"
    changed.write_bytes(pickle.dumps("anything"))
    with pytest.raises(ValueError, match=r"data_batch_3: is not the published file"):
        load(f"cifar10:{tmp_path}")


COLOURS = {"blue": (0, 0, 250), "green": (0, 250, 0), "red": (250, 0, 0)}


def write_images(root: Path, count: int, size: tuple[int, int] = (12, 10), **classes) -> None:
    for name, colour in (classes or COLOURS).items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", size, colour).save(root / name / f"{number}.png")


def check_colours(batches) -> None:
    """Each image has the colour of its class, in all pixels that are not black."""
    for images, labels in batches:
        brightest = images.amax(dim=(2, 3)).argmax(dim=1)
        assert torch.equal(brightest, 2 - labels)


@pytest.mark.parametrize("part", ["val", "test"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_directory_with_a_test_set(tmp_path, part, in_memory):
    write_images(tmp_path / "train", 6)
    write_images(tmp_path / part, 2)
    data = load(f"folder:{tmp_path}", in_memory=in_memory, workers=0)
    assert isinstance(data, ImageData if in_memory else StreamedData)
    assert (data.num_train, data.num_test, data.num_classes) == (18, 6, 3)
    assert (data.channels, data.image_size) == (3, (10, 10))
    for augment in (None, Augment(crop_padding=2, flip=True), Augment(resized_crop=0.3)):
        check_colours(data.train_batches(5, augment=augment))
    check_colours(data.test_batches(5))


@pytest.mark.parametrize("sub", ["", "train"])
def test_one_class_is_too_few(tmp_path, sub):
    write_images(tmp_path / sub, 10, alone=(1, 2, 3))
    with pytest.raises(ValueError, match="at least two classes, but found only 'alone'"):
        load(f"folder:{tmp_path}", workers=0)


def test_directory_prefers_a_test_set_with_classes(tmp_path):
    # As ImageNet comes: the images of test/ are of unknown class.
    write_images(tmp_path / "train", 2)
    write_images(tmp_path / "val", 1)
    (tmp_path / "test").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "test" / "0.png")
    assert load(f"folder:{tmp_path}").num_test == 3


@pytest.mark.parametrize("sub", ["", "train"])
def test_directory_without_test_set_holds_some_of_each_class_out(tmp_path, sub):
    write_images(tmp_path / sub, 10)
    data = load(f"folder:{tmp_path}", held_out=0.2, workers=0)
    assert data.train_labels.bincount().tolist() == [8, 8, 8]
    assert data.test_labels.bincount().tolist() == [2, 2, 2]
    assert load(f"folder:{tmp_path}", workers=0).num_test == 3
    files = load(f"folder:{tmp_path}", in_memory=False)
    assert not set(files.train.files) & set(files.test.files)
    # Not the first or last by name, which are often alike.
    files = load(f"folder:{tmp_path}", in_memory=False, held_out=0.3)
    held_out = {Path(path).stem for path, _ in files.test.files}
    assert not held_out <= set("012")
    assert not held_out <= set("789")


def test_halves_of_a_directory_have_every_class(tmp_path):
    write_images(tmp_path / "train", 20)
    write_images(tmp_path / "val", 1)
    data = load(f"folder:{tmp_path}", workers=0)
    for part in split(data.num_train, 0.5):
        assert data.train_labels[part].bincount(minlength=3).min() >= 4


def test_large_directory_is_not_kept_in_memory(tmp_path, monkeypatch):
    write_images(tmp_path, 4)
    monkeypatch.setattr("fastnas.data.pairs.MEMORY_LIMIT", 12 * 300 - 1)
    assert isinstance(load(f"folder:{tmp_path}", workers=0), StreamedData)
    monkeypatch.setattr("fastnas.data.pairs.MEMORY_LIMIT", 12 * 300)
    assert isinstance(load(f"folder:{tmp_path}", workers=0), ImageData)


def test_image_of_the_size_asked_for_is_kept_and_others_lose_their_border(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    framed = np.full((16, 48, 3), 255, dtype=np.uint8)
    framed[1:15, 17:31] = 7
    for name, array in (("kept", pixels), ("framed", framed)):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.fromarray(array).save(tmp_path / name / f"{number}.png")
    data = load(f"folder:{tmp_path}", image_size=16, workers=0)
    kept = data.train_images[data.train_labels == 1][0]
    assert torch.equal(kept, torch.from_numpy(pixels).permute(2, 0, 1))
    # The middle square of 14 of 16 rows: the frame is seen at the very edge only, blended in.
    inner = data.train_images[data.train_labels == 0]
    assert (inner[:, :, 1:-1, 1:-1] == 7).all()
    assert inner.max() < 60


def test_crops_come_from_the_full_resolution_and_do_not_depend_on_workers(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for number in range(4):
            image = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
            image.save(tmp_path / name / f"{number}.png")

    def batches(workers: int, epoch: int = 0, start: int = 0) -> list[torch.Tensor]:
        data = load(f"folder:{tmp_path}", image_size=8, in_memory=False, workers=workers)
        loader = data.train_batches(2, augment=Augment.imagenet(), seed=1)
        return [images for images, _ in loader.iterate(epoch, start)]

    alone = batches(0)
    assert [images.shape for images in alone] == [(2, 3, 8, 8)] * 3
    assert all(torch.equal(a, b) for a, b in zip(alone, batches(2), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(alone[1:], batches(1, start=1), strict=True))
    assert not torch.equal(alone[0], batches(0, epoch=1)[0])


def test_crops_differ_between_epochs(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for number in range(3):
            pixels = np.arange(1200).astype(np.uint8).reshape(20, 20, 3)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    data = load(f"folder:{tmp_path}", image_size=8, in_memory=False, workers=0)
    batches = data.train_batches(4, augment=Augment(resized_crop=0.1), shuffle=False)
    (first, _), (second, _) = next(batches.iterate(0)), next(batches.iterate(1))
    assert (first != second).flatten(1).any(1).all()
    assert len(first.unique(dim=0)) == 4


def test_subset_of_a_directory_still_crops_from_the_files(tmp_path):
    write_images(tmp_path, 4)
    data = load(f"folder:{tmp_path}", in_memory=False, workers=0).subset(5, 2)
    assert (data.num_train, data.num_test) == (5, 2)
    batches = data.train_batches(5, augment=Augment(resized_crop=0.5))
    assert batches.items.crops
    check_colours(batches)


def test_colour_changes_are_those_of_torchvision():
    from torchvision.transforms import functional

    images = torch.rand(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    changes = (
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
    )
    for index, change in enumerate(changes):
        for amount in (-0.4, 0.1, 0.4):
            amounts = torch.zeros(4, 4)
            amounts[:, index] = amount
            expected = change(images, amount if index == 3 else 1 + amount)
            found = jitter(images, amounts, (index,))
            # torchvision rounds the weights of grey to four digits.
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_broken_image_is_named(tmp_path):
    write_images(tmp_path, 4)
    for number in range(4):
        (tmp_path / "red" / f"{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    with pytest.raises(ValueError, match=r"red.*\.png: expected an image file, cannot decode it"):
        load(f"folder:{tmp_path}", image_size=10, workers=0)


def test_directories_that_do_not_fit_are_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"class folder"):
        load(f"folder:{tmp_path}")
    write_images(tmp_path / "train", 2)
    write_images(tmp_path / "val", 1, blue=(0, 0, 9), pink=(9, 0, 9))
    with pytest.raises(ValueError, match=r"missing \['green', 'red'\], too many \['pink'\]"):
        load(f"folder:{tmp_path}")
    write_images(tmp_path / "other", 1)
    with pytest.raises(ValueError, match=r"blue.*0\.png has one image, expected at least two"):
        load(f"folder:{tmp_path / 'other'}")
    with pytest.raises(ValueError, match=r"held_out: expected more than 0 and less than 1, got 1"):
        load(f"folder:{tmp_path / 'other'}", held_out=1.0)
    with pytest.raises(ValueError, match=r"workers: expected 0 or more processes, got -1"):
        load(f"folder:{tmp_path / 'other'}", workers=-1)


def test_held_out_with_a_test_set_is_refused(tmp_path):
    write_images(tmp_path / "train", 2)
    write_images(tmp_path / "val", 1)
    with pytest.raises(ValueError, match=r"held_out: .*val is the test set"):
        load(f"folder:{tmp_path}", held_out=0.5)
