# SPDX-License-Identifier: Apache-2.0
"""Every op, forward and backward, on small tensors: what the sanitizers watch.

The folder tests has to be on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import sys

import torch
from ops_calls import CALLS, SHAPE, WITHOUT_IMAGES

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
#: Rows of whole vectors, and of none; one with as many channels as make two chunks of a row.
SHAPES = (SHAPE, (2, 3, 5, 7), (2, 260, 1, 3))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    done = 0
    for name, make in CALLS.items():
        for layout in ("contiguous", "channels_last"):
            for dtype in DTYPES:
                for shape in SHAPES:
                    call = make(device, layout=layout, dtype=dtype, shape=shape)
                    call.run(call.inputs)
                    done += 1
                    if name in WITHOUT_IMAGES:
                        break
        if device == "cuda":
            torch.cuda.synchronize()
    print(f"small cases: {done} calls done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
