# SPDX-License-Identifier: Apache-2.0
"""The blocks of the DARTS space: together they are the network, and each is what its key says."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastnas.costs import block_macs, block_parameters
from fastnas.nn.candidates import DARTS_PRIMITIVES
from fastnas.spaces import Block, BlockPlan, MixedEdge, count_macs, count_parameters
from fastnas.spaces.blocks import block_key
from fastnas.spaces.darts import GENOTYPES, SPACE, DartsShape, Genotype

RULES = SPACE.blocks
SHAPES = {
    "eval demo": DartsShape(),
    "cifar": DartsShape(image_size=32, in_channels=3, C=6, layers=8),
    "imagenet": DartsShape(64, 3, 7, C=4, layers=6, stem="imagenet"),
    "one layer": DartsShape(image_size=8, C=2, layers=1),
    "imagenet, one layer": DartsShape(32, 3, C=2, layers=1, stem="imagenet"),
}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def shape(request):
    return request.param


@pytest.mark.parametrize("name", GENOTYPES)
def test_blocks_of_a_network_make_up_its_parameters_and_macs(shape, name):
    plan, genotype = RULES.plan(shape), GENOTYPES[name]
    keys = RULES.keys(genotype, shape)
    network = RULES.network(genotype, shape)
    images = (1, shape.in_channels, shape.image_size, shape.image_size)
    macs = {key: block_macs(plan.blocks[key]) for key in set(keys)}
    parameters = {key: block_parameters(plan.blocks[key]) for key in set(keys)}
    assert sum(macs[key] for key in keys) == count_macs(network, images)
    assert sum(parameters[key] for key in keys) == count_parameters(network)


def test_each_block_takes_and_gives_what_its_key_says(shape):
    for key, block in RULES.plan(shape).blocks.items():
        module = block.build().eval()
        with torch.no_grad():
            y = module(torch.zeros(2, *block.input_shape))
        said = re.search(r"-input:([\dx]+)-output:([\dx]+)", key).groups()
        given = [[*s[1:], s[0]] for s in (block.input_shape, tuple(y.shape[1:]))]
        assert [list(map(int, s.split("x"))) for s in said] == given


def test_a_network_runs_the_modules_of_its_blocks():
    shape = SHAPES["cifar"]
    plan, genotype = RULES.plan(shape), GENOTYPES["PC_DARTS_cifar"]

    def convolutions(modules):
        return Counter(
            str(layer)
            for module in modules
            for layer in module.modules()
            if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.Linear))
        )

    keys = RULES.keys(genotype, shape)
    blocks = convolutions(plan.blocks[key].build() for key in keys)
    assert blocks == convolutions([RULES.network(genotype, shape)])


def test_every_cell_has_its_edges_and_cells_of_a_kind_share_them():
    plan = RULES.plan(SHAPES["cifar"])
    places = Counter((edge.kind, edge.row) for edge in plan.edges)
    assert places == {
        (kind, row): cells for kind, cells in (("normal", 6), ("reduce", 2)) for row in range(14)
    }
    for edge in plan.edges:
        assert edge.kept == 2
        assert edge.incoming == 2 + (0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3)[edge.row]
        assert edge.candidates[DARTS_PRIMITIVES.index("none")] is None


def test_an_identity_is_no_block_but_a_skip_that_reduces_is_one():
    plan = RULES.plan(SHAPES["cifar"])
    skips = {
        (edge.kind, edge.row): edge.candidates[DARTS_PRIMITIVES.index("skip_connect")]
        for edge in plan.edges
    }
    assert all(skips["normal", row] is None for row in range(14))
    from_inputs = (0, 1, 2, 3, 5, 6, 9, 10)
    for row in range(14):
        assert (skips["reduce", row] is not None) == (row in from_inputs)


def test_cells_of_other_sizes_have_other_keys():
    keys = RULES.plan(SHAPES["cifar"]).blocks
    pools = [key for key in keys if key.startswith("max_pool_3x3")]
    assert pools == [
        "max_pool_3x3-input:32x32x6-output:32x32x6-stride:1",
        "max_pool_3x3-input:32x32x12-output:16x16x12-stride:2",
        "max_pool_3x3-input:16x16x12-output:16x16x12-stride:1",
        "max_pool_3x3-input:16x16x24-output:8x8x24-stride:2",
        "max_pool_3x3-input:8x8x24-output:8x8x24-stride:1",
    ]


def test_random_architectures_are_valid_differ_and_use_everything():
    generator = torch.Generator().manual_seed(0)
    shape = SHAPES["eval demo"]
    found = [RULES.sample(shape, generator) for _ in range(40)]
    assert len(set(found)) == 40
    known = set(RULES.plan(shape).blocks)
    used = Counter()
    for genotype in found:
        used.update((op, source) for op, source in genotype.normal)
        for node in range(4):
            first, second = genotype.normal[2 * node : 2 * node + 2]
            assert first[1] != second[1]
        assert set(RULES.keys(genotype, shape)) <= known
    assert {op for op, _ in used} == set(DARTS_PRIMITIVES) - {"none"}
    assert {source for _, source in used} == set(range(5))
    again = torch.Generator().manual_seed(0)
    assert found[0] == RULES.sample(shape, again)


def test_a_genotype_of_another_form_is_refused():
    pairs = (("sep_conv_3x3", 0), ("sep_conv_3x3", 1))
    small = Genotype(pairs, (2,), pairs, (2,))
    with pytest.raises(ValueError, match=r"expected 4 nodes in the normal cell.* but got 1"):
        RULES.keys(small, DartsShape())
    published = GENOTYPES["DARTS_V2"]
    with pytest.raises(ValueError, match="all of them its output"):
        RULES.keys(replace(published, reduce_concat=(3, 4, 5)), DartsShape())
    other = replace(published, normal=(("sep_conv_7x7", 0), *published.normal[1:]))
    with pytest.raises(ValueError, match="but got 'sep_conv_7x7'"):
        RULES.keys(other, DartsShape())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 30}, "cannot be halved"),
        ({"image_size": 0}, "image_size must be a positive integer"),
        ({"in_channels": 0}, "in_channels must be"),
        ({"num_classes": True}, "num_classes must be"),
        ({"C": 0}, "C must be"),
        ({"layers": -1}, "layers must be"),
        ({"C": 3, "stem": "imagenet", "image_size": 64}, "C must be even"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DartsShape(**fields)


def test_a_plan_names_the_key_that_has_no_block():
    block = Block("a", (1, 2, 2), nn.Identity)
    with pytest.raises(ValueError, match="none for the key 'b'"):
        BlockPlan({"a": block}, (MixedEdge("chain", 0, ("a", None, "b")),), ())
    with pytest.raises(ValueError, match="none for the key 'c'"):
        BlockPlan({"a": block}, (), ("c",))
    with pytest.raises(ValueError, match="expected the key 'a', but got 'b'"):
        BlockPlan({"b": block}, (), ())


def test_block_key():
    assert block_key("mbconv", (24, 56, 48), (40, 28, 24), expand=3, skip=0) == (
        "mbconv-input:56x48x24-output:28x24x40-expand:3-skip:0"
    )
    assert block_key("classifier", (8, 7, 7), (10,)) == "classifier-input:7x7x8-output:10"
