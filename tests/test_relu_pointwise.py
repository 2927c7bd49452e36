# SPDX-License-Identifier: Apache-2.0
"""relu_pointwise against torch in float64, its place before a cell, what it refuses."""

from __future__ import annotations

import copy

import ops_cases as cases
import pytest
import torch
import torch.nn.functional as F
from ops_cases import assert_all_near, assert_layout, raises
from torch import nn

from fastnas import ops
from fastnas.nn.candidates import ReLUConvBN
from fastnas.nn.cell import run_alone
from fastnas.ops import relu_pointwise

# (N, C, H, W) and C': around vectors of every width; channels that fill blocks by themselves; more
# pixels than a block and than sums run over at once.
SHAPES = (
    ((1, 1, 1, 1), 1),
    ((2, 16, 8, 8), 32),
    ((3, 48, 5, 7), 16),
    ((5, 3, 4, 9), 2),
    ((1, 17, 9, 3), 33),
    ((2, 8, 1, 19), 4),
    ((2, 300, 5, 1), 3),
    ((3, 32, 40, 41), 8),
    ((0, 3, 4, 4), 2),
)


def stock(x, weight):
    return F.conv2d(F.relu(x), weight)


def operands(shape, outputs, dtype=torch.float32, layout="contiguous", device="cpu"):
    x = cases.make(shape, dtype, layout, device, seed=1).requires_grad_()
    scale = max(shape[1], 1) ** -0.5
    weight = cases.make((outputs, shape[1], 1, 1), dtype, device=device, seed=2) * scale
    return x, weight.requires_grad_()


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
def test_matches_torch(dtype, layout, device, tolerances):
    for shape, outputs in SHAPES:
        x, weight = operands(shape, outputs, dtype, layout, device)
        exact = [t.detach().double().requires_grad_() for t in (x, weight)]
        y, expected = relu_pointwise(x, weight), stock(*exact)
        grad = cases.like_output(y, 50)
        grads = torch.autograd.grad(y, (x, weight), grad)
        exact_grads = torch.autograd.grad(expected, exact, grad.double())
        names = [f"{name} of {shape}" for name in ("y", "dx", "dweight")]
        assert_all_near([y, *grads], [expected, *exact_grads], tolerances, names)
        assert y.dtype == grads[0].dtype == grads[1].dtype == dtype
        if y.numel() and min(shape[1], outputs, shape[2] * shape[3]) > 1:
            assert_layout(y, layout)
            assert_layout(grads[0], layout)


def test_zero_and_nan_pass_as_in_torch(device):
    x = torch.tensor([0.0, -0.0, -1.0, 2.0], device=device).view(1, 4, 1, 1).requires_grad_()
    weight = torch.ones(1, 4, 1, 1, device=device)
    (dx,) = torch.autograd.grad(relu_pointwise(x, weight).sum(), x)
    assert dx.flatten().tolist() == [0, 0, 0, 1]
    assert relu_pointwise(x.detach() * torch.nan, weight).isnan().all()


def test_what_needs_no_gradient_gets_none(device):
    for needed in (0, 1):
        given = operands((2, 16, 3, 3), 8, device=device)
        given[1 - needed].requires_grad_(False)
        expected = torch.autograd.grad(stock(*given).square().sum(), given[needed])
        found = torch.autograd.grad(relu_pointwise(*given).square().sum(), given[needed])
        torch.testing.assert_close(found, expected)
        assert given[1 - needed].grad is None


def test_gradcheck_and_gradgradcheck(device):
    given = operands((2, 3, 2, 3), 4, torch.float64, device=device)
    assert torch.autograd.gradcheck(relu_pointwise, given)
    assert torch.autograd.gradgradcheck(relu_pointwise, given)
    first = []
    for function in (relu_pointwise, stock):  # differentiable gradients are those of the layers
        y = function(*given).square().sum()
        first.append(torch.autograd.grad(y, given, create_graph=True))
    torch.testing.assert_close(*first)


def test_the_number_of_threads_changes_nothing():
    given = operands((3, 32, 40, 41), 8)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = relu_pointwise(*given)
            found.append([y, *torch.autograd.grad(y.square().sum(), given)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_two_readers_keep_one_tensor(device):
    x, weight = operands((2, 16, 4, 5), 4, device=device)
    other = weight.detach().clone().requires_grad_()
    _, addresses = cases.saved_by(lambda: (relu_pointwise(x, weight), relu_pointwise(x, other)))
    assert addresses == {x.data_ptr(), weight.data_ptr(), other.data_ptr()}


def test_autocast_computes_as_a_convolution_does(device):
    x, weight = operands((2, 16, 4, 5), 8, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        y, expected = relu_pointwise(x, weight), stock(x, weight)
        wide = relu_pointwise(x.double(), weight.double())
    assert y.dtype == expected.dtype == torch.bfloat16 and wide.dtype == torch.float64
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
    grads = torch.autograd.grad(y.float().square().sum(), (x, weight))
    assert [g.dtype for g in grads] == [torch.float32] * 2


@pytest.mark.parametrize(
    ("x", "weight", "error", "parts"),
    [
        (torch.ones(3, 4, 4), torch.ones(2, 3, 1, 1), ValueError, ("(N, C, H, W)", "[3, 4, 4]")),
        (torch.ones(1, 3, 4, 4), torch.ones(2, 4, 1, 1), ValueError, ("(C', 3, 1, 1)", "[2, 4")),
        (torch.ones(1, 3, 4, 4), torch.ones(2, 3, 3, 1), ValueError, ("(C', 3, 1, 1)", "[2, 3")),
        (torch.ones(1, 3, 4, 4), torch.ones(()), ValueError, ("(C', 3, 1, 1)", "[]")),
        (torch.ones(1, 3, 4, 4), torch.ones(0, 3, 1, 1), ValueError, ("C' at least 1", "[0, 3")),
        (torch.ones(1, 3, 4, 4).long(), torch.ones(2, 3, 1, 1), TypeError, ("int64",)),
        (torch.ones(1, 3, 4, 4), torch.ones(2, 3, 1, 1).int(), TypeError, ("weight", "int32")),
        (None, torch.ones(2, 3, 1, 1), TypeError, ("x to be a tensor", "NoneType")),
    ],
)
def test_refuses(x, weight, error, parts):
    with raises(error, "relu_pointwise: expected", *parts):
        relu_pointwise(x, weight)
    if x is not None:
        with raises(error, "relu_pointwise: expected"):
            torch.ops.fastnas.relu_pointwise(x, weight)


def test_the_raw_backward_checks_its_gradient(device):
    x, weight = (t.detach() for t in operands((2, 3, 4, 4), 5, device=device))
    for grad, error, part in (
        (x, ValueError, "grad of shape [2, 5, 4, 4]"),
        (torch.ones(2, 5, 4, 4, device=device).long(), TypeError, "grad"),
    ):
        with raises(error, "relu_pointwise_backward: expected", part):
            torch.ops.fastnas.relu_pointwise_backward(grad, x, weight, True, True)


# --- before a cell


def outcome(function, module, x):
    """Output, gradients and what is left in the BatchNorm."""
    module, x = copy.deepcopy(module), x.detach().clone().requires_grad_()
    y = function(module, x)
    grads = torch.autograd.grad(y.square().sum() + y[0].sum(), [x, *module.parameters()])
    return [y, *grads, *module.buffers()]


@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("affine", [False, True])
def test_before_a_cell_it_is_what_the_layers_are(affine, mode, memory, monkeypatch):
    calls = []
    monkeypatch.setattr(ops, "relu_pointwise", lambda *a: calls.append(1) or relu_pointwise(*a))
    module = ReLUConvBN(12, 8, 1, 1, 0, affine=affine).double().train(mode == "train")
    x = cases.make((3, 12, 4, 5), torch.float64)
    found = outcome(lambda m, x: run_alone(m, x, memory), module, x)
    expected = outcome(lambda m, x: m(x), module, x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert calls == [1]


def changed(what):
    module = ReLUConvBN(4, 4, 1, 1, 0)
    relu, convolution, _ = module.op
    if what == "inplace":
        relu.inplace = True
    elif what == "bias":
        module.op[1] = nn.Conv2d(4, 4, 1)
    elif what == "groups":
        module.op[1] = nn.Conv2d(4, 4, 1, groups=2, bias=False)
    elif what == "stride":
        module.op[1] = nn.Conv2d(4, 4, 1, stride=2, bias=False)
    elif what == "padding":
        module.op[1] = nn.Conv2d(4, 4, 1, padding=1, bias=False)
    elif what == "forward":
        convolution.forward = lambda x: x * 2
    elif what == "norm":
        module.op[2] = nn.Identity()
    return module


@pytest.mark.parametrize(
    "what", ["inplace", "bias", "groups", "stride", "padding", "forward", "norm"]
)
def test_other_layers_are_called(what, monkeypatch):
    monkeypatch.setattr(ops, "relu_pointwise", lambda *a: pytest.fail("called"))
    module, x = changed(what), cases.make((2, 4, 4, 4))
    expected = copy.deepcopy(module)(x.clone())
    torch.testing.assert_close(run_alone(module, x), expected)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_hooks_fire(part):
    module, calls = ReLUConvBN(4, 4, 1, 1, 0), []
    module.op[part].register_forward_hook(lambda *_: calls.append(part))
    x = cases.make((2, 4, 4, 4))
    torch.testing.assert_close(run_alone(copy.deepcopy(module), x), copy.deepcopy(module)(x))
    calls.clear()
    run_alone(module, x)
    assert calls == [part]
