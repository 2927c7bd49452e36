# SPDX-License-Identifier: Apache-2.0
"""Checks that sample_paths draws the same on the CPU and on the device."""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from phase import write

from fastnas import ops

EDGES, WIDTHS = 1024, (1, 2, 7, 32, 33, 64)
#: float64 sums of up to 64 exponentials, in another order on each device, and two exponentials.
MOST_EPS = 16
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SEEDS = (0, 1, (1 << 63) + 12345)
STEPS = (0, 1, 1 << 40)


def compare(device: str) -> dict[str, Any]:
    """Draws, and how many of them differ."""
    generator = torch.Generator().manual_seed(0)
    draws = different = 0
    error = 0.0
    for width, dtype in itertools.product(WIDTHS, DTYPES):
        logits = torch.randn(EDGES, width, generator=generator).mul(4).to(dtype)
        logits[::17, 0] = -torch.inf
        logits[5::19, -1] = torch.nan
        counts = torch.randint(0, width + 1, (EDGES,), generator=generator)
        there = logits.to(device)
        for seed, step, given, two in itertools.product(
            SEEDS, STEPS, (None, counts), (False, True)
        ):
            here = ops.sample_paths(logits, seed, step, given, two)
            other = ops.sample_paths(
                there, seed, step, None if given is None else given.to(device), two
            )
            differs = here.active.ne(other.active.cpu()) | here.inactive.ne(other.inactive.cpu())
            draws += EDGES
            different += int(differs.sum())
            off = (here.probs.double() - other.probs.cpu().double()).abs().max()
            error = max(error, float(off) / torch.finfo(dtype).eps)
    return {"draws": draws, "different": different, "probability_error_in_eps": error}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    found = compare(options.device)
    write(options.out, found)
    print(found)
    return 0 if found["different"] == 0 and found["probability_error_in_eps"] <= MOST_EPS else 1


if __name__ == "__main__":
    sys.exit(main())
