# SPDX-License-Identifier: Apache-2.0
"""What the tests of gates share."""

from __future__ import annotations

import torch

ALPHA = (0.2, -0.1, 0.4)


def logits(values=ALPHA):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def rest(active, n=3):
    return [k for k in range(n) if k != active]
