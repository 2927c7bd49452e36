# SPDX-License-Identifier: Apache-2.0
"""Exact parameter and operation counts of the published networks, on the meta device."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import nn

from fastnas.spaces import (
    SPACES,
    OperationCounts,
    count_macs,
    count_operations,
    count_parameters,
    get_space,
)
from fastnas.spaces.darts import GENOTYPES, Genotype, Network, Supernet, derive


@lru_cache
def supernet(**arguments: object) -> Supernet:
    with torch.device("meta"):
        return Supernet(**arguments)


@lru_cache
def network(name: str, stem: str) -> Network:
    C, layers, classes = (36, 20, 10) if stem == "cifar" else (48, 14, 1000)
    with torch.device("meta"):
        return Network(GENOTYPES[name], C, layers, classes, auxiliary=True, stem=stem)


def hundred_classes(model: Network | Supernet, parameters: int) -> int:
    """Parameters after the classifier of 10 classes is exchanged for one of 100."""
    return parameters + 90 * (model.classifier.in_features + 1)


def module_counts(modules: nn.ModuleList) -> list[int]:
    return [count_parameters(module) for module in modules]


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [
        ({}, 1_930_618),
        ({"partial_channels": 4}, 299_578),
        ({"num_classes": 100}, 1_953_748),
        ({"partial_channels": 4, "num_classes": 100}, 322_708),
        ({"partial_channels": 2, "num_classes": 1000, "stem": "imagenet"}, 956_512),
    ],
)
def test_supernet_parameters(arguments: dict[str, object], parameters: int) -> None:
    assert count_parameters(supernet(**arguments)) == parameters


def test_dropping_none_removes_no_parameters() -> None:
    model = Supernet(C=4, layers=3)
    seven = Supernet(C=4, layers=3, primitives=model.cell_specs["normal"].primitives[1:])
    assert count_parameters(seven) == count_parameters(model)


@pytest.mark.parametrize(
    ("name", "plain", "auxiliary", "cifar100"),
    [
        ("DARTS_V1", 3_169_414, 3_645_840, 3_221_344),
        ("DARTS_V2", 3_349_342, 3_825_768, 3_401_272),
        ("PC_DARTS_cifar", 3_634_678, 4_111_104, 3_686_608),
        ("PC_DARTS_image", 3_721_510, 4_197_936, 3_773_440),
    ],
)
def test_cifar_parameters(name: str, plain: int, auxiliary: int, cifar100: int) -> None:
    model = network(name, "cifar")
    assert count_parameters(model) == plain
    assert count_parameters(model, auxiliary=True) == auxiliary
    assert hundred_classes(model, plain) == cifar100
    assert count_parameters(model.auxiliary_head) == 476_426


def test_cifar100_network() -> None:
    with torch.device("meta"):
        model = Network(GENOTYPES["DARTS_V2"], 36, 20, 100)
    assert count_parameters(model) == 3_401_272


@pytest.mark.parametrize(
    ("name", "plain", "auxiliary", "macs", "with_elementwise"),
    [
        ("DARTS_V1", 4_510_432, 5_771_208, 505_864_704, 519.149),
        ("DARTS_V2", 4_718_752, 5_979_528, 529_911_552, 543.986),
        ("PC_DARTS_cifar", 5_270_560, 6_531_336, 571_137_408, 585.946),
        ("PC_DARTS_image", 5_342_464, 6_603_240, 581_627_328, 597.056),
    ],
)
def test_imagenet(
    name: str, plain: int, auxiliary: int, macs: int, with_elementwise: float
) -> None:
    model = network(name, "imagenet")
    assert count_parameters(model) == plain
    assert count_parameters(model, auxiliary=True) == auxiliary
    assert count_parameters(model.auxiliary_head) == 1_260_776
    counts = count_operations(model, (1, 3, 224, 224))
    assert counts.macs == macs
    assert round(counts.with_elementwise / 1e6, 3) == with_elementwise


@pytest.mark.parametrize(
    ("name", "conv"),
    [
        ("DARTS_V1", 500_981_760),
        ("DARTS_V2", 528_353_280),
        ("PC_DARTS_cifar", 556_664_832),
        ("PC_DARTS_image", 570_461_184),
    ],
)
def test_cifar_macs(name: str, conv: int) -> None:
    counts = count_operations(network(name, "cifar"), (1, 3, 32, 32))
    assert (counts.conv, counts.linear) == (conv, 5_760)
    assert count_macs(network(name, "cifar"), (1, 3, 32, 32)) == conv + 5_760


@pytest.mark.parametrize(("k", "conv"), [(1, 300_253_184), (4, 56_594_432)])
def test_supernet_macs(k: int, conv: int) -> None:
    model = supernet(partial_channels=k) if k > 1 else supernet()
    counts = count_operations(model, (1, 3, 32, 32), model.uniform_weights())
    assert (counts.conv, counts.linear) == (conv, 2_560)


def test_imagenet_supernet_macs() -> None:
    model = supernet(partial_channels=2, num_classes=1000, stem="imagenet")
    assert count_macs(model, (1, 3, 224, 224), model.uniform_weights()) == 144_392_832


def test_supernet_structure() -> None:
    model = supernet()
    edges = [op for cell in model.cells for op in cell._ops]
    assert len(edges) == 112
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 1395
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 929
    assert len(list(model.parameters())) == 1399
    assert [cell.reduction for cell in model.cells] == [i in (2, 5) for i in range(8)]
    assert count_parameters(model.stem) == 1_392
    assert count_parameters(model.classifier) == 2_570
    assert module_counts(model.cells) == [
        *(45_888, 46_144, 144_000, 137_856, 139_904, 484_608, 460_032, 468_224)
    ]
    assert module_counts(supernet(partial_channels=4).cells) == [
        *(8_592, 8_848, 21_408, 22_944, 24_992, 62_784, 68_928, 77_120)
    ]


def test_cell_outputs() -> None:
    model = supernet()
    shapes: list[tuple[int, ...]] = []
    hooks = [
        cell.register_forward_hook(lambda _m, _i, out: shapes.append(tuple(out.shape[1:])))
        for cell in model.cells
    ]
    x = torch.empty(2, 3, 32, 32, device="meta")
    assert model(x, model.uniform_weights()).shape == (2, 10)
    for hook in hooks:
        hook.remove()
    assert shapes == [(64, 32, 32)] * 2 + [(128, 16, 16)] * 3 + [(256, 8, 8)] * 3


@pytest.mark.parametrize(
    ("k", "stride1", "stride2"),
    [(1, (3_168, 9_408, 31_104), (10_432, 35_200)), (4, (504, 1_200, 3_168), (1_264, 3_424))],
)
def test_mixed_op_parameters(k: int, stride1: tuple[int, ...], stride2: tuple[int, ...]) -> None:
    model = supernet(partial_channels=k) if k > 1 else supernet()
    # Cells 0, 2 and 5 have 16, 32 and 64 channels; edges 0 and 13 leave an input and a node.
    assert tuple(count_parameters(model.cells[i]._ops[13]) for i in (0, 2, 5)) == stride1
    assert tuple(count_parameters(model.cells[i]._ops[0]) for i in (2, 5)) == stride2
    halved = [count_parameters(op) == stride2[0] for op in model.cells[2]._ops]
    assert halved == [j < 2 for node in range(4) for j in range(2 + node)]
    assert sum(halved) == 8


def test_darts_v2_per_module() -> None:
    cifar = network("DARTS_V2", "cifar")
    assert count_parameters(cifar.stem) == 3_132
    assert count_parameters(cifar.classifier) == 5_770
    assert module_counts(cifar.cells) == [
        *(26_532, 27_828, *[29_124] * 4, 21_024, 97_128, *[107_496] * 5),
        *(83_520, 370_512, *[411_984] * 5),
    ]
    imagenet = network("DARTS_V2", "imagenet")
    assert count_parameters(imagenet.stem0) == 11_160
    assert count_parameters(imagenet.stem1) == 20_832
    assert count_parameters(imagenet.classifier) == 769_000
    assert module_counts(imagenet.cells) == [
        *(35_952, 42_864, *[49_776] * 2, 37_248, 168_672, *[187_104] * 3),
        *(148_224, 650_688, *[724_416] * 3),
    ]


def test_counting_by_hand() -> None:
    layers = nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, groups=2),  # 6 outputs of 2 * 9 products each
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )
    counts = count_operations(layers, (2, 4, 7, 5))
    pixels = 2 * 7 * 5
    assert counts == OperationCounts(pixels * 6 * 18, 2 * 6 * 5, pixels * 6, pixels * 6)
    assert counts.with_elementwise == counts.macs + 3 * pixels * 6


def test_counting_leaves_the_module_as_it_was() -> None:
    model = Network(GENOTYPES["DARTS_V1"], 4, 3, 10)
    model.cells[1].eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    count_operations(model, (1, 3, 8, 8))
    with pytest.raises(ValueError, match="images of 9x9"):
        count_operations(model, (1, 3, 9, 9))
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
        assert tensor.device.type == "cpu"


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 3, 32, 0), (1, 3, 32, 32.0)])
def test_counting_refuses_shapes(shape: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match="input_shape: wanted four positive integers"):
        count_macs(nn.Identity(), shape)


def test_registry() -> None:
    space = get_space("darts")
    assert SPACES["darts"] is space
    assert (space.supernet, space.network, space.derive) == (Supernet, Network, derive)
    assert (space.genotype, space.genotypes) == (Genotype, GENOTYPES)
    with pytest.raises(ValueError, match="unknown name 'dart', known are darts"):
        get_space("dart")
