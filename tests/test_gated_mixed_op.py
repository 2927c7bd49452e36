# SPDX-License-Identifier: Apache-2.0
"""GatedMixedOp and its gates: one path runs, all logits learn (spec: ProxylessNAS, section 3.2)."""

from __future__ import annotations

import pytest
import torch
from data_parallel import STEPS, Searched, freeze, search_steps
from gated_cases import logits, rest
from torch import nn

from fastnas.nn.candidates import Zero
from fastnas.nn.gated import GatedMixedOp, frozen_statistics
from fastnas.nn.gates import Gate
from fastnas.spaces.mbconv.layers import MBConv


def edge(C=8, zero=True):
    blocks = [MBConv(C, C, k, 1, e) for k, e in ((3, 3), (5, 3), (7, 6))]
    op = GatedMixedOp([*blocks, Zero(1)] if zero else blocks)
    for p in op.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return op.double()


def full_gate(op, active, alpha):
    return Gate(active, tuple(rest(active, len(op.candidate_ops))), alpha)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_frozen_statistics(norm):
    """Neither kind of norm moves them, or reads them while it trains."""
    frozen, free = (norm(3, track_running_stats=True) for _ in range(2))
    x = torch.randn(4, 3, 5, 5)
    before = {name: b.clone() for name, b in frozen.named_buffers()}
    with frozen_statistics(frozen):
        y = frozen(x)
    torch.testing.assert_close(y, free(x))
    assert frozen.track_running_stats
    for name, b in frozen.named_buffers():
        assert torch.equal(b, before[name])
        if name.startswith("running"):
            assert not torch.equal(b, free.get_buffer(name))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("active", range(4))
def test_against_all_outputs_weighted_by_gates(active, residual):
    """The mode ``full`` of the released code: sum_j g_j o_j(x), all but the active one detached."""
    op, alpha = edge(), logits((0.3, -0.2, 0.1, 0.5))
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    gates = nn.functional.one_hot(torch.tensor(active), 4).double().requires_grad_()
    with frozen_statistics(op):
        outputs = [c(x) for c in op.candidate_ops]
    mixed = sum(
        g * (o if j == active else o.detach())
        for j, (g, o) in enumerate(zip(gates, outputs, strict=True))
    )
    plain = mixed + x if residual else mixed
    loss = (plain.sin() * weight).sum()
    dgates, dx = torch.autograd.grad(loss, (gates, x))
    p = torch.softmax(alpha, 0)
    dalpha = p * (dgates - (p * dgates).sum())

    y = op(x, full_gate(op, active, alpha), residual=residual)
    torch.testing.assert_close(y, plain)
    loss = (y.sin() * weight).sum()
    found_alpha, found_x = torch.autograd.grad(loss, (alpha, x), materialize_grads=True)
    torch.testing.assert_close(found_alpha, dalpha)
    torch.testing.assert_close(found_x, dx)


@pytest.mark.parametrize("active", range(4))
def test_as_the_first_layer(active):
    op, alpha = edge(), logits((0.3, -0.2, 0.1, 0.5))
    op.requires_grad_(False)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    y = op(x, full_gate(op, active, alpha))
    (found,) = torch.autograd.grad(y.square().sum() + (y * 3).sum(), alpha)
    x.requires_grad_()
    y = op(x, full_gate(op, active, alpha))
    (again,) = torch.autograd.grad(y.square().sum() + (y * 3).sum(), alpha)
    torch.testing.assert_close(found, again)
    assert found.abs().min() > 0


def test_only_the_active_candidate_has_gradients_statistics_and_momentum():
    op = edge()
    optimizer = torch.optim.SGD(op.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    for _ in range(2):  # momentum everywhere, so that it could move what is not sampled
        for k in range(3):
            op(x, Gate(k)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    before = {n: t.clone() for n, t in op.state_dict().items()}
    momentum = {n: optimizer.state[p]["momentum_buffer"].clone() for n, p in op.named_parameters()}
    op(x, Gate(1)).square().sum().backward()
    named = dict(op.named_parameters())
    assert {n.split(".")[1] for n, p in named.items() if p.grad is not None} == {"1"}
    optimizer.step()
    for name, value in op.state_dict().items():
        moved = not torch.equal(value, before[name])
        assert moved == (name.split(".")[1] == "1"), name
    for name, p in named.items():
        moved = not torch.equal(optimizer.state[p]["momentum_buffer"], momentum[name])
        assert moved == (name.split(".")[1] == "1"), name


@pytest.mark.parametrize("others", [(0, 2, 3), (2,)])
def test_a_recompute_moves_no_statistics(others):
    op, alpha = edge(), logits((0.3, -0.2, 0.1, 0.5))
    before = {n: b.clone() for n, b in op.named_buffers()}
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    y = op(x, Gate(1, others, alpha))
    after = {n: b.clone() for n, b in op.named_buffers()}
    y.square().sum().backward()
    for name, buffer in op.named_buffers():
        assert torch.equal(buffer, after[name]), name
        assert torch.equal(buffer, before[name]) != (name.split(".")[1] == "1"), name
    assert all(n.track_running_stats for n in op.modules() if isinstance(n, nn.BatchNorm2d))


def test_a_recompute_normalises_by_the_batch_in_training_and_by_the_past_in_evaluation():
    op, alpha = edge(zero=False), logits((0.3, -0.2, 0.1))
    x = torch.randn(4, 8, 6, 6, dtype=torch.float64)
    weight = torch.randn(4, 8, 6, 6, dtype=torch.float64)
    found = {}
    for mode in (True, False):
        op.train(mode)
        with torch.no_grad(), frozen_statistics(op):
            products = torch.stack([(c(x) * weight).sum() for c in op.candidate_ops])
        p = torch.softmax(alpha, 0)
        y = op(x, full_gate(op, 0, alpha))
        (found[mode],) = torch.autograd.grad((y * weight).sum(), alpha)
        torch.testing.assert_close(found[mode], p * (products - (p * products).sum()))
    assert (found[True] - found[False]).abs().max() > 1e-3


def test_without_gradients_nothing_is_recomputed():
    op, alpha = edge(), logits((0.3, -0.2, 0.1, 0.5))
    calls = []
    op.candidate_ops[0].register_forward_hook(lambda *_: calls.append(0))
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        op(x, full_gate(op, 1, alpha))
    op(x, Gate(1)).sum().backward()
    assert not calls and alpha.grad is None
    op(x, full_gate(op, 1, alpha)).sum().backward()
    assert calls == [0] and alpha.grad is not None


def test_a_zero_block_is_not_copied_and_has_its_true_gradient():
    op, alpha = edge(), logits((0.3, -0.2, 0.1, 0.5))
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64, requires_grad=True)
    assert op(x, Gate(3), residual=True) is x
    y = op(x, full_gate(op, 3, alpha), residual=True)
    assert y.data_ptr() == x.data_ptr()
    weight = torch.randn_like(x)
    (found,) = torch.autograd.grad((y * weight).sum(), alpha)
    with torch.no_grad(), frozen_statistics(op):
        products = torch.stack([(c(x) * weight).sum() for c in op.candidate_ops])
    p = torch.softmax(alpha, 0)
    torch.testing.assert_close(found, p * (products - (p * products).sum()))
    assert op(x, Gate(3)).count_nonzero() == 0


def test_zero_of_stride_two():
    op = GatedMixedOp([Zero(2), nn.AvgPool2d(2)])
    assert op(torch.ones(1, 3, 6, 6), Gate(0)).shape == (1, 3, 3, 3)


@pytest.mark.parametrize("enabled", [False, True])
def test_autocast_reaches_the_recompute(enabled, device):
    op = edge(zero=False).float().to(device)
    alpha = torch.zeros(3, device=device, requires_grad=True)
    seen = []
    for c in op.candidate_ops:
        c.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    x = torch.randn(2, 8, 6, 6, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
        y = op(x, full_gate(op, 0, alpha))
    y.float().sum().backward()
    assert set(seen) == {torch.bfloat16 if enabled else torch.float32} and len(seen) == 3
    assert alpha.grad.dtype == torch.float32


def test_weights_give_the_weighted_sum():
    op = edge()
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    w = torch.tensor([0.1, 0.5, -0.2, 0.6], dtype=torch.float64)
    with frozen_statistics(op):
        wanted = sum(w[k] * op.candidate_ops[k](x) for k in range(3))
        torch.testing.assert_close(op(x, w), wanted)
        torch.testing.assert_close(op(x, w, residual=True), wanted + x)
        torch.testing.assert_close(op(x, w.tolist()), wanted)
    only_zero = GatedMixedOp([Zero(1)])
    assert only_zero(x, [2.0]).count_nonzero() == 0


def saved(op, x, gate):
    """Bytes kept for the backward by storages, the parameters' left out."""
    anyway = {p.untyped_storage().data_ptr() for p in op.parameters()}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in anyway:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = op(x, gate, residual=True)
    assert y.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("active", [0, 1])
def test_memory_of_one_path_at_any_number_of_candidates(active):
    x = torch.randn(2, 24, 14, 14, requires_grad=True)
    found = set()
    for n in (2, 4, 7, 16, 32):
        op = GatedMixedOp(MBConv(24, 24, 3 + 2 * (j % 3), 1, 3 + 3 * (j % 2)) for j in range(n))
        alpha = torch.zeros(n, requires_grad=True)
        one = saved(op, x, Gate(active))
        for others in (tuple(rest(active, n)), (1 - active,)):
            assert saved(op, x, Gate(active, others, alpha)) <= 1.15 * one
        found.add(one)
    assert len(found) == 1


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path):
    """The same paths on both ranks, gradients averaged, none for what did not run."""
    results = torch.multiprocessing.Manager().dict()
    torch.multiprocessing.spawn(search_steps, (tmp_path / "store", results), nprocs=2)
    torch.manual_seed(0)
    net = Searched()
    images = torch.randn(2, 3, 3, 6, 6)
    seen = set()
    for number, (step, paths) in enumerate(STEPS):
        expected = {n: None for n, _ in net.named_parameters()}
        freeze(net, paths)
        for x in images:
            net.zero_grad(set_to_none=True)
            net(x, step, paths).square().mean().backward()
            for name, p in net.named_parameters():
                if p.grad is not None:
                    before = expected[name]
                    expected[name] = p.grad / 2 if before is None else before + p.grad / 2
        seen.update(enumerate(net.drawn))
        for rank in range(2):
            drawn, grads = results[rank][number]
            assert drawn == net.drawn
            for name, wanted in expected.items():
                assert (grads[name] is None) == (wanted is None), (name, step, paths)
                if wanted is not None:
                    torch.testing.assert_close(grads[name], wanted)
    assert len(seen) >= 4


def test_errors_name_the_argument():
    op, x = GatedMixedOp([nn.Identity(), nn.Identity()]), torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"gate\.active from 0 to 1, but got 2"):
        op(x, Gate(2))
    with pytest.raises(ValueError, match=r"gate\.others from 0 to 1, but got -1"):
        op(x, Gate(0, (-1,)))
    with pytest.raises(ValueError, match="2 candidates and 3 weights"):
        op(x, torch.zeros(3))
    with pytest.raises(ValueError, match="at least one candidate"):
        GatedMixedOp([])
