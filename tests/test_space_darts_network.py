# SPDX-License-Identifier: Apache-2.0
"""The derived network against the formulas; drop path, auxiliary head, sizes, export, refusals."""

from __future__ import annotations

from collections.abc import Iterator

import darts_by_name
import pytest
import torch
import torch.nn.functional as F
from darts_by_name import Keys, randomise
from torch import Tensor, nn

from fastnas.spaces.darts import GENOTYPES, Genotype, Network
from fastnas.spaces.darts.backbone import LayerPlan
from fastnas.spaces.darts.network import AuxiliaryHead, Cell, drop_path

FP64 = {"rtol": 1e-9, "atol": 1e-10}
PC = GENOTYPES["PC_DARTS_cifar"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Seeds, and one thread: on tensors this small threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", GENOTYPES)
@pytest.mark.parametrize(("stem", "size"), [("cifar", 32), ("imagenet", 224)])
def test_against_the_formulas(name: str, stem: str, size: int) -> None:
    genotype = GENOTYPES[name]
    C, layers = (4, 5) if stem == "cifar" else (2, 3)
    model = Network(genotype, C, layers, 7, auxiliary=True, stem=stem, in_channels=2).double()
    randomise(model)
    x = torch.randn(2, 2, size, size, dtype=torch.float64)
    for training in (False, True):
        model.train(training)
        sd = Keys(model.state_dict(), training)
        logits, auxiliary = darts_by_name.network(
            sd, x, genotype.normal, genotype.reduce, layers, stem, auxiliary=True
        )
        assert not sd.unread
        out = model(x)
        if training:
            torch.testing.assert_close(out[1], auxiliary, **FP64)
            out = out[0]
        torch.testing.assert_close(out, logits, **FP64)


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_nodes_of_any_number_of_inputs(stem: str) -> None:
    ops = ("sep_conv_3x3", "skip_connect", "max_pool_3x3", "dil_conv_5x5")
    cells = [
        [[(ops[(i + j + shift) % 4], j) for j in range(n)] for i, n in enumerate((1, 2, 2, 5))]
        for shift in (0, 1)
    ]
    genotype = Genotype.from_nodes(cells[0], range(2, 6), cells[1], range(2, 6))
    model = Network(genotype, 2, 3, 5, auxiliary=True, stem=stem, in_channels=1).double()
    randomise(model)
    size = 32 if stem == "cifar" else 224
    x = torch.randn(2, 1, size, size, dtype=torch.float64)
    model.train()
    sd = Keys(model.state_dict(), training=True)
    logits, auxiliary = darts_by_name.network(
        sd, x, genotype.normal, genotype.reduce, 3, stem, auxiliary=True, inputs=(1, 2, 2, 5)
    )
    assert not sd.unread
    out = model(x)
    torch.testing.assert_close(out[0], logits, **FP64)
    torch.testing.assert_close(out[1], auxiliary, **FP64)
    # It trains, with drop path on every path that is no identity.
    model.drop_path_prob = 0.5
    sum(y.square().sum() for y in model(x)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_state_dict_names() -> None:
    names = set(Network(PC, 4, 5, 10, auxiliary=True).state_dict())
    assert {
        "stem.0.weight",
        "cells.0._ops.0.op.5.weight",
        "cells.0.preprocess1.op.2.bias",
        "cells.2.preprocess0.conv_1.weight",
        "auxiliary_head.features.6.running_mean",
        "auxiliary_head.classifier.weight",
        "classifier.weight",
    } <= names
    assert names - set(Network(PC, 4, 5, 10).state_dict()) == {
        n for n in names if n.startswith("auxiliary_head.")
    }


def test_every_batch_norm_is_affine_and_pools_have_none() -> None:
    model = Network(GENOTYPES["DARTS_V1"], 4, 3, 10)
    assert all(m.affine for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    pools = [op for op in model.cells[1]._ops if isinstance(op, (nn.MaxPool2d, nn.AvgPool2d))]
    assert len(pools) == 5


@pytest.mark.parametrize(("layers", "place"), [(20, 13), (14, 9), (1, 0), (2, 1)])
def test_auxiliary_head_sees_the_second_reduction_cell_in_training_only(
    layers: int, place: int
) -> None:
    model = Network(PC, 2, layers, 10, auxiliary=True)
    seen: list[Tensor] = []
    outputs: list[Tensor] = []
    model.auxiliary_head.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    for cell in model.cells:
        cell.register_forward_hook(lambda _m, _i, out: outputs.append(out))
    x = torch.randn(2, 3, 8, 8)
    logits, auxiliary_logits = model(x)
    assert logits.shape == auxiliary_logits.shape == (2, 10)
    assert len(seen) == 1 and seen[0] is outputs[place]
    assert isinstance(model.eval()(x), Tensor)
    assert len(seen) == 1
    assert isinstance(Network(PC, 2, layers, 10)(x), Tensor)


@pytest.mark.parametrize("size", [8, 20, 28, 32, 36, 64, 96])
def test_auxiliary_head_takes_other_image_sizes(size: int) -> None:
    model = Network(PC, 2, 3, 10, auxiliary=True)
    assert model(torch.randn(2, 3, size, size + 4))[1].shape == (2, 10)


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_auxiliary_pool(stem: str) -> None:
    pool = AuxiliaryHead(4, 10, stem).features[1]
    stride = 3 if stem == "cifar" else 2
    for size in range(2, 40):
        x = torch.rand(1, 1, size, size, requires_grad=True)
        y = pool(x)
        assert y.shape == (1, 1, 2, 2)
        published = F.avg_pool2d(x, 5, stride) if size >= 5 else None
        if published is not None and published.shape == y.shape:
            assert torch.equal(y, published)
        else:
            # Elsewhere no row and no column is left out.
            (gradient,) = torch.autograd.grad(y.sum(), x)
            assert (gradient > 0).all()
    assert torch.equal(
        AuxiliaryHead(4, 10, "imagenet").features[1](torch.ones(1, 1, 7, 7)), torch.ones(1, 1, 2, 2)
    )


def test_auxiliary_head_refuses_a_single_pixel() -> None:
    model = Network(PC, 2, 3, 10, auxiliary=True)
    with pytest.raises(ValueError, match="its input is 1x1, at least 2x2 is wanted"):
        model(torch.randn(2, 3, 4, 4))
    assert model.eval()(torch.randn(2, 3, 4, 4)).shape == (2, 10)


def test_drop_path_drops_samples_and_keeps_the_mean() -> None:
    x = torch.full((4000, 2, 2, 2), 3.0)
    y = drop_path(x, 0.25)
    samples = y.flatten(1)
    assert torch.equal(samples, samples[:, :1].expand_as(samples))
    torch.testing.assert_close(samples[:, 0].unique(), torch.tensor([0.0, 4.0]))
    assert abs(float((samples[:, 0] == 0).float().mean()) - 0.25) < 0.03
    assert torch.equal(x, torch.full_like(x, 3.0))


def skipping_cell(stride: int) -> Cell:
    pairs = (("skip_connect", 0), ("sep_conv_3x3", 1)) * 2
    genotype = Genotype(pairs, (2, 3), pairs, (2, 3))
    return Cell(genotype, LayerPlan(4, 4, 4, stride == 2, False))


def test_drop_path_spares_only_the_identity() -> None:
    s0, s1 = torch.randn(2, 2, 4, 8, 8)
    almost_one = 1 - 1e-7
    cell = skipping_cell(stride=1)
    skip = cell.preprocess0(s0)
    torch.testing.assert_close(cell(s0, s1, almost_one), torch.cat([skip, skip], 1))
    # With stride 2 a skip is a FactorizedReduce, and dropped like any other operation.
    assert torch.equal(skipping_cell(stride=2)(s0, s1, almost_one), torch.zeros(2, 8, 4, 4))


def test_drop_path_prob() -> None:
    model = Network(PC, 2, 3, 10)
    assert model.drop_path_prob == 0.0
    x = torch.randn(4, 3, 8, 8)
    # Without drop path a training pass draws nothing; with it, it does, and evaluation never.
    state = torch.get_rng_state()
    plain = model(x)
    assert torch.equal(torch.get_rng_state(), state)
    model.drop_path_prob = 0.5
    assert not torch.equal(model(x), plain)
    assert not torch.equal(torch.get_rng_state(), state)
    state = torch.get_rng_state()
    model.eval()(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert Network(PC, 2, 3, 10, drop_path=0.2).drop_path_prob == 0.2
    for value in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="drop_path_prob must be at least 0 and below 1"):
            model.drop_path_prob = value


@pytest.mark.parametrize("layers", [1, 2])
def test_few_layers_are_all_reduction_cells(layers: int) -> None:
    model = Network(PC, 2, layers, 10)
    assert all(cell.reduction for cell in model.cells)
    assert model(torch.randn(2, 3, 2**layers * 2, 2**layers)).shape == (2, 10)


def test_cells_of_another_shape() -> None:
    genotype = Genotype(
        [("sep_conv_7x7", 1), ("conv_7x1_1x7", 0)] + [("avg_pool_3x3", 2), ("skip_connect", 0)] * 4,
        (6, 4),
        [("conv_7x1_1x7", 1), ("max_pool_3x3", 0)] * 2,
        (3,),
    )
    model = Network(genotype, 4, 4, 10, auxiliary=True)
    logits, auxiliary_logits = model(torch.randn(2, 3, 16, 16))
    assert logits.shape == auxiliary_logits.shape == (2, 10)
    # Width 16 times the two concatenated states of the last, normal cell.
    assert model.classifier.in_features == 32


def test_concat_keeps_its_order() -> None:
    pairs = (("skip_connect", 0), ("max_pool_3x3", 1), ("skip_connect", 2), ("max_pool_3x3", 0))
    plan = LayerPlan(4, 4, 4, False, False)
    first, second = (Cell(Genotype(pairs, c, pairs, c), plan) for c in ((2, 3), (3, 2)))
    second.load_state_dict(first.state_dict())
    s0, s1 = torch.randn(2, 2, 4, 8, 8)
    node2, node3 = first(s0, s1).chunk(2, dim=1)
    assert torch.equal(second(s0, s1), torch.cat([node3, node2], 1))
    assert not torch.equal(node2, node3)


@pytest.mark.parametrize(("stem", "size"), [("cifar", 28), ("imagenet", 32)])
def test_export(stem: str, size: int) -> None:
    model = Network(PC, 2, 3, 10, auxiliary=True, drop_path=0.2, stem=stem, in_channels=1).eval()
    x = torch.randn(2, 1, size, size)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    more = torch.randn(5, 1, size, size)
    torch.testing.assert_close(program.module()(more), model(more))


def test_errors() -> None:
    with pytest.raises(TypeError, match="genotype: wanted a Genotype, got str"):
        Network("DARTS_V1", 4, 3, 10)
    cases = [
        ({"C": 0}, "C must be a positive integer"),
        ({"layers": 0}, "layers must be a positive integer"),
        ({"num_classes": 0}, "num_classes must be a positive integer"),
        ({"in_channels": 0}, "in_channels must be a positive integer"),
        ({"drop_path": 1.0}, "drop_path_prob must be at least 0 and below 1, got 1.0"),
        ({"stem": "tiny"}, "stem must be one of cifar, imagenet, got 'tiny'"),
        ({"C": 3, "stem": "imagenet"}, "C must be even with the imagenet stem, got 3"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            Network(PC, **{"C": 4, "layers": 3, "num_classes": 10, **arguments})
    with pytest.raises(ValueError, match=r"^x: images of 30x30 .* multiples of 4"):
        Network(PC, 2, 3, 10)(torch.zeros(2, 3, 30, 30))
