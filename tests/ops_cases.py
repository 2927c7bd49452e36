# SPDX-License-Identifier: Apache-2.0
"""What the tests of the ops share: shapes, layouts, norms, the stock formula and comparisons."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last")

# (K, shape): each number that a kernel could round up, cut off, divide by or leave to another task.
SHAPES = (
    (1, (1, 1, 1, 2)),
    (2, (1, 3, 1, 17)),
    (8, (2, 16, 8, 8)),
    (9, (3, 17, 3, 1)),
    (17, (1, 12, 33, 3)),
    (64, (2, 4, 1, 3)),
    (3, (1, 257, 3, 5)),
    (5, (2, 1, 17, 49)),
    (2, (33, 4, 3, 3)),
    (2, (5, 3, 1, 1)),
    (3, (0, 3, 4, 4)),
    (2, (2, 3, 0, 5)),
    (2, (30, 2, 24, 25)),
    (2, (1, 12, 40, 41)),
)

# Views that are no dense tensor of either format, or start where no vector load is aligned.
VIEWS = (
    "contiguous",
    "channels_last",
    "transposed",
    "sliced",
    "sliced_last",
    "expanded",
    "misaligned",
)


def ids(value):
    """Readable test ids of dtypes and of (K, shape)."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], tuple):
        return f"{value[0]}x" + "_".join(map(str, value[1]))
    return None


def laid_out(x, layout):
    """The values of ``x`` in another layout; "expanded" repeats its first channel."""
    n, c, h, w = x.shape
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "sliced":
        return x.new_zeros(n, c + 3, h, w + 1)[:, 2 : c + 2, :, :w].copy_(x)
    if layout == "sliced_last":
        return x.new_zeros(n, h, w, c + 3)[..., 1 : c + 1].permute(0, 3, 1, 2).copy_(x)
    if layout == "expanded":
        return x[:, :1].expand(x.shape)
    assert layout == "misaligned"
    return x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x)


def draw(shape, seed):
    """Uniform in -2 .. 2, from integers: torch.randn gives other bits where vectors are wider."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(1 << 20), 1 << 20, shape, generator=generator) / float(1 << 19)


def make(shape, dtype=torch.float32, layout="contiguous", device="cpu", seed=0):
    x = draw(shape, seed).to(device, dtype)
    return laid_out(x, layout) if len(shape) == 4 else x


def make_inputs(count, shape, dtype=torch.float32, layout="contiguous", device="cpu", seed=0):
    """K tensors that require gradients and K weights of both signs, in the dtype of the sums."""
    xs = [make(shape, dtype, layout, device, seed + k).requires_grad_() for k in range(count)]
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    weights = draw((count,), seed + 1000).div(count**0.5).to(device, acc)
    return xs, weights.requires_grad_()


def make_norms(count, channels, device="cpu", first=0):
    """K BatchNorms of every kind in turn, and a candidate without one between them."""
    kinds = (
        lambda: nn.BatchNorm2d(channels, affine=False),  # as in the search networks of DARTS
        lambda: None,
        lambda: nn.BatchNorm2d(channels, eps=1e-3, momentum=0.3),
        lambda: nn.BatchNorm2d(channels).eval(),
        lambda: nn.BatchNorm2d(channels, momentum=None),
        lambda: nn.BatchNorm2d(channels, affine=False, track_running_stats=False),
        lambda: nn.BatchNorm2d(channels, affine=False, eps=1e-2).eval(),
    )
    norms = [kinds[(first + k) % len(kinds)]() for k in range(count)]
    with torch.no_grad():
        for k, norm in enumerate(norms):
            if norm is None:
                continue
            for i, t in enumerate((norm.weight, norm.bias, norm.running_mean)):
                if t is not None:
                    t.copy_(draw((channels,), 2000 + 4 * k + i))
            if norm.running_var is not None:
                norm.running_var.copy_(draw((channels,), 2003 + 4 * k).abs() + 0.5)
    return on_device(norms, device)


def on_device(norms, device, dtype=None):
    return [norm if norm is None else norm.to(device, dtype) for norm in norms]


def doubled(norms):
    return [norm if norm is None else copy.deepcopy(norm).double() for norm in norms]


def in_double(tensors):
    """Leaves of the same values in float64: what an oracle computes with."""
    return [t.detach().double().contiguous().requires_grad_(t.requires_grad) for t in tensors]


def affine_parameters(norms):
    return [p for norm in norms if norm is not None for p in norm.parameters()]


def stock(xs, weights, norms=None):
    """The loop that the fused ops stand for, with torch's own modules."""
    norms = [None] * len(xs) if norms is None else norms
    terms = [x if norm is None else norm(x) for x, norm in zip(xs, norms, strict=True)]
    y = weights[0] * terms[0]
    for w, term in zip(weights[1:], terms[1:], strict=True):
        y = y + w * term
    return y


def shuffled(z, k):
    """Upstream's channel shuffle."""
    n, channels, h, w = z.shape
    return z.view(n, k, channels // k, h, w).transpose(1, 2).contiguous().view(n, channels, h, w)


def like_output(y, seed=99):
    """An upstream gradient in the dtype and layout of ``y``."""
    return torch.empty_like(y).copy_(make(y.shape, y.dtype, device=y.device, seed=seed))


def assert_near(actual, expected, tolerances, what=""):
    """Equal but for a few units in the last place of the largest element, in ``actual``'s dtype."""
    assert actual.shape == expected.shape, what
    if not actual.numel():
        return
    tolerance = tolerances[actual.dtype]
    expected = expected.detach().double().to(actual.device)
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(
        actual.detach().double(),
        expected,
        rtol=tolerance.rtol,
        atol=tolerance.atol * scale,
        msg=lambda text: f"{what}: {text}",
    )


def assert_all_near(actual, expected, tolerances, names):
    for a, e, name in zip(actual, expected, names, strict=True):
        assert_near(a, e, tolerances, name)


def assert_buffers_near(norms, expected, tolerances):
    """Running statistics as expected, counters exactly so."""
    for k, (norm, other) in enumerate(zip(norms, expected, strict=True)):
        if norm is None or norm.running_mean is None:
            continue
        assert_near(norm.running_mean, other.running_mean, tolerances, f"running_mean {k}")
        assert_near(norm.running_var, other.running_var, tolerances, f"running_var {k}")
        seen, wanted = (int(n.num_batches_tracked) for n in (norm, other))
        assert seen == wanted, f"counter {k}"


def assert_bitwise(actual, expected, what=""):
    """Equal in every bit but the sign of zeros and the payload of NaN."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, what
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


def assert_layout(x, layout, what=""):
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    assert x.is_contiguous(memory_format=formats[layout]), f"{what} has strides {x.stride()}"


def layout_after(view):
    """The format of an output whose first operand is such a view."""
    return "channels_last" if view in ("channels_last", "sliced_last") else "contiguous"


def saved_by(function):
    """Result of ``function`` and the addresses of what it kept for backward.

    But for empty tensors, and the single number that norms leave to whoever looks.
    """
    kept = []

    def pack(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function()
    return result, {t.data_ptr() for t in kept if t.numel() and t.dim()}


def raises(error, *parts):
    """pytest.raises that wants every part in the message, in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(part) for part in parts))
