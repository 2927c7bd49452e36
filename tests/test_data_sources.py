"""Named sets: the embedded images, IDX files, and what is said of broken ones."""

from __future__ import annotations

import gzip
import importlib.metadata
import importlib.util
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastnas.data
from fastnas.data import Augment, ImageData, load, statistics
from fastnas.data.idx import read_idx, write_idx
from fastnas.data.sources import ASSETS

TOOL = Path(__file__).parent.parent / "tools" / "make_fashion_mnist_mini.py"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(scope="module")
def mini() -> ImageData:
    return load()


@pytest.fixture
def idx_set(tmp_path: Path) -> Path:
    """A tiny set in IDX files, one pair compressed and one not."""
    generator = np.random.default_rng(0)
    for part, count, end in (("train", 12, ".gz"), ("t10k", 6, "")):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{end}", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{end}", labels)
    return tmp_path


def test_embedded_set_is_balanced_and_small(mini):
    assert mini.train_images.shape == (5000, 1, 28, 28)
    assert mini.test_images.shape == (1000, 1, 28, 28)
    assert mini.train_images.dtype == torch.uint8
    assert mini.train_labels.bincount().tolist() == [500] * 10
    assert mini.test_labels.bincount().tolist() == [100] * 10
    assert (mini.num_classes, mini.channels, mini.image_size) == (10, 1, (28, 28))
    assert (mini.num_train, mini.num_test) == (5000, 1000)
    assert sum(path.stat().st_size for path in (ASSETS / mini.name).iterdir()) < 4 * 2**20


def test_halves_of_the_embedded_set_have_every_class(mini):
    for part in fastnas.data.split(mini.num_train, 0.5):
        assert mini.train_labels[part].bincount().min() > 200


def test_embedded_set_keeps_its_notice():
    notice = (ASSETS / "fashion-mnist-mini" / "LICENSE").read_text(encoding="utf-8")
    assert "2017, Zalando SE" in notice
    assert "Permission is hereby granted, free of charge" in notice
    assert "The above copyright notice and this permission notice shall be included" in notice


def test_training_images_are_normalised_to_mean_0_and_deviation_1(mini):
    images = torch.cat([images for images, _ in mini.train_batches(1000, dtype=torch.float64)])
    assert images.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_statistics_are_those_of_each_channel():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (50, 3, 5, 4), dtype=torch.uint8, generator=generator)
    images[:, 1] //= 3
    mean, std = statistics(images)
    scaled = images.double() / 255
    assert mean == pytest.approx(scaled.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert std == pytest.approx(scaled.std((0, 2, 3), correction=0).tolist(), abs=1e-12)


def test_test_batches_keep_their_order_and_train_batches_do_not(mini):
    few = mini.subset(100, 50)
    assert torch.equal(next(iter(few.test_batches(50)))[1], mini.test_labels[:50])
    assert not torch.equal(next(iter(few.train_batches(100)))[1], mini.train_labels[:100])


def test_subset_takes_the_first(mini):
    few = mini.subset(30)
    assert torch.equal(few.train_images, mini.train_images[:30])
    assert (few.num_train, few.num_test) == (30, 1000)
    with pytest.raises(ValueError, match=r"train: expected 1 to 5000 images, got 5001"):
        mini.subset(5001)
    with pytest.raises(ValueError, match=r"test: expected 1 to 1000 images, got 0"):
        mini.subset(10, 0)


def test_image_size_adds_a_black_border(mini):
    wide = load(image_size=33)
    assert wide.image_size == (33, 33)
    assert torch.equal(wide.train_images[:, :, 2:30, 2:30], mini.train_images)
    assert wide.train_images.sum() == mini.train_images.sum()
    assert wide.mean == mini.mean
    with pytest.raises(ValueError, match=r"image_size: 27 is less than the 28 x 28 pixels"):
        load(image_size=27)
    with pytest.raises(ValueError, match=r"image_size: expected 1 or more pixels, got 0"):
        load(image_size=0)


def test_loaders_share_the_images_of_a_set(mini):
    first, second = mini.train_batches(10), mini.train_batches(20, augment=Augment(flip=True))
    assert first.images.data_ptr() == second.images.data_ptr() == mini.train_images.data_ptr()


def test_to_copies_nothing_that_is_there_already(mini):
    assert mini.to("cpu").train_images.data_ptr() == mini.train_images.data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_gpu_are_those_of_the_cpu(mini):
    augment = Augment(crop_padding=4, flip=True, cutout=8)
    there = mini.to("cuda")
    batches = there.train_batches(100, augment=augment, device="cuda", seed=1)
    assert batches.images.data_ptr() == there.train_images.data_ptr()
    expected = mini.train_batches(100, augment=augment, seed=1)
    for (images, labels), (again, labels_again) in zip(expected, batches, strict=True):
        assert again.device.type == labels_again.device.type == "cuda"
        assert torch.equal(labels, labels_again.cpu())
        torch.testing.assert_close(images, again.cpu())


def test_idx_directory(idx_set):
    data = load(f"fashion-mnist:{idx_set}")
    assert isinstance(data, ImageData)
    assert data.train_images.shape == (12, 1, 28, 28)
    assert data.test_labels.tolist() == [0, 1, 2, 3, 4, 5]
    expected = read_idx(idx_set / "t10k-images-idx3-ubyte", dims=3)
    assert torch.equal(data.test_images[:, 0], torch.from_numpy(expected))


@pytest.mark.parametrize("name", ["values", "values.gz"])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 4)])
def test_idx_round_trip(tmp_path, name, shape):
    values = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    write_idx(tmp_path / name, values)
    assert np.array_equal(read_idx(tmp_path / name, dims=len(shape)), values)
    first = (tmp_path / name).read_bytes()
    write_idx(tmp_path / name, values)
    assert (tmp_path / name).read_bytes() == first


def test_idx_writes_bytes_only(tmp_path):
    with pytest.raises(TypeError, match=r"values: expected dtype uint8, got int64"):
        write_idx(tmp_path / "values", np.arange(3))


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("mnist", "unknown specification 'mnist'; there are fashion-mnist-mini, fashion-mnist:DIR"),
        ("", "unknown specification ''"),
        ("fashion-mnist", "a directory must follow its colon"),
        ("cifar10:", "a directory must follow its colon"),
        ("fashion-mnist-mini:there", "unknown specification"),
    ],
)
def test_unknown_specification_lists_what_there_is(spec, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        load(spec)


@pytest.mark.parametrize("kind", ["fashion-mnist", "cifar10", "cifar100", "folder"])
def test_missing_directory_is_named(tmp_path, kind):
    with pytest.raises(FileNotFoundError, match=rf"{kind}:.*expected a directory at .*nowhere"):
        load(f"{kind}:{tmp_path / 'nowhere'}")


@pytest.mark.parametrize(
    "options", [{"held_out": 0.2}, {"in_memory": True}, {"workers": 2}], ids=lambda o: next(iter(o))
)
def test_options_of_directories_are_refused_elsewhere(options):
    with pytest.raises(ValueError, match=rf"{next(iter(options))}: applies to folder:DIR only"):
        load(**options)


def test_missing_file_is_named(idx_set):
    (idx_set / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-labels-idx1-ubyte\.gz: no such file"):
        load(f"fashion-mnist:{idx_set}")
    with pytest.raises(FileNotFoundError, match=r"absent: no such file; expected an IDX file"):
        read_idx(idx_set / "absent", dims=1)


HEADER = bytes((0, 0, 8, 1)) + struct.pack(">I", 3)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "starts with nothing, expected the magic number 00000801"),
        (b"\x89PNG....", "starts with 89504e47, expected the magic number 00000801"),
        (bytes((0, 0, 8, 3)) + bytes(20), "starts with 00000803, expected the magic number"),
        (bytes((0, 0, 13, 1)) + bytes(20), "starts with 00000d01, expected the magic number"),
        (HEADER[:6], "ends inside its header of 8 bytes"),
        (HEADER + b"ab", r"announces 3 bytes, found only 2"),
        (HEADER + b"abcd", r"announces 3 bytes, found more"),
        (HEADER[:4] + bytes(4), r"header announces sizes \(0,\), expected 1 to"),
        (HEADER[:4] + b"\x3f" + b"\xff" * 3 + b"abc", r"announces 1073741823 bytes, found only 3"),
        (HEADER[:4] + b"\xff" * 4 + b"abc", r"expected 1 to 1073741824 bytes in all"),
    ],
)
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_broken_idx_file_is_named_with_what_was_expected(tmp_path, pack, content, text):
    path = tmp_path / "labels-file"
    path.write_bytes(pack(content))
    with pytest.raises(ValueError, match=rf"labels-file: .*{text}"):
        read_idx(path, dims=1)


def test_absurd_sizes_are_refused_before_reading(tmp_path):
    path = tmp_path / "images"
    path.write_bytes(bytes((0, 0, 8, 3)) + b"\xff" * 12)
    with pytest.raises(ValueError, match=r"images: the header announces sizes .* expected 1 to"):
        read_idx(path, dims=3)


@pytest.mark.parametrize("damage", ["truncated", "checksum", "garbled"])
def test_broken_gzip_is_named(tmp_path, damage):
    path = tmp_path / "labels.gz"
    content = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)
    write_idx(path, content)
    packed = bytearray(path.read_bytes())
    if damage == "truncated":
        packed = packed[:-100]
    elif damage == "checksum":
        packed[-8] ^= 1
    else:
        packed[10] = 0xFF
    path.write_bytes(packed)
    with pytest.raises(ValueError, match=r"labels\.gz: broken or truncated gzip data"):
        read_idx(path, dims=1)


def test_count_and_range_of_labels_are_checked(idx_set):
    labels = idx_set / "t10k-labels-idx1-ubyte"
    write_idx(labels, np.zeros(5, dtype=np.uint8))
    with pytest.raises(ValueError, match=r"t10k-labels.*: holds 5 labels, expected 6"):
        load(f"fashion-mnist:{idx_set}")
    write_idx(labels, np.array([0, 1, 2, 10, 3, 4], dtype=np.uint8))
    with pytest.raises(ValueError, match=r"t10k-labels.*: label number 3 is 10, expected 0 to 9"):
        load(f"fashion-mnist:{idx_set}")


def test_sizes_of_both_parts_must_agree(idx_set):
    write_idx(idx_set / "t10k-images-idx3-ubyte", np.zeros((6, 28, 27), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"\[1, 28, 28\], test images \[1, 28, 27\]"):
        load(f"fashion-mnist:{idx_set}")


def test_image_data_checks_labels(mini):
    with pytest.raises(ValueError, match=r"training labels go from 0 to 9, expected 0 to 8"):
        ImageData(
            "nine",
            mini.train_images,
            mini.train_labels,
            mini.test_images,
            mini.test_labels,
            num_classes=9,
            mean=mini.mean,
            std=mini.std,
        )


def test_images_of_one_colour_are_refused(idx_set):
    write_idx(idx_set / "train-images-idx3-ubyte", np.full((12, 28, 28), 9, dtype=np.uint8))
    with pytest.raises(ValueError, match=r"fashion-mnist:.*deviation above 0 .* got \(0.0,\)"):
        load(f"fashion-mnist:{idx_set}")


def test_a_home_that_does_not_exist():
    with pytest.raises(FileNotFoundError, match="expected a directory at ~nobody-of-this-name/x"):
        load("folder:~nobody-of-this-name/x")


def test_torchvision_is_asked_for_by_its_extra(tmp_path, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setattr("importlib.metadata.version", missing)
    for kind in ("cifar10", "cifar100", "folder"):
        with pytest.raises(ImportError, match=r'pip install "fastnas\[vision\]"'):
            load(f"{kind}:{tmp_path}")


def test_a_torchvision_of_another_torch_is_not_asked_for_again(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.9+cu1")
    with pytest.raises(ImportError, match=r"torchvision 0.9\+cu1 does not fit torch") as raised:
        load(f"folder:{tmp_path}")
    assert "fastnas[vision]" not in str(raised.value)


def test_tool_takes_the_first_of_each_class():
    spec = importlib.util.spec_from_file_location("make_fashion_mnist_mini", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    labels = np.array([3, 3, *range(10), 3, *range(10)], dtype=np.uint8)
    assert tool.first_of_each_class(labels, 1).tolist() == [0, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    with pytest.raises(
        ValueError, match=r"classes \[0, 1, 2, 4, 5, 6, 7, 8, 9\] have fewer than 3"
    ):
        tool.first_of_each_class(labels, 3)


@pytest.mark.slow
@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_tool_makes_the_embedded_files_again(tmp_path):
    command = [sys.executable, str(TOOL), "--target", str(tmp_path)]
    subprocess.run(command, check=True, cwd=TOOL.parent.parent, env=_environment())
    embedded = ASSETS / "fashion-mnist-mini"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        path.name for path in embedded.iterdir()
    )
    for path in tmp_path.iterdir():
        made, kept = path.read_bytes(), (embedded / path.name).read_bytes()
        # Another zlib may pack the same content into other bytes.
        if path.suffix == ".gz":
            made, kept = gzip.decompress(made), gzip.decompress(kept)
        assert made == kept, path.name


def _environment() -> dict[str, str]:
    root = Path(fastnas.data.__file__).parents[2]
    return {**os.environ, "PYTHONPATH": str(root)}
