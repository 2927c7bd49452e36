# SPDX-License-Identifier: Apache-2.0
"""What ops have in common that read one source through a BatchNorm and a ReLU, or a ReLU alone.

Their kernels and references take ``(x, kind, eps, gamma, beta, running_mean, running_var, *groups,
dilations, stride)``, where a group has a weight for each output, and return ``(ys, mean, var)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnas._extension import has_kernels
from fastnas.ops import reference
from fastnas.ops._carried import make_carriers, with_outputs
from fastnas.ops._common import differentiate, memory_format
from fastnas.ops._norms import Norm, Updates, gather_norms, update_running_statistics
from fastnas.ops.reference import PLAIN, RUNNING


class SourceNorm(NamedTuple):
    """The norm before the ReLU as arguments of an op; kind ``PLAIN`` for none."""

    kind: int
    eps: float
    #: gamma, beta, running mean and running variance; None for what it has not.
    tensors: list[Tensor | None]
    updates: Updates | None

    def update(self, x: Tensor, mean: Tensor, var: Tensor) -> None:
        """Move the running statistics as calling the norm would have."""
        if self.updates:
            count = x.numel() // max(x.shape[1], 1)
            update_running_statistics(self.updates, mean.unsqueeze(0), var.unsqueeze(0), count)


def read_norm(op: str, x: Tensor, norm: Norm | None, training: bool | None) -> SourceNorm:
    """Read ``norm`` as ``BatchNorm2d.forward`` would."""
    if norm is None:
        return SourceNorm(PLAIN, 0.0, [None] * 4, None)
    n = gather_norms(op, [x], [norm], training, "norm")
    tensors = [(items[0] if items else None) for items in n[3:7]]
    return SourceNorm(n.kinds[0], n.eps[0], tensors, n.updates)


class SourceConvolutions(torch.autograd.Function):
    """Autograd of these ops; a second derivative goes through the reference.

    Its arguments are the name of the op, kind, eps, dilations, stride, how many carriers there are
    to be (``fastnas.ops._carried``; none, or one for each output; of ``separable_group`` alone), x,
    the norm's tensors and all weights.
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        """The outputs, the ``(C,)`` mean and biased variance used, empty for none, and carriers."""
        # One parameter for all: without gradients, torch.compile would take the first argument for
        # ctx where there are as many arguments as parameters.
        ctx, op, kind, eps, dilations, stride, carriers, x, gamma, beta, *arguments_left = arguments
        running_mean, running_var, *weights = arguments_left
        groups, made = _groups(weights, len(dilations)), []
        norm = kind, eps, gamma, beta, running_mean, running_var
        if not has_kernels(x.device.type):
            ys, mean, var = getattr(reference, op)(x, *norm, *groups, dilations, stride)
            made = make_carriers(ys[:carriers])
        elif op == "separable_group":
            ys, mean, var, made = torch.ops.fastnas.separable_group(
                x, *norm, *groups, dilations, stride, None, carriers > 0
            )
        else:
            ys, mean, var = getattr(torch.ops.fastnas, op)(x, *norm, *groups, dilations, stride)
        # Not the running statistics: a training step may move them before the backward.
        ctx.save_for_backward(x, mean, var, gamma, beta, *weights, *ys[:carriers])
        ctx.op, ctx.kind, ctx.eps, ctx.dilations, ctx.stride = op, kind, eps, dilations, stride
        ctx.format = memory_format(x)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        ctx.carriers = carriers
        return (*ys, mean, var, *made)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of ``x``, of the affine parameters and of the weights that ask for one."""
        x, mean, var, gamma, beta, *weights = ctx.saved_tensors
        count, first = len(ctx.dilations), len(weights) - ctx.carriers
        weights, ys = weights[:first], weights[first:]
        need_x, need_gamma, need_beta, _, _, *need_weights = ctx.needs_input_grad[6:]
        grads, numbers = grads[:count], grads[count + 2 :]
        present = [g is not None for g in grads]
        given = [g for g in grads if g is not None]
        # What has no gradient has none here either: autograd tells it from zeros.
        need_weights = [n and present[i % count] for i, n in enumerate(need_weights)]
        if not given or not any((need_x, need_gamma, need_beta, *need_weights)):
            return (None,) * len(ctx.needs_input_grad)
        op, kind, eps, tail = ctx.op, ctx.kind, ctx.eps, (ctx.dilations, ctx.stride)
        if torch.is_grad_enabled() or not has_kernels(given[0].device.type):
            affine = [] if gamma is None else [gamma, beta]
            needs = [need_x, *([need_gamma, need_beta] if affine else []), *need_weights]
            running = (mean, var) if kind == RUNNING else (None, None)

            def composite(x: Tensor, *tensors: Tensor) -> list[Tensor]:
                scale, shift = tensors[:2] if affine else (None, None)
                groups = _groups(tensors[len(affine) :], count)
                ys, *_ = getattr(reference, op)(
                    x, kind, eps, scale, shift, *running, *groups, *tail
                )
                return [y for y, p in zip(ys, present, strict=True) if p]

            dx, *more = differentiate(composite, (x, *affine, *weights), needs, given)
            dgamma, dbeta = more[:2] if affine else (None, None)
            return (None,) * 6 + (dx, dgamma, dbeta, None, None, *more[len(affine) :])
        given = [g.contiguous(memory_format=ctx.format) for g in given]
        lists: list[list[Tensor]] = []
        if op == "separable_group":
            carried = [n for n, p in zip(numbers, present, strict=False) if p]
            made = [y for y, p in zip(ys, present, strict=False) if p]
            lists = list(with_outputs(carried, made))
        dx, *dgroups, dgamma, dbeta = getattr(torch.ops.fastnas, f"{op}_backward")(
            given, present, x, mean, var, kind, eps, gamma, beta, *_groups(weights, count), *tail,
            need_x, need_gamma or need_beta, *_groups(need_weights, count), *lists,
        )[: 3 + len(weights) // count]  # fmt: skip
        items = iter([dw for group in dgroups for dw in group])
        return (
            *(None,) * 6,
            dx if need_x else None,
            dgamma.view(-1).to(gamma.dtype) if need_gamma else None,
            dbeta.view(-1).to(beta.dtype) if need_beta else None,
            None,
            None,
            *(next(items) if need else None for need in need_weights),
        )


def _groups(items: Sequence[Any], count: int) -> list[list[Any]]:
    return [list(items[i : i + count]) for i in range(0, len(items), count)]
