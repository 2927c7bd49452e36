# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels, executed on the host, pass the tests of the ops.

Each test file of an op runs once more in a process of its own whose ops are csrc/cuda on fibers
(tests/simt): random order of threads and blocks, guarded and poisoned memory.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import ops_cases as cases
import pytest
import torch
from ops_calls import CALLS, WITHOUT_IMAGES
from ops_samples import samples
from simt import harness
from test_separable_each import make_case as make_each_case
from torch.utils._pytree import tree_leaves

from fastnas import _extension
from fastnas.ops import (
    batch_norm_depthwise,
    depthwise_group,
    mixed_batch_norm,
    mixed_sum,
    multi_target_sum,
    partial_channel_mix,
    pool_pair,
    relu_pointwise,
    separable_each,
    separable_group,
)

pytestmark = [
    pytest.mark.skipif(harness.compiler() is None, reason="no g++"),
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # compiles
]
TESTS = Path(__file__).resolve().parent

# pytest -k of the tests of an op. Not those of what cannot hold on a GPU (counts are checked on the
# host there), or that take minutes for draws that the reference has already been compared with.
SELECTED = {
    "sample_paths": "not frequencies and not every_bit and not counts",
    # Thousands of pixels of the largest images say nothing new.
    "depthwise_group": "not 97_90",
    "batch_norm_depthwise": "not 97_90",
    # With many channels composed of PyTorch's convolutions, which are the CPU's here; in bfloat16
    # oneDNN's are wrong on some CPUs (the gradient of 256 and more channels from few).
    "relu_pointwise": "not threads and not bfloat16",
    # On a GPU the mean of a channel with an infinity is NaN.
    "mixed_batch_norm_statistics": "not infinity",
    # The CPU's derivatives of derivatives.
    "separable_each": "not gradcheck",
    # Composed of ops that are tested here as they are.
    "separable_group": "several or subset or without or raw_ops or any_view",
}


@pytest.fixture(scope="module")
def simt():
    return harness.build()


@pytest.mark.parametrize(
    "op",
    [
        "mixed_sum",
        "mixed_batch_norm",
        "mixed_batch_norm_statistics",
        "multi_target_sum",
        "partial_channel_mix",
        "partial_channel_node",
        "gate_gradient",
        "sample_paths",
        "depthwise_group",
        "pool_pair",
        "relu_pointwise",
        "ops_alignment",
        "batch_norm_depthwise",
        "separable_each",
        "separable_group",
        "sparse_connections",
    ],
)
def test_passes_the_tests_of_the_op(op, simt):
    # Not -m pytest: that would put the folder it starts in, and fastnas if it is there, first.
    run = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", run, "-q", "-p", "simt.plugin", "-p", "no:cacheprovider"]
    command += [str(TESTS / f"test_{op}.py"), "-k", SELECTED.get(op, "test"), "-m", ""]
    path = os.pathsep.join([str(TESTS), os.environ["PYTHONPATH"]])
    environment = {**os.environ, "PYTHONPATH": path, "FASTNAS_TEST_DEVICE": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@contextlib.contextmanager
def cuda_kernels(simt):
    names = [n for op in harness.OPS for n in (op, f"{op}_backward")]
    with harness.kernels(simt, [n for n in names if hasattr(torch.ops.fastnas, n)]):
        yield


def has_cuda_kernels(name):
    return any(name.startswith(op) for op in harness.OPS)


SHAPED = [
    n
    for n in CALLS
    if " of " not in n
    and n not in WITHOUT_IMAGES
    # Which leave many channels to PyTorch: test_products_of_few_channels.
    and not n.startswith(("separable", "relu"))
    and has_cuda_kernels(n)
]


def shapes(dtype):
    """Planes of so many values, rows of so many channels: around a vector, around a block of them.

    Beyond a block, rows are cut in chunks; of planes, a thread takes two vectors.
    """
    wide = 16 // dtype.itemsize
    block = 256 * wide
    near = {wide - 1, wide, wide + 1, block - 1, block + wide}
    for values in sorted(near | {2 * block - wide, 2 * block, 2 * block + 1}):
        yield "contiguous", (2, 2, 1, values)
    for channels in sorted({wide - 1, wide + 1, block - wide, block, block + wide} - {1}):
        yield "channels_last", (2, channels, 2, 1)


#: Depthwise convolutions in one dtype: in others a block has more values, each of dozens of taps,
#: and takes half a minute here.
AROUND = [
    pytest.param(name, dtype, id=f"{name}-{cases.ids(dtype)}")
    for name in SHAPED
    for dtype in cases.DTYPES
    if dtype == torch.float64 or not name.startswith("depthwise")
]


@pytest.mark.parametrize(("name", "dtype"), AROUND)
def test_shapes_around_vectors_and_blocks(name, dtype, simt, tolerances, monkeypatch):
    """Against reference.py in float64."""
    for layout, shape in shapes(dtype):
        call = CALLS[name]("cpu", layout=layout, dtype=dtype, shape=shape)
        before = simt.launches()
        with cuda_kernels(simt):
            seen = call.run(call.inputs)
        assert simt.launches() > before
        with monkeypatch.context() as patch:
            patch.setattr(_extension, "_DEVICES", frozenset())  # the reference runs
            expected = call.run(cases.in_double(call.inputs))
        for k, (a, b) in enumerate(zip(seen, expected, strict=True)):
            cases.assert_near(a, b, tolerances, f"{shape} result {k}")


@pytest.mark.parametrize(
    "op",
    [
        "mixed_batch_norm",
        "mixed_sum",
        "gate_gradient",
        "sample_paths",
        "depthwise_group",
        "sparse_connections",
        "multi_target_sum",
    ],
)
def test_more_blocks_than_a_grid_takes_are_an_error(op, simt):
    call = CALLS[op]("cpu")
    call.run(call.inputs)
    simt.set_grid_limit(0)
    try:
        with cuda_kernels(simt), pytest.raises(RuntimeError, match="CUDA error 9"):
            call.run(call.inputs)
    finally:
        simt.set_grid_limit((1 << 31) - 1)


@pytest.mark.parametrize("limit", [1, 100])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_indices_beyond_the_narrow_ones(limit, layout, simt, tolerances):
    """With a limit of 2^31 lowered, small tensors go the way of those with more elements."""
    xs, weights = cases.make_inputs(3, (3, 4, 8, 6), torch.float32, layout)
    rest = cases.make((3, 12, 17, 13), torch.float32, layout, seed=9).requires_grad_()
    norms = cases.make_norms(3, 4)
    leaves = [weights, *xs]
    kernels = [cases.make((4, 1, k, k), torch.float32, seed=k).requires_grad_() for k in (3, 5)]

    def results():
        before = simt.launches()
        out = []
        for y in (
            mixed_sum(xs, weights),
            mixed_batch_norm(xs, weights, norms),
            *multi_target_sum(xs, weights * torch.tensor([[1.0], [0.5]]), norms)[1:],
            partial_channel_mix(rest, xs, weights, 4, norms),
        ):
            inputs = leaves if y.shape[1] == 4 else [*leaves, rest]
            out += [y, *torch.autograd.grad(y, inputs, cases.like_output(y))]
        for stride in (1, 2):
            y = torch.stack(depthwise_group(rest[:, :4], kernels, [1, 2], stride))
            out += [y, *torch.autograd.grad(y, [rest, *kernels], cases.like_output(y))]
            y = torch.stack(pool_pair(rest, stride))
            out += [y, *torch.autograd.grad(y, [rest], cases.like_output(y))]
        return out, simt.launches() - before

    expected, launches = results()
    assert launches == 0
    with cuda_kernels(simt):
        ordinary, _ = results()
        simt.set_narrow_limit(limit)
        try:
            wide, launches = results()
        finally:
            simt.set_narrow_limit(1 << 31)
    assert launches > 10
    for k, (a, b, c) in enumerate(zip(wide, ordinary, expected, strict=True)):
        cases.assert_bitwise(a, b, str(k))
        cases.assert_near(a, c, tolerances, str(k))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=cases.ids)
def test_norms_before_dilations_that_no_tile_reaches(dtype, layout, training, simt, tolerances):
    """Those kernels read a table of weights, and the norm's sums have a pass of their own."""
    F = torch.nn.functional
    for stride, channels in ((1, 8), (2, 3)):
        x = cases.make((2, channels, 9, 7), dtype, layout).requires_grad_()
        kernels = [cases.make((channels, 1, k, k), seed=k).requires_grad_() for k in (3, 5)]
        (norm,) = cases.make_norms(1, channels, first=2)
        norm.train(training)
        leaves = [x, *kernels, norm.weight, norm.bias]
        with cuda_kernels(simt):
            ys = batch_norm_depthwise(x, norm, kernels, [3, 1], stride)
            grads = [cases.like_output(y, seed=i) for i, y in enumerate(ys)]
            results = [*ys, *torch.autograd.grad(ys, leaves, grads)]
        x, *exact, gamma, beta = cases.in_double(leaves)
        statistics = None if training else norm.running_mean.double()
        variance = None if training else norm.running_var.double()
        h = F.batch_norm(x, statistics, variance, gamma, beta, training, eps=norm.eps).relu()
        expected = [
            F.conv2d(h, w, None, stride, d * (w.shape[2] // 2), d, channels)
            for w, d in zip(exact, (3, 1), strict=True)
        ]
        inputs = [x, *exact, gamma, beta]
        expected += torch.autograd.grad(expected, inputs, [g.double() for g in grads])
        for k, (a, b) in enumerate(zip(results, expected, strict=True)):
            cases.assert_near(a, b, tolerances, f"stride {stride} result {k}")


@pytest.mark.parametrize(("count", "backward"), [(1, 2), (8, 2), (9, 3)])
def test_the_backward_of_a_sum_is_one_pass(count, backward, simt, tolerances):
    """And one to fold the sums; with more inputs than a pass takes, another for the gradients."""
    xs, weights = cases.make_inputs(count, (2, 3, 5, 12), torch.bfloat16)
    wanted = [weights, *xs[1:]]
    with cuda_kernels(simt):
        y = mixed_sum(xs, weights)
        before = simt.launches()
        results = torch.autograd.grad(y, wanted, cases.like_output(y))
        assert simt.launches() - before == backward
    weights, *exact = cases.in_double([weights, *xs])
    expected = torch.autograd.grad(
        sum(w * x for w, x in zip(weights, exact, strict=True)),
        [weights, *exact[1:]],
        cases.like_output(y).double(),
    )
    for k, (a, b) in enumerate(zip(results, expected, strict=True)):
        cases.assert_near(a, b, tolerances, str(k))


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
def test_products_of_few_channels(dtype, layout, simt, tolerances):
    """Around fours, eights and the most of channels; around vectors, tiles and blocks of pixels."""
    shapes = [(1, 1), (4, 4), (3, 5), (16, 16), (64, 7), (5, 64), (20, 36), (64, 64), (63, 33)]
    pixels = [(1, 1, 1), (1, 1, 3), (2, 2, 2), (3, 5, 7), (1, 4, 32), (2, 8, 8), (1, 1, 129)]
    pixels += [(2, 23, 23), (1, 33, 64)]
    seen = 0
    for n, (inputs, outputs) in enumerate(shapes):
        for m, (N, H, W) in enumerate(pixels):
            if (n + m) % 3:  # every pair of neighbours is enough
                continue
            x = cases.make((N, inputs, H, W), dtype, layout, seed=n).requires_grad_()
            weight = cases.make((outputs, inputs, 1, 1), dtype, seed=m).requires_grad_()
            grad = cases.make((N, outputs, H, W), dtype, layout, seed=n + m)
            before = simt.launches()
            with cuda_kernels(simt):
                y = relu_pointwise(x, weight)
                results = [y, *torch.autograd.grad(y, [x, weight], grad)]
            assert simt.launches() == before + 4
            x, weight, grad = cases.in_double([x, weight, grad])
            y = torch.nn.functional.conv2d(x.relu(), weight)
            expected = [y, *torch.autograd.grad(y, [x, weight], grad)]
            for k, (a, b) in enumerate(zip(results, expected, strict=True)):
                cases.assert_near(a, b, tolerances, f"{(inputs, outputs, N, H, W)} result {k}")
            seen += 1
    assert seen == 27


def test_launches_of_separable_convolutions(simt):
    """What a call costs on a GPU: small images are done sooner than their kernels are launched."""
    x = cases.make((2, 8, 6, 6), torch.float32, "contiguous").requires_grad_()
    weights = [
        cases.make(size).requires_grad_()
        for size in [(8, 1, 3, 3), (8, 1, 5, 5), (8, 1, 5, 5), *[(8, 8, 1, 1)] * 3]
    ]
    norm = torch.nn.BatchNorm2d(8)
    for arguments, forward, backward in (
        ({}, 2, 8),  # convolutions, products; back: both and, of a size each, the weights' sums
        # Statistics before, running ones behind; back: coefficients, sums, gradient.
        ({"norm": norm}, 5, 11),
    ):
        with cuda_kernels(simt):
            before = simt.launches()
            ys = separable_group(x, weights[:3], weights[3:], [1, 1, 2], **arguments)
            assert simt.launches() - before == forward
            before = simt.launches()
            torch.autograd.grad(ys, [x, *weights], [cases.like_output(y) for y in ys])
            assert simt.launches() - before == backward


def test_launches_serve_all_sources(simt):
    """As many as for one: those of the norm and of one convolution of either size."""
    for changes, forward, backward in (
        ({}, 5, 11),
        ({"layouts": ("contiguous", "channels_last")}, 3 * 4 + 1, 3 * 10),  # one after the other
    ):
        *tensors, norms = make_each_case(("plain", "affine", "plain"), "cpu", **changes)
        with cuda_kernels(simt):
            before = simt.launches()
            ys = separable_each(*tensors, norms)
            assert simt.launches() - before == forward
            before = simt.launches()
            torch.autograd.grad(ys, [*tensors[0], *tensors[1], *tensors[2]], ys)
            assert simt.launches() - before == backward


def test_outputs_share_no_memory(simt):
    """As torch.library asks of an op; opcheck sees it on a GPU alone."""
    seen = 0
    with cuda_kernels(simt):
        for name, op, arguments in samples("cpu"):
            if not has_cuda_kernels(op):
                continue
            if name.endswith("carried"):
                with pytest.raises(
                    ValueError, match="carried statistics and gradients are for the CPU alone"
                ):
                    getattr(torch.ops.fastnas, op)(*arguments)
                continue
            outputs = getattr(torch.ops.fastnas, op)(*arguments)
            storages = [
                t.untyped_storage()._cdata
                for t in tree_leaves(outputs)
                if isinstance(t, torch.Tensor)
            ]
            assert len(set(storages)) == len(storages), f"{op} {name}"
            seen += 1
    assert seen > 50
