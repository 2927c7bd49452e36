# SPDX-License-Identifier: Apache-2.0
"""Tensors of more than 2^31 elements on a GPU: offsets and grids beyond 32 bits.

Without batch statistics an op is local, so that a slice of its result is the result of the slices,
bit for bit. What is summed over everything has inputs whose sums are known.
"""

from __future__ import annotations

import pytest
import torch
from ops_cases import assert_bitwise
from torch import nn

from fastnas import _extension, ops

IMAGES, CHANNELS, SIDE = 131_074, 16, 32  # an even number of images: 2^31 and 32,768 elements
NEEDED = 40 << 30


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not _extension.CUDA_VERSION, reason="built without CUDA kernels"),
]
LAYOUTS = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["planes", "columns"]
)
PLACES = (0, IMAGES // 2, IMAGES - 1)


@pytest.fixture(autouse=True)
def _memory():
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < NEEDED:
        pytest.skip(f"needs {NEEDED >> 30} GiB of free GPU memory")
    yield
    torch.cuda.empty_cache()


def images(memory_format, channels=CHANNELS, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    size = (IMAGES, channels, SIDE, SIDE)
    x = torch.empty(size, dtype=torch.bfloat16, device="cuda", memory_format=memory_format)
    return x.normal_(generator=generator).requires_grad_()


def check_slices(run, tensors, grad):
    """``run(*tensors)`` and its gradients at a few images are those of these images alone."""
    y = run(*tensors)
    grads = torch.autograd.grad(y, tensors, grad)
    for place in PLACES:
        part = slice(place, place + 1)
        alone = [t.detach()[part].clone().requires_grad_() for t in tensors]
        small = run(*alone)
        assert_bitwise(y[part], small, f"output {place}")
        expected = torch.autograd.grad(small, alone, grad[part].clone())
        for k, (a, b) in enumerate(zip(grads, expected, strict=True)):
            assert_bitwise(a[part], b, f"gradient {k} {place}")


@LAYOUTS
def test_mixed_sum(memory_format):
    xs = [images(memory_format, seed=k) for k in range(2)]
    grad = images(memory_format, seed=9).detach()
    check_slices(lambda *xs: ops.mixed_sum(xs, [0.5, -2.0]), xs, grad)


@LAYOUTS
def test_mixed_batch_norm_with_running_statistics(memory_format):
    xs = [images(memory_format, seed=k) for k in range(2)]
    grad = images(memory_format, seed=9).detach()
    norms = [nn.BatchNorm2d(CHANNELS).cuda().eval(), None]
    check_slices(lambda *xs: ops.mixed_batch_norm(xs, [0.5, -2.0], norms), xs, grad)


@LAYOUTS
@pytest.mark.parametrize("stride", [1, 2])
def test_partial_channel_mix(memory_format, stride):
    c, size = CHANNELS // 4, SIDE // stride
    whole = images(memory_format).detach()
    rest = whole[:, c:].requires_grad_()
    x = whole[:, :c, :size, :size].clone().contiguous(memory_format=memory_format)
    x.requires_grad_()
    grad = images(memory_format, seed=9).detach()[:, :, :size, :size]
    grad = grad.clone().contiguous(memory_format=memory_format)
    check_slices(lambda x, rest: ops.partial_channel_mix(rest, [x], [0.5], 4), [x, rest], grad)


@LAYOUTS
def test_sums_over_everything(memory_format):
    """x is 1 in even images and -1 in odd ones; g is 1 in the last image and 0 elsewhere."""
    x = images(memory_format).detach()
    x[0::2], x[1::2] = 1, -1
    x.requires_grad_()
    g = torch.zeros_like(x)
    g[-1] = 1
    weights = torch.tensor([0.5], device="cuda", requires_grad=True)

    y = ops.mixed_sum([x], weights)
    dw, dx = torch.autograd.grad(y, [weights, x], g)
    assert dw.item() == -CHANNELS * SIDE * SIDE
    assert dx[-1].unique().tolist() == [0.5] and dx[0].unique().tolist() == [0.0]
    del y, dx

    norm = nn.BatchNorm2d(CHANNELS, affine=False, momentum=1.0).cuda()
    y = ops.mixed_batch_norm([x], weights, [norm])
    assert norm.running_mean.abs().max() < 1e-5
    torch.testing.assert_close(norm.running_var, torch.ones_like(norm.running_var))
    assert y[0].unique().tolist() == [0.5] and y[-1].unique().tolist() == [-0.5]  # as bfloat16
    dw, dx = torch.autograd.grad(y, [weights, x], g)
    torch.testing.assert_close(dw, torch.full_like(dw, -CHANNELS * SIDE * SIDE), rtol=1e-4, atol=0)
    assert dx[-1].unique().tolist() == [0.5]  # less a millionth: the image is one of 131,074

    probs = torch.tensor([0.25, 0.75], device="cuda")
    alpha = ops.gate_gradient(g, [x.detach(), None], probs)
    assert alpha.tolist() == [-0.25 * 0.75 * 16384, 0.75 * 0.25 * 16384]
