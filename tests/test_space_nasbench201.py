# SPDX-License-Identifier: Apache-2.0
"""The space nasbench201: genotypes, published counts, supernet and derived network, blocks."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch import nn

from fastnas.costs import Cost
from fastnas.nn.gates import Gate
from fastnas.spaces import (
    CellGates,
    CellRoles,
    CellSelection,
    CellWeights,
    count_macs,
    count_parameters,
)
from fastnas.spaces.nasbench201 import (
    GENOTYPES,
    PRIMITIVES,
    Genotype,
    NASBench201Options,
    NASBench201Shape,
    Network,
    Supernet,
    derive,
    one_hot,
)
from fastnas.spaces.nasbench201.blocks import RULES

# Records of the benchmark: index -> cell, parameters and multiply-adds of its CIFAR-10 network.
RECORDS = {
    0: (
        "|avg_pool_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+"
        "|nor_conv_1x1~0|skip_connect~1|skip_connect~2|",
        129_306,
        15_647_370,
    ),
    284: (
        "|skip_connect~0|+|skip_connect~0|skip_connect~1|+|none~0|nor_conv_1x1~1|none~2|",
        101_306,
        11_715_210,
    ),
    11: (
        "|nor_conv_3x3~0|+|nor_conv_3x3~0|avg_pool_3x3~1|+|none~0|nor_conv_3x3~1|avg_pool_3x3~2|",
        802_426,
        113_951_370,
    ),
}


def published(genotype: Genotype, classes: int, size: int = 32) -> tuple[int, int]:
    """Parameters and multiply-adds by the closed forms; the latter count the classifier's bias."""
    n1, n3 = (genotype.ops.count(f"nor_conv_{k}x{k}") for k in (1, 3))
    convolutions = 7_782_400 + 3_932_160 * n1 + 35_389_440 * n3
    return (
        72_656 + 65 * classes + 28_000 * n1 + 243_040 * n3,
        convolutions * size**2 // 32**2 + 65 * classes,
    )


@pytest.mark.parametrize("index", RECORDS)
def test_records_of_the_benchmark(index: int) -> None:
    text, parameters, macs = RECORDS[index]
    genotype = Genotype.parse(text)
    assert published(genotype, 10) == (parameters, macs)
    network = Network(genotype)
    assert count_parameters(network) == parameters
    assert count_macs(network, (1, 3, 32, 32)) == macs - 10


@pytest.mark.parametrize("name", GENOTYPES)
@pytest.mark.parametrize(("classes", "size"), [(100, 32), (120, 16)])
def test_closed_forms(name: str, classes: int, size: int) -> None:
    network = Network(GENOTYPES[name], num_classes=classes)
    parameters, macs = published(GENOTYPES[name], classes, size)
    assert count_parameters(network) == parameters
    assert count_macs(network, (1, 3, size, size)) == macs - classes


# --- genotypes -----------------------------------------------------------------------------------


def test_round_trips() -> None:
    cells = list(Genotype.all(3))
    assert len(set(cells)) == len(set(map(str, cells))) == 125
    for cell in [*cells, *GENOTYPES.values(), Genotype.parse(RECORDS[284][0])]:
        assert Genotype.parse(str(cell)) == Genotype.from_json(cell.to_json()) == cell
        assert Genotype.from_ops(cell.ops) == cell
    assert str(Genotype.parse(RECORDS[0][0])) == RECORDS[0][0]
    assert cells[0].ops == ("none",) * 3 and cells[1].ops == ("none", "none", "skip_connect")
    assert Genotype.parse(" |none~0|\n").nodes == (("none",),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "node 1 is '', wanted"),
        ("|", "node 1"),
        ("|none~0", "node 1"),
        ("|none~0|+", "node 2 is ''"),
        ("|none~0|none~1|", "one operation from each of the nodes 0 to 0"),
        ("|none~0|+|none~1|none~0|", "nodes 0 to 1, in this order"),
        ("|none~0|+|none~0|", "nodes 0 to 1"),
        ("|sep_conv_3x3~0|", "unknown operation 'sep_conv_3x3', known are none, skip_connect"),
        ("|none~00|", "from each of"),
        ("|none~0|+|none~0||none~1|", "node 2"),
        ("|__import__('os')~0|", "node 1"),
        ("|none~0|" * 2000, "more than 10000 characters"),
        ("+".join("|none~0|" for _ in range(20)), "node 2"),
    ],
)
def test_text_is_read_strictly(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Genotype.parse(text)


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match="node 2 is \\('none',\\), wanted 2 operations"):
        Genotype.from_ops(["none"] * 2)
    good = GENOTYPES["NASBench201_9930"].to_dict()
    for changes, message in (
        ({"space": "darts"}, "space is 'darts', wanted 'nasbench201'"),
        ({"version": True}, "version is True"),
        ({"version": 1.0}, "version is 1.0, wanted 1"),
        ({"more": 1}, "unknown field 'more'"),
        ({"cell": 1}, "wanted text, got int"),
    ):
        with pytest.raises(ValueError, match=message):
            Genotype.from_dict({**good, **changes})
    with pytest.raises(ValueError, match="cell is missing"):
        Genotype.from_dict({k: v for k, v in good.items() if k != "cell"})
    with pytest.raises(ValueError, match="not JSON"):
        Genotype.from_json("{")
    with pytest.raises(ValueError, match=r"nodes must be from 2 .* to 16, got 17"):
        NASBench201Options(nodes=17)


# --- networks ------------------------------------------------------------------------------------


def test_a_cell_against_its_formula() -> None:
    genotype = Genotype.parse("|nor_conv_3x3~0|+|skip_connect~0|avg_pool_3x3~1|")
    network = Network(genotype, 4, 3, 10, 1).eval()
    cell = network.cells[0]
    conv = cell._ops[0].op
    assert [type(layer) for layer in conv] == [nn.ReLU, nn.Conv2d, nn.BatchNorm2d]
    assert conv[1].bias is None and conv[2].affine
    x = torch.randn(2, 4, 8, 8)
    pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    torch.testing.assert_close(cell(x), x + pool(conv(x)))
    assert [reduction.conv_a.op[1].in_channels for reduction in network.reductions] == [4, 8]


def test_an_empty_cell_returns_zeros() -> None:
    network = Network(Genotype.from_ops(["none"] * 3), 4, 3, 10, 1)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(network.cells[0](x), torch.zeros_like(x))
    assert network(torch.randn(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(("layers", "stages"), [(3, "012"), (5, "01122"), (15, "000001111122222")])
def test_stages(layers: int, stages: str) -> None:
    network = Network(Genotype.from_ops(["nor_conv_1x1"]), 4, layers, 10, 1)
    widths = [cell._ops[0].op[1].in_channels for cell in network.cells]
    assert widths == [4 * 2 ** int(stage) for stage in stages]
    assert network(torch.randn(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("partial_channels", [1, 2])
@pytest.mark.parametrize("weigh_edges", [False, True])
def test_supernet_against_its_formula(partial_channels: int, weigh_edges: bool) -> None:
    torch.manual_seed(0)
    net = Supernet(4, 3, 10, 1, nodes=4, partial_channels=partial_channels).double()
    spec = net.cell_specs["normal"]
    assert spec.inputs_per_node == (1, 2, 3) and spec.primitives == PRIMITIVES
    ops = torch.softmax(torch.randn(6, 5, dtype=torch.float64), 1)
    edges = torch.rand(6, dtype=torch.float64) if weigh_edges else None
    cell, x = net.cells[0], torch.randn(2, 4, 8, 8, dtype=torch.float64)
    states, edge = [x], 0
    for node in range(1, 4):
        total = torch.zeros_like(x)
        for source in range(node):
            factor = 1 if edges is None else edges[edge]
            total = total + factor * cell._ops[edge](states[source], ops[edge])
            edge += 1
        states.append(total)
    torch.testing.assert_close(cell(x, CellWeights(ops, edges)), states[-1])
    conv, pool = cell._ops[0]._ops[3].op, cell._ops[0]._ops[4]
    assert conv[1].bias is not None and not conv[2].affine
    assert isinstance(pool, nn.AvgPool2d) and not pool.count_include_pad


def test_one_path_is_the_pruned_supernet() -> None:
    torch.manual_seed(0)
    net = Supernet(4, 3, 10, 1, nodes=3).eval()
    x = torch.randn(2, 1, 8, 8)
    for genotype in itertools.islice(Genotype.all(3), 3, None, 17):
        gates = CellGates(tuple(Gate(PRIMITIVES.index(op)) for op in genotype.ops))
        pruned = one_hot(genotype, net.cell_specs)
        torch.testing.assert_close(net(x, {"normal": gates}), net(x, pruned))
        assert derive({"normal": pruned["normal"].ops}, net.cell_specs) == genotype


@pytest.mark.parametrize("share", [False, True])
def test_connections_are_the_weights_that_are_not_zero(share: bool) -> None:
    torch.manual_seed(0)
    net = Supernet(4, 3, 10, 1, nodes=3, none=False, share=share).eval()
    genotype = Genotype.parse("|nor_conv_3x3~0|+|avg_pool_3x3~0|skip_connect~1|")
    x, hot = torch.randn(2, 1, 8, 8), one_hot(genotype, net.cell_specs)
    selection = CellSelection(((2,), (3,), (0,)))
    torch.testing.assert_close(net(x, {"normal": selection}), net(x, hot))


def test_the_last_cell_is_the_engine() -> None:
    torch.manual_seed(0)
    net = Supernet(4, 3, 10, 1, nodes=3, none=False, engine_cells="last").eval()
    assert net.engine_cells == (2,)
    x, uniform = torch.randn(2, 1, 8, 8), net.uniform_weights()["normal"]
    transit = CellSelection(((2,), (1,), (3,)))
    h = net.stem(x)
    for number, cell in enumerate(net.cells):
        h = net.reductions[number - 1](h) if number else h
        h = cell(h, uniform if number == 2 else transit)
    expected = net.classifier(net.lastact(h).mean((2, 3)))
    torch.testing.assert_close(net(x, {"normal": CellRoles(uniform, transit)}), expected)


def test_supernet_refuses() -> None:
    net = Supernet(4, 3, 10, 1, nodes=3)
    uniform = net.uniform_weights()
    for x, message in (
        (torch.zeros(1, 3, 8, 8), "wanted \\(N, 1, H, W\\)"),
        (torch.zeros(1, 1, 6, 8), "6x8 cannot be halved .* multiples of 4"),
    ):
        with pytest.raises(ValueError, match=message):
            net(x, uniform)
    x = torch.zeros(1, 1, 8, 8)
    for weights, error, message in (
        ({}, ValueError, "'normal' is missing"),
        ({"normal": CellWeights(torch.ones(6, 5))}, ValueError, "shape \\(6, 5\\)"),
        ({"normal": CellGates((Gate(0),))}, ValueError, "1 gates, wanted 3"),
        ({"normal": CellSelection(((1,), (1,), (1,)))}, TypeError, "wanted CellWeights, got"),
    ):
        with pytest.raises(error, match=message):
            net(x, weights)
    with pytest.raises(TypeError, match="wanted CellWeights, got CellGates"):
        Supernet(4, 3, 10, 1, nodes=3, partial_channels=2)(x, {"normal": CellGates(())})
    with pytest.raises(ValueError, match="connections: node 1 has none"):
        Supernet(4, 3, 10, 1, nodes=3, none=False)(x, {"normal": CellSelection(((), (1,), ()))})
    for options, message in (
        ({"layers": 2}, "layers must be at least 3"),
        ({"nodes": 1}, "nodes must be from 2"),
        ({"C": 6, "partial_channels": 4}, "multiple of partial_channels, got 6 and 4"),
        ({"share": True}, "none=False, got 1 and none=True"),
        ({"none": False, "engine_cells": (5,)}, "different numbers from 0 to 2"),
        ({"memory": "least"}, "memory must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            Supernet(**{"C": 4, "layers": 3, **options})


# --- derivation and blocks -----------------------------------------------------------------------


def test_derivation() -> None:
    specs = Supernet(4, 3, nodes=3).cell_specs
    scores = torch.tensor([[0.5, 0.3, 0.2, 0, 0], [0, 0.4, 0, 0.4, 0], [0, 0, 0.1, 0.2, 0.9]])
    assert derive({"normal": scores}, specs).ops == ("none", "skip_connect", "avg_pool_3x3")
    mixed = Supernet(4, 3, nodes=3, derive_none=False).cell_specs
    assert derive({"normal": scores}, mixed).ops == ("skip_connect", "skip_connect", "avg_pool_3x3")
    stay = {"normal": torch.tensor([True, False, True])}
    assert derive({"normal": scores}, mixed, stay).ops == ("skip_connect", "none", "avg_pool_3x3")
    assert derive({"normal": scores}, specs, stay).ops == ("none", "none", "avg_pool_3x3")
    several = {"normal": torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 1, 1, 0]]).bool()}
    assert derive({"normal": scores}, specs, several).ops == (
        *("skip_connect", "none", "nor_conv_3x3"),
    )
    for given, message in (
        (scores[:2], "shape \\(2, 5\\), wanted \\(3, 5\\)"),
        (scores * torch.nan, "contains NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            derive({"normal": given}, specs)
    with pytest.raises(ValueError, match="a cell of 3 nodes, but got 4"):
        one_hot(GENOTYPES["NASBench201_9930"], specs)


def test_blocks_are_what_networks_are_made_of() -> None:
    shape = NASBench201Shape(image_size=8, in_channels=1, C=4, layers=5, nodes=3)
    plan = RULES.plan(shape)
    macs, params = Cost.counted("macs", plan), Cost.counted("params", plan)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        genotype = RULES.sample(shape, generator)
        network = RULES.network(genotype, shape)
        keys = RULES.keys(genotype, shape)
        assert set(keys) <= set(plan.blocks)
        choices = {"normal": [PRIMITIVES.index(op) for op in genotype.ops]}
        assert macs.of(choices) == count_macs(network, (1, 1, 8, 8))
        assert params.of(choices) == count_parameters(network)
        built = sum(count_parameters(plan.blocks[key].build()) for key in keys)
        assert built == count_parameters(network)
        weights = one_hot(genotype, Supernet(4, 3, nodes=3).cell_specs)["normal"].ops
        assert macs.expected({"normal": weights}) == macs.of(choices)
    for key, block in plan.blocks.items():
        assert block.build()(torch.zeros(2, *block.input_shape)).shape[0] == 2, key
    with pytest.raises(ValueError, match="a cell of 3 nodes, but got 4"):
        RULES.keys(GENOTYPES["NASBench201_9930"], shape)
    with pytest.raises(ValueError, match="multiples of 4"):
        NASBench201Shape(image_size=6)
