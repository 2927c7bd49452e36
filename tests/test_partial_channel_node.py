# SPDX-License-Identifier: Apache-2.0
"""partial_channel_node against concatenation and shuffle in float64, where it stands in a cell."""

from __future__ import annotations

import ops_cases as cases
import pytest
import torch
from ops_cases import assert_all_near, assert_bitwise, assert_layout, raises

from fastnas.nn import cell, source
from fastnas.ops import partial_channel_node
from fastnas.spaces.darts import Supernet

# (E, k, shape of mixed): sizes that loops know when they are compiled, and others; shuffled
# channels of one group that go to both parts; one pixel, no image, more pixels than a task has.
CASES = (
    (2, 4, (2, 4, 8, 8)),
    (5, 4, (3, 8, 5, 7)),
    (3, 4, (2, 16, 3, 3)),
    (2, 2, (2, 8, 4, 5)),
    (4, 2, (3, 5, 3, 1)),
    (3, 3, (2, 4, 9, 3)),
    (1, 4, (1, 9, 1, 17)),
    (2, 4, (5, 3, 1, 1)),
    (2, 4, (1, 1, 1, 1)),
    (2, 4, (0, 4, 3, 3)),
    (3, 4, (2, 4, 40, 41)),
    (64, 2, (1, 3, 2, 3)),
)
NAMES = ("first", "others", "dmixed", "dweights")


def make_case(count, k, shape, dtype, layout, device, weights_need=True):
    n, c, h, w = shape
    mixed = cases.make(shape, dtype, layout, device, seed=7).requires_grad_()
    rests, weights = cases.make_inputs(count, (n, (k - 1) * c, h, w), dtype, layout, device)
    return mixed, rests, weights.detach().requires_grad_(weights_need)


def stock(mixed, rests, weights, k):
    y = cases.shuffled(torch.cat([mixed, cases.stock(rests, weights)], 1), k)
    return y[:, : mixed.shape[1]], y[:, mixed.shape[1] :]


@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)], ids=["both", "first", "others"])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
def test_matches_torch(dtype, layout, used, device, tolerances):
    for count, k, shape in CASES:
        mixed, rests, weights = make_case(count, k, shape, dtype, layout, device)
        leaves = [mixed, weights, *rests]
        exact = cases.in_double(leaves)
        parts = partial_channel_node(mixed, rests, weights, k)
        expected = stock(exact[0], exact[2:], exact[1], k)
        grads = [cases.like_output(parts[i], 50 + i) for i in used]
        found = torch.autograd.grad([parts[i] for i in used], leaves, grads)
        wide = [g.double() for g in grads]
        wanted = torch.autograd.grad([expected[i] for i in used], exact, wide)
        names = [f"{name} of {shape}, {k}" for name in (*NAMES, *["drest"] * count)]
        assert_all_near([*parts, *found], [*expected, *wanted], tolerances, names)
        for t in (*parts, found[0], *found[2:]):
            assert t.dtype == dtype
            if t.numel() and shape[1] > 1:
                assert_layout(t, layout)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("neighbours", [False, True])
def test_reads_the_gradient_of_a_concatenation_where_it_stands(neighbours, layout, device):
    """And one that reaches a part by both ways."""
    for count, k, shape in CASES:
        mixed, rests, weights = make_case(count, k, shape, torch.float64, layout, device)
        leaves = [mixed, weights, *rests]

        def loss(parts, c=shape[1]):
            y = torch.cat([parts[1], parts[0], parts[1][:, :c]], 1)
            z = (y * cases.make(y.shape, y.dtype, device=y.device)).sum()
            return z + parts[0].square().sum() if neighbours else z

        found = torch.autograd.grad(loss(partial_channel_node(mixed, rests, weights, k)), leaves)
        wanted = torch.autograd.grad(loss(stock(mixed, rests, weights, k)), leaves)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("view", cases.VIEWS)
def test_any_strides(view, device):
    mixed, rests, weights = make_case(3, 4, (2, 4, 5, 6), torch.float32, view, device)
    dense = [t.detach().contiguous() for t in rests]
    parts = partial_channel_node(mixed, rests, weights, 4)
    grads = [cases.make(y.shape, layout=view, device=device, seed=9) for y in parts]
    found = torch.autograd.grad(parts, [weights, rests[0]], grads)
    expected = partial_channel_node(mixed.detach().contiguous(), dense, weights, 4)
    for y, e in zip(parts, expected, strict=True):
        assert_bitwise(y, e)
        assert_layout(y, cases.layout_after(view))
    wanted = stock(mixed, rests, weights, 4)
    wanted = torch.autograd.grad(wanted, [weights, rests[0]], grads)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck_and_gradgradcheck(device):
    mixed, rests, weights = make_case(2, 3, (1, 2, 2, 3), torch.float64, "contiguous", device)

    def function(mixed, weights, *rests):
        return partial_channel_node(mixed, rests, weights, 3)

    assert torch.autograd.gradcheck(function, (mixed, weights, *rests))
    assert torch.autograd.gradgradcheck(function, (mixed, weights, *rests))
    only = torch.autograd.gradgradcheck(lambda *t: function(*t)[1], (mixed, weights, *rests))
    assert only


@pytest.mark.parametrize("asked", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1)])
def test_subsets_of_gradients(asked, device):
    mixed, rests, weights = make_case(2, 4, (2, 4, 3, 5), torch.float64, "channels_last", device)
    leaves = [mixed, weights, rests[1]]
    for leaf, need in zip((mixed, weights, rests[1]), asked, strict=True):
        leaf.requires_grad_(bool(need))
    rests[0].requires_grad_(False)
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    loss = sum(y.pow(2).sum() for y in partial_channel_node(mixed, rests, weights, 4))
    wanted = sum(y.pow(2).sum() for y in stock(mixed, rests, weights, 4))
    for a, b in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted, leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_keeps_the_rests_only_for_the_weights(device):
    for need in (False, True):
        mixed, rests, weights = make_case(
            2, 4, (2, 4, 3, 3), torch.float32, "contiguous", device, need
        )
        _, kept = cases.saved_by(
            lambda m=mixed, r=rests, w=weights: partial_channel_node(m, r, w, 4)
        )
        assert mixed.data_ptr() not in kept
        assert need == (rests[0].data_ptr() in kept)


def test_mixed_dtypes(device, tolerances):
    mixed, _, _ = make_case(1, 4, (2, 4, 3, 3), torch.bfloat16, "channels_last", device)
    _, rests, weights = make_case(2, 4, (2, 4, 3, 3), torch.float32, "channels_last", device)
    leaves = [mixed, weights, *rests]
    exact = cases.in_double(leaves)
    parts = partial_channel_node(mixed, rests, weights, 4)
    assert all(y.dtype == torch.float32 for y in parts)
    expected = stock(exact[0], exact[2:], exact[1], 4)
    found = torch.autograd.grad(parts, leaves, [torch.ones_like(y) for y in parts])
    wanted = torch.autograd.grad(expected, exact, [torch.ones_like(y) for y in expected])
    names = (*NAMES, "drest", "drest")
    assert_all_near([*parts, *found], [*expected, *wanted], tolerances, names)
    assert [t.dtype for t in found] == [t.dtype for t in leaves]


@pytest.mark.parametrize("reduction", [False, True])
@pytest.mark.parametrize("k", [2, 4])
def test_nodes_of_a_cell_are_kept_in_two_parts(k, reduction, monkeypatch):
    """They are what whole nodes are, and the state that leaves the cell is one tensor."""
    chosen = Supernet(16, 3, partial_channels=k).double().cells[1 if reduction else 0]
    width = chosen._ops[0]._channels
    inputs = [torch.randn(2, width, 8, 8, dtype=torch.float64) for _ in range(2)]
    weights, factors = torch.rand(14, 8).double().requires_grad_(), torch.rand(14).double()
    results = []
    assert source.is_faster("parts", inputs[0])
    for parts in (True, False):
        monkeypatch.setitem(source._FASTER, "parts", ("cpu",) if parts else ())
        states = cell.run_nodes(inputs, list(chosen._ops), weights, factors)
        assert [len(state) for state in states] == [1, 1, *[2 if parts else 1] * 4]
        y = cell.join_states(states[-4:])
        results.append([y, *torch.autograd.grad(y.square().sum(), [weights])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def ones(*shape):
    return torch.ones(shape)


@pytest.mark.parametrize(
    ("mixed", "rests", "k", "error", "parts"),
    [
        (ones(2, 2, 4, 4), [ones(2, 2, 4, 4)], 1, ValueError, ("k of at least 2", "got 1")),
        (ones(2, 2, 4, 4), [ones(2, 2, 4, 4)], True, TypeError, ("k to be an integer", "bool")),
        (ones(2, 2, 4), [ones(2, 2, 4)], 2, ValueError, ("mixed of shape", "[2, 2, 4]")),
        (ones(2, 2, 4, 4), [ones(2, 4, 4, 4)], 4, ValueError,
         ("rests of shape [2, 6, 4, 4]", "k = 4", "[2, 2, 4, 4]", "got [2, 4, 4, 4]")),
        (ones(2, 2, 4, 4), [ones(2, 2, 4, 4), ones(2, 2, 4, 5)], 2, ValueError, ("rests[1]",)),
        (ones(2, 2, 4, 4), [], 2, ValueError, ("1 to 64 tensors in rests", "got 0")),
        (ones(2, 2, 4, 4).long(), [ones(2, 2, 4, 4)], 2, TypeError, ("mixed[0] is torch.int64",)),
        (ones(2, 2, 4, 4), [ones(2, 2, 4, 4).to("meta")], 2, ValueError, ("rests on cpu", "meta")),
    ],
)  # fmt: skip
def test_refuses(mixed, rests, k, error, parts):
    with raises(error, "partial_channel_node: expected", *parts):
        partial_channel_node(mixed, rests, [1.0] * len(rests), k)


def test_refuses_another_number_of_weights():
    with raises(ValueError, "partial_channel_node: expected one weight per input"):
        partial_channel_node(ones(2, 2, 4, 4), [ones(2, 2, 4, 4)], [1.0, 2.0], 2)


def test_the_raw_ops_check_their_arguments(device):
    raw = torch.ops.fastnas
    g, w = torch.ones(2, 2, 4, 4, device=device), torch.ones(1, device=device)
    for arguments, part in (((g, [g], w, 1), "k of 2"), ((g, [g], w, 3), "rests of shape")):
        with raises(ValueError, "partial_channel_node: expected", part):
            raw.partial_channel_node(*arguments)
    tail = (True, [1], True)
    for arguments, part in (
        ((None, None, [g], w, 2, *tail), "a gradient of a part"),
        ((g, g, [g], w, 3, *tail), "grad_rest of shape [2, 4, 4, 4]"),
        ((g, g.double(), [g], w, 2, *tail), "dtype"),
        ((None, g, [g], w, 4, *tail), "for k = 4"),
        ((g, g, [], w, 2, *tail), "all (1)"),
        ((g, g, [g[..., :3]], w, 2, *tail), "xs[0] of shape"),
    ):
        with raises(ValueError, "partial_channel_node_backward: expected", part):
            raw.partial_channel_node_backward(*arguments)
