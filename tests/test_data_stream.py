"""Sets read by a DataLoader: the same interface, and nothing depends on the workers."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from fastnas.data import Augment, Endless, ImageData, StreamedData, from_datasets
from fastnas.data.stream import GRACE, default_workers, outlive_signals

NUMBERS = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
EVERYTHING = Augment(crop_padding=2, flip=True, cutout=3, color_jitter=(0.4, 0.4, 0.4, 0.2))


class Pictures(Dataset):
    """Images that are a function of their index; `kind` is how an item comes."""

    classes = ("even", "odd")

    def __init__(self, n: int = 11, kind: str = "tensor", size: int = 8):
        self.n, self.kind, self.size = n, kind, size

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(256, (3, self.size, self.size), generator=generator).byte()
        if self.kind == "noisy":
            # All three global generators, as transforms of different origin use them.
            noise = random.random() + np.random.rand() + torch.rand(1).item()
            return image.float() + noise, index % 2
        if self.kind == "array":
            return image.permute(1, 2, 0).numpy(), index % 2
        if self.kind == "float":
            return image / 255, torch.tensor(index % 2)
        return image, index % 2


def tensors(n: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    items = [Pictures()[index] for index in range(n)]
    return torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])


def make(kind: str = "tensor", workers: int = 0, **options):
    numbers = NUMBERS if kind in ("tensor", "array") else {}
    return from_datasets(
        Pictures(kind=kind), Pictures(5, kind), workers=workers, **numbers, **options
    )


def same(one, other) -> bool:
    one, other = list(one), list(other)
    return len(one) == len(other) and all(
        torch.equal(a, b)
        for left, right in zip(one, other, strict=True)
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("kind", ["tensor", "array"])
@pytest.mark.parametrize("augment", [None, EVERYTHING, Augment(resized_crop=0.3)])
def test_batches_are_those_of_a_set_in_memory(kind, augment):
    images, labels = tensors()
    kept = ImageData("kept", images, labels, images, labels, num_classes=2, **NUMBERS)
    streamed = make(kind)
    options = {"augment": augment, "seed": 3, "indices": torch.arange(1, 11)}
    assert same(
        streamed.train_batches(4, **options).iterate(2), kept.train_batches(4, **options).iterate(2)
    )


def test_test_batches_keep_their_order():
    batches = make().test_batches(2)
    assert len(batches) == 3
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 1, 0, 1, 0]


def test_set_describes_itself():
    data = make()
    assert isinstance(data, StreamedData)
    assert (data.num_train, data.num_test, data.num_classes) == (11, 5, 2)
    assert (data.channels, data.image_size) == (3, (8, 8))
    assert data.to("cpu") is data
    few = data.subset(4, 2)
    assert (few.num_train, few.num_test) == (4, 2)
    with pytest.raises(ValueError, match=r"train: expected 1 to 11 images, got 12"):
        data.subset(12)


def test_random_transforms_do_not_depend_on_workers_or_on_where_an_epoch_starts():
    def batches(workers: int):
        return make("noisy", workers).train_batches(3, seed=5, augment=Augment(flip=True))

    alone = list(batches(0).iterate(1))
    assert same(alone, batches(2).iterate(1))
    assert same(alone[2:], batches(2).iterate(1, 2))
    assert not same(alone, batches(0).iterate(0))


def test_one_image_is_noisy_in_another_way_each_epoch():
    batches = make("noisy").train_batches(11, shuffle=False)
    (first, _), (second, _) = next(batches.iterate(0)), next(batches.iterate(1))
    assert (first != second).flatten(1).any(1).all()
    noise = (first - second)[:, 0, 0, 0]
    assert len(noise.unique()) == 11


def test_global_generators_are_left_alone():
    random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    list(make("noisy").train_batches(3))
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_endless_goes_on_where_it_was_saved():
    endless = Endless(make("noisy").train_batches(4))
    for _ in range(4):
        next(endless)
    resumed = Endless(make("noisy").train_batches(4))
    resumed.load_state_dict(endless.state_dict())
    for _ in range(4):
        assert same([next(endless)], [next(resumed)])


def test_floating_point_images_count_as_normalised():
    batches = make("float").train_batches(11, shuffle=False)
    images, labels = next(iter(batches))
    expected, expected_labels = tensors()
    assert torch.equal(images, expected / 255)
    assert torch.equal(labels, expected_labels)
    with pytest.raises(ValueError, match=r"color_jitter needs uint8 images"):
        make("float").train_batches(4, augment=EVERYTHING)


def test_kept_in_memory_with_its_own_statistics(monkeypatch):
    monkeypatch.setattr("fastnas.data.pairs.READ_BATCH", 4)
    data = from_datasets(Pictures(), Pictures(5), in_memory=True, workers=0)
    images, labels = tensors()
    assert isinstance(data, ImageData)
    assert torch.equal(data.train_images, images)
    assert torch.equal(data.train_labels, labels)
    assert torch.equal(data.test_images, images[:5])
    assert data.mean == pytest.approx((images / 255).mean((0, 2, 3)).tolist(), abs=1e-6)
    numbered = from_datasets(Pictures(), Pictures(5), in_memory=True, workers=0, **NUMBERS)
    assert numbered.mean == NUMBERS["mean"]


def test_tensor_dataset_needs_its_number_of_classes():
    images, labels = tensors()
    pair = TensorDataset(images, labels)
    with pytest.raises(ValueError, match=r"num_classes: needed"):
        from_datasets(pair, pair, **NUMBERS)
    assert from_datasets(pair, pair, num_classes=2, **NUMBERS).num_classes == 2


class Counting(IterableDataset):
    def __iter__(self):
        return iter(range(3))


@pytest.mark.parametrize(
    ("pair", "options", "error", "text"),
    [
        ((Pictures(), Pictures(0)), NUMBERS, ValueError, "test: expected at least one item"),
        ((Counting(), Pictures()), NUMBERS, TypeError, "expected one with __len__ and __getitem__"),
        ((Pictures(), Pictures()), {}, ValueError, "mean and std: expected both"),
        ((Pictures(), Pictures()), {"mean": (0,) * 3}, ValueError, "mean and std: expected both"),
        ((Pictures(kind="float"),) * 2, NUMBERS, ValueError, "apply to uint8 images"),
        ((Pictures(kind="float"),) * 2, {"in_memory": True}, ValueError, "apply to uint8 images"),
        (
            (TensorDataset(torch.zeros(3, 4), torch.zeros(3)),) * 2,
            {"num_classes": 2},
            ValueError,
            r"\[C, H, W\], got \[4\]",
        ),
        (
            (TensorDataset(*[torch.zeros(3)] * 2),) * 2,
            {"num_classes": 1},
            ValueError,
            "num_classes: expected at least 2, got 1",
        ),
        (
            (TensorDataset(*[torch.zeros(3)] * 2),) * 2,
            {"num_classes": 2},
            ValueError,
            r"\[C, H, W\], got \[\]",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(pair, options, error, text):
    with pytest.raises(error, match=text):
        from_datasets(*pair, **options)


def test_items_of_another_kind_are_refused():
    class Words(Pictures):
        def __getitem__(self, index):
            return np.zeros((2, 2)), 0

    with pytest.raises(TypeError, match=r"image: expected a tensor .* got ndarray with float64"):
        from_datasets(Words(), Words(), **NUMBERS)


def test_one_shape_for_all_images():
    mixed = torch.utils.data.ConcatDataset([Pictures(2), Pictures(2, size=9)])
    data = from_datasets(mixed, Pictures(), num_classes=2, workers=0, **NUMBERS)
    with pytest.raises(
        ValueError, match=r"image 2 is torch.uint8 \[3, 9, 9\], expected .*\[3, 8, 8\]"
    ):
        list(data.train_batches(2, shuffle=False))


class Numbered(Pictures):
    """The label is the index."""

    def __getitem__(self, index):
        return super().__getitem__(index)[0], index


@pytest.mark.parametrize("workers", [0, 1])
def test_labels_are_checked_in_every_process(workers):
    data = from_datasets(Numbered(), Pictures(), workers=workers, **NUMBERS)
    with pytest.raises(ValueError, match=r"image 2 has label 2, expected 0 to 1"):
        list(data.train_batches(2, shuffle=False))


class Broken(Pictures):
    """One of the images cannot be read."""

    def __getitem__(self, index):
        if index == 2:
            raise self.error(f"picture-{index}.png: cannot decode it\n(in two lines)")
        return super().__getitem__(index)


@pytest.mark.parametrize("error", [ValueError, OSError])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_without_the_workers_traceback(error, workers):
    broken = Broken()
    broken.error = error
    data = from_datasets(broken, Pictures(), workers=workers, **NUMBERS)
    with pytest.raises(error) as info:
        list(data.train_batches(2, shuffle=False))
    assert str(info.value) == "picture-2.png: cannot decode it\n(in two lines)"
    assert not multiprocessing.active_children()


class Signalling(Pictures):
    """The worker gets the signals that are sent to all processes of a run, twice over."""

    def __getitem__(self, index):
        if index == 1:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) * 2:
                os.kill(os.getpid(), number)
            time.sleep(0.05)
        return super().__getitem__(index)


def test_workers_leave_signals_to_the_main_process():
    data = from_datasets(Signalling(), Pictures(), workers=1, **NUMBERS)
    assert len(list(data.train_batches(2, shuffle=False))) == 6


def _live_on(ready):
    outlive_signals(0)
    ready.set()
    for _ in range(300):  # a signal that comes just before a sleep is seen only after it
        time.sleep(0.1)


@pytest.mark.parametrize(("ending", "code"), [(1, 0), (0, -signal.SIGALRM)])
def test_a_worker_is_not_immortal(monkeypatch, ending, code):
    monkeypatch.setattr("fastnas.data.stream.GRACE", 1)
    monkeypatch.setattr("fastnas.data.stream._ENDING", [ending])
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    worker = fork.Process(target=_live_on, args=(ready,), daemon=True)
    worker.start()
    assert ready.wait(20)
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == code


def test_a_process_that_ends_does_not_wait_for_its_workers():
    code = """
from test_data_stream import make
batches = iter(make(workers=1).train_batches(2))
next(batches)
print("end", flush=True)
"""
    path = os.pathsep.join(sys.path)
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert process.stdout.readline() == b"end\n"
    began = time.monotonic()
    assert process.wait(60) == 0
    assert time.monotonic() - began < 0.8 * GRACE


def test_workers_are_shared_among_the_processes_of_a_run(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(12)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert default_workers() == 8  # it may be of another program
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    for processes, workers in ((1, 8), (2, 6), (4, 3), (100, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert default_workers() == workers
