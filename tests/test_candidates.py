# SPDX-License-Identifier: Apache-2.0
"""The candidates' structure, parameter counts, shapes and arithmetic."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastnas.nn import candidates
from fastnas.nn.candidates import (
    DARTS_PRIMITIVES,
    FactorizedReduce,
    ReLUConvBN,
    Zero,
    build_candidate,
    candidate_names,
    register_candidate,
)

SEPARABLE = {"sep_conv_3x3": 3, "sep_conv_5x5": 5, "sep_conv_7x7": 7}
DILATED = {"dil_conv_3x3": 3, "dil_conv_5x5": 5}


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_order_of_primitives() -> None:
    assert DARTS_PRIMITIVES == (
        "none",
        "max_pool_3x3",
        "avg_pool_3x3",
        "skip_connect",
        "sep_conv_3x3",
        "sep_conv_5x5",
        "dil_conv_3x3",
        "dil_conv_5x5",
    )
    assert set(candidate_names()) == {
        *DARTS_PRIMITIVES,
        *("sep_conv_7x7", "conv_7x1_1x7", "nor_conv_1x1", "nor_conv_3x3"),
    }


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("C", [4, 10])
def test_parameter_counts(C: int, stride: int, affine: bool) -> None:
    expected = dict.fromkeys(("none", "max_pool_3x3", "avg_pool_3x3"), 0)
    expected["skip_connect"] = 0 if stride == 1 else C * C + 2 * C * affine
    for name, k in SEPARABLE.items():
        expected[name] = 2 * (k * k * C + C * C) + 4 * C * affine
    for name, k in DILATED.items():
        expected[name] = k * k * C + C * C + 2 * C * affine
    expected["conv_7x1_1x7"] = 14 * C * C + 2 * C * affine
    for name, k in (("nor_conv_1x1", 1), ("nor_conv_3x3", 3)):
        expected[name] = k * k * C * C + (2 * C if affine else C)
    found = {name: parameters(build_candidate(name, C, stride, affine)) for name in expected}
    assert found == expected
    assert parameters(ReLUConvBN(3, C, 1, 1, 0, affine=affine)) == 3 * C + 2 * C * affine


@pytest.mark.parametrize("name", sorted(candidate_names()))
def test_shapes_and_conventions(name: str) -> None:
    x = torch.randn(2, 4, 6, 8)
    before = x.clone()
    for stride in (1, 2):
        op = build_candidate(name, 4, stride)
        assert op(x).shape == (2, 4, 6 // stride, 8 // stride)
        for layer in op.modules():
            if isinstance(layer, nn.Conv2d):
                # NAS-Bench-201 has a bias in search, where the BatchNorm has no shift.
                assert (layer.bias is not None) == name.startswith("nor_conv")
            if isinstance(layer, nn.BatchNorm2d):
                assert (layer.eps, layer.momentum, layer.affine) == (1e-5, 0.1, False)
    assert torch.equal(x, before)


def test_child_names() -> None:
    def layers(op: nn.Module) -> list[str]:
        return [f"{n}:{type(m).__name__}" for n, m in op.named_modules() if not list(m.children())]

    half = ["op.0:ReLU", "op.1:Conv2d", "op.2:Conv2d", "op.3:BatchNorm2d"]
    second = ["op.4:ReLU", "op.5:Conv2d", "op.6:Conv2d", "op.7:BatchNorm2d"]
    assert layers(build_candidate("sep_conv_3x3", 4, 1)) == half + second
    assert layers(build_candidate("dil_conv_3x3", 4, 1)) == half
    assert layers(build_candidate("skip_connect", 4, 2)) == [
        *("relu:ReLU", "conv_1:Conv2d", "conv_2:Conv2d", "bn:BatchNorm2d")
    ]
    assert layers(ReLUConvBN(4, 4, 1, 1, 0)) == ["op.0:ReLU", "op.1:Conv2d", "op.2:BatchNorm2d"]
    assert isinstance(build_candidate("skip_connect", 4, 1), nn.Identity)


def test_stride_stands_in_the_first_depthwise_convolution_only() -> None:
    convolutions = [
        m for m in build_candidate("sep_conv_5x5", 4, 2).modules() if isinstance(m, nn.Conv2d)
    ]
    assert [(m.stride[0], m.groups, m.kernel_size[0]) for m in convolutions] == [
        *((2, 4, 5), (1, 1, 1), (1, 4, 5), (1, 1, 1))
    ]


@pytest.mark.parametrize(("name", "reach"), [("dil_conv_3x3", 2), ("dil_conv_5x5", 4)])
def test_dilated_receptive_field(name: str, reach: int) -> None:
    op = build_candidate(name, 1, 1).eval()
    with torch.no_grad():
        for p in op.parameters():
            p.fill_(1.0)
        x = torch.zeros(1, 1, 15, 15)
        x[0, 0, 7, 7] = 1.0
        rows = op(x)[0, 0].abs().sum(1).nonzero().flatten().tolist()
    assert rows == list(range(7 - reach, 8 + reach, 2))


def test_average_pool_leaves_padding_out_of_the_divisor() -> None:
    assert torch.equal(
        build_candidate("avg_pool_3x3", 1, 1)(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4)
    )


def test_zero() -> None:
    x = torch.randn(1, 2, 5, 4)
    assert torch.equal(Zero(2)(x), torch.zeros(1, 2, 3, 2))
    x[0, 0, 0, 0] = float("inf")
    assert Zero(1)(x)[0, 0, 0, 0].isnan()
    assert not build_candidate("none", 2, 2).state_dict()


def test_factorized_reduce_against_the_formula() -> None:
    op = FactorizedReduce(3, 4).double().eval()
    with torch.no_grad():
        op.bn.running_mean.normal_()
        op.bn.running_var.uniform_(0.5, 2.0)
        op.bn.weight.normal_()
    x = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    # A 1x1 convolution of stride 2 sees pixels (0, 0), (0, 2), ...; shifted: (1, 1), (1, 3), ...
    even, odd = (x.relu()[:, :, i::2, i::2] for i in (0, 1))
    halves = [
        torch.einsum("oi,nihw->nohw", conv.weight[:, :, 0, 0], part)
        for conv, part in ((op.conv_1, even), (op.conv_2, odd))
    ]
    expected = F.batch_norm(
        torch.cat(halves, 1), op.bn.running_mean, op.bn.running_var, op.bn.weight, op.bn.bias
    )
    torch.testing.assert_close(op(x), expected)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"C_out must be even .* got 5"):
        FactorizedReduce(4, 5)
    for shape in ((1, 4, 7, 8), (1, 4, 8, 7)):
        with pytest.raises(ValueError, match=f"must be even, got {shape[2]}x{shape[3]}"):
            FactorizedReduce(4, 4)(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"unknown candidate 'sep_conv_9x9', known are none, "):
        build_candidate("sep_conv_9x9", 4, 1)
    for C in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="C must be a positive integer"):
            build_candidate("none", C, 1)
    with pytest.raises(ValueError, match="stride must be 1 or 2, got 3"):
        build_candidate("none", 4, 3)


def test_register(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "_FACTORIES", dict(candidates._FACTORIES))

    @register_candidate("conv_1x1")
    def conv_1x1(C: int, stride: int, affine: bool) -> nn.Module:
        return ReLUConvBN(C, C, 1, stride, 0, affine=affine)

    assert build_candidate("conv_1x1", 4, 2)(torch.randn(1, 4, 4, 4)).shape == (1, 4, 2, 2)
    assert "conv_1x1" in candidate_names()
    for name in ("conv_1x1", "none"):
        with pytest.raises(ValueError, match=f"'{name}' is already taken"):
            register_candidate(name)
    with pytest.raises(ValueError, match="non-empty string"):
        register_candidate("")


@pytest.mark.parametrize("channels", [3, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_gradient_of_an_average_is_right_in_every_format(layout, stride, channels, device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64, generator=generator)
    exact = x.clone().requires_grad_()
    expected = F.avg_pool2d(exact[:, :channels], 3, stride, 1, count_include_pad=False)
    grad = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    expected.backward(grad)
    seen = x.to(device).contiguous(memory_format=layout).requires_grad_()
    y = build_candidate("avg_pool_3x3", 3, stride)(seen[:, :channels])
    assert y.is_contiguous(memory_format=layout)
    y.backward(grad.to(device))
    torch.testing.assert_close(y.cpu(), expected)
    torch.testing.assert_close(seen.grad.cpu(), exact.grad)
