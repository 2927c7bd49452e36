# SPDX-License-Identifier: Apache-2.0
"""What a step of a supernet cannot do without: bytes through memory, and multiply-adds.

Counted is an ideal execution of the formula, forward and backward with the gradients of weights and
architecture, whose intermediate tensors do not stay in a cache:

* the depthwise convolutions that read one state are one pass over it, and so is their backward;
* pools are computed once a state;
* a BatchNorm in front of a sum is statistics and nothing more, the sum of a node one pass over all
  that enters it, backward one pass for the sums and one that writes the gradients;
* a BatchNorm inside a separable convolution is normalised on the way into the next layer;
* a pointwise convolution reads and writes its ends, backward its input and a gradient, and writes
  one.
"""

from __future__ import annotations

from fastnas.bench.machine import Work
from fastnas.bench.stock import StockSupernet
from fastnas.spaces.counting import count_macs
from fastnas.spaces.darts import Supernet
from fastnas.spaces.darts.backbone import LayerPlan, plan_layers

__all__ = ["step_work"]

_NODES, _INPUTS, _STEM = 4, 2, 3


def step_work(
    C: int, layers: int, partial_channels: int, batch_size: int, image_size: int, itemsize: int = 4
) -> Work:
    """Bytes and floating-point operations of one step, three input channels.

    Args:
        C: channels of the first cell's nodes.
        layers: number of cells.
        partial_channels: k; one in k channels is mixed.
        batch_size: images.
        image_size: their side.
        itemsize: bytes of a number.
    """
    size, image = image_size, batch_size * image_size**2 * itemsize
    # Convolution and BatchNorm of the stem.
    total = _layer(3 * image, _STEM * C * image) + _norm(_STEM * C * image)
    for plan in plan_layers(C, layers, _STEM * C, "cifar", (_NODES, _NODES)):
        area_in = batch_size * size**2 * itemsize
        if plan.reduction:
            size //= 2
        total += _cell(plan, partial_channels, area_in, batch_size * size**2 * itemsize)
    stock = StockSupernet(C, layers, partial_channels=partial_channels)
    weights = Supernet(C, layers, partial_channels=partial_channels).uniform_weights()
    macs = count_macs(stock, (1, 3, image_size, image_size), weights) * batch_size
    # Forward, gradient of the inputs, gradient of the weights.
    return Work(total, 3 * 2 * macs)


def _layer(read: int, written: int) -> int:
    """A convolution or pool: in, out; backward in, gradient in, gradient out."""
    return 3 * read + 2 * written


def _norm(size: int) -> int:
    """A BatchNorm on its own: statistics, normalisation, and two passes backward."""
    return (1 + 2) * size + (2 + 3) * size


def _cell(plan: LayerPlan, k: int, area_in: int, area: int) -> int:
    """Bytes of a cell whose inputs have ``area_in`` bytes a channel and whose nodes ``area``."""
    nodes = plan.C * area
    # Both inputs are brought to the cell's width, at the size of its inputs.
    earlier = 4 * area_in if plan.reduction_prev else area_in
    total = _layer(plan.C_prev_prev * earlier, plan.C * area_in) + _norm(plan.C * area_in)
    total += _layer(plan.C_prev * area_in, plan.C * area_in) + _norm(plan.C * area_in)
    for source in range(_INPUTS + _NODES - 1):
        edges = _NODES - max(source - 1, 0)
        halved = plan.reduction and source < _INPUTS
        total += _source(plan.C * (area_in if halved else area) // k, nodes // k, edges, halved)
        if k > 1:
            # The channels that pass by: in and out once an edge, forward and backward.
            total += 2 * edges * ((plan.C * (area_in if halved else area)) * (k - 1) // k)
    # What a node receives was counted at its sources; here it is written, its gradient read twice.
    total += _NODES * 3 * nodes
    # The nodes are joined, and the gradient taken apart.
    return total + 4 * _NODES * nodes


def _source(read: int, mixed: int, edges: int, halved: bool) -> int:
    """Bytes of what happens between a state, of ``read`` bytes, and the sums of its edges."""
    norms = 4 + halved  # of separable and dilated convolutions, and of a skip that halves
    # Depthwise convolutions: one pass over the state for all of them, forward and backward.
    total = _layer(read, 4 * edges * mixed)
    # Pointwise convolutions: two in each separable one, one in each dilated one.
    total += edges * 6 * _layer(mixed, mixed)
    # Inside a separable convolution: statistics, then BatchNorm, ReLU and convolution in one pass;
    # backward one for the sums and one for the gradient.
    total += edges * 2 * (3 + 5) * mixed
    # Two pools and the statistics of their BatchNorms, once for all edges.
    total += 2 * (_layer(read, mixed) + mixed)
    if halved:
        total += edges * _layer(read, mixed)
    # The sum: statistics; each term; backward each term again, then once more with its gradient.
    return total + edges * (norms + 7 + 7 + 2 * 7) * mixed
