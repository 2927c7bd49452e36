# SPDX-License-Identifier: Apache-2.0
"""Statistics that are taken where a tensor is made are those of the tensor."""

from __future__ import annotations

import importlib

import ops_cases as cases
import pytest
import torch
from ops_cases import raises
from torch import nn

from fastnas import MixedOp
from fastnas.nn import carriers as carriers_file
from fastnas.ops._carried import make_carriers
from fastnas.ops.pool_pair import run_pool_pair
from fastnas.ops.separable_each import run_separable_each
from fastnas.ops.separable_group import run_separable_group
from fastnas.spaces.base import CellWeights
from fastnas.spaces.darts import Supernet

F64 = torch.float64


def assert_statistics(carriers, outputs):
    assert len(carriers) == len(outputs)
    for y, carrier in zip(outputs, carriers, strict=True):
        tolerance = 1e-12 if y.dtype == F64 else 3e-6
        # In double: of float32, the statistics are closer to the truth than PyTorch's.
        var, mean = torch.var_mean(y.detach().double(), (0, 2, 3), correction=0)
        assert carrier.shape == (4, y.shape[1]) and carrier.dtype == y.dtype
        off = (carrier[0].double() - mean).abs() / (var.sqrt() + mean.abs())
        assert off.max() <= tolerance, ("mean", off.max())
        off = (carrier[1].double() - var).abs() / var.clamp_min(1e-300)
        assert (off <= tolerance).logical_or(var == 0).all(), ("var", off.max())
        assert not carrier[2:].any()


def convolve(x, stride=1, scale=1.0):
    """Outputs of two convolutions and of one more behind a norm, and their carriers."""
    channels = x.shape[1]
    depthwise = [cases.make((channels, 1, k, k), x.dtype, seed=k) for k in (3, 5)]
    pointwise = [
        scale * cases.make((channels, channels, 1, 1), x.dtype, seed=k).requires_grad_()
        for k in (6, 7)
    ]
    ys, given = run_separable_group(x, depthwise, pointwise, [1, 2], stride, carry=True)
    norms = [nn.BatchNorm2d(channels, eps=1e-2, dtype=x.dtype) for _ in range(2)]
    weights = depthwise, pointwise, [1, 2], norms, stride
    zs, made = run_separable_each(ys, *weights, given=given, carry=True)
    return [*ys, *zs], [*given, *made]


def pool(x, stride=1):
    """Both outputs and their carriers."""
    outputs, carriers = run_pool_pair(x, stride, 1)
    return [y for (y,) in outputs], [c for (c,) in carriers]


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=cases.ids)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("images", [1, 3, 17])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 8, 16, 20, 48])
def test_convolutions_and_pools(channels, images, layout, dtype):
    """Channels that share a vector with those of others, fill vectors up, and make several."""
    x = cases.make((images, channels, 6, 7), dtype, layout)
    outputs, carriers = convolve(x)
    assert_statistics(carriers, outputs)
    for stride in (1, 2):
        outputs, carriers = pool(x, stride)
        assert_statistics(carriers, outputs)


@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize("size, stride", [((70, 66), 1), ((9, 3), 2), ((1, 1), 1), ((90, 90), 2)])
def test_images_of_other_sizes(size, stride, channels):
    """Large ones are cut in pieces, of which the last is small."""
    x = cases.make((2, channels, *size), F64, "channels_last")
    assert_statistics(*reversed(convolve(x, stride)))
    assert_statistics(*reversed(pool(x, stride)))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nothing_cancels(layout):
    """Values whose square leaves nothing of their variance, and a first piece unlike others."""
    x = cases.make((4, 16, 40, 40), torch.float32, layout) + 1000
    assert_statistics(*reversed(pool(x)))
    x[:, :, :8] += 3000
    assert_statistics(*reversed(pool(x)))
    one = torch.ones(16, 1, 1, 1)
    ys, carriers = run_separable_group(x, [one], [torch.eye(16)[..., None, None]], [1], carry=True)
    assert torch.equal(ys[0], x)
    assert_statistics(carriers, ys)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value):
    x = torch.rand(2, 3, 4, 4)
    x[1, 1, 2, 2] = value
    outputs, carriers = pool(x)
    for y, carrier in zip(outputs, carriers, strict=True):
        var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
        for mine, theirs in ((carrier[0], mean), (carrier[1], var)):
            assert mine.isfinite().tolist() == theirs.isfinite().tolist() == [True, False, True]


def test_the_number_of_threads_does_not_matter():
    x, before, found = cases.make((9, 16, 30, 31), torch.float32), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append([*convolve(x)[1], *pool(x)[1]])
        finally:
            torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_without_kernels():
    ys = [cases.make((2, 3, 4, 5), dtype) for dtype in (F64, torch.float32)]
    assert_statistics(make_carriers(ys), ys)


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_readers_take_the_statistics_they_are_given(kind):
    """Of a norm in training alone; nothing is measured again."""
    x, one = cases.make((2, 3, 4, 5), F64), torch.ones(1, dtype=F64)
    carrier = torch.rand(4, 3, dtype=F64) + 1
    running = ([carrier[2]], [carrier[3]]) if kind == 2 else ([], [])
    op = torch.ops.fastnas.mixed_batch_norm
    y, mean, var = op([x], one, [kind], [0.1], [0], [], [], *running, [carrier])
    scale = {0: 0, 1: 1, 2: 3}[kind]  # whose deviation is taken
    expected = {0: x, 1: nn.functional.batch_norm(x, carrier[0], carrier[1], eps=0.1)}.get(
        kind, nn.functional.batch_norm(x, carrier[2], carrier[3], eps=0.1)
    )
    assert torch.allclose(y, expected, rtol=1e-12)
    if scale == 1:
        assert torch.equal(mean[0], carrier[0]) and torch.equal(var[0], carrier[1])
    kernel, matrix = torch.ones(3, 1, 1, 1, dtype=F64), torch.eye(3, dtype=F64)[..., None, None]
    statistics = (running[0][0], running[1][0]) if kind == 2 else (None, None)
    tail = (None, None, *statistics, [kernel], [matrix], [1], 1, carrier, False)
    (y,), *_ = torch.ops.fastnas.separable_group(x, kind, 0.1, *tail)
    assert torch.allclose(y, expected.relu(), rtol=1e-12)


def test_the_raw_ops_check_carriers():
    x, w = torch.ones(2, 3, 4, 4), torch.ones(1)
    mix, mine = torch.ops.fastnas.mixed_batch_norm, torch.ones(4, 3)
    head = ([x], w, [1], [0.1], [0], [], [], [], [])
    with raises(ValueError, "mixed_batch_norm: expected as many carriers as inputs (1) or none"):
        mix(*head, [mine, mine])
    with raises(ValueError, "mixed_batch_norm: expected carriers[0] of shape [4, 3]", "[3, 4]"):
        mix(*head, [mine.t()])
    tail = (0, 0.1, *(None,) * 4, [torch.ones(3, 1, 1, 1)], [torch.ones(3, 3, 1, 1)], [1], 1)
    with raises(ValueError, "separable_group: expected carriers[0] of shape [4, 3]", "[2, 3]"):
        torch.ops.fastnas.separable_group(x, *tail, mine[:2], False)
    for op, arguments in (("separable_group", (*tail, None)), ("pool_pair", (1,))):
        with raises(ValueError, f"{op}: expected float32 or float64 for outputs with carriers"):
            getattr(torch.ops.fastnas, op)(x.bfloat16(), *arguments, True)


def test_without_kernels_nothing_else_is_carried(monkeypatch):
    """Statistics of the reference go the same way."""
    x = cases.make((2, 4, 5, 6), F64)
    with_kernels = [*convolve(x)[1], *pool(x)[1]]
    for name in ("_source", "separable_each", "pool_pair"):
        file = importlib.import_module(f"fastnas.ops.{name}")
        monkeypatch.setattr(file, "has_kernels", lambda device: False)
    for a, b in zip(with_kernels, [*convolve(x)[1], *pool(x)[1]], strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.fixture
def known(monkeypatch):
    """How many statistics every sum and every convolution behind a norm is given."""
    monkeypatch.setattr(carriers_file, "_CARRIED_ELEMENTS", 1)
    known = {"sum": 0, "convolution": 0}
    mix, convolve = torch.ops.fastnas.mixed_batch_norm, torch.ops.fastnas.separable_each

    def spy_on_sums(*arguments):
        known["sum"] += sum(c.numel() > 0 for c in arguments[-1])
        return mix(*arguments)

    def spy_on_convolutions(*arguments):
        known["convolution"] += sum(c.numel() > 0 for c in arguments[-2])
        return convolve(*arguments)

    monkeypatch.setattr(torch.ops.fastnas, "mixed_batch_norm", spy_on_sums)
    monkeypatch.setattr(torch.ops.fastnas, "separable_each", spy_on_convolutions)
    return known


@pytest.mark.parametrize("k", [1, 4])
def test_cells_measure_nothing_twice(k, known):
    net = Supernet(8, 3, partial_channels=k)
    cells = {spec: CellWeights(torch.randn(14, 8), None) for spec in net.cell_specs}
    net(torch.randn(2, 3, 8, 8), cells)
    # Of 14 edges in each of three cells: two pools, two dilated and two separable convolutions.
    assert known == {"sum": 3 * 14 * 6, "convolution": 3 * 14 * 2}
    with torch.no_grad():
        net(torch.randn(2, 3, 8, 8), cells)
    assert known["sum"] == 3 * 14 * 6


def test_a_mixed_op_measures_nothing_twice(known):
    MixedOp(4, 1)(torch.randn(2, 4, 8, 8), torch.rand(8))
    assert known == {"sum": 6, "convolution": 2}
