# SPDX-License-Identifier: Apache-2.0
"""Where partial_channel_mix puts each channel, and how it pools those no candidate sees."""

from __future__ import annotations

import ops_cases as cases
import pytest
import torch
import torch.nn.functional as F
from ops_cases import assert_bitwise, assert_layout, assert_near, shuffled

from fastnas.ops import partial_channel_mix, reference


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_one_hot_on_skip_is_the_shuffled_input_bitwise(layout, device):
    x = cases.make((2, 16, 5, 7), torch.float32, layout, device)
    processed = x[:, :4]
    y = partial_channel_mix(x, [torch.randn_like(processed), processed], [0.0, 1.0], 4)
    order = [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15]  # C = 16, k = 4
    assert_bitwise(y, x[:, order])
    assert_bitwise(y, shuffled(x, 4))
    assert_layout(y, layout)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_one_hot_on_none_at_stride_two_is_the_pooled_bypass_bitwise(layout, device):
    x = cases.make((2, 12, 6, 8), torch.float32, layout, device)
    none = torch.zeros(2, 3, 3, 4, device=device)
    y = partial_channel_mix(x, [none, torch.randn_like(none)], [1.0, 0.0], 4)
    z = torch.cat([none, F.max_pool2d(x[:, 3:], 2, 2)], 1)
    assert_bitwise(y, shuffled(z, 4))


@pytest.mark.parametrize(("channels", "k"), [(16, 4), (12, 2), (12, 3), (4, 4), (51, 17)])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_shuffle_index_and_inverse(layout, channels, k, device):
    x = torch.arange(channels, dtype=torch.float32, device=device).view(1, -1, 1, 1)
    x = cases.laid_out(x.expand(1, channels, 2, 3), layout)
    c = channels // k
    y = partial_channel_mix(x, [x[:, :c]], [1.0], k)
    assert y[0, :, 1, 2].tolist() == [(o % k) * c + o // k for o in range(channels)]
    if c >= 2:
        back = partial_channel_mix(y, [y[:, :k]], [1.0], c)
        assert_bitwise(back, x)


def test_shuffle_commutes_with_the_sum_over_edges(device, tolerances):
    zs = [cases.make((2, 12, 3, 3), torch.float64, device=device, seed=s) for s in range(3)]
    beta = [0.2, 0.3, 0.5]
    edges = [partial_channel_mix(z, [z[:, :3]], [1.0], 4) for z in zs]
    total = sum(b * z for b, z in zip(beta, zs, strict=True))
    node = partial_channel_mix(total, [total[:, :3]], [1.0], 4)
    assert_near(sum(b * e for b, e in zip(beta, edges, strict=True)), node, tolerances)


# --- pooling


def pool_case(dtype, device, height, width, special):
    """Values of which many tie, among them those of ``special``; all are exact in each dtype."""
    generator = torch.Generator().manual_seed(height)
    x = torch.randint(-2, 3, (2, 6, height, width), generator=generator).to(dtype)
    where = torch.rand(x.shape, generator=generator)
    for k, value in enumerate(special):
        x[(where > 0.2 * k) & (where < 0.2 * (k + 1))] = value
    return x.to(device)


@pytest.mark.parametrize("special", [(), (torch.nan,), (-torch.inf, torch.inf, torch.nan)], ids=str)
@pytest.mark.parametrize("size", [(6, 8), (7, 9), (2, 3), (3, 34)], ids=str)
@pytest.mark.parametrize("layout", [*cases.LAYOUTS, "transposed", "sliced_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=cases.ids)
def test_pools_as_torch_does_with_ties_nan_and_odd_sizes(dtype, layout, size, special, device):
    x = pool_case(dtype, device, *size, special)
    rest = cases.laid_out(x, layout).requires_grad_()
    mixed = cases.laid_out(
        torch.zeros(2, 2, size[0] // 2, size[1] // 2, dtype=dtype, device=device),
        "channels_last" if layout in ("channels_last", "sliced_last") else "contiguous",
    )
    y = partial_channel_mix(rest, [mixed], [1.0], 4)
    exact = x.clone().requires_grad_()
    expected = shuffled(torch.cat([mixed, F.max_pool2d(exact, 2, 2)], 1), 4)
    assert_bitwise(y, expected)
    grad = cases.like_output(y)
    (drest,) = torch.autograd.grad(y, [rest], grad)
    (expected_grad,) = torch.autograd.grad(expected, [exact], grad)
    assert_bitwise(drest, expected_grad)


@pytest.mark.parametrize("rows", [0, 1])
def test_pools_an_input_of_one_row_or_none_to_nothing(rows, device):
    x = torch.randn(2, 4, rows, 6, device=device, requires_grad=True)
    y = partial_channel_mix(x, [torch.zeros(2, 1, 0, 3, device=device)], [1.0], 4)
    assert y.shape == (2, 4, 0, 3)
    (dx,) = torch.autograd.grad(y, [x], torch.empty_like(y))
    assert dx.eq(0).all()


def test_reference_shuffle_is_its_own_inverse_with_the_other_factor():
    z = torch.randn(2, 24, 3, 3)
    assert_bitwise(reference.channel_shuffle(reference.channel_shuffle(z, 4), 6), z)
