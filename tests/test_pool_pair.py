# SPDX-License-Identifier: Apache-2.0
"""pool_pair against torch's own pools in float64, its place among candidates, what it refuses."""

from __future__ import annotations

import ops_cases as cases
import pytest
import torch
import torch.nn.functional as F
from ops_cases import assert_all_near, assert_layout, raises

from fastnas import ops
from fastnas.nn.candidates import build_candidate
from fastnas.nn.fused import SharedPools
from fastnas.nn.recompute import Recompute
from fastnas.nn.source import evaluate_source, make_recipe
from fastnas.ops import pool_pair

# (N, C, H, W): around vectors of every width; one row, one column; more rows than are packed at
# once.
SHAPES = (
    (1, 1, 1, 1),
    (2, 16, 8, 8),
    (3, 4, 8, 7),
    (5, 3, 4, 9),
    (1, 17, 9, 3),
    (2, 5, 1, 19),
    (3, 6, 13, 1),
    (1, 1, 600, 5),
    (0, 3, 4, 4),
)


def stock(x, stride):
    return F.max_pool2d(x, 3, stride, 1), F.avg_pool2d(x, 3, stride, 1, count_include_pad=False)


def image(shape, kind, dtype=torch.float32, layout="contiguous", device="cpu"):
    """Numbers; or few different ones, so that most windows have ties; or many NaN and -inf."""
    x = cases.make(shape, torch.float64, device=device, seed=1)
    if kind != "plain":
        x = x.round().clamp(-1, 1)
    if kind == "special":
        x[cases.make(shape, device=device, seed=2) > 1] = torch.nan
        x[cases.make(shape, device=device, seed=3) > 0.5] = -torch.inf
    return cases.laid_out(x.to(dtype), layout).requires_grad_()


@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)], ids=["both", "max", "avg"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("kind", ["plain", "ties", "special"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
def test_matches_torch(dtype, kind, layout, stride, used, device, tolerances):
    for shape in SHAPES:
        x = image(shape, kind, dtype, layout, device)
        exact = x.detach().double().requires_grad_()
        ys, expected = pool_pair(x, stride), stock(exact, stride)
        grads = [cases.like_output(y, 50 + i) for i, y in enumerate(ys)]
        (dx,) = torch.autograd.grad([ys[i] for i in used], x, [grads[i] for i in used])
        wide = [grads[i].double() for i in used]
        (exact_dx,) = torch.autograd.grad([expected[i] for i in used], exact, wide)
        if kind == "special":  # compared where both are numbers, and NaN in the same places
            pairs = list(zip((*ys, dx), (*expected, exact_dx), strict=True))
            for a, b in pairs:
                torch.testing.assert_close(a.isnan(), b.isnan())
            ys = [a.nan_to_num(0.0, 9.0, -9.0) for a, _ in pairs]
            expected = [b.nan_to_num(0.0, 9.0, -9.0) for _, b in pairs]
        else:
            ys, expected = [*ys, dx], [*expected, exact_dx]
        names = [f"{name} of {shape}" for name in ("max", "avg", "dx")]
        assert_all_near(ys, expected, tolerances, names)
        assert all(y.dtype == dtype for y in ys)
        if dx.numel() and shape[1] > 1:
            for t in (*pool_pair(x, stride), dx):
                assert_layout(t, layout)


@pytest.mark.parametrize("stride", [1, 2])
def test_gradcheck_and_gradgradcheck(stride, device):
    x = image((1, 2, 3, 4), "plain", torch.float64, device=device)
    assert torch.autograd.gradcheck(lambda x: pool_pair(x, stride), (x,))
    assert torch.autograd.gradgradcheck(lambda x: pool_pair(x, stride), (x,))


def test_keeps_its_input_and_no_indices(device):
    x = image((2, 3, 4, 5), "plain", device=device)
    _, addresses = cases.saved_by(lambda: pool_pair(x))
    assert addresses == {x.data_ptr()}


def test_autocast_leaves_it_alone(device):
    x = image((2, 3, 4, 5), "plain", device=device)
    with torch.autocast(device.type, torch.bfloat16):
        assert [y.dtype for y in pool_pair(x)] == [y.dtype for y in stock(x, 1)]


@pytest.mark.parametrize(
    ("x", "stride", "error", "parts"),
    [
        (torch.ones(3, 4, 4), 1, ValueError, ("x of shape (N, C, H, W)", "[3, 4, 4]")),
        (torch.ones(1, 1, 1, 1).expand(1, 1, 1, 2**30 + 1), 1, ValueError, ("2^30", "1073741825")),
        (torch.ones(2, 3, 4, 4), 3, ValueError, ("stride 1 or 2", "got 3")),
        (torch.ones(2, 3, 4, 4), 1.0, ValueError, ("stride 1 or 2", "got 1.0")),
        (torch.ones(2, 3, 4, 4), "1", ValueError, ("stride 1 or 2", "got '1'")),
        (torch.ones(2, 3, 4, 4).long(), 1, TypeError, ("int64",)),
        (None, 1, TypeError, ("x to be a tensor", "NoneType")),
    ],
)
def test_refuses(x, stride, error, parts):
    with raises(error, "pool_pair: expected", *parts):
        pool_pair(x, stride)
    if x is not None and isinstance(stride, int):  # PyTorch refuses others itself
        with raises(error, "pool_pair: expected"):
            torch.ops.fastnas.pool_pair(x, stride, False)


def test_the_raw_backward_checks_its_arguments(device):
    op, g = torch.ops.fastnas.pool_pair_backward, torch.ones(2, 3, 4, 4, device=device)
    for arguments, part in (
        ((g, g, g, [4], 1), "size of 2 entries"),
        ((g, g[..., :3], g, [4, 4], 1), "gradients of shape [2, 3, 4, 4]"),
        ((g, None, g[..., :3], [4, 4], 1), "x of shape [2, 3, 4, 4]"),
        ((g, None, g.new_empty(0), [4, 4], 1), "x of shape [2, 3, 4, 4]"),
        ((g[0], None, g, [4, 4], 1), "gradients of shape (N, C, H, W)"),
    ):
        with raises(ValueError, "pool_pair_backward: expected", part):
            op(*arguments)


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_pools_of_one_state_are_one_call(stride, low, monkeypatch):
    names = ("max_pool_3x3", "avg_pool_3x3")
    recipes = [make_recipe([build_candidate(n, 4, stride)]) for n in (*names, *names)]
    calls = []
    monkeypatch.setattr(ops, "pool_pair", lambda *a: calls.append(a[1]) or pool_pair(*a))
    x = image((2, 4, 8, 8), "plain")
    again = Recompute()
    run = again.run if low else (lambda layer, x: layer(x))
    (a, b), (c, d) = evaluate_source(x, [recipes[:2], recipes[2:]], run)
    assert calls == [stride] and a is c and b is d
    ((alone,),) = evaluate_source(x, [recipes[:1]], run)
    assert calls == [stride]
    for y, z in zip((a, b, alone), (*stock(x, stride), a), strict=True):
        torch.testing.assert_close(y, z)
    (a * b).sum().backward()
    expected = image((2, 4, 8, 8), "plain")
    top, mean = stock(expected, stride)
    (top * mean).sum().backward()
    torch.testing.assert_close(x.grad, expected.grad)


def test_what_is_shared_says_its_stride():
    assert SharedPools(2)(image((1, 1, 4, 4), "plain"))[0].shape == (1, 1, 2, 2)
