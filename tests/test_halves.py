# SPDX-License-Identifier: Apache-2.0
"""Factorized reduces of one state: picked pixels, one product of matrices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastnas.nn.batch_norm import make_route
from fastnas.nn.candidates import FactorizedReduce
from fastnas.nn.cell import run_alone
from fastnas.nn.halves import SharedHalves, TwoHalves, picked_pixels
from fastnas.nn.source import evaluate_source

FORMATS = [torch.contiguous_format, torch.channels_last]


def made(C_in, C_out, dtype=torch.float64):
    return FactorizedReduce(C_in, C_out, affine=False).to(dtype)


def image(shape, format, dtype=torch.float64, device=None):
    x = torch.randn(shape, dtype=dtype, device=device).contiguous(memory_format=format)
    return x.requires_grad_()


def formula(module, x):
    """What enters the BatchNorm, as the paper's code has it."""
    x = F.relu(x)
    first = F.conv2d(x, module.conv_1.weight, stride=2)
    return torch.cat([first, F.conv2d(x[:, :, 1:, 1:], module.conv_2.weight, stride=2)], 1)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(2, 5, 6, 4), (1, 3, 2, 2), (3, 1, 8, 2), (0, 3, 4, 4)])
def test_several_of_one_state(shape, format):
    modules = [made(shape[1], width) for width in (4, 6, 4)]
    x = image(shape, format)
    routes = [make_route(m) for m in modules]
    calls = []

    def run(layer, x):
        calls.append(layer)
        return layer(x)

    outputs = evaluate_source(x, [[r.recipe] for r in routes[:2]] + [[routes[2].recipe]], run)
    # Once the pixels, one product for each width.
    assert [type(c).__name__ for c in calls] == ["function", "SharedHalves", "SharedHalves"]
    parameters = [p for m in modules for p in m.parameters()]
    grads = []
    for m, (y,) in zip(modules, outputs, strict=True):
        expected = formula(m, x)
        torch.testing.assert_close(y, expected)
        ambiguous = y.numel() == 0 or shape[1] == 1
        assert ambiguous or y.is_contiguous(memory_format=format)
        grads.append(torch.randn_like(y))
    expected = torch.autograd.grad([formula(m, x) for m in modules], [x, *parameters], grads)
    actual = torch.autograd.grad([y for (y,) in outputs], [x, *parameters], grads)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("format", FORMATS)
def test_twice_differentiable(format):
    halves = [TwoHalves(made(2, 2)), TwoHalves(made(2, 2))]
    shared = SharedHalves(halves, format)

    def function(x, *weights):
        return tuple(shared.product(picked_pixels(x), *weights))

    inputs = (image((1, 2, 4, 2), format), *shared.weights)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_the_state_stays_as_it_is():
    # Of one block the pixels might be a view of the state.
    x = torch.tensor([[[[-1.0, 1.0], [1.0, -2.0]]]])
    before = x.clone()
    assert picked_pixels(x).flatten().tolist() == [0.0, 0.0]
    assert torch.equal(x, before)


@pytest.mark.parametrize("module_name", ["relu", "conv_1", "conv_2", "bn", ""])
def test_hooks_fire(module_name):
    module, x = made(3, 4), image((2, 3, 4, 4), torch.contiguous_format)
    expected = module(x)
    torch.testing.assert_close(run_alone(module, x), expected)
    fired = []
    module.get_submodule(module_name).register_forward_hook(lambda *a: fired.append(1))
    torch.testing.assert_close(run_alone(module, x), expected)
    assert fired == [1]


def _strange(module, how):
    if how == "bias":
        module.conv_2 = nn.Conv2d(3, 2, 1, stride=2, dtype=torch.float64)
    elif how == "kernel":
        module.conv_1 = nn.Conv2d(3, 2, 3, stride=2, padding=1, bias=False, dtype=torch.float64)
    elif how == "width":
        module.conv_1 = nn.Conv2d(3, 1, 1, stride=2, bias=False, dtype=torch.float64)
        module.conv_2 = nn.Conv2d(3, 3, 1, stride=2, bias=False, dtype=torch.float64)
    elif how == "spectral":
        nn.utils.parametrizations.spectral_norm(module.conv_1)
        module.conv_1.eval()
    elif how == "patched":
        forward = module.conv_1.forward
        module.conv_1.forward = lambda x: 2 * forward(x)
    else:
        module.relu = nn.ReLU6()


@pytest.mark.parametrize("how", ["bias", "kernel", "width", "spectral", "patched", "relu"])
def test_others_are_called_as_they_stand(how):
    module, x = made(3, 4), image((2, 3, 4, 4), torch.contiguous_format)
    _strange(module, how)
    assert make_route(module).recipe.halves is None
    torch.testing.assert_close(run_alone(module, x), module(x), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(1, 3, 5, 4), (1, 3, 4, 5)])
def test_odd_sizes_are_refused(shape):
    with pytest.raises(ValueError, match="height and width must be even, got"):
        run_alone(made(3, 4), image(shape, torch.contiguous_format))


@pytest.mark.parametrize("format", FORMATS)
def test_under_autocast(format, device):
    module = made(8, 8, torch.float32).to(device)
    x = image((2, 8, 4, 4), format, torch.float32, device)
    recipe = make_route(module).recipe
    with torch.autocast(device.type, torch.bfloat16):
        ((y,),) = evaluate_source(x, [[recipe]])
        expected = formula(module, x)
    assert y.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), expected.float(), rtol=2e-2, atol=2e-2)
