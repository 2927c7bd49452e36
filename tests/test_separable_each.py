# SPDX-License-Identifier: Apache-2.0
"""separable_each is separable_group of each source, in gradients and statistics too.

To the bit on a CPU; by the CUDA kernels but for the order of sums, which are cut for all sources.
"""

from __future__ import annotations

import copy
import sys

import ops_cases as cases
import pytest
import torch
from ops_cases import assert_bitwise, raises
from source_cases import NORMS, make_norm
from torch import nn

from fastnas.ops import separable_each, separable_group

CONVOLUTIONS = ((3, 1), (5, 1), (3, 2))  # kernel size and dilation


def make_case(kinds, device, dtype=torch.float32, layouts=("contiguous",), channels=4, size=(6, 5)):
    """Sources, weights, dilations and norms, as many as kinds."""
    xs, depthwise, pointwise, dilations = [], [], [], []
    for i in range(len(kinds)):
        k, d = CONVOLUTIONS[i % len(CONVOLUTIONS)]
        layout = layouts[i % len(layouts)]
        xs.append(cases.make((2, channels, *size), dtype, layout, device, seed=i))
        depthwise.append(cases.make((channels, 1, k, k), dtype, device=device, seed=10 + i))
        square = (channels, channels, 1, 1)
        pointwise.append(cases.make(square, dtype, device=device, seed=20 + i))
        dilations.append(d)
    for t in (*xs, *depthwise, *pointwise):
        t.requires_grad_()
    norms = [make_norm(kind, channels, device).to(dtype) for kind in kinds]
    return xs, depthwise, pointwise, dilations, norms


def one_by_one(xs, depthwise, pointwise, dilations, norms, stride=1):
    rows = zip(xs, depthwise, pointwise, dilations, norms, strict=True)
    return [separable_group(x, [w], [p], [d], stride, n)[0] for x, w, p, d, n in rows]


def leaves_of(case):
    xs, depthwise, pointwise, _, norms = case
    return [*xs, *depthwise, *pointwise, *(p for norm in norms for p in norm.parameters())]


def assert_equal(a, b, name):
    """To the bit, or nearly where all sources are summed up together."""
    if a.device.type == "cpu" and "simt.plugin" not in sys.modules:
        assert_bitwise(a, b, name)
        return
    assert a.dtype == b.dtype, name
    near = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}
    scale = max(b.double().abs().max().item(), 1.0) if b.numel() else 1.0
    difference = (a.double() - b.double()).abs().max().item() if b.numel() else 0.0
    assert difference <= near[a.dtype] * scale, f"{name}: {difference} of {scale}"


def assert_same(case, stride=1, present=None):
    *tensors, norms = case
    twins = copy.deepcopy(norms)
    found = separable_each(*tensors, norms, stride)
    expected = one_by_one(*tensors, twins, stride)
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert_equal(a, b, f"output {k}")
        assert a.stride() == b.stride()
    for a, b in zip(norms, twins, strict=True):
        for (name, x), y in zip(a.named_buffers(), b.buffers(), strict=True):
            if y.is_floating_point():
                assert_equal(x, y, name)
            else:
                assert x == y
    grads = [cases.like_output(y, 50 + i) for i, y in enumerate(found)]
    chosen = range(len(found)) if present is None else present
    results = []
    for ys, leaves in ((found, leaves_of(case)), (expected, leaves_of((*tensors, twins)))):
        leaves = [t for t in leaves if t.requires_grad]
        pairs = [ys[i] for i in chosen], leaves, [grads[i] for i in chosen]
        results.append(torch.autograd.grad(*pairs, allow_unused=present is not None))
    for k, (a, b) in enumerate(zip(*results, strict=True)):
        assert (a is None) == (b is None)
        if a is not None:
            assert_equal(a, b, f"gradient {k}")
            assert a.dtype == b.dtype
    return results[0]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
def test_every_kind_of_norm_in_every_dtype(dtype, stride, device):
    assert_same(make_case(NORMS, device, dtype, cases.LAYOUTS), stride)


@pytest.mark.parametrize("channels", [1, 3, 16])
def test_any_view_of_any_number_of_channels(channels, device):
    assert_same(
        make_case(("plain", "affine", "plain"), device, layouts=cases.VIEWS, channels=channels)
    )


@pytest.mark.parametrize("channels", [65, 3])
@pytest.mark.parametrize("layouts", [("contiguous",), ("channels_last", "contiguous")])
def test_many_channels_and_formats_of_their_own(layouts, channels, device):
    assert_same(make_case(("plain", "affine"), device, layouts=layouts, channels=channels))


def test_dilations_that_no_tile_reaches(device):
    *tensors, _, norms = make_case(("plain", "affine"), device, size=(9, 8))
    assert_same((*tensors, [1, 3], norms))


def test_outputs_without_a_gradient_give_none(device):
    case = make_case(("affine", "affine evaluation", "plain"), device)
    found = assert_same(case, present=[1])
    assert [g is None for g in found[:3]] == [True, False, True]
    assert [g is None for g in found[9:]] == [True, True, False, False]


@pytest.mark.parametrize("seed", range(6))
def test_any_subset_of_gradients(seed, device):
    case = make_case(("affine", "plain", "affine evaluation"), device)
    chosen = torch.rand(len(leaves_of(case)), generator=torch.Generator().manual_seed(seed)) < 0.5
    for leaf, on in zip(leaves_of(case), chosen.tolist(), strict=True):
        leaf.requires_grad_(on)
    for i in range(3):  # each output has a gradient, and not only through this
        case[0][i].requires_grad_()
    assert_same(case)


def test_gradcheck_and_gradgradcheck(device):
    xs, depthwise, pointwise, dilations, norms = make_case(
        ("affine", "evaluation", "affine evaluation"),
        device,
        torch.float64,
        channels=2,
        size=(3, 4),
    )
    affine = [p for norm in norms for p in norm.parameters()]

    def function(*t):
        norms[0]._parameters.update(weight=t[9], bias=t[10])
        norms[2]._parameters.update(weight=t[11], bias=t[12])
        return tuple(separable_each(t[:3], list(t[3:6]), list(t[6:9]), dilations, norms))

    leaves = (*xs, *depthwise, *pointwise, *affine)
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_one_norm_of_several_sources_moves_as_often(device):
    norm, twin = make_norm("average", 4, device), make_norm("average", 4, device)
    *tensors, _ = make_case(("plain",) * 3, device)
    separable_each(*tensors, [norm] * 3)
    one_by_one(*tensors, [twin] * 3)
    assert norm.num_batches_tracked == twin.num_batches_tracked == 3
    for a, b in zip(
        (norm.running_mean, norm.running_var), (twin.running_mean, twin.running_var), strict=True
    ):
        assert_equal(a, b, "running")


def test_under_autocast_as_one_by_one(device):
    *tensors, norms = make_case(("plain", "affine"), device)
    with torch.autocast(device.type, torch.bfloat16):
        found = separable_each(*tensors, norms)
        expected = one_by_one(*tensors, copy.deepcopy(norms))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.bfloat16
        assert_equal(a, b, "output")


ONES = {
    "xs": [torch.ones(2, 3, 4, 4)],
    "depthwise": [torch.ones(3, 1, 3, 3)],
    "pointwise": [torch.ones(3, 3, 1, 1)],
    "dilations": [1],
    "norms": [nn.BatchNorm2d(3)],
}


@pytest.mark.parametrize(
    ("changes", "error", "parts"),
    [
        ({"xs": torch.ones(2, 3, 4, 4)}, TypeError, ("xs to be a list",)),
        ({"xs": []}, ValueError, ("1 to 64 tensors in xs, but got 0",)),
        ({"xs": [torch.ones(2, 3, 4)]}, ValueError, ("(N, C, H, W)", "got [2, 3, 4]")),
        ({"xs": ONES["xs"] * 2, "norms": ONES["norms"] * 2}, ValueError,
         ("one depthwise weight per input", "2 inputs and 1")),
        ({"pointwise": []}, ValueError, ("one pointwise weight per", "1 depthwise and 0")),
        ({"stride": 3}, ValueError, ("stride 1 or 2, but got 3",)),
        ({"norms": None}, TypeError, ("norms to be a list of BatchNorms", "NoneType")),
        ({"xs": iter(())}, TypeError, ("xs to be a list of tensors", "tuple_iterator")),
        ({"norms": []}, ValueError, ("one norm", "1 inputs and 0 norms")),
        ({"norms": [None]}, TypeError, ("norms[0] to be a BatchNorm, but got None",)),
        ({"norms": [nn.BatchNorm2d(4)]}, ValueError, ("norms[0].weight of shape [3]", "got [4]")),
        ({"norms": [nn.InstanceNorm2d(3)]}, TypeError, ("norms[0]", "InstanceNorm2d")),
        ({"xs": [torch.ones(1, 3, 1, 1)]}, ValueError, ("more than 1 value per channel",)),
    ],
)  # fmt: skip
def test_refuses(changes, error, parts):
    with raises(error, "separable_each: expected", *parts):
        separable_each(**{**ONES, **changes})
