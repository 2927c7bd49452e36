# SPDX-License-Identifier: Apache-2.0
"""Which images the weights are trained on, and which the architecture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from search_tiny import config, images, registered

from fastnas.data import ImageData, load
from fastnas.search import Progress, Search, preset_config
from fastnas.search.assembly import split_images


@pytest.fixture(autouse=True, scope="module")
def _space() -> object:
    with registered():
        yield


def test_order_takes_the_first_and_the_last_images() -> None:
    for split in ("order", "auto"):  # images in memory
        first, second = split_images(images(96), config(split=split))
        assert torch.equal(first, torch.arange(48))
        assert torch.equal(second, torch.arange(48, 96))
    settings = config(split="order", weight_share=0.25, arch_share=0.125)
    first, second = split_images(images(96), settings)
    assert torch.equal(first, torch.arange(24))
    assert torch.equal(second, torch.arange(84, 96))


def test_random_parts_do_not_overlap() -> None:
    parts = [split_images(images(96), config(split="random", seed=s)) for s in (1, 1, 2)]
    (a, b), again, other = parts
    assert len({*a.tolist(), *b.tolist()}) == 96
    assert torch.equal(a, again[0])
    assert not torch.equal(a, other[0])


def test_the_default_search_sees_the_classes_about_equally_often() -> None:
    # The embedded images end with whole rows of the classes that are rarest elsewhere.
    data = load()
    for part in split_images(data, preset_config("demo")):
        counts = torch.bincount(data.train_labels[part], minlength=10)
        assert counts.min() > 0.6 * counts.max()


def sorted_images() -> ImageData:
    data = images(96)
    order = data.train_labels.argsort(stable=True)
    return replace(
        data, train_images=data.train_images[order], train_labels=data.train_labels[order]
    )


def test_images_sorted_by_class_are_noticed() -> None:
    message = (
        r"weight_share 0.5: these 48 of 96 training images have none of class 2 \(24 in all\); "
        "set split to 'random', for the images seem to be sorted by class"
    )
    with pytest.raises(ValueError, match=message):
        split_images(sorted_images(), config(split="order"))
    split_images(sorted_images(), config(split="random"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"weight_share": 0.03},
            r"weight_share 0.03: these 2 of 96 training images have none of class 2 \(24 in all\); "
            "take a larger share",
        ),
        ({"arch_share": 0.03}, "arch_share 0.03: these 2 of 96 .* none of class 0 .* larger share"),
        (
            {"weight_share": 0.001},
            "weight_share: 0.001 of 96 training images is none; expected at least 0.01",
        ),
        ({"arch_share": 0.01}, "arch_share: 0.01 of 96 training images is none"),
    ],
    ids=str,
)
def test_a_share_that_is_too_small_is_named(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_images(images(96), config(split="order", **fields))


def test_a_class_without_images_is_not_missed() -> None:
    data = replace(images(96), num_classes=10)  # as IDX files have ten, whatever is in them
    assert len(split_images(data, config(split="order"))[0]) == 48


def test_one_image_cannot_be_shared() -> None:
    data = images(96).subset(1)
    with pytest.raises(ValueError, match="tiny: expected at least two training images to share"):
        split_images(data, config())


@pytest.mark.parametrize("batch_size", [13, 500])
def test_a_batch_may_be_larger_than_a_share(batch_size: int) -> None:
    # 12 and 6 images: a batch has all of them, and the search neither waits nor spins.
    settings = config(batch_size=batch_size, weight_share=0.13, arch_share=0.07, epochs=1)
    search = Search(settings, data=images(), progress=Progress())
    assert [search.halves.weights.batch_size, search.halves.validation.batch_size] == [12, 6]
    assert search.steps_per_epoch == 1
    assert len(search.run().history) == 1


def test_batches_come_from_their_halves() -> None:
    search = Search(config(split="order"), data=images(), progress=Progress())
    weights, architecture = search.halves.weights, search.halves.architecture.batches
    assert torch.equal(weights.indices.sort().values, torch.arange(48))
    assert torch.equal(architecture.indices.sort().values, torch.arange(48, 96))
    assert torch.equal(search.halves.validation.indices, torch.arange(48, 96))
    assert weights.augment == architecture.augment == search.config.augment
    assert not search.halves.validation.augment.flip
    assert not search.halves.validation.shuffle
