# SPDX-License-Identifier: Apache-2.0
"""Which layers can be run again without side effects, and how.

Running a layer again must not move running statistics, fire hooks or read what may have changed
since, so each is turned into a function of the tensors that it held when it ran.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnas import ops
from fastnas.nn.batch_norm import has_global_hook, hook_tables
from fastnas.nn.fused import (
    NormConvolution,
    NormConvolutions,
    Rectified,
    SharedConvolutions,
    SharedPools,
)
from fastnas.nn.halves import SharedHalves, TwoHalves, picked_pixels
from fastnas.nn.pool import AVERAGE_POOLS

__all__ = ["BatchStatistics", "Packed", "Repeat", "repeat_of"]


class Repeat(NamedTuple):
    """How a layer's output is made again: by a function without side effects."""

    function: Callable[..., Any]
    #: What it takes after the layer's inputs: the tensors that the layer holds now.
    tensors: tuple[Tensor | None, ...] = ()
    #: It costs a pass over memory and no more.
    cheap: bool = False
    #: The function gives more than the layer, and the first of it is what the layer gives.
    instead: bool = False
    #: The function takes the numbers of the outputs that are wanted, and gives only these.
    selects: bool = False


class Packed:
    """A layer that brings a slice of channels together."""

    def __init__(self, format: torch.memory_format) -> None:
        """Take the memory format of the result."""
        self.format = format

    def __call__(self, x: Tensor) -> Tensor:
        """A dense tensor of the same values."""
        return x.contiguous(memory_format=self.format)


def repeat_of(layer: Callable[..., Any]) -> Repeat | None:
    """How ``layer`` is repeated; None for what may have side effects."""
    if isinstance(layer, SharedConvolutions):
        again: Any = partial(_convolutions, layer.dilations, layer.stride)
        return Repeat(again, (*layer.weights, *layer.mixing), selects=True)
    if isinstance(layer, SharedHalves):
        return Repeat(layer.product, tuple(layer.weights))
    if isinstance(layer, Rectified):
        return Repeat(ops.relu_pointwise, (layer.conv.weight,))
    if isinstance(layer, SharedPools):
        return Repeat(layer, cheap=True)
    if layer is picked_pixels:
        return Repeat(layer, cheap=True)
    if isinstance(layer, Packed):
        return Repeat(layer, cheap=True)
    if isinstance(layer, NormConvolution):
        conv, norm, mixing = layer.depthwise, layer.norm, layer.pointwise
        if not _normalises_by_batch(norm):
            return None
        again = partial(_norm_convolution, norm.eps, conv.dilation[0], conv.stride[0])
        last = None if mixing is None else mixing.weight
        return Repeat(again, (conv.weight, last, norm.weight, norm.bias))
    if isinstance(layer, NormConvolutions):
        if not all(map(_normalises_by_batch, layer.norms)):
            return None
        epsilons = [norm.eps for norm in layer.norms]
        affine = [t for norm in layer.norms for t in (norm.weight, norm.bias)]
        again = partial(_norm_convolutions, epsilons, layer.dilations, layer.stride)
        return Repeat(again, (*layer.weights, *layer.mixing, *affine), selects=True)
    if isinstance(layer, TwoHalves):
        convs = layer.convs
        if not all(isinstance(conv, nn.Conv2d) for conv in convs):
            return None
        halves = [half for half in map(repeat_of, convs) if half is not None]
        if len(halves) < len(convs):
            return None
        again = partial(_two_halves, [half.function for half in halves])
        return Repeat(again, tuple(t for half in halves for t in half.tensors))
    return _of_module(layer) if isinstance(layer, nn.Module) else None


def _of_module(layer: Any) -> Repeat | None:
    """The same for a module."""
    kind = type(layer)
    if "forward" in vars(layer) or _listens(layer):
        return None
    if kind is nn.ReLU and not layer.inplace:
        return Repeat(torch.relu, cheap=True)
    if kind is nn.Conv2d and layer.padding_mode == "zeros":
        settings = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return Repeat(partial(_convolution, settings), (layer.weight, layer.bias))
    if kind is nn.BatchNorm2d and _normalises_by_batch(layer):
        return Repeat(partial(_batch_norm, layer.eps), (layer.weight, layer.bias), cheap=True)
    if kind is nn.MaxPool2d and not layer.return_indices:
        # The indices, of eight bytes each, are what the backward keeps.
        sizes = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.ceil_mode)
        return Repeat(partial(_max_pool, sizes), cheap=True, instead=True)
    if kind in AVERAGE_POOLS:
        return Repeat(layer.forward, cheap=True)
    return None


def _normalises_by_batch(norm: nn.BatchNorm2d) -> bool:
    """Running statistics may have moved on by the time of the backward."""
    return norm.training or norm.running_mean is None or norm.running_var is None


def _listens(module: nn.Module) -> bool:
    return has_global_hook() or any(map(bool, hook_tables(module)))


def _convolutions(
    dilations: list[int], stride: int, x: Tensor, *weights: Tensor, wanted: list[int]
) -> list[Tensor]:
    count = len(dilations)
    some = [dilations[i] for i in wanted]
    depthwise = [weights[i] for i in wanted]
    mixing = [weights[count + i] for i in wanted] if len(weights) > count else []
    if mixing:
        return ops.separable_group(x, depthwise, mixing, some, stride)
    return ops.depthwise_group(x, depthwise, some, stride)


class BatchStatistics(NamedTuple):
    """A BatchNorm without running statistics: nothing is left behind in it."""

    eps: float
    weight: Tensor | None
    bias: Tensor | None
    running_mean: None = None
    running_var: None = None
    num_batches_tracked: None = None
    momentum: None = None
    training: bool = True


def _norm_convolution(
    eps: float,
    dilation: int,
    stride: int,
    x: Tensor,
    weight: Tensor,
    mixing: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    norm: Any = BatchStatistics(eps, scale, shift)
    if mixing is None:
        (y,) = ops.batch_norm_depthwise(x, norm, [weight], [dilation], stride)
    else:
        (y,) = ops.separable_group(x, [weight], [mixing], [dilation], stride, norm)
    return y


def _norm_convolutions(
    epsilons: list[float], dilations: list[int], stride: int, *tensors: Tensor, wanted: list[int]
) -> list[Tensor]:
    count = len(dilations)
    xs, weights, mixing = (tensors[i * count : (i + 1) * count] for i in range(3))
    affine = tensors[3 * count :]
    norms: list[Any] = [
        BatchStatistics(epsilons[i], affine[2 * i], affine[2 * i + 1]) for i in wanted
    ]
    some = [dilations[i] for i in wanted]
    sources, depthwise, pointwise = ([part[i] for i in wanted] for part in (xs, weights, mixing))
    return ops.separable_each(sources, depthwise, pointwise, some, norms, stride)


def _convolution(settings: tuple[Any, ...], x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, *settings)


def _two_halves(halves: list[Callable[..., Tensor]], x: Tensor, *tensors: Tensor) -> Tensor:
    first, second = halves
    return torch.cat([first(x, *tensors[:2]), second(x[:, :, 1:, 1:], *tensors[2:])], dim=1)


def _batch_norm(eps: float, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)


def _max_pool(sizes: tuple[Any, ...], x: Tensor) -> tuple[Tensor, Tensor]:
    kernel, stride, padding, dilation, ceil = sizes
    return F.max_pool2d(x, kernel, stride, padding, dilation, ceil, return_indices=True)
