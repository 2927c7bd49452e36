# SPDX-License-Identifier: Apache-2.0
"""The mixed op of ProxylessNAS: one candidate runs, all of them learn."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _NormBase

from fastnas.nn.candidates import Zero
from fastnas.nn.gates import Gate
from fastnas.ops import gate_gradient, mixed_sum

__all__ = ["GatedMixedOp", "frozen_statistics", "run_gate"]


class GatedMixedOp(nn.Module):
    """``y = candidate_active(x)``: a mixed op with binary gates (arXiv 1812.00332, section 3.2).

    Only the active candidate runs and is stored for the backward, so an edge takes the memory of
    one path however many candidates it has. Where the gate asks for a gradient, the backward runs
    the other candidates once more, without storing anything, and forms the gradient of the logits
    (equation 4) from their outputs: ``dalpha_i = p_i (G_i - sum_j p_j G_j)`` with
    ``G_j = <dL/dy, candidate_j(x)>``. Candidates that do not run have no gradient at all (None):
    neither weight decay nor momentum moves them. Running statistics of normalisations move for the
    candidate that ran only. It need not be that x requires a gradient.

    Under DistributedDataParallel use ``find_unused_parameters=True``: which candidates run changes
    from step to step, and is the same on all ranks if they draw with the same seed.

    Args:
        candidates: modules that map ``(N, C, H, W)`` to one common shape; ``Zero`` is not called.

    Attributes:
        candidate_ops: the candidates.

    Raises:
        ValueError: there is no candidate.

    Example:
        >>> from fastnas.nn import GatedMixedOp, draw_gates
        >>> edge = GatedMixedOp([torch.nn.Conv2d(8, 8, k, padding=k // 2) for k in (1, 3, 5)])
        >>> alpha = torch.zeros(1, 3, requires_grad=True)  # of one edge
        >>> gates = draw_gates(alpha, seed=0, step=0, paths="full")
        >>> edge(torch.randn(2, 8, 6, 6), gates.edges[0]).square().mean().backward()
        >>> alpha.grad.shape
        torch.Size([1, 3])
    """

    def __init__(self, candidates: Iterable[nn.Module]) -> None:
        super().__init__()
        self.candidate_ops = nn.ModuleList(candidates)
        if len(self.candidate_ops) == 0:
            raise ValueError("GatedMixedOp: expected at least one candidate, but got none")

    def forward(
        self, x: Tensor, gate: Gate | Tensor | Sequence[Tensor | float], residual: bool = False
    ) -> Tensor:
        """Run the active candidate.

        Args:
            x: ``(N, C, H, W)``, floating point.
            gate: which candidate runs, and whose gates get a gradient. Or weights, one a
                candidate: then all of them run and the weighted sum is returned, as in DARTS.
            residual: add x to the result.

        Returns:
            ``(N, C', H', W')``.

        Raises:
            ValueError: a gate names a candidate that is not there, or another number of weights.
        """
        if isinstance(gate, Gate):
            return run_gate(self.candidate_ops, x, gate, residual)
        y = self._mix(x, gate)
        return x + y if residual else y

    def _mix(self, x: Tensor, weights: Tensor | Sequence[Tensor | float]) -> Tensor:
        """The weighted sum of all candidates; a zero candidate adds nothing."""
        if len(weights) != len(self.candidate_ops):
            raise ValueError(
                f"GatedMixedOp: expected one weight per candidate, but got "
                f"{len(self.candidate_ops)} candidates and {len(weights)} weights"
            )
        rows = zip(self.candidate_ops, weights, strict=True)
        kept = [(op, w) for op, w in rows if not isinstance(op, Zero)]
        if not kept:
            (zero,) = {op.stride for op in self.candidate_ops if isinstance(op, Zero)}
            return _zeros(x, zero)
        return mixed_sum([op(x) for op, _ in kept], [w for _, w in kept])


def run_gate(candidates: nn.ModuleList, x: Tensor, gate: Gate, residual: bool = False) -> Tensor:
    """Run the active candidate of a mixed op, whatever module holds the candidates.

    Arguments, result and errors as of ``GatedMixedOp.forward``.
    """
    for name, index in (("active", gate.active), *(("others", k) for k in gate.others)):
        if not 0 <= index < len(candidates):
            raise ValueError(
                f"GatedMixedOp: expected gate.{name} from 0 to {len(candidates) - 1}, "
                f"but got {index}"
            )
    learns = gate.logits is not None and gate.others and torch.is_grad_enabled()
    candidate = candidates[gate.active]
    zero = isinstance(candidate, Zero)
    if isinstance(candidate, Zero):
        # x + 0 is x: a block that is skipped is not even copied.
        y = x if residual else _zeros(x, candidate.stride)
        residual = False
    else:
        y = candidate(x)
    if learns:
        y = _Learn.apply(y, x, gate.logits, gate.scale, candidates, gate, zero)
    return x + y if residual else y


class _Learn(torch.autograd.Function):
    """Identity on y, whose backward finds the gradient of the gate's logits.

    y has the graph of the active path; this adds the logits beside it, so that nothing of the
    candidates' weights passes through here and hooks on them fire as always.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        logits: Tensor,
        scale: Tensor | None,
        candidates: nn.ModuleList,
        gate: Gate,
        zero: bool,
    ) -> Tensor:
        ctx.candidates, ctx.gate, ctx.zero = candidates, gate, zero
        device = x.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.save_for_backward(x, None if zero else y, logits, scale)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dlogits = None
        if ctx.needs_input_grad[2]:
            x, y, logits, scale = ctx.saved_tensors
            device, dtype, enabled = ctx.autocast
            with torch.no_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
                others = [_recompute(ctx.candidates[k], x) for k in ctx.gate.others]
            members = torch.tensor([ctx.gate.active, *ctx.gate.others], device=logits.device)
            probs = torch.softmax(logits[members], dim=0)
            share = gate_gradient(grad, [y, *others], probs)
            if scale is not None:
                share = share * scale
            dlogits = torch.zeros_like(logits).index_copy_(0, members, share.to(logits.dtype))
        dy = grad if ctx.needs_input_grad[0] else None
        return dy, None, dlogits, None, None, None, None


def _recompute(candidate: nn.Module, x: Tensor) -> Tensor | None:
    """What the candidate returns in its present mode; None for zeros."""
    if isinstance(candidate, Zero):
        return None
    with frozen_statistics(candidate):
        return candidate(x)


@contextlib.contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Within the block, normalisations in training mode leave their running statistics alone.

    They go on normalising by the statistics of the batch.
    """
    norms = [m for m in module.modules() if isinstance(m, _NormBase) and m.training]
    norms = [m for m in norms if m.track_running_stats]
    kept = [(m, m._buffers["running_mean"], m._buffers["running_var"]) for m in norms]
    for norm in norms:
        norm.track_running_stats = False
        # InstanceNorm moves what it has, whatever that says.
        norm._buffers["running_mean"] = norm._buffers["running_var"] = None
    try:
        yield
    finally:
        for norm, mean, var in kept:
            norm.track_running_stats = True
            norm._buffers["running_mean"], norm._buffers["running_var"] = mean, var


def _zeros(x: Tensor, stride: int) -> Tensor:
    """What ``Zero`` returns, in the memory of one number."""
    n, c, h, w = x.shape
    return x.new_zeros(()).expand(n, c, -(-h // stride), -(-w // stride))
