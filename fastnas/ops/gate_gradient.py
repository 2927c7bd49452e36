# SPDX-License-Identifier: Apache-2.0
"""Gradient of the gate logits of one mixed op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnas._extension import has_kernels
from fastnas.ops import reference
from fastnas.ops._common import check_candidates, differentiate


def gate_gradient(grad_output: Tensor, outputs: Sequence[Tensor | None], probs: Tensor) -> Tensor:
    """Gradient of a mixed op's gate logits, ProxylessNAS (arXiv 1812.00332) eq. 4.

    ``dalpha_i = p_i (G_i - sum_j p_j G_j)`` with ``G_j = <grad_output, outputs[j]>``. All dot
    products in one pass over ``grad_output`` and the outputs, then the closed form; the double loop
    over ``p_j (delta_ij - p_i)`` gives the same numbers.

    Args:
        grad_output: gradient of the loss in the mixed op's output, any shape.
        outputs: K outputs of that shape; None stands for a candidate whose output is zero.
        probs: ``(K,)`` probabilities; in two-path mode those of the pair, renormalised.

    Returns:
        ``(K,)`` in the dtype of ``probs``.

    Raises:
        ValueError: counts, shapes or devices that differ.
        TypeError: tensors that are not floating point.
    """
    if not grad_output.is_floating_point():
        raise TypeError(
            f"gate_gradient: expected floating-point grad_output, but got {grad_output.dtype}"
        )
    if isinstance(outputs, Tensor):
        raise TypeError("gate_gradient: expected outputs to be a list of tensors, but got a tensor")
    filled = [grad_output if o is None else o for o in outputs]
    check_candidates("gate_gradient", filled, "outputs")
    if filled[0].shape != grad_output.shape or filled[0].device != grad_output.device:
        raise ValueError(
            f"gate_gradient: expected outputs of shape {list(grad_output.shape)} on "
            f"{grad_output.device} like grad_output, but got {list(filled[0].shape)} on "
            f"{filled[0].device}"
        )
    if probs.dim() != 1 or probs.shape[0] != len(outputs):
        raise ValueError(
            f"gate_gradient: expected one probability per output, but got {len(outputs)} outputs "
            f"and probs of shape {list(probs.shape)}"
        )
    if not probs.is_floating_point():
        raise TypeError(f"gate_gradient: expected floating-point probs, but got {probs.dtype}")
    if probs.device != grad_output.device:
        raise ValueError(
            f"gate_gradient: expected probs on {grad_output.device} like grad_output, but got "
            f"{probs.device}"
        )
    present = tuple(o is not None for o in outputs)
    given = [o for o in outputs if o is not None]
    return GateGradient.apply(present, grad_output, probs, *given)


class GateGradient(torch.autograd.Function):
    """Autograd of :func:`gate_gradient`; its derivatives go through the reference."""

    @staticmethod
    def forward(
        ctx: Any, present: tuple[bool, ...], grad_output: Tensor, probs: Tensor, *outputs: Tensor
    ) -> Tensor:
        """``dalpha`` from the kernel of the device, or from the reference where there is none."""
        ctx.present = present
        ctx.save_for_backward(grad_output, probs, *outputs)
        if has_kernels(grad_output.device.type):
            return torch.ops.fastnas.gate_gradient(grad_output, outputs, probs, present)
        return _composite(present, grad_output, probs, *outputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients for second-order uses: nobody differentiates this in an ordinary search."""
        present = ctx.present
        grads = differentiate(
            lambda *t: _composite(present, *t), ctx.saved_tensors, ctx.needs_input_grad[1:], grad
        )
        return (None, *grads)


def _composite(
    present: Sequence[bool], grad_output: Tensor, probs: Tensor, *outputs: Tensor
) -> Tensor:
    items = iter(outputs)
    full = [next(items) if has else None for has in present]
    return reference.gate_gradient(grad_output, full, probs)


@torch.library.register_fake("fastnas::gate_gradient")
def _(grad_output: Tensor, outputs: list[Tensor], probs: Tensor, present: list[bool]) -> Tensor:
    return torch.empty_like(probs)
