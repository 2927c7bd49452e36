# SPDX-License-Identifier: Apache-2.0
"""`sparse_connections` of DARTS' cell against the formula in PyTorch: all nodes at once, or each.

14 edges of seven operations that lead to four nodes. `torch loop` takes one node after the other,
`torch batched` pads the nodes to five edges.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from cases import Call, Case, Setting

from fastnas import ops
from fastnas.ops import reference

IN_DEGREES = (2, 3, 4, 5)
EDGES, K = sum(IN_DEGREES), 7


def loop(alpha, beta, _):
    weights = []
    for p, t in zip(torch.softmax(alpha, 1).split(IN_DEGREES), torch.sigmoid(beta), strict=True):
        q = F.relu(p / p.max() - t)
        total = q.sum(1, keepdim=True)
        weights.append(q / torch.where(total > 0, total, 1.0))
    return torch.cat(weights)


def batched(alpha, beta, place):
    p = torch.softmax(alpha, 1)
    nodes = p.new_zeros(len(IN_DEGREES) * max(IN_DEGREES), K).index_copy(0, place, p)
    nodes = nodes.view(len(IN_DEGREES), -1)
    q = F.relu(nodes / nodes.amax(1, keepdim=True) - torch.sigmoid(beta).unsqueeze(1))
    q = q.view(-1, K).index_select(0, place)
    total = q.sum(1, keepdim=True)
    return q / torch.where(total > 0, total, 1.0)


FUNCTIONS = {
    "torch loop": loop,
    "torch batched": batched,
    "fastnas": lambda alpha, beta, _: ops.sparse_connections(alpha, beta, IN_DEGREES),
    "reference": lambda alpha, beta, _: reference.sparse_connections(
        alpha, beta, IN_DEGREES, 1.0, False, False
    ),
}


def build(implementation: str, setting: Setting) -> Call:
    alpha = torch.randn(setting.shape).to(setting.device).requires_grad_()
    beta = torch.full((len(IN_DEGREES),), -1.0, device=setting.device, requires_grad=True)
    most = max(IN_DEGREES)
    rows = [j * most + e for j, degree in enumerate(IN_DEGREES) for e in range(degree)]
    place = torch.tensor(rows, device=setting.device)
    return Call(FUNCTIONS[implementation], (alpha, beta, place), (alpha, beta))


CASES = [
    Case("sparse_connections", (EDGES, K), build, images=False, stock=("torch batched",)),
]


def test_row(row, prepared, mode, form):
    row(prepared, mode, form)


def test_ratio(ratio, prepared, mode):
    ratio(prepared, mode)
