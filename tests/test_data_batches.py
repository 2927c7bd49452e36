"""Batches and augmentation: a function of seed, epoch and position, and the right one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastnas.data import Augment, Batches, Endless, split
from fastnas.data.augment import crop, cutout_

EVERYTHING = Augment(crop_padding=2, flip=True, cutout=3, color_jitter=(0.4, 0.4, 0.4, 0.2))
RESIZED = Augment(resized_crop=0.2, flip=True, cutout=3)


def numbered(n: int = 23, channels: int = 3, size: int = 6) -> tuple[Tensor, Tensor]:
    """Random images whose label is their position."""
    generator = torch.Generator().manual_seed(0)
    shape = (n, channels, size, size)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator), torch.arange(n)


def make(n: int = 23, batch_size: int = 5, channels: int = 3, **options) -> Batches:
    images, labels = numbered(n, channels)
    options = {"mean": (0.5,) * channels, "std": (0.25,) * channels, **options}
    return Batches(images, labels, batch_size, **options)


def collect(batches) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_every_image_comes_once_an_epoch():
    batches = make()
    orders = [collect(batches.iterate(epoch))[1] for epoch in range(3)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(23))
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[1], orders[2])


@pytest.mark.parametrize(("drop_last", "count", "last"), [(False, 5, 3), (True, 4, 5)])
def test_length_counts_the_last_batch_unless_dropped(drop_last, count, last):
    batches = make(drop_last=drop_last)
    sizes = [len(labels) for _, labels in batches]
    assert len(batches) == len(sizes) == count
    assert sizes[-1] == last


def test_normalisation_without_augmentation():
    images, _ = numbered()
    batches = make(shuffle=False, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    found, _ = collect(batches)
    mean = torch.tensor((0.1, 0.2, 0.3)).view(3, 1, 1)
    std = torch.tensor((0.5, 0.6, 0.7)).view(3, 1, 1)
    torch.testing.assert_close(found, (images / 255 - mean) / std)


@pytest.mark.parametrize("augment", [None, EVERYTHING, RESIZED])
@pytest.mark.parametrize("start", [0, 1, 3, 5])
def test_resume_in_the_middle_of_an_epoch_is_exact(augment, start):
    whole = list(make(augment=augment).iterate(7))
    rest = list(make(augment=augment).iterate(7, start))
    assert len(rest) == len(whole) - start
    for (images, labels), (again, labels_again) in zip(whole[start:], rest, strict=True):
        assert torch.equal(images, again)
        assert torch.equal(labels, labels_again)


@pytest.mark.parametrize("augment", [EVERYTHING, RESIZED])
def test_epochs_and_seeds_differ_in_augmentation(augment):
    def one(seed: int, epoch: int) -> Tensor:
        return collect(make(augment=augment, shuffle=False, seed=seed).iterate(epoch))[0]

    assert torch.equal(one(1, 0), one(1, 0))
    assert not torch.equal(one(1, 0), one(2, 0))
    assert not torch.equal(one(1, 0), one(1, 1))


def test_augmentation_of_a_position_does_not_depend_on_the_batch_size():
    augment = Augment(crop_padding=2, flip=True, cutout=3)
    few, _ = collect(make(batch_size=4, augment=augment))
    many, _ = collect(make(batch_size=9, augment=augment))
    assert torch.equal(few, many)


def test_global_generators_are_left_alone():
    before = torch.get_rng_state()
    collect(make(augment=EVERYTHING))
    assert torch.equal(before, torch.get_rng_state())


def test_two_parts_with_one_seed_are_shuffled_independently():
    first, second = (collect(make(indices=part))[1] for part in split(22, 0.5))
    assert set(first.tolist()) == set(range(11))
    assert set(second.tolist()) == set(range(11, 22))
    assert not torch.equal(first, second - 11)


def test_set_epoch_chooses_what_iteration_gives():
    batches = make(augment=EVERYTHING)
    batches.set_epoch(4)
    assert torch.equal(collect(batches)[0], collect(batches.iterate(4))[0])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("augment", [None, EVERYTHING])
def test_dtype_and_memory_format(augment, dtype, memory_format):
    images, labels = next(iter(make(augment=augment, dtype=dtype, memory_format=memory_format)))
    assert images.dtype == dtype
    assert labels.dtype == torch.int64
    assert images.is_contiguous(memory_format=memory_format)
    plain, _ = next(iter(make(augment=augment)))
    torch.testing.assert_close(images, plain.to(dtype), rtol=0, atol=0)


def test_crop_takes_the_window_at_its_offset():
    images, _ = numbered(n=25)
    padding = 2
    offsets = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    found = crop(images, offsets, padding)
    padded = torch.zeros(25, 3, 10, 10, dtype=torch.uint8)
    padded[:, :, 2:8, 2:8] = images
    for image, (top, left), window in zip(padded, offsets.tolist(), found, strict=True):
        assert torch.equal(window, image[:, top : top + 6, left : left + 6])


def test_crops_use_every_offset_and_no_other():
    draws = Augment(crop_padding=2).draw(2000, 6, 6, torch.Generator().manual_seed(0))
    rows, columns = draws["crop"].unbind(1)
    assert set(rows.tolist()) == set(columns.tolist()) == set(range(5))
    # The two axes are drawn apart: all 25 pairs occur.
    assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) == 25


def test_crop_pads_with_black():
    images = torch.full((400, 1, 6, 6), 255, dtype=torch.uint8)
    batches = Batches(
        images,
        torch.zeros(400, dtype=torch.int64),
        400,
        augment=Augment(crop_padding=4),
        mean=(0.5,),
        std=(0.5,),
    )
    found, _ = next(iter(batches))
    assert set(found.round(decimals=4).unique().tolist()) == {-1.0, 1.0}


def test_half_of_the_images_are_flipped_and_twice_is_the_identity():
    images, _ = numbered(n=400)
    augment = Augment(flip=True)
    draws = augment.draw(400, 6, 6, torch.Generator().manual_seed(0))
    once = augment.geometry(images, draws)
    share = draws["flip"].float().mean().item()
    assert 0.4 < share < 0.6
    assert torch.equal(once[draws["flip"]], images[draws["flip"]].flip(3))
    assert torch.equal(once[~draws["flip"]], images[~draws["flip"]])
    assert torch.equal(augment.geometry(once, draws), images)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 16])
def test_cutout_is_a_square_around_its_centre_clipped_at_the_border(side):
    size = 7
    centres = torch.cartesian_prod(torch.arange(size), torch.arange(size))
    found = cutout_(torch.ones(len(centres), 2, size, size), centres, side)
    for image, (row, column) in zip(found, centres.tolist(), strict=True):
        expected = torch.ones(2, size, size)
        top, left = row - side // 2, column - side // 2
        expected[:, max(top, 0) : top + side, max(left, 0) : left + side] = 0
        assert torch.equal(image, expected)


def test_cutout_comes_after_normalisation_with_any_pixel_as_centre():
    images = torch.full((500, 1, 4, 4), 255, dtype=torch.uint8)
    labels = torch.zeros(500, dtype=torch.int64)
    augment = Augment(cutout=1)
    batches = Batches(images, labels, 500, augment=augment, mean=(0.5,), std=(0.5,))
    found, _ = next(iter(batches))
    assert set(found.round(decimals=4).unique().tolist()) == {0.0, 1.0}
    assert (found == 0).flatten(1).sum(1).eq(1).all()
    # 500 images, 16 pixels: each is the centre about 31 times.
    hits = (found == 0).sum(0).flatten()
    assert hits.min() > 10
    assert hits.max() < 60


def test_resized_crop_of_the_whole_image_changes_nothing():
    images, _ = numbered()
    whole = Augment(resized_crop=1.0)
    boxes = torch.tensor([[0, 0, 6, 6]]).expand(len(images), 4)
    found = whole.geometry(images, {"boxes": boxes})
    torch.testing.assert_close(found, images.float(), rtol=0, atol=1e-3)


def test_resized_crop_shows_its_box():
    # A quarter of the image is bright; the box of that quarter shows nothing else.
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    images[:, :, :4, 4:] = 200
    boxes = torch.tensor([[0, 4, 4, 4], [4, 0, 4, 4]])
    found = Augment(resized_crop=0.1).geometry(images, {"boxes": boxes})
    assert found[0, 0, 1:-1, 1:-1].eq(200).all()
    assert found[1, 0, 1:-1, 1:-1].eq(0).all()


@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 50), (400, 10)])
def test_boxes_lie_inside_with_the_area_and_ratio_asked_for(height, width):
    generator = torch.Generator().manual_seed(0)
    boxes = Augment(resized_crop=0.25).draw_boxes(3000, height, width, generator)
    top, left, box_height, box_width = boxes.unbind(1)
    assert boxes.min() >= 0
    assert box_height.min() >= 1
    assert box_width.min() >= 1
    assert (top + box_height).max() <= height
    assert (left + box_width).max() <= width
    if (height, width) == (32, 32):
        share = box_height * box_width / (height * width)
        assert 0.2 < share.min() < 0.3
        assert share.max() > 0.9
        ratio = box_width / box_height
        assert 0.65 < ratio.min() < 0.8
        assert 1.25 < ratio.max() < 1.5
        assert top.max() > 0 < left.max()
    if (height, width) == (400, 10):
        # No box of a quarter of the area fits: the middle, as high as the ratio 3 / 4 allows.
        assert torch.equal(boxes.unique(dim=0), torch.tensor([[193, 0, 13, 10]]))


def test_endless_goes_from_epoch_to_epoch():
    batches = make(augment=EVERYTHING)
    endless = Endless(batches)
    taken = [next(endless) for _ in range(2 * len(batches) + 1)]
    expected = [*batches.iterate(0), *batches.iterate(1), next(batches.iterate(2))]
    for (images, labels), (again, labels_again) in zip(taken, expected, strict=True):
        assert torch.equal(images, again)
        assert torch.equal(labels, labels_again)


@pytest.mark.parametrize("taken", [0, 1, 4, 5, 12])
def test_endless_goes_on_where_it_was_saved(taken):
    endless = Endless(make(augment=EVERYTHING))
    for _ in range(taken):
        next(endless)
    state = endless.state_dict()
    resumed = Endless(make(augment=EVERYTHING))
    next(resumed)
    resumed.load_state_dict(state)
    for _ in range(7):
        (images, labels), (again, labels_again) = next(endless), next(resumed)
        assert torch.equal(images, again)
        assert torch.equal(labels, labels_again)


def test_endless_refuses_the_state_of_other_batches():
    state = Endless(make(batch_size=5)).state_dict()
    with pytest.raises(ValueError, match="5 batches an epoch, here there are 3"):
        Endless(make(batch_size=10)).load_state_dict(state)


def test_split_is_upstreams_first_and_last_part():
    first, second = split(11, 0.5)
    assert first.tolist() == [0, 1, 2, 3, 4]
    assert second.tolist() == [5, 6, 7, 8, 9, 10]
    first, second = split(11, 0.5, seed=3)
    assert torch.equal(torch.cat((first, second)).sort().values, torch.arange(11))
    assert first.tolist() != [0, 1, 2, 3, 4]
    assert torch.equal(first, split(11, 0.5, seed=3)[0])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((10, 0.0), "fraction: expected more than 0"),
        ((10, 1.0), "fraction: expected more than 0"),
        ((1, 0.5), "n: 1 positions cannot be split"),
    ],
)
def test_split_refuses_empty_parts(arguments, text):
    with pytest.raises(ValueError, match=text):
        split(*arguments)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"crop_padding": -1}, "crop_padding and cutout: expected 0 or more"),
        ({"cutout": -1}, "crop_padding and cutout: expected 0 or more"),
        ({"resized_crop": 1.5}, "resized_crop: expected a share"),
        ({"resized_crop": 0.5, "crop_padding": 4}, "exclude each other"),
        ({"color_jitter": (0.1, 0.1, 0.1)}, "color_jitter: expected"),
        ({"color_jitter": (0.1, 0.1, 0.1, 0.6)}, "hue"),
        ({"color_jitter": (float("nan"), 0.1, 0.1, 0.1)}, "color_jitter: expected"),
        ({"color_jitter": (0.1, float("inf"), 0.1, 0.1)}, "color_jitter: expected"),
        ({"resized_crop": float("nan")}, "resized_crop: expected a share"),
    ],
)
def test_augment_refuses_what_makes_no_sense(options, text):
    with pytest.raises(ValueError, match=text):
        Augment(**options)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"batch_size": 0}, ValueError, "batch_size: expected 1 or more, got 0"),
        ({"batch_size": 24, "drop_last": True}, ValueError, "drop_last leaves nothing of 23"),
        ({"indices": []}, ValueError, "indices: expected"),
        ({"indices": [0, 23]}, ValueError, "indices: expected 0 to 22, got 0 to 23"),
        ({"indices": [-1]}, ValueError, "indices: expected 0 to 22, got -1"),
        ({"indices": [0.5]}, ValueError, "indices: expected one row of integers"),
        ({"mean": (0.5,)}, ValueError, "mean and std: expected 3 numbers"),
        ({"std": (0.5, 0.5, 0.0)}, ValueError, "std: expected numbers above 0"),
        ({"dtype": torch.int64}, TypeError, "dtype: expected a floating-point dtype"),
    ],
)
def test_batches_refuse_what_makes_no_sense(options, error, text):
    with pytest.raises(error, match=text):
        make(**options)


def test_batches_refuse_other_tensors():
    images, labels = numbered()
    numbers = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(
        ValueError, match=r"images: expected uint8 \[N, C, H, W\], got torch.float32"
    ):
        Batches(images.float(), labels, 4, **numbers)
    with pytest.raises(ValueError, match=r"labels: expected int64 \[23\]"):
        Batches(images, labels[:-1], 4, **numbers)
    with pytest.raises(ValueError, match=r"labels: expected int64 \[23\]"):
        Batches(images, labels.int(), 4, **numbers)
    with pytest.raises(ValueError, match="color_jitter needs 3 channels, the images have 1"):
        make(channels=1, augment=EVERYTHING)
    with pytest.raises(ValueError, match=r"crop_padding of at most the side .* 6 x 6, got 7"):
        make(augment=Augment(crop_padding=7))
    with pytest.raises(ValueError, match="start: expected a batch number from 0 to 5, got 6"):
        make().iterate(0, 6)
