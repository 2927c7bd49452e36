# SPDX-License-Identifier: Apache-2.0
"""What goes along with a tensor from its maker to its reader, both ways.

Forward: statistics that are taken where it is made. A BatchNorm reads its input twice, once for
mean and variance; whoever makes the input has it at hand, piece by piece, in the cache.

Backward: gradients that are made where they are read. A mixed sum whose inputs pass a BatchNorm
has, for each of them, the gradient ``a g + b (x - centre) + c``: four numbers a channel, ``g`` the
gradient of the sum. Whoever made ``x`` reads that gradient once. Instead of writing it for every
input, the sum hands out ``g`` itself, and the four numbers apart: the maker has ``x``, and the rest
is arithmetic.

Both take the way of every tensor and its gradient. A maker returns, beside each output, a
*carrier*, ``(4, C)``, whose first two rows are mean and biased variance of that output; the other
two are zeros. The reader of the output takes the carrier as one more input, and its gradient are
the numbers. Three things must hold, for which the caller stands: the reader is the only one, it
gets both, and both have one dtype. Where no numbers arrive, as under ``create_graph``, the gradient
of the output is what it always is; and since the graph that is created then reads the inputs once
more, a reader sends numbers no more after that.

Where an output has several readers, as a pool's has, the maker returns it once for each, all in the
same memory: each with a carrier and a gradient of its own, which nobody has to add up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnas.ops import reference
from fastnas.ops.reference import accumulate_dtype

#: What the kernels are asked for an input: its gradient, or the numbers.
WRITTEN, CARRIED = 1, 2


def count_carriers(x: Tensor, outputs: int, wanted: bool) -> int:
    """How many a maker of so many outputs of ``x``'s dtype returns: one for each, or none.

    None in half precision, where a gradient that is never written is not rounded either: results
    would not be those of other ways any more.
    """
    return outputs if wanted and x.dtype == accumulate_dtype(x.dtype) else 0


def make_carriers(outputs: Sequence[Tensor]) -> list[Tensor]:
    """One for each of ``outputs`` ``(N, C, H, W)``, where no kernel has made them."""
    carriers = []
    for y in outputs:
        mean, var = reference.statistics(y)
        carriers.append(torch.stack([mean, var, torch.zeros_like(mean), torch.zeros_like(mean)]))
    return carriers


def with_outputs(
    numbers: Sequence[Tensor | None], outputs: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """``outputs`` and ``carried`` of a kernel: empty tensors where no numbers came, or no lists."""
    if all(each is None for each in numbers):
        return [], []
    none = outputs[0].new_empty(0)
    pairs = [
        (none, none) if each is None else (y, each)
        for y, each in zip(outputs, numbers, strict=True)
    ]
    return [y for y, _ in pairs], [each for _, each in pairs]
