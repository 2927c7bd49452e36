"""The options that every source of batches takes."""

from __future__ import annotations

from typing import TypedDict

import torch

from fastnas.data.augment import Augment
from fastnas.data.batches import Indices


class BatchOptions(TypedDict, total=False):
    """Keyword options of `train_batches` and `test_batches`; `fastnas.data.Batches` explains them."""

    indices: Indices | None
    augment: Augment | None
    device: torch.device | str
    seed: int
    shuffle: bool
    drop_last: bool
    dtype: torch.dtype
    memory_format: torch.memory_format
