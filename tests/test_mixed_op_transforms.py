# SPDX-License-Identifier: Apache-2.0
"""Mixed ops under what PyTorch does: second derivatives, compile, export, CUDA graphs."""

from __future__ import annotations

import copy

import pytest
import stock
import torch
from side_by_side import assert_same, observe, randomise_statistics, twins
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from fastnas import MixedOp, PartialMixedOp

BOTH = pytest.mark.parametrize("cls", [MixedOp, PartialMixedOp])


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def small(cls, stride=1):
    """A mixed op of one candidate of each kind, and data for it, in float64."""
    names = ("none", "max_pool_3x3", "skip_connect", "dil_conv_3x3")
    C = 4 if cls is PartialMixedOp else 2
    op = cls(C, stride, **({"k": 2} if cls is PartialMixedOp else {}), primitives=names)
    x = torch.randn(2, C, 4, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(len(names), dtype=torch.float64, requires_grad=True)
    return randomise_statistics(op).double(), x, weights


@BOTH
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_first_and_second_order(cls, stride, training):
    op, x, weights = small(cls, stride)
    op.train(training)
    assert gradcheck(op, (x, weights), fast_mode=True)
    assert gradgradcheck(op, (x, weights), fast_mode=True)


@BOTH
def test_the_hessian_in_the_weights_is_the_stock_one(cls):
    theirs = (stock.MixedOp if cls is MixedOp else stock.PartialMixedOp)(8, 1)
    ours, theirs = twins(cls(8, 1), theirs)
    ours.double(), theirs.double()
    x, alpha = torch.randn(3, 8, 4, 4).double(), torch.randn(8).double()

    def hessian(op):  # of a loss in alpha, as R-DARTS takes it
        return torch.autograd.functional.hessian(
            lambda a: op(x, torch.softmax(a, 0)).pow(3).sum(), alpha
        )

    torch.testing.assert_close(hessian(ours), hessian(theirs), rtol=1e-8, atol=1e-8)


@BOTH
@pytest.mark.parametrize("training", [True, False])
def test_compiles_into_one_graph(cls, training):
    op = randomise_statistics(cls(8, 2)).train(training)
    plain = copy.deepcopy(op)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    x, weights = torch.randn(3, 8, 6, 6), torch.randn(8)
    for _ in range(2):
        expected = observe(plain, x, weights)
        seen = observe(compiled, x, weights)
        seen = {name.replace("_orig_mod.", ""): value for name, value in seen.items()}
        assert_same(seen, expected, 1e-6)


@BOTH
def test_compiles_for_sizes_that_may_change(cls):
    op = randomise_statistics(cls(8, 2)).eval()
    x, weights = torch.randn(3, 8, 6, 6), torch.randn(8)
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, weights), op(x, weights))


def test_compiled_with_hooks_and_again_with_a_replaced_candidate():
    op = MixedOp(4, 1, ("skip_connect", "max_pool_3x3", "dil_conv_3x3")).eval()
    op._ops[2].register_forward_hook(lambda m, args, y: 2 * y)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    x, weights = torch.randn(2, 4, 6, 6), torch.randn(3)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, weights), op(x, weights))
        op._ops[1] = nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(4)).eval()
        torch.testing.assert_close(compiled(x, weights), op(x, weights))


@BOTH
@pytest.mark.parametrize("strict", [False, True])
def test_exports(cls, strict):
    op = randomise_statistics(cls(8, 2)).eval()
    x, weights = torch.randn(2, 8, 6, 6), torch.randn(8)
    program = torch.export.export(op, (x, weights), strict=strict)
    torch.testing.assert_close(program.module()(x, weights), op(x, weights))
    fused = "partial_channel_mix" if cls is PartialMixedOp else "mixed_batch_norm"
    graphs = [m.graph for m in program.graph_module.modules() if hasattr(m, "graph")]
    assert any(fused in str(node.target) for graph in graphs for node in graph.nodes)


def test_functional_call_differentiates_in_given_parameters():
    op = MixedOp(4, 1)
    x, weights = torch.randn(3, 4, 6, 6), torch.randn(8)
    given = {n: (p * 1.5).detach().requires_grad_() for n, p in op.named_parameters()}
    torch.func.functional_call(op, given, (x, weights)).square().sum().backward()
    with torch.no_grad():
        for p in op.parameters():
            p.mul_(1.5)
    op(x, weights).square().sum().backward()
    for name, p in op.named_parameters():
        torch.testing.assert_close(given[name].grad, p.grad)


@pytest.mark.gpu
@BOTH
def test_cuda_graph(cls):
    op = cls(8, 2).cuda()
    plain = copy.deepcopy(op)
    x = torch.randn(3, 8, 6, 6, device="cuda", requires_grad=True)
    weights = torch.randn(8, device="cuda", requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(op, (x, weights))
    state = {n: b.clone() for n, b in op.named_buffers()}  # the warm-up has moved them
    plain.load_state_dict(state, strict=False)
    for _ in range(3):
        new_x, new_weights = torch.randn_like(x), torch.randn_like(weights)
        seen, expected = observe(graphed, new_x, new_weights), observe(plain, new_x, new_weights)
        assert_same(seen, expected, 1e-5)
