# SPDX-License-Identifier: Apache-2.0
"""Gradients that are made where they are read are those that are written."""

from __future__ import annotations

import copy

import ops_cases as cases
import pytest
import torch
from ops_cases import raises
from source_cases import NORMS, make_norm
from torch import nn

from fastnas import MixedOp, ops
from fastnas.nn import carriers as carriers_file
from fastnas.nn import source
from fastnas.nn.carriers import Carriers
from fastnas.nn.source import evaluate_source, make_recipe
from fastnas.ops.mixed_batch_norm import mix_apart
from fastnas.ops.separable_each import run_separable_each
from fastnas.ops.separable_group import run_separable_group
from fastnas.spaces.base import CellWeights
from fastnas.spaces.darts import Supernet

F64 = torch.float64
RELATIVE = {F64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def assert_near(found, expected):
    # What vanishes, as the gradient before a BatchNorm of one channel, is rounded like the others.
    least = 0.01 * max(b.double().norm() for b in expected if b is not None)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a is None) == (b is None), i
        if a is not None:
            assert a.dtype == b.dtype and a.stride() == b.stride()
            off = (a.double() - b.double()).norm() / b.double().norm().clamp_min(least)
            assert off < RELATIVE[a.dtype], (i, off)


@pytest.fixture
def of_any_size(monkeypatch):
    """Tensors that are too small to gain anything carry as well."""
    monkeypatch.setattr(carriers_file, "_CARRIED_ELEMENTS", 1)


class Node:
    """Separable convolutions of one state, second ones behind some, a pool, and their mixed sum."""

    def __init__(self, channels, size, dtype=F64, layout="contiguous", stride=1, images=3):
        def make(shape, seed, layout="contiguous"):
            return cases.make(shape, dtype, layout, seed=seed).requires_grad_()

        sizes = (3, 5, 3, 5)
        self.stride, self.dilations = stride, [1, 1, 2, 2]
        self.x = make((images, channels, *size), 0, layout)
        self.first = [make((channels, 1, k, k), 10 + i) for i, k in enumerate(sizes)]
        self.second = [make((channels, 1, k, k), 20 + i) for i, k in enumerate(sizes[:2])]
        square = (channels, channels, 1, 1)
        self.mixing = [make(square, 30 + i) for i in range(6)]
        self.between = [make_norm(kind, channels).to(dtype) for kind in NORMS[:2]]
        kinds = ("affine", "none", "plain", "affine evaluation", "plain")
        self.norms = [make_norm(kind, channels) for kind in kinds]
        self.norms = [n.to(dtype) if n is not None else None for n in self.norms]
        self.weights = torch.tensor([0.3, -0.7, 1.1, 0.5, 0.2]).to(
            torch.promote_types(dtype, torch.float32)
        )
        self.weights.requires_grad_()

    def leaves(self):
        norms = [n for n in (*self.between, *self.norms) if n is not None]
        parameters = [p for n in norms for p in n.parameters()]
        return [self.x, self.weights, *self.first, *self.second, *self.mixing, *parameters]

    def run(self, carry):
        arguments = self.first, self.mixing[:4], self.dilations, self.stride
        ys, given = run_separable_group(self.x, *arguments, carry=carry)
        arguments = self.second, self.mixing[4:], [1, 1], self.between
        zs, carriers = run_separable_each(ys[:2], *arguments, given=given[:2], carry=carry)
        pool = nn.functional.avg_pool2d(self.x, 3, self.stride, 1)
        xs = [*zs, *ys[2:], pool]
        if not carry:
            assert not given and not carriers
            return ops.mixed_batch_norm(xs, self.weights, self.norms)
        if self.x.dtype.itemsize < 4:
            assert not given and not carriers
        else:
            assert len(given) == 4 and len(carriers) == 2
        several = dict(enumerate([*carriers, *given[2:]]))
        return mix_apart(xs, self.weights, self.norms, several)

    def gradients(self, carry, **options):
        y = self.run(carry)
        grad = cases.like_output(y, 1)
        leaves = [t for t in self.leaves() if t.requires_grad]
        return torch.autograd.grad(y, leaves, grad, allow_unused=True, **options)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [1, 3, 4, 16, 32])
def test_the_same_gradients(channels, layout, dtype):
    """Channels that share a vector with those of others, fill vectors up, and make several."""
    node = Node(channels, (6, 5), dtype, layout)
    assert_near(node.gradients(True), node.gradients(False))


@pytest.mark.parametrize("size, stride", [((5, 9), 2), ((70, 66), 1), ((1, 1), 1)])
@pytest.mark.parametrize("channels", [2, 8])
def test_the_same_gradients_of_images_of_other_sizes(channels, size, stride):
    """Large ones are cut in pieces, whose borders belong to two."""
    node = Node(channels, size, stride=stride)
    assert_near(node.gradients(True), node.gradients(False))


def test_only_what_is_asked_for():
    """Inputs, weights and norms without a gradient, one after the other."""
    node = Node(4, (6, 5))
    for leaf in node.leaves():
        leaf.requires_grad_(False)
        assert_near(node.gradients(True), node.gradients(False))
        leaf.requires_grad_()
    for leaf in (*node.first, *node.mixing[:4], node.x):  # nothing left before the second ones
        leaf.requires_grad_(False)
    assert_near(node.gradients(True), node.gradients(False))


def test_an_output_without_a_reader():
    node = Node(4, (6, 5))
    results = []
    for carry in (False, True):
        ys, carriers = run_separable_group(
            node.x, node.first, node.mixing[:4], node.dilations, carry=carry
        )
        several = {1: carriers[2]} if carry else {}  # the other's gradient is written
        y = mix_apart([ys[1], ys[2]], node.weights[:2], [node.norms[2]] * 2, several)
        leaves = [node.x, *node.first, *node.mixing[:4]]
        results.append(torch.autograd.grad(y, leaves, cases.like_output(y, 1), allow_unused=True))
    assert_near(*results)
    assert results[0][1] is None and results[0][2] is not None


def test_the_second_derivative():
    node = Node(2, (3, 3), images=2)
    second = []
    for carry in (False, True):
        y, leaves = node.run(carry), [t for t in node.leaves() if t.requires_grad]
        first = torch.autograd.grad(y, leaves, cases.like_output(y, 1), create_graph=True)
        total = sum(g.square().sum() for g in first) + y.pow(3).sum()  # once more through the node
        second.append(torch.autograd.grad(total, leaves))
    assert_near(*second)


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_the_numbers_are_what_the_gradient_is_made_of(kind):
    x, g = (cases.make((2, 3, 4, 5), F64, seed=i) for i in range(2))
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    gamma = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    head = (g, [x], torch.tensor([0.7], dtype=F64), mean[None], var[None], [kind], [0.1])
    affine = ([1], [gamma], [gamma]) if kind else ([0], [], [])
    backward = torch.ops.fastnas.mixed_batch_norm_backward
    (expected,), *others, none = backward(*head, *affine, [1], True)
    written, *found, numbers = backward(*head, *affine, [2], True)
    assert not written and none.shape == (0, 4, 3) and numbers.shape == (1, 4, 3)
    a, b, centre, c = numbers[0][:, :, None, None].unbind(0)
    assert_near([a * g + b * (x - centre) + c, *found], [expected, *others])


def test_the_raw_op_checks_what_is_carried():
    x, w, p = (torch.ones(*s) for s in ((2, 3, 4, 4), (3, 1, 3, 3), (3, 3, 1, 1)))
    backward, none = torch.ops.fastnas.separable_group_backward, x.new_empty(0)
    head = ([x], [1], x, none, none, 0, 0.1, None, None, [w], [p], [1], 1, 1, False, [1], [1])
    with raises(ValueError, "expected as many outputs and carried as grads (1) or none"):
        backward(*head, [x], [])
    with raises(ValueError, "expected as many outputs and carried as grads (1) or none"):
        backward(*head, [x, x], [none, none])
    with raises(ValueError, "expected carried[0] of shape [4, 3] and its output like its gradient"):
        backward(*head, [x], [torch.ones(3, 4)])
    with raises(ValueError, "expected carried[0] of shape [4, 3] and its output like its gradient"):
        backward(*head, [x[:1]], [torch.ones(4, 3)])


def make_candidate(C=4):
    return make_recipe(
        [nn.ReLU(), nn.Conv2d(C, C, 3, 1, 1, groups=C, bias=False), nn.Conv2d(C, C, 1, bias=False)]
    )


def test_a_result_that_two_edges_read_has_no_carrier(of_any_size):
    recipes, x = [make_candidate(), make_candidate()], torch.randn(2, 4, 5, 5)
    carriers = Carriers()
    ((a,), (b,)) = evaluate_source(x, [[recipes[0]], [recipes[1]]], carriers=carriers)
    assert [*carriers.take([a, b])] == [0, 1]
    assert not carriers.take([a, b])  # there is one reader
    again = Carriers()
    ((c,), _) = evaluate_source(x, [[recipes[0]], [recipes[0]]], carriers=again)
    assert not again.take([c])


def test_layers_behind_the_convolutions_take_no_carrier(of_any_size):
    recipe, x = make_candidate(), torch.randn(2, 4, 5, 5)
    carriers = Carriers()
    ((y,),) = evaluate_source(x, [[recipe._replace(after=(nn.Tanh(),))]], carriers=carriers)
    assert not carriers.take([y])


@pytest.fixture
def asked(monkeypatch):
    """What every sum and every convolution behind a norm is asked for each input's gradient."""
    asked = []
    mix, convolve, convolve_each = (
        getattr(torch.ops.fastnas, f"{op}_backward")
        for op in ("mixed_batch_norm", "separable_group", "separable_each")
    )

    def spy_on_sums(*arguments):
        asked.extend(("sum", way) for way in arguments[10])
        return mix(*arguments)

    def spy_on_convolutions(*arguments):
        asked.append(("convolution", arguments[13]))
        return convolve(*arguments)

    def spy_on_each(*arguments):
        asked.extend(("convolution", way) for way in arguments[13])
        return convolve_each(*arguments)

    monkeypatch.setattr(torch.ops.fastnas, "mixed_batch_norm_backward", spy_on_sums)
    monkeypatch.setattr(torch.ops.fastnas, "separable_each_backward", spy_on_each)
    monkeypatch.setattr(torch.ops.fastnas, "separable_group_backward", spy_on_convolutions)
    return asked


@pytest.mark.parametrize("training", [True, False])
def test_a_mixed_op_writes_gradients_of_identities_alone(training, of_any_size, asked, monkeypatch):
    torch.manual_seed(0)
    op = MixedOp(4, 1).double().train(training)
    x = torch.randn(2, 4, 8, 8, dtype=F64, requires_grad=True)
    weights = torch.randn(8, dtype=F64, requires_grad=True)
    results = []
    for ways in ((), ("cpu",)):
        monkeypatch.setitem(source._FASTER, "carried", ways)
        asked.clear()
        y = copy.deepcopy(op)(x, weights)
        results.append(torch.autograd.grad(y, [x, weights], cases.like_output(y, 1)))
        assert asked.count(("sum", 2)) == (6 if ways and training else 0)
        assert asked.count(("convolution", 2)) == (2 if ways and training else 0)
    assert_near(*results)


@pytest.mark.parametrize("k", [1, 4])
def test_cells_write_gradients_of_identities_alone(k, of_any_size, asked, monkeypatch):
    torch.manual_seed(0)
    net = Supernet(8, 3, partial_channels=k).double()
    weights = [torch.randn(14, 8, dtype=F64, requires_grad=True) for _ in range(2)]
    images = torch.randn(2, 3, 8, 8, dtype=F64)
    results = []
    for ways in ((), ("cpu",)):
        monkeypatch.setitem(source._FASTER, "carried", ways)
        asked.clear()
        twin = copy.deepcopy(net)
        cells = dict(zip(net.cell_specs, (CellWeights(w, None) for w in weights), strict=True))
        loss = twin(images, cells).square().sum()
        leaves = [*weights, *twin.parameters()]
        results.append(torch.autograd.grad(loss, leaves, allow_unused=True))
        assert asked.count(("sum", 2)) == (3 * 14 * 6 if ways else 0)
        assert asked.count(("convolution", 2)) == (3 * 14 * 2 if ways else 0)
    assert_near(*results)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("whose", ["norms", "everything"])
def test_values_that_are_not_finite_before_norms_in_evaluation(whose, value, of_any_size):
    """They have no part in the gradient there, which a loss may mask."""
    torch.manual_seed(0)
    op = MixedOp(4, 1).double()
    for module in op.modules():
        if whose == "everything" or isinstance(module, nn.BatchNorm2d):
            module.training = False
    x = torch.randn(2, 4, 6, 6, dtype=F64)
    x[1, :, 2, 3] = value
    x.requires_grad_()
    loss = op(x, torch.rand(8, dtype=F64)).nan_to_num(0, 0, 0).sum()
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient.isfinite().all()


def test_small_results_have_no_carrier():
    recipe = make_candidate()
    for size, carried in ((127, False), (128, True)):
        carriers = Carriers()
        ((y,),) = evaluate_source(torch.randn(2, 4, size, 128), [[recipe]], carriers=carriers)
        assert bool(carriers.take([y])) == carried
