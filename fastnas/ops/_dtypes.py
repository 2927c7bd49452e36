# SPDX-License-Identifier: Apache-2.0
"""The dtypes of sums and of results."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are taken in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def result_dtype(xs: Sequence[Tensor]) -> torch.dtype:
    """What ``sum(w * x for x in xs)`` has for 0-d weights, which promote nothing."""
    return functools.reduce(torch.promote_types, (x.dtype for x in xs))
