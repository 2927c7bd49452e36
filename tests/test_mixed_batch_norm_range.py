# SPDX-License-Identifier: Apache-2.0
"""Statistics at the end of what their dtype holds: as BatchNorm's own."""

from __future__ import annotations

import ops_cases as cases
import pytest
import torch
from torch import nn

from fastnas.ops import mixed_batch_norm


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_of_half_precision_whose_batches_vary_more_than_it_holds(dtype, momentum, device):
    """What they move by is computed in float32, as in BatchNorm: a variance may not fit, yet."""
    norms = [nn.BatchNorm2d(3, momentum=momentum).to(device, dtype) for _ in range(2)]
    for step in range(3):
        x = (250 * cases.draw((4, 3, 6, 6), step) + 40).to(device, dtype)
        mixed_batch_norm([x], [1.0], norms[:1])
        norms[1](x)
        assert 70000 < x.double().var() < 120000
        for a, b in zip(norms[0].buffers(), norms[1].buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("big", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_a_variance_that_overflows_is_infinite_from_then_on(momentum, dtype, big):
    """And so nothing but the bias is left of such a channel, in training and in evaluation."""
    norm, theirs = (nn.BatchNorm2d(3, momentum=momentum).to(d) for d in (dtype, torch.float32))
    for step in range(4):
        for module in (norm, theirs):
            module.train(step < 3)
        x = cases.draw((4, 3, 6, 6), step).float() * (1e20 if step == big else 1)
        y, expected = mixed_batch_norm([x], [1.0], [norm]), theirs(x)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        assert y.eq(0).all() == (step in (big, 3))
    assert norm.running_var.isinf().all()
    torch.testing.assert_close(norm.running_mean.float(), theirs.running_mean, rtol=1e-4, atol=0)
