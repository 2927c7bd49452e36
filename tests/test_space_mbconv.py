# SPDX-License-Identifier: Apache-2.0
"""The MBConv space: every count that is known of it, its layers, supernet and derived networks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastnas.costs import Cost
from fastnas.nn.gates import Gate
from fastnas.spaces import (
    SPACES,
    CellGates,
    CellWeights,
    count_macs,
    count_parameters,
    get_space,
    mbconv,
)
from fastnas.spaces.mbconv.blocks import RULES
from fastnas.spaces.mbconv.layers import MBConv, init_weights
from fastnas.spaces.mbconv.layout import round_width

IMAGENET = {"image_size": 224, "in_channels": 3, "num_classes": 1000}
SMALL = {
    "width_multiplier": 0.5,
    "stem_stride": 1,
    "stage_channels": (32, 48),
    "stage_blocks": (2, 2),
    "stage_strides": (1, 2),
    "head_channels": 32,
}


def tiny(**fields):
    return mbconv.Supernet(num_classes=10, in_channels=1, **{**SMALL, **fields})


def uniform(net):
    return net.uniform_weights()


# --- counts ----------------------------------------------------------------------------------


def test_counts_of_the_imagenet_supernet():
    net = mbconv.Supernet()
    (spec,) = net.cell_specs.values()
    assert count_parameters(net) == 16_034_168
    assert spec.edges == 21
    assert [spec.candidates.count(n) for n in (6, 7)] == [6, 15]
    assert sum(spec.candidates) == 141
    assert math.prod(spec.candidates) == 6**6 * 7**15 == 221_502_229_807_900_608
    assert spec.primitives == mbconv.PRIMITIVES


def test_counts_with_the_published_width_of_stage_one():
    net = mbconv.Supernet(stage_channels=(32, 40, 80, 96, 192, 320))
    assert count_parameters(net) == 16_158_680


@pytest.mark.parametrize(
    ("name", "fixed", "least", "most"),
    [
        ("params", 1_694_984, 2_154_984, 5_103_336),
        ("macs", None, 102_528_896, 606_590_720),
    ],
)
def test_range_of_derived_networks(name, fixed, least, most):
    cost = Cost.counted(name, RULES.plan(mbconv.MBConvShape(**IMAGENET)))
    counts = mbconv.Supernet().cell_specs["block"].candidates
    rows = [row[:n] for row, n in zip(cost.values["block"].tolist(), counts, strict=True)]
    if fixed is not None:
        assert cost.fixed == fixed
    assert cost.fixed + sum(map(min, rows)) == least
    assert cost.fixed + sum(map(max, rows)) == most


@pytest.mark.parametrize(
    ("name", "parameters", "macs", "skipped"),
    [
        ("proxyless_cpu", 4_361_648, 439_243_864, 2),
        ("proxyless_gpu", 7_119_848, 465_260_160, 8),
        ("proxyless_mobile", 4_080_512, 320_427_584, 2),
        ("proxyless_mobile_14", 6_857_568, 580_883_408, 2),
    ],
)
def test_counts_of_published_networks(name, parameters, macs, skipped):
    genotype = get_space("mbconv").genotypes[name]
    net = mbconv.Network(genotype)
    assert count_parameters(net) == parameters
    assert count_macs(net, (1, 3, 224, 224)) == macs
    assert genotype.ops.count("Zero") == skipped


@pytest.mark.parametrize(
    ("name", "norms", "convolutions"),
    [
        ("proxyless_cpu", 35_088, 61),
        ("proxyless_gpu", 45_520, 43),
        ("proxyless_mobile", 34_496, 61),
        ("proxyless_mobile_14", 47_280, 61),
    ],
)
def test_parts_of_published_networks(name, norms, convolutions):
    modules = list(mbconv.Network(SPACES["mbconv"].genotypes[name]).modules())
    assert sum(isinstance(m, nn.Conv2d) for m in modules) == convolutions
    found = [m for m in modules if isinstance(m, nn.BatchNorm2d)]
    assert sum(p.numel() for m in found for p in m.parameters()) == norms
    assert {(m.eps, m.momentum) for m in found} == {(1e-3, 0.1)}


def test_mobile_ops_at_the_script_s_width():
    ops = SPACES["mbconv"].genotypes["proxyless_mobile"].ops
    genotype = mbconv.Genotype.build(mbconv.MBConvOptions().layout(3, 1000), ops)
    net = mbconv.Network(genotype)
    assert count_parameters(net) == 4_073_520
    assert count_macs(net, (1, 3, 224, 224)) == 304_227_008


def test_widths_of_published_multipliers():
    base = (32, 16, 32, 40, 80, 96, 192, 320, 1280)
    cpu = [round_width(c * 1.12) for c in (*base[:2], 24, *base[3:])]
    gpu = [round_width(c * 1.35) for c in (*base[:2], 24, *base[3:])]
    assert cpu == [40, 24, 32, 48, 88, 104, 216, 360, 1432]
    assert gpu == [40, 24, 32, 56, 112, 128, 256, 432, 1728]
    layout = mbconv.MBConvOptions(width_multiplier=1.12).layout(3, 1000)
    published = SPACES["mbconv"].genotypes["proxyless_cpu"]
    assert mbconv.Genotype.build(layout, published.ops) == published


def test_rounding_of_widths():
    assert [round_width(c) for c in (1, 8, 11.9, 12, 18.4, 89.6)] == [8, 8, 16, 16, 24, 88]


def test_the_head_shrinks_with_no_multiplier():
    assert mbconv.MBConvOptions(width_multiplier=0.5).layout(3, 10).head_channels == 1280


# --- blocks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, "proxyless_mobile"])
def test_keys_add_up_to_the_network(name):
    stage1 = (32,) if name else (24,)
    shape = mbconv.MBConvShape(**IMAGENET, stage_channels=(*stage1, 40, 80, 96, 192, 320))
    generator = torch.Generator().manual_seed(1)
    genotype = SPACES["mbconv"].genotypes[name] if name else RULES.sample(shape, generator)
    plan = RULES.plan(shape)
    keys = RULES.keys(genotype, shape)
    assert set(keys) <= set(plan.blocks)
    net = RULES.network(genotype, shape)
    assert sum(count_parameters(plan.blocks[k].build()) for k in keys) == count_parameters(net)
    shapes = {k: (1, *plan.blocks[k].input_shape) for k in keys}
    macs = {k: count_macs(plan.blocks[k].build(), shapes[k]) for k in set(keys)}
    assert sum(macs[k] for k in keys) == count_macs(net, (1, 3, 224, 224))


@pytest.mark.parametrize("size", [28, 33])
def test_blocks_map_the_shapes_they_name(size):
    shape = mbconv.MBConvShape(image_size=size, **SMALL)
    for key, block in RULES.plan(shape).blocks.items():
        with torch.no_grad():
            out = block.build().eval()(torch.zeros(1, *block.input_shape))
        wanted = key.partition("output:")[2].partition("-")[0].split("x")
        assert list(out.shape[1:]) == [int(wanted[-1]), *map(int, wanted[:-1])], key


def test_the_plan_has_the_choices_of_the_supernet():
    plan = RULES.plan(mbconv.MBConvShape(**IMAGENET))
    assert len(plan.blocks) == 4 + 11 * 6
    spec = mbconv.Supernet().cell_specs["block"]
    assert tuple(len(e.candidates) for e in plan.edges) == spec.candidates
    assert [e.candidates[-1] is None for e in plan.edges] == [n == 7 for n in spec.candidates]
    assert [e.row for e in plan.edges] == list(range(21))


def test_a_genotype_of_other_widths_has_no_keys_here():
    genotype = SPACES["mbconv"].genotypes["proxyless_gpu"]
    with pytest.raises(ValueError, match="its widths are not those of these options"):
        RULES.keys(genotype, mbconv.MBConvShape(**IMAGENET))


# --- networks --------------------------------------------------------------------------------


def test_a_path_of_the_supernet_is_the_derived_network():
    net = tiny()
    spec = net.cell_specs["block"]
    paths = [3, 2, 4, 6]
    genotype = mbconv.Genotype.build(spec.layout, [spec.primitives[k] for k in paths])
    derived = mbconv.Network(genotype)
    state = {}
    for name, value in net.state_dict().items():
        parts = name.split(".")
        if "candidate_ops" in parts:
            block, candidate = int(parts[1]), int(parts[4])
            if paths[block - 1] != candidate:
                continue
            del parts[3:5]
        state[".".join(parts)] = value
    derived.load_state_dict(state)
    x = torch.randn(3, 1, 13, 13)
    gates = {"block": CellGates(tuple(Gate(k) for k in paths))}
    torch.testing.assert_close(net(x, gates), derived(x), rtol=0, atol=0)


def test_one_hot_weights_are_a_path():
    net = tiny()
    paths = [0, 2, 5, 1]
    ops = torch.nn.functional.one_hot(torch.tensor(paths), 7).float()
    x = torch.randn(3, 1, 12, 12)
    expected = net(x, {"block": CellGates(tuple(Gate(k) for k in paths))})
    torch.testing.assert_close(net(x, {"block": CellWeights(ops)}), expected)
    doubled = net(x, {"block": CellWeights(ops / 2, torch.full((4,), 2.0))})
    torch.testing.assert_close(doubled, expected)


def test_mixed_supernet_trains_every_candidate():
    net = tiny()
    net(torch.randn(4, 1, 12, 12), uniform(net)).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_shortcuts_and_zero_stand_where_the_shape_stays():
    net = tiny()
    _, *mixed = net.blocks
    assert [b.residual for b in mixed] == [False, True, False, True]
    # A first block of stride 1 that keeps the width may be skipped too.
    same = tiny(first_channels=32)
    assert [b.residual for b in same.blocks][1:] == [True, True, False, True]
    assert same.cell_specs["block"].candidates == (7, 7, 6, 7)


def test_no_expansion_means_no_first_convolution():
    assert MBConv(8, 8, 3, 1, 1).inverted_bottleneck is None
    assert MBConv(8, 8, 3, 1, 3).inverted_bottleneck.conv.out_channels == 24
    assert MBConv(8, 8, 3, 1, 3, mid_channels=20).depth_conv.conv.groups == 20


def test_initialisation():
    conv, linear = nn.Conv2d(64, 128, 3, groups=64, bias=False), nn.Linear(400, 50)
    norm = nn.BatchNorm2d(4)
    nn.init.constant_(norm.weight, 3.0)
    init_weights(nn.Sequential(conv, linear, norm))
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 128)), rel=0.1)
    assert linear.weight.abs().max().item() <= 1 / 20
    assert linear.weight.abs().max().item() > 0.9 / 20
    assert not linear.bias.any() and (norm.weight == 1).all()


def test_networks_take_other_images():
    genotype = SPACES["mbconv"].genotypes["proxyless_gpu"]
    net = mbconv.Network(genotype, num_classes=10, in_channels=1).eval()
    assert net(torch.randn(2, 1, 28, 28)).shape == (2, 10)


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stage_blocks": (2,)}, "one number for each stage, got 2, 1 and 2"),
        ({"stage_strides": (1, 3)}, r"stage_strides\[1\] must be 1 or 2, got 3"),
        ({"stem_stride": 0}, "stem_stride must be a positive integer, got 0"),
        ({"width_multiplier": 0.0}, "width_multiplier must be a positive number"),
        ({"stage_channels": (16, -1)}, r"stage_channels\[1\] must be a positive integer, got -1"),
    ],
)
def test_options_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny(**fields)


def test_wrong_inputs_are_named():
    net = tiny()
    with pytest.raises(ValueError, match=r"wanted images \(N, 1, H, W\)"):
        net(torch.zeros(1, 3, 8, 8), uniform(net))
    x = torch.zeros(2, 1, 8, 8)
    with pytest.raises(ValueError, match="the kind 'block' is missing"):
        net(x, {})
    with pytest.raises(ValueError, match="1 gates, wanted 4"):
        net(x, {"block": CellGates((Gate(0),))})
    with pytest.raises(TypeError, match="wanted CellGates or CellWeights, got list"):
        net(x, {"block": [1]})
    with pytest.raises(ValueError, match=r"shape \(4, 6\), wanted \(4, 7\)"):
        net(x, {"block": CellWeights(torch.zeros(4, 6))})


def test_derive_takes_the_best_candidate_a_block_has():
    spec = tiny().cell_specs["block"]
    scores = torch.zeros(4, 7)
    scores[:, 6] = 9.0  # blocks 0 and 2 do not have it
    scores[0, 4] = scores[2, 1] = 1.0
    found = mbconv.derive({"block": scores}, {"block": spec})
    assert found.ops == ("7x7_MBConv3", "Zero", "3x3_MBConv6", "Zero")
    with pytest.raises(ValueError, match=r"shape \(4, 6\), wanted \(4, 7\)"):
        mbconv.derive({"block": scores[:, :6]}, {"block": spec})
    with pytest.raises(TypeError, match="wanted a ChainSpec"):
        mbconv.derive({"block": scores}, {})
