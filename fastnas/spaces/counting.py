# SPDX-License-Identifier: Apache-2.0
"""Parameters and multiply-accumulates of a network, counted exactly.

The literature uses two conventions. DARTS speaks of multiply-adds of convolutions and linear
layers; the published figures of PC-DARTS are met when every BatchNorm element counts twice and
every ReLU element once on top. Both are reported, see ``OperationCounts``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

__all__ = ["OperationCounts", "count_macs", "count_operations", "count_parameters"]


class OperationCounts(NamedTuple):
    """Operations of one forward pass.

    Attributes:
        conv: multiply-accumulates of all 2-D convolutions (a bias is not counted).
        linear: multiply-accumulates of all linear layers (a bias is not counted).
        batch_norm: output elements of all BatchNorm2d.
        relu: output elements of all ReLU.
    """

    conv: int
    linear: int
    batch_norm: int
    relu: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates of convolutions and linear layers."""
        return self.conv + self.linear

    @property
    def with_elementwise(self) -> int:
        """``macs`` plus two per BatchNorm element and one per ReLU element."""
        return self.macs + 2 * self.batch_norm + self.relu


def count_parameters(module: nn.Module, auxiliary: bool = False) -> int:
    """Count the elements of all parameters, shared ones once.

    Args:
        module: any module, on any device.
        auxiliary: count an ``auxiliary_head`` too. Papers leave it out, since it is dropped
            after training.
    """
    return sum(
        parameter.numel()
        for name, parameter in module.named_parameters()
        if auxiliary or "auxiliary_head" not in name.split(".")
    )


def count_macs(module: nn.Module, input_shape: Sequence[int], *arguments: object) -> int:
    """Count multiply-accumulates of convolutions and linear layers in one forward pass.

    Arguments and errors as ``count_operations``.
    """
    return count_operations(module, input_shape, *arguments).macs


def count_operations(
    module: nn.Module, input_shape: Sequence[int], *arguments: object
) -> OperationCounts:
    """Count the operations of ``module(x, *arguments)`` in evaluation mode.

    The pass runs on the meta device: shapes only, no arithmetic, and parameters, buffers and
    training modes of ``module`` stay as they are.

    Args:
        module: a network made of ``Conv2d``, ``Linear``, ``BatchNorm2d``, ``ReLU`` and anything
            that does not count.
        input_shape: ``(N, C, H, W)``; a batch of 1 gives the figures of the papers.
        arguments: further arguments of ``forward``, tensors in them are replaced by their shapes.

    Raises:
        ValueError: ``input_shape`` is not four positive integers.
    """
    if len(input_shape) != 4 or not all(isinstance(n, int) and n > 0 for n in input_shape):
        raise ValueError(
            f"input_shape: wanted four positive integers (N, C, H, W), got {tuple(input_shape)!r}"
        )
    totals = dict.fromkeys(OperationCounts._fields, 0)

    def count(layer: nn.Module, _inputs: object, output: Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            totals["conv"] += output.numel() * layer.weight[0].numel()
        elif isinstance(layer, nn.Linear):
            totals["linear"] += output.numel() * layer.in_features
        elif isinstance(layer, nn.BatchNorm2d):
            totals["batch_norm"] += output.numel()
        elif isinstance(layer, nn.ReLU):
            totals["relu"] += output.numel()

    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    shadow = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    x = torch.empty(tuple(input_shape), device="meta", dtype=_floating_dtype(module))
    arguments = tree_map_only(Tensor, lambda t: torch.empty_like(t, device="meta"), arguments)
    modes = [(layer, layer.training) for layer in module.modules()]
    with ExitStack() as stack, torch.no_grad():
        # Every module is hooked, the containers too: a fused mixed op calls a hooked candidate
        # layer by layer, and only then is each BatchNorm seen.
        for layer, _ in modes:
            stack.callback(layer.register_forward_hook(count).remove)
        stack.callback(_restore_modes, modes)
        module.eval()
        torch.func.functional_call(module, shadow, (x, *arguments))
    return OperationCounts(**totals)


def _floating_dtype(module: nn.Module) -> torch.dtype:
    for parameter in module.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    return torch.get_default_dtype()


def _restore_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for layer, training in modes:
        layer.training = training
