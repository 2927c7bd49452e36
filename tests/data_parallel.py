# SPDX-License-Identifier: Apache-2.0
"""What each process of a data-parallel test does, in a module that the processes can import."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn


def train_a_step(rank, path, cls, results):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    try:
        torch.manual_seed(0)
        op = nn.parallel.DistributedDataParallel(cls(8, 2))
        x = torch.randn(2, 3, 8, 6, 6)[rank]
        weights = torch.linspace(-1, 1, 8)
        for _ in range(2):  # the second pass fails if a gradient of the first was left out
            op(x, weights).square().sum().backward()
        results[rank] = {n: p.grad for n, p in op.module.named_parameters()}
    finally:
        dist.destroy_process_group()
