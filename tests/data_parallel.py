# SPDX-License-Identifier: Apache-2.0
"""What each process of a data-parallel test does, in a module that the processes can import."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from fastnas.nn.candidates import Zero
from fastnas.nn.gated import GatedMixedOp
from fastnas.nn.gates import draw_gates


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


class Searched(nn.Module):
    """Two gated edges and their logits in one module, so that all gradients are averaged."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1)
        self.edges = nn.ModuleList(
            GatedMixedOp([*(nn.Conv2d(3, 3, k, padding=k // 2) for k in (1, 3, 5)), Zero(1)])
            for _ in range(2)
        )
        self.alpha = nn.Parameter(torch.tensor([[0.1, 0.0, -0.1, 0.2]] * 2))

    def forward(self, x, step, paths):
        gates = draw_gates(self.alpha, 7, step, paths=paths)
        x = self.stem(x)
        self.drawn = [g.active for g in gates.edges]
        for edge, gate in zip(self.edges, gates.edges, strict=True):
            x = edge(x, gate, residual=True)
        return x


def freeze(net, paths):
    """The weights are held in an architecture step."""
    net.stem.requires_grad_(paths == "one")
    net.edges.requires_grad_(paths == "one")


STEPS = [(step, paths) for step in range(4) for paths in ("one", "full", "two")]


def search_steps(rank, path, results):
    """Weight and architecture steps on different images a rank, with the paths of each step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    try:
        torch.manual_seed(0)
        net = nn.parallel.DistributedDataParallel(Searched(), find_unused_parameters=True)
        x = torch.randn(2, 3, 3, 6, 6)[rank]
        found = []
        for step, paths in STEPS:
            net.zero_grad(set_to_none=True)
            freeze(net.module, paths)
            net(x, step, paths).square().mean().backward()
            grads = {n: p.grad for n, p in net.module.named_parameters()}
            found.append((list(net.module.drawn), grads))
        results[rank] = found
    finally:
        dist.destroy_process_group()
