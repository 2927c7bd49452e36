# SPDX-License-Identifier: Apache-2.0
"""Gradient of the gate logits of one mixed op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnas._extension import has_kernels
from fastnas.ops import reference
from fastnas.ops._common import check_candidates, check_devices
from fastnas.ops._norms import spread


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
    """Autograd of :func:`gate_gradient`; its derivatives are for second-order uses."""

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        """``dalpha`` from the kernel of the device, or from the reference where there is none."""
        # One parameter for all: without gradients, torch.compile would take the first argument for
        # ctx where there are as many arguments as parameters.
        ctx, present, grad_output, probs, *outputs = arguments
        ctx.present = present
        ctx.save_for_backward(grad_output, probs, *outputs)
        if has_kernels(grad_output.device.type):
            return torch.ops.fastnas.gate_gradient(grad_output, outputs, probs, present)
        return reference.gate_gradient(grad_output, spread(present, outputs), probs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """All gradients, in operations that have derivatives themselves."""
        grad_output, probs, *outputs = ctx.saved_tensors
        _, need_g, need_p, *need_outputs = ctx.needs_input_grad
        acc = reference.accumulate_dtype(reference.result_dtype([grad_output, *outputs]))
        g, p, v = (t.to(acc) for t in (grad_output, probs, grad))
        mean = (v * p).sum()
        ddots = p * (v - mean)
        dg = torch.zeros_like(g)
        douts: list[Tensor | None] = []
        dots = []
        for ddot, o in zip(ddots.unbind(0), spread(ctx.present, outputs), strict=True):
            if o is None:
                dots.append(ddot.new_zeros(()))
                continue
            dots.append((g * o.to(acc)).sum())
            dg = dg + ddot * o.to(acc)
            douts.append((ddot * g).to(o.dtype))
        big_g = torch.stack(dots)
        dp = v * (big_g - (p * big_g).sum()) - mean * big_g
        return (
            None,
            dg.to(grad_output.dtype) if need_g else None,
            dp.to(probs.dtype) if need_p else None,
            *(d if need else None for d, need in zip(douts, need_outputs, strict=True)),
        )


@torch.library.register_fake("fastnas::gate_gradient")
def _(grad_output: Tensor, outputs: list[Tensor], probs: Tensor, present: list[bool]) -> Tensor:
    check_devices("gate_gradient", grad_output, probs, *outputs)
    return torch.empty_like(probs)
