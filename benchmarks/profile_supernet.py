# SPDX-License-Identifier: Apache-2.0
"""Where a search step in the supernet spends its time on the CPU, by PyTorch's profiler.

    python benchmarks/profile_supernet.py --partial-channels 4 --batch-size 64

prints each operator's share of the time that operators themselves take, forward and backward with
the gradients of the architecture, 16 channels and 8 cells in channels_last.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastnas.methods import METHODS, Moment
from fastnas.spaces.darts import Supernet


def main() -> None:
    """Profile one step, after two that warm up and one that is timed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--partial-channels", type=int, default=1, help="k; 1 is DARTS")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=15, help="how many operators to print")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    k = arguments.partial_channels
    network = Supernet(partial_channels=k).to(memory_format=torch.channels_last)
    method = METHODS["darts" if k == 1 else "pc_darts"](network.cell_specs)
    arch = method.parameters()
    images = torch.randn(arguments.batch_size, 3, 32, 32).to(memory_format=torch.channels_last)

    def step() -> tuple[Tensor | None, ...]:
        logits = network(images, method.weights(arch, Moment(0, 1, 0)))
        leaves = [*arch.parameters(), *network.parameters()]
        return torch.autograd.grad(logits.square().mean(), leaves, allow_unused=True)

    for _ in range(2):
        step()
    start = time.perf_counter()
    step()
    print(f"a step without the profiler: {time.perf_counter() - start:.2f} s")
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    events = sorted(profiled.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    for event in events[: arguments.rows]:
        share = event.self_cpu_time_total / total
        print(
            f"{share:6.1%} {event.self_cpu_time_total / 1e6:8.3f} s {event.count:6} x {event.key}"
        )


if __name__ == "__main__":
    main()
