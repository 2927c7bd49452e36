# SPDX-License-Identifier: Apache-2.0
"""`sample_paths` of a ProxylessNAS network against draws by `torch.multinomial`.

21 edges, six of them (the first of each stage) with six candidates, the others with seven. All
forms end with the chosen indices on the host, where the search needs them. `torch loop` draws one
edge after the other as published; `torch batched` draws all edges in one call.
"""

from __future__ import annotations

import functools

import torch
from cases import Call, Case, Setting
from torch import Tensor

from fastnas import ops
from fastnas.ops import reference

EDGES, K = 21, 7
COUNTS = [6 if edge % 4 == 0 else 7 for edge in range(EDGES)]


def loop(logits, two):
    active, inactive, probs = [], [], []
    for edge, count in enumerate(COUNTS):
        alpha = logits[edge, :count]
        p = torch.softmax(alpha, 0)
        if not two:
            chosen = torch.multinomial(p.detach(), 1)
            active.append(chosen.item())
            inactive.append(-1)
            probs.append(torch.cat([p[chosen], p.new_zeros(1)]))
            continue
        pair = torch.multinomial(p.detach(), 2)
        p = torch.softmax(alpha[pair], 0)
        first = torch.multinomial(p.detach(), 1).item()
        order = [first, 1 - first]
        indices = pair.tolist()
        active.append(indices[order[0]])
        inactive.append(indices[order[1]])
        probs.append(p[order])
    return active, inactive, torch.stack(probs)


def batched(logits, two, dead):
    logits = logits.masked_fill(dead, -torch.inf)
    p = torch.softmax(logits, 1)
    if not two:
        active = torch.multinomial(p.detach(), 1)
        probs = torch.cat([p.gather(1, active), torch.zeros_like(p[:, :1])], 1)
        return active.squeeze(1).tolist(), [-1] * EDGES, probs
    pair = torch.multinomial(p.detach(), 2)
    p = torch.softmax(logits.gather(1, pair), 1)
    first = torch.multinomial(p.detach(), 1)
    order = torch.cat([first, 1 - first], 1)
    active, inactive = pair.gather(1, order).t().tolist()
    return active, inactive, p.gather(1, order)


def build(implementation: str, setting: Setting, two: bool) -> Call:
    logits = torch.randn(setting.shape).to(setting.device).requires_grad_()
    counts = torch.tensor(COUNTS, device=setting.device)

    def fused(logits):
        paths = ops.sample_paths(logits, 0, 0, counts, two)
        return *paths.tolist(), paths.probs

    if implementation == "fastnas":
        return Call(fused, (logits,), (logits,))
    if implementation == "torch loop":
        return Call(functools.partial(loop, two=two), (logits,), (logits,))
    dead = torch.arange(K, device=setting.device) >= counts.unsqueeze(1)
    return Call(functools.partial(batched, two=two, dead=dead), (logits,), (logits,))


def check(implementation: str, setting: Setting, drawn, two: bool) -> None:
    """Any draw is a possible one and has its probabilities; ours is the reference's."""
    torch.manual_seed(0)
    logits = torch.randn(setting.shape).to(setting.device)
    counts = torch.tensor(COUNTS, device=setting.device)
    indices: list[Tensor] = [torch.tensor(i, device=setting.device) for i in drawn[:2]]
    assert all(0 <= i < count for i, count in zip(drawn[0], COUNTS, strict=True))
    assert all((0 <= i < count) == two for i, count in zip(drawn[1], COUNTS, strict=True))
    assert all(a != b for a, b in zip(*drawn[:2], strict=True))
    expected = reference.path_probabilities(logits, counts, *indices)
    torch.testing.assert_close(drawn[2].detach(), expected)
    if implementation == "fastnas":
        twin = reference.sample_path_indices(logits, counts, 0, 0, two)
        assert [i.tolist() for i in twin] == list(drawn[:2])


CASES = [
    Case(
        "sample_paths",
        (EDGES, K),
        functools.partial(build, two=two),
        images=False,
        stock=("torch batched",),
        check=functools.partial(check, two=two),
        note="two paths" if two else "one path",
    )
    for two in (False, True)
]


def test_row(row, prepared, mode, form):
    row(prepared, mode, form)


def test_ratio(ratio, prepared, mode):
    ratio(prepared, mode)
