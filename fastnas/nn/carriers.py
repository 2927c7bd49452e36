# SPDX-License-Identifier: Apache-2.0
"""What goes along with tensors (``fastnas.ops._carried``), and with which."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["Carriers", "can_carry", "carrying_anything", "is_large"]


class Carriers:
    """Tensors, and what came along with each (``fastnas.ops._carried``)."""

    def __init__(self) -> None:
        """Nothing yet."""
        # By identity of the tensor, which is kept, so that it stays its own.
        self._found: dict[int, tuple[Tensor, Tensor]] = {}

    def put(self, tensors: Iterable[Tensor], carriers: Iterable[Tensor]) -> None:
        """Note the carriers of the first ``tensors``; there may be none at all."""
        self._found.update(
            (id(x), (x, carrier)) for x, carrier in zip(tensors, carriers, strict=False)
        )

    def take(self, xs: Sequence[Tensor]) -> dict[int, Tensor]:
        """Those of ``xs``, by their number: there is one reader, and no second."""
        entries = {i: self._found.pop(id(x), None) for i, x in enumerate(xs)}
        return {i: entry[1] for i, entry in entries.items() if entry is not None}


#: Values from where on a tensor is large.
_CARRIED_ELEMENTS = 1 << 17


def is_large(x: Tensor) -> bool:
    """Whether ``x`` fills a core's cache: to write or read again what stays there costs nothing."""
    return x.numel() >= _CARRIED_ELEMENTS


def can_carry(training: bool) -> bool:
    """Whether statistics and gradients are wanted, and torch.compile need not know which come."""
    return training and torch.is_grad_enabled() and not torch.compiler.is_compiling()


@contextmanager
def carrying_anything() -> Iterator[None]:
    """Have every tensor be large, so that what is proved on them is what large ones get."""
    global _CARRIED_ELEMENTS
    before, _CARRIED_ELEMENTS = _CARRIED_ELEMENTS, 1
    try:
        yield
    finally:
        _CARRIED_ELEMENTS = before
