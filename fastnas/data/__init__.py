"""Images to search and train on: named sets, and batches made on the device.

For example::

    data = fastnas.data.load("fashion-mnist-mini").to(device)
    first, second = fastnas.data.split(data.num_train, 0.5)
    batches = data.train_batches(64, indices=first, augment=Augment(flip=True), device=device)
    for images, labels in batches.iterate(epoch=0): ...
"""

from fastnas.data.augment import Augment
from fastnas.data.batches import Batches, Endless, EpochBatches, split
from fastnas.data.images import ImageData, statistics
from fastnas.data.interface import BatchOptions, Data
from fastnas.data.pairs import from_datasets
from fastnas.data.sources import DEFAULT, load
from fastnas.data.stream import StreamedData

__all__ = [
    "DEFAULT",
    "Augment",
    "BatchOptions",
    "Batches",
    "Data",
    "Endless",
    "EpochBatches",
    "ImageData",
    "StreamedData",
    "from_datasets",
    "load",
    "split",
    "statistics",
]
