# SPDX-License-Identifier: Apache-2.0
"""The weights of EnTranNAS-DST in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


def sparse_connections(
    alpha: Tensor,
    beta: Tensor,
    in_degrees: Sequence[int],
    tau: float = 1.0,
    norm: Literal["edge", "node"] = "edge",
    detach_max: bool = False,
) -> Tensor:
    """``relu(p / m - sigmoid(beta))`` of each node, normalised; p is softmax(alpha / tau)."""
    p = torch.softmax(alpha / tau, dim=-1)
    parts = p.split(list(in_degrees))
    most = torch.stack([part.max() for part in parts])
    if detach_max:
        most = most.detach()
    found = []
    for part, m, t in zip(parts, most.unbind(), torch.sigmoid(beta).unbind(), strict=True):
        q = torch.relu(part / m - t)
        total = q.sum() if norm == "node" else q.sum(dim=-1, keepdim=True)
        found.append(q / torch.where(total > 0, total, 1))
    return torch.cat(found)
