# SPDX-License-Identifier: Apache-2.0
"""The discretization rule: two best edges a node, best candidate on each, ties, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastnas.nn.candidates import DARTS_PRIMITIVES
from fastnas.spaces.base import CellSpec
from fastnas.spaces.darts.derive import derive
from fastnas.spaces.darts.genotype import Genotype

SPEC = CellSpec((2, 3, 4, 5), DARTS_PRIMITIVES)
SPECS = {"normal": SPEC, "reduce": SPEC}
NONE, SKIP, SEP3, DIL5 = 0, 3, 4, 7
OFFSETS = (0, 2, 5, 9)


def derive_from(normal: Tensor, reduce: Tensor | None = None) -> Genotype:
    return derive({"normal": normal, "reduce": normal if reduce is None else reduce}, SPECS)


def node(genotype: Genotype, index: int) -> tuple[tuple[str, int], ...]:
    return genotype.normal[2 * index : 2 * index + 2]


def test_spec() -> None:
    assert SPEC.edges == 14
    assert [(s.start, s.stop) for s in SPEC.node_slices] == [(0, 2), (2, 5), (5, 9), (9, 14)]


def test_zero_alpha() -> None:
    genotype = derive_from(torch.zeros(14, 8).softmax(-1))
    assert genotype.normal == genotype.reduce == (("max_pool_3x3", 0), ("max_pool_3x3", 1)) * 4
    assert genotype.normal_concat == genotype.reduce_concat == (2, 3, 4, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pairs_come_in_order_of_decreasing_score(dtype: torch.dtype) -> None:
    alpha = torch.zeros(14, 8, dtype=dtype)
    alpha[OFFSETS[2] + 3, SEP3] = 2.0
    alpha[OFFSETS[2] + 1, DIL5] = 1.0
    alpha[OFFSETS[2] + 0, SKIP] = 0.5
    assert node(derive_from(alpha), 2) == (("sep_conv_3x3", 3), ("dil_conv_5x5", 1))


def test_ties_go_to_the_lower_source_and_the_lower_candidate() -> None:
    alpha = torch.zeros(14, 8)
    alpha[OFFSETS[3] : OFFSETS[3] + 5, SKIP] = 1.0
    alpha[OFFSETS[3] : OFFSETS[3] + 5, SEP3] = 1.0
    alpha[OFFSETS[3], :] = 0.0
    assert node(derive_from(alpha), 3) == (("skip_connect", 1), ("skip_connect", 2))


def test_negative_scores() -> None:
    scores = torch.full((14, 8), -5.0)
    scores[OFFSETS[1] + 2, SEP3] = -1.0
    assert node(derive_from(scores), 1) == (("sep_conv_3x3", 2), ("max_pool_3x3", 0))


def test_none_is_never_taken_but_costs_its_edge() -> None:
    alpha = torch.zeros(14, 8)
    rows = slice(OFFSETS[1], OFFSETS[1] + 3)
    alpha[rows, SEP3] = torch.tensor([3.0, 2.0, 1.0])
    before = derive_from(alpha.softmax(-1))
    assert node(before, 1) == (("sep_conv_3x3", 0), ("sep_conv_3x3", 1))
    # The op stays the best of its edge; the edge loses, because the softmax includes none.
    alpha[OFFSETS[1], NONE] = 9.0
    after = derive_from(alpha.softmax(-1))
    assert node(after, 1) == (("sep_conv_3x3", 1), ("sep_conv_3x3", 2))
    assert node(derive_from(alpha), 1) == node(before, 1)


def test_edge_weights_change_edges_and_never_operations() -> None:
    torch.manual_seed(0)
    scores = torch.rand(14, 8)
    beta = torch.cat([torch.rand(n).softmax(0) for n in (2, 3, 4, 5)])
    plain, scaled = derive_from(scores), derive_from(scores * beta[:, None])
    best = [DARTS_PRIMITIVES[1 + int(k)] for k in scores[:, 1:].argmax(1)]
    for genotype in (plain, scaled):
        for position, (op, source) in enumerate(genotype.normal):
            assert op == best[OFFSETS[position // 2] + source]
    assert plain != scaled


def test_against_a_slow_statement_of_the_rule() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        # Few distinct values, so that ties are everywhere.
        cells = [torch.randint(0, 4, (14, 8), generator=generator) / 4 for _ in range(2)]
        genotype = derive_from(*cells)
        for cell, pairs in zip(cells, (genotype.normal, genotype.reduce), strict=True):
            for i, offset in enumerate(OFFSETS):
                rivals = [
                    (-float(cell[offset + j, 1:].max()), j, int(cell[offset + j, 1:].argmax()))
                    for j in range(2 + i)
                ]
                expected = [(DARTS_PRIMITIVES[k + 1], j) for _, j, k in sorted(rivals)[:2]]
                assert list(pairs[2 * i : 2 * i + 2]) == expected


def test_candidates_without_none() -> None:
    spec = CellSpec((2, 3, 4, 5), DARTS_PRIMITIVES[1:])
    scores = torch.zeros(14, 7)
    scores[:, 0] = 1.0
    genotype = derive({"normal": scores, "reduce": scores}, {"normal": spec, "reduce": spec})
    assert genotype.normal[0] == ("max_pool_3x3", 0)


def test_errors() -> None:
    good = torch.zeros(14, 8)
    with pytest.raises(ValueError, match=r"scores\['reduce'\]: shape \(14, 7\), wanted \(14, 8\)"):
        derive_from(good, good[:, 1:])
    with pytest.raises(ValueError, match=r"scores\['normal'\]: contains NaN"):
        derive_from(good.index_fill(0, torch.tensor([3]), float("nan")), good)
    with pytest.raises(ValueError, match="scores: the kind 'reduce' is missing"):
        derive({"normal": good}, SPECS)
    with pytest.raises(ValueError, match="specs: the kind 'normal' is missing"):
        derive({"normal": good, "reduce": good}, {"reduce": SPEC})
