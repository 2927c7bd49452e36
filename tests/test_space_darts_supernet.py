# SPDX-License-Identifier: Apache-2.0
"""The supernet against the formulas, its shapes, its state dict, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import darts_by_name
import pytest
import torch
from darts_by_name import Keys, randomise
from torch import Tensor

from fastnas.spaces.base import CellWeights
from fastnas.spaces.darts import Supernet
from fastnas.spaces.darts.backbone import reduction_layers

KINDS = ("normal", "reduce")
FP64 = {"rtol": 1e-9, "atol": 1e-10}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Seeds, and one thread: on tensors this small threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def random_weights(
    edges: bool, dtype: torch.dtype = torch.float64, seed: int = 0
) -> dict[str, CellWeights]:
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        values = torch.rand(shape, generator=generator, dtype=dtype)
        return values.requires_grad_()

    return {kind: CellWeights(rand(14, 8), rand(14) if edges else None) for kind in KINDS}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("k", "stem", "edges", "size", "layers"),
    [(1, "cifar", False, 8, 5), (4, "cifar", True, 8, 4), (2, "imagenet", True, 32, 3)],
)
def test_against_the_formulas(
    k: int, stem: str, edges: bool, size: int, layers: int, training: bool
) -> None:
    model = Supernet(4, layers, 7, in_channels=2, partial_channels=k, stem=stem).double()
    randomise(model)
    model.train(training)
    weights = random_weights(edges)
    leaves = [t for w in weights.values() for t in w if t is not None]
    x = torch.randn(2, 2, size, size, dtype=torch.float64)

    sd = Keys({**model.state_dict(), **dict(model.named_parameters())}, training)
    expected = darts_by_name.supernet(
        sd,
        x,
        {kind: weights[kind].ops for kind in KINDS},
        {kind: weights[kind].edges for kind in KINDS} if edges else None,
        layers,
        k,
        stem,
    )
    assert not sd.unread
    wanted = [*leaves, *model.parameters()]
    expected_grads = torch.autograd.grad(expected.square().sum(), wanted)
    out = model(x, weights)
    torch.testing.assert_close(out, expected, **FP64)
    grads = torch.autograd.grad(out.square().sum(), wanted)
    # Gradients through BatchNorms over few elements are large: measured against their own size.
    for found, right in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(
            found, right, rtol=1e-7, atol=1e-9 * float(right.abs().max() + 1)
        )


def test_state_dict_goes_both_ways() -> None:
    first, second = Supernet(4, 3), Supernet(4, 3)
    randomise(first, seed=1)
    result = second.load_state_dict(first.state_dict(), strict=True)
    assert not result.missing_keys
    x, weights = torch.randn(2, 3, 8, 8), first.uniform_weights()
    assert torch.equal(first.eval()(x, weights), second.eval()(x, weights))
    # A few published names, spelled out.
    assert {
        "stem.0.weight",
        "stem.1.running_mean",
        "cells.0.preprocess0.op.1.weight",
        "cells.2.preprocess0.conv_2.weight",
        "cells.0._ops.0._ops.1.1.running_var",
        "cells.0._ops.13._ops.4.op.6.weight",
        "cells.1._ops.0._ops.3.conv_1.weight",
        "classifier.bias",
    } <= set(first.state_dict())


def test_reduction_cells() -> None:
    expected = {
        1: (0,),
        2: (0, 1),
        3: (1, 2),
        4: (1, 2),
        5: (1, 3),
        8: (2, 5),
        14: (4, 9),
        20: (6, 13),
    }
    assert {layers: reduction_layers(layers) for layers in expected} == expected
    with torch.device("meta"):
        model = Supernet(4, 5)
    assert [cell.reduction for cell in model.cells] == [False, True, False, True, False]


def test_only_cell_norms_lack_scale_and_shift() -> None:
    model = Supernet(4, 3, stem="imagenet")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.affine == name.startswith("stem")


def test_edges_scale_the_node_sums() -> None:
    """Weights of 1 equal no weights; scaling the edges equals scaling the candidates' weights."""
    model = Supernet(4, 3).double().eval()
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    plain = random_weights(edges=False)
    factors = torch.rand(14, dtype=torch.float64)
    ones = {kind: CellWeights(w.ops, torch.ones_like(factors)) for kind, w in plain.items()}
    torch.testing.assert_close(model(x, ones), model(x, plain), **FP64)
    scaled = {kind: CellWeights(w.ops, factors) for kind, w in plain.items()}
    folded = {kind: CellWeights(w.ops * factors[:, None]) for kind, w in plain.items()}
    torch.testing.assert_close(model(x, scaled), model(x, folded), **FP64)
    assert not torch.allclose(model(x, scaled), model(x, plain))


def test_each_kind_gets_its_own_weights() -> None:
    """Normal weights must not reach the first reduction cell, nor the other way round."""
    model = Supernet(2, 6).eval()
    outputs: list[Tensor] = []
    for cell in model.cells:
        cell.register_forward_hook(lambda _m, _i, out: outputs.append(out))
    x, weights = torch.randn(1, 3, 8, 8), model.uniform_weights()

    def first_change(kind: str) -> int:
        outputs.clear()
        model(x, weights)
        model(x, {**weights, kind: CellWeights(weights[kind].ops * 1.5)})
        return next(i for i in range(6) if not torch.equal(outputs[i], outputs[6 + i]))

    assert (first_change("normal"), first_change("reduce")) == (0, 2)


def test_embedded_image_size_and_copies() -> None:
    model = Supernet(4, 3, num_classes=10, in_channels=1, partial_channels=2)
    x, weights = torch.randn(2, 1, 28, 28), model.uniform_weights()
    out = model(x, weights)
    assert out.shape == (2, 10)
    assert torch.equal(copy.deepcopy(model)(x, weights), out)
    assert {kind: w.ops.sum(1).unique().numel() for kind, w in weights.items()} == {
        "normal": 1,
        "reduce": 1,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"C": 0}, "C must be a positive integer, got 0"),
        ({"C": 4.0}, "C must be a positive integer, got 4.0"),
        ({"layers": 2}, r"layers must be at least 3, got 2: cells floor\(L/3\)"),
        ({"layers": -1}, "layers must be a positive integer"),
        ({"num_classes": 0}, "num_classes must be a positive integer"),
        ({"in_channels": 0}, "in_channels must be a positive integer"),
        ({"partial_channels": 0}, "partial_channels must be a positive integer"),
        ({"partial_channels": 3}, "C must be a multiple of partial_channels, got 4 and 3"),
        ({"stem": "mnist"}, "stem must be one of cifar, imagenet, got 'mnist'"),
        ({"C": 3, "stem": "imagenet"}, "C must be even with the imagenet stem, got 3"),
        ({"primitives": ("skip_connect", "sepconv")}, "unknown candidate 'sepconv'"),
    ],
)
def test_constructor_errors(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Supernet(**{"C": 4, "layers": 3, **arguments})


@pytest.mark.parametrize(
    ("stem", "shape", "message"),
    [
        ("cifar", (2, 3, 30, 32), "images of 30x32 .* multiples of 4"),
        ("cifar", (2, 3, 32, 27), "images of 32x27 .* multiples of 4"),
        ("cifar", (2, 3, 0, 32), "images of 0x32"),
        ("cifar", (2, 1, 32, 32), r"wanted \(N, 3, H, W\), got shape \(2, 1, 32, 32\)"),
        ("cifar", (3, 32, 32), r"wanted \(N, 3, H, W\), got shape \(3, 32, 32\)"),
        ("imagenet", (2, 3, 48, 64), "images of 48x64 .* multiples of 32"),
    ],
)
def test_image_errors(stem: str, shape: tuple[int, ...], message: str) -> None:
    with torch.device("meta"):
        model = Supernet(4, 3, stem=stem)
        with pytest.raises(ValueError, match=f"^x: {message}"):
            model(torch.empty(shape), model.uniform_weights())


def test_imagenet_stem_rounds_up() -> None:
    with torch.device("meta"):
        model = Supernet(4, 3, stem="imagenet")
        # 221 leaves 56 pixels behind stem0, as 224 does.
        assert model(torch.empty(1, 3, 221, 256), model.uniform_weights()).shape == (1, 10)


def test_weight_errors() -> None:
    model = Supernet(4, 3)
    x, good = torch.zeros(1, 3, 8, 8), model.uniform_weights()
    ops = good["normal"].ops
    cases = [
        (CellWeights(ops[:, 1:]), r"weights\['normal'\].ops: shape \(14, 7\), wanted \(14, 8\)"),
        (CellWeights(ops[1:]), r"weights\['normal'\].ops: shape \(13, 8\)"),
        (
            CellWeights(ops, torch.ones(8)),
            r"weights\['normal'\].edges: shape \(8,\), wanted \(14,\)",
        ),
    ]
    for bad, message in cases:
        with pytest.raises(ValueError, match=message):
            model(x, {**good, "normal": bad})
    with pytest.raises(TypeError, match=r"weights\['normal'\]: wanted CellWeights, got Tensor"):
        model(x, {**good, "normal": ops})
    with pytest.raises(ValueError, match="weights: the kind 'reduce' is missing"):
        model(x, {"normal": good["normal"]})
