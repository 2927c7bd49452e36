# SPDX-License-Identifier: Apache-2.0
"""The ops under torch.compile, and their registrations under torch.library.opcheck."""

from __future__ import annotations

import copy

import ops_cases as cases
import pytest
import torch
from ops_cases import assert_bitwise
from ops_samples import samples
from torch import nn

from fastnas import ops


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def check_compiled(function, make_arguments, device, extra=()):
    """Outputs, gradients and buffers as in eager mode, for two sizes: the second may be dynamic."""
    for size in (6, 4):
        results = []
        for run in (function, compiled(function)):
            arguments, leaves, norms = make_arguments(size, device)
            y = run(*arguments, *extra)
            grads = torch.autograd.grad(y, leaves, cases.like_output(y), allow_unused=True)
            buffers = [b for norm in norms if norm is not None for b in norm.buffers()]
            results.append([y.detach(), *grads, *buffers])
            assert all(g is not None for g in grads)
        for k, (a, b) in enumerate(zip(*results, strict=True)):
            assert a.stride() == b.stride(), k
            assert_bitwise(b, a, str(k))


def mixed_arguments(size, device):
    xs, weights = cases.make_inputs(7, (2, 3, size, 5), layout="channels_last", device=device)
    norms = cases.make_norms(7, 3, device)
    return (xs, weights, norms), [weights, *xs, *cases.affine_parameters(norms)], norms


def test_mixed_sum(device):
    def make(size, device):
        xs, weights = cases.make_inputs(3, (2, 3, size, 5), layout="channels_last", device=device)
        xs[1] = xs[1].detach().bfloat16().requires_grad_()
        return (xs, weights), [weights, *xs], []

    check_compiled(lambda xs, w: ops.mixed_sum(xs, torch.softmax(w, 0)) * 2, make, device)


@pytest.mark.parametrize("training", [None, True, False])
def test_mixed_batch_norm_and_its_buffers(training, device):
    def function(xs, w, norms):
        return ops.mixed_batch_norm([2 * x for x in xs], w, norms, training)

    check_compiled(function, mixed_arguments, device)


@pytest.mark.parametrize("normed", [False, True])
def test_multi_target_sum(normed, device):
    def make(size, device):
        (xs, _, norms), leaves, _ = mixed_arguments(size, device)
        weights = cases.make((3, 7), device=device, seed=9).requires_grad_()
        norms = norms if normed else []
        return (xs, weights, norms), [weights, *leaves[1:8], *cases.affine_parameters(norms)], norms

    def function(xs, weights, norms):
        ys = ops.multi_target_sum([2 * x for x in xs], torch.softmax(weights, 1), norms or None)
        return ys[0] + 2 * ys[1]  # the last target gets no gradient

    check_compiled(function, make, device)


@pytest.mark.parametrize("halved", [False, True], ids=["same", "halved"])
def test_partial_channel_mix(halved, device):
    def make(size, device):
        (xs, weights, norms), leaves, _ = mixed_arguments(size, device)
        scale = 2 if halved else 1
        x = cases.make((2, 12, scale * size, scale * 5), layout="channels_last", device=device)
        x.requires_grad_()
        return (x, xs, weights, norms), [x, *leaves], norms

    def function(x, xs, w, norms):
        return ops.partial_channel_mix(x, xs, w, 4, norms)

    check_compiled(function, make, device)


def test_partial_channel_node(device):
    def make(size, device):
        (xs, _, _), _, _ = mixed_arguments(size, device)
        n, c, h, w = xs[0].shape
        rests, weights = cases.make_inputs(
            2, (n, 3 * c, h, w), layout="channels_last", device=device
        )
        return (xs[0], rests, weights), [xs[0], weights, *rests], []

    def function(mixed, rests, w):
        first, others = ops.partial_channel_node(mixed, rests, w, 4)
        return torch.cat([first, others, first], 1)

    check_compiled(function, make, device)


def test_sample_paths_with_a_step_that_counts(device):
    logits = torch.randn(5, 4, device=device, requires_grad=True)

    def function(x, step):
        paths = ops.sample_paths(x, 2**63 + 1, step, None, True)
        return paths.probs, paths.active, paths.inactive

    run = compiled(function)
    for step in (0, 1, 2, 3, 50, 2**40):
        expected, actual = function(logits, step), run(logits, step)
        for a, b in zip(actual, expected, strict=True):
            assert_bitwise(a, b)
        gradients = [
            torch.autograd.grad(paths[0][:, 0].sum(), [logits])[0] for paths in (actual, expected)
        ]
        assert_bitwise(*gradients)


@pytest.mark.parametrize("norm", ["edge", "node"])
def test_sparse_connections(norm, device):
    def make(size, device):
        alpha = cases.make((5, size), device=device).requires_grad_()
        beta = cases.make((2,), device=device, seed=1).requires_grad_()
        return (alpha, beta), [alpha, beta], []

    def function(alpha, beta):
        return ops.sparse_connections(2 * alpha, beta, (2, 3), 0.9, norm) * 2

    check_compiled(function, make, device)


def test_gate_gradient(device):
    def make(size, device):
        xs, weights = cases.make_inputs(3, (2, 3, size, 5), device=device)
        return (xs, weights), [weights, *xs], []

    def function(xs, w):
        return ops.gate_gradient(xs[0], [xs[1], None, xs[2]], torch.softmax(w, 0))

    check_compiled(function, make, device)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_group(stride, autocast, device):
    def make(size, device):
        x, *weights = (
            cases.make(shape, device=device, seed=k).requires_grad_()
            for k, shape in enumerate([(2, 3, size, 5), (3, 1, 3, 3), (3, 1, 5, 5)])
        )
        x = cases.laid_out(x.detach(), "channels_last").requires_grad_()
        return (x, weights), [x, *weights], []

    def function(x, weights):
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            a, b = ops.depthwise_group(x * 2, weights, [2, 1], stride)
            return a + 2 * b

    check_compiled(function, make, device)


@pytest.mark.parametrize("affine", [False, True])
def test_batch_norm_depthwise(affine, device):
    def make(size, device):
        x, *weights = (
            cases.make(shape, device=device, seed=k).requires_grad_()
            for k, shape in enumerate([(2, 3, size, 5), (3, 1, 3, 3)])
        )
        norm = nn.BatchNorm2d(3, affine=affine).to(device)
        return (x, norm, weights), [x, *weights, *norm.parameters()], [norm]

    def function(x, norm, weights):
        return ops.batch_norm_depthwise(x * 2, norm, weights, [2])[0] * 3

    check_compiled(function, make, device)


@pytest.mark.parametrize("affine", [None, False, True])
def test_separable_group(affine, device):
    def make(size, device):
        x, *weights = (
            cases.make(shape, device=device, seed=k).requires_grad_()
            for k, shape in enumerate([(2, 4, size, 5), (4, 1, 3, 3), (4, 4, 1, 1)])
        )
        norm = None if affine is None else nn.BatchNorm2d(4, affine=affine).to(device)
        parameters = [] if norm is None else list(norm.parameters())
        return (x, norm, weights), [x, *weights, *parameters], [n for n in [norm] if n is not None]

    def function(x, norm, weights):
        return ops.separable_group(x * 2, weights[:1], weights[1:], [2], 1, norm)[0] * 3

    check_compiled(function, make, device)


def test_separable_each(device):
    def make(size, device):
        shapes = [(2, 4, size, 5), *[(4, 1, 3, 3)] * 2, *[(4, 4, 1, 1)] * 2]
        x, *weights = (
            cases.make(shape, device=device, seed=k).requires_grad_()
            for k, shape in enumerate(shapes)
        )
        norms = [nn.BatchNorm2d(4, affine=affine).to(device) for affine in (False, True)]
        return (x, norms, weights), [x, *weights, *norms[1].parameters()], norms

    def function(x, norms, weights):
        ys = ops.separable_each([x * 2, x], weights[:2], weights[2:], [2, 1], norms)
        return ys[0] * 3 + ys[1]

    check_compiled(function, make, device)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_without_gradients_any_number_of_candidates(count, device):
    """Where nothing asks for a gradient, the compiler inlines the Functions' forward."""
    xs = [cases.make((2, 3, 4, 5), device=device, seed=k) for k in range(count)]
    x, w = cases.make((2, 12, 4, 5), device=device), torch.rand(count, device=device)
    norms = [nn.BatchNorm2d(3, affine=False).to(device) for _ in xs]
    wide = [nn.BatchNorm2d(12, affine=False).to(device) for _ in xs]
    kernel = cases.make((12, 1, 3, 3), device=device)
    matrix = cases.make((12, 12, 1, 1), device=device)

    def function(x, xs, w):
        y = ops.mixed_batch_norm(xs, w, norms)
        return (
            y,
            ops.mixed_sum(xs, w),
            *ops.multi_target_sum(xs, w.view(1, -1)),
            *ops.multi_target_sum(xs, w.expand(2, -1), norms),
            ops.partial_channel_mix(x, xs, w, 4),
            *ops.partial_channel_node(x[:, :3], [x[:, 3:]] * count, w, 4),
            ops.gate_gradient(y, xs, w),
            *ops.sample_paths(w.view(1, -1), 1, 2),
            *ops.depthwise_group(x, [kernel] * count, [1] * count),
            *ops.pool_pair(x),
            ops.relu_pointwise(x, matrix),
            *ops.separable_group(x, [kernel] * count, [matrix] * count, [1] * count),
            *ops.separable_each([x] * count, [kernel] * count, [matrix] * count, [1] * count, wide),
            ops.sparse_connections(w.view(1, -1), w[:1], [1]),
        )

    for a, b in zip(compiled(function)(x, xs, w), function(x, xs, w), strict=True):
        assert_bitwise(a, b)


# --- registrations: schema, fake kernel, dispatch under the compiler


OPS = (
    "mixed_sum",
    "mixed_sum_backward",
    "mixed_batch_norm",
    "mixed_batch_norm_backward",
    "update_running_statistics",
    "multi_target_sum",
    "multi_target_sum_backward",
    "partial_channel_mix",
    "partial_channel_mix_backward",
    "partial_channel_node",
    "partial_channel_node_backward",
    "sample_paths",
    "sample_paths_backward",
    "gate_gradient",
    "depthwise_group",
    "depthwise_group_backward",
    "pool_pair",
    "pool_pair_backward",
    "pool_pair_carried_backward",
    "relu_pointwise",
    "relu_pointwise_backward",
    "batch_norm_depthwise",
    "batch_norm_depthwise_backward",
    "separable_group",
    "separable_group_backward",
    "separable_each",
    "separable_each_backward",
    "sparse_connections",
    "sparse_connections_backward",
)


#: Elsewhere nothing is carried.
CPU_ONLY = ("pool_pair_carried_backward",)


def arguments_of(name, device):
    """Each case of an op, and its arguments."""
    if name in CPU_ONLY and device.type != "cpu":
        pytest.skip("for the CPU alone")
    found = [(case, arguments) for case, op, arguments in samples(device) if op == name]
    assert found
    return found


def test_every_op_of_the_library_is_listed_here():
    names = {
        s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if "fastnas::" in s.name
    }
    assert names == set(OPS)


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, device):
    """All utilities on one case in each of plain, unusual and empty; the fake kernel on all."""
    mine = arguments_of(name, device)
    op = getattr(torch.ops.fastnas, name).default
    thorough = {0, len(mine) // 2, len(mine) - 1}
    for k, (_, arguments) in enumerate(mine):
        utilities = {} if k in thorough else {"test_utils": "test_faketensor"}
        torch.library.opcheck(op, copy.deepcopy(arguments), **utilities)


@pytest.mark.parametrize("name", OPS)
def test_fake_kernels_give_the_strides_of_the_real_ones(name, device):
    """opcheck compares sizes and dtypes; compiled code also relies on strides."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._pytree import tree_leaves, tree_map

    def facts(found):
        found = [] if found is None else tree_leaves(found)
        return [(t.shape, t.stride(), t.dtype, t.device) for t in found]

    op = getattr(torch.ops.fastnas, name)
    for case, arguments in arguments_of(name, device):
        with FakeTensorMode() as mode:
            fake = tree_map(
                lambda a: mode.from_tensor(a) if isinstance(a, torch.Tensor) else a, arguments
            )
            described = facts(op(*fake))
        real = facts(op(*arguments))
        assert described == real, case


@pytest.mark.parametrize("name", OPS)
def test_a_meta_tensor_among_others_is_refused(name, device):
    """It would choose the fake kernel, which returns tensors without values."""
    from torch.utils._pytree import tree_flatten, tree_unflatten

    op = getattr(torch.ops.fastnas, name)
    arguments = arguments_of(name, device)[0][1]
    leaves, tree = tree_flatten(arguments)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    for i in places if len(places) > 1 else []:
        with_meta = [leaf.to("meta") if k == i else leaf for k, leaf in enumerate(leaves)]
        with cases.raises(ValueError, f"{name}: expected", "meta"):
            op(*tree_unflatten(with_meta, tree))


def test_the_ops_are_private_to_autograd_functions(device):
    """Without their Functions the raw ops are not differentiable, and say so in backward."""
    x = torch.ones(3, device=device, requires_grad=True)
    y = torch.ops.fastnas.mixed_sum([x], torch.ones(1, device=device))
    with pytest.warns(UserWarning, match=r"fastnas::mixed_sum.*autograd"):
        y.sum().backward()


def test_a_compiled_module_keeps_its_buffers_in_step(device):
    class Node(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(nn.BatchNorm2d(3, affine=False) for _ in range(2))

        def forward(self, x, w):
            return ops.mixed_batch_norm([x, x * x], w, list(self.norms))

    node = Node().to(device)
    eager, w = copy.deepcopy(node), torch.tensor([0.3, 0.7], device=device)
    run = torch.compile(node, fullgraph=True, backend="aot_eager")
    for step in range(3):
        x = cases.make((2, 3, 4, 5), device=device, seed=step)
        assert_bitwise(run(x, w), eager(x, w))
    # On a GPU, compiled, an average is moved by other operations than lerp, which may round
    # differently.
    for a, b in zip(node.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert node.norms[0].num_batches_tracked.item() == 3
