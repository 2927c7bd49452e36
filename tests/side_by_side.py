# SPDX-License-Identifier: Apache-2.0
"""Run two mixed ops on the same data and compare everything a step takes from them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Relative to the largest value of each tensor; what drop-in users are promised.
RELATIVE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def randomise_statistics(op: nn.Module) -> nn.Module:
    """Running statistics as after some training: fresh ones (0 and 1) hide mistakes."""
    for module in op.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            module.num_batches_tracked.fill_(7)
    return op


def twins(ours: nn.Module, theirs: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The two with the same state; loading is strict, both ways."""
    randomise_statistics(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def observe(op: nn.Module, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """One forward and backward pass: output, all gradients, all buffers after it."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    weights = weights.detach().clone().requires_grad_()
    op.zero_grad()
    y = op(x, weights)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    y.backward(grad)
    seen = {"y": y.detach(), "grad x": x.grad, "grad weights": weights.grad}
    for name, p in op.named_parameters():
        seen[f"grad {name}"] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
    for name, buffer in op.named_buffers():
        seen[f"buffer {name}"] = buffer.clone()
    return seen


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], rtol: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, b in theirs.items():
        a = ours[name]
        assert a.shape == b.shape, f"{name}: {list(a.shape)} and {list(b.shape)}"
        assert a.dtype == b.dtype, f"{name}: {a.dtype} and {b.dtype}"
        if not b.is_floating_point():
            assert torch.equal(a, b), name
        elif b.numel():
            a, b = a.double(), b.double()
            # A gradient that is zero on paper (below the floor) is compared absolutely.
            error = float((a - b).abs().max() / b.abs().max().clamp(min=1e-2))
            assert error <= rtol, f"{name} differs by {error:.2e}"
