# SPDX-License-Identifier: Apache-2.0
"""``memory="low"``: the same numbers as by default, from half the memory."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from side_by_side import randomise_statistics
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastnas.nn.fused import NormConvolution
from fastnas.nn.recompute import Recompute
from fastnas.nn.source import _FASTER
from fastnas.spaces.base import CellWeights
from fastnas.spaces.darts import Supernet


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On tensors this small threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pair(k: int = 1, dtype=torch.float64, C: int = 4) -> dict[str, Supernet]:
    """The same supernet with either memory."""
    default = randomise_statistics(Supernet(C, 3, 5, partial_channels=k)).to(dtype)
    low = Supernet(C, 3, 5, partial_channels=k, memory="low").to(dtype)
    low.load_state_dict(default.state_dict())
    return {"default": default, "low": low}


def make_weights(k: int, dtype=torch.float64) -> tuple[dict[str, CellWeights], list[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    leaves = [torch.randn(14, 8, generator=generator, dtype=dtype) for _ in range(2)]
    leaves += [torch.randn(14, generator=generator, dtype=dtype) for _ in range(2)] if k > 1 else []
    for leaf in leaves:
        leaf.requires_grad_()
    edges = leaves[2:] or (None, None)
    kinds = zip(("normal", "reduce"), leaves, edges, strict=False)
    return {kind: CellWeights(ops, edge) for kind, ops, edge in kinds}, leaves


def images(dtype=torch.float64, layout=torch.contiguous_format) -> Tensor:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(6), dtype=dtype)
    return x.contiguous(memory_format=layout)


def loss_of(net: nn.Module, weights: dict[str, CellWeights], x: Tensor) -> Tensor:
    return F.cross_entropy(net(x, weights).double(), torch.arange(4))


def observe(net: Supernet, k: int, x: Tensor, wanted: str = "all") -> dict[str, Tensor]:
    """Loss, gradients of what is ``wanted``, and buffers afterwards."""
    weights, leaves = make_weights(k, net.classifier.weight.dtype)
    if wanted == "weights":
        weights = {n: CellWeights(*(t if t is None else t.detach() for t in w)) for n, w in
                   weights.items()}  # fmt: skip
    net.requires_grad_(wanted != "architecture")
    inputs = {f"arch {i}": leaf for i, leaf in enumerate(leaves)} if wanted != "weights" else {}
    if wanted != "architecture":
        inputs |= dict(net.named_parameters())
    state = torch.get_rng_state()
    loss = loss_of(net, weights, x)
    grads = torch.autograd.grad(loss, list(inputs.values()))
    assert torch.equal(torch.get_rng_state(), state)
    seen = {f"grad {n}": g for n, g in zip(inputs, grads, strict=True)}
    return {"loss": loss.detach(), **seen, **{n: b.clone() for n, b in net.named_buffers()}}


@pytest.mark.parametrize("wanted", ["all", "weights", "architecture"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("k", [1, 2])
def test_losses_gradients_and_buffers_are_equal(k, layout, training, wanted):
    seen = {}
    for memory, net in pair(k).items():
        net.to(memory_format=layout).train(training)
        seen[memory] = observe(net, k, images(layout=layout), wanted)
    assert seen["low"].keys() == seen["default"].keys()
    for name, expected in seen["default"].items():
        torch.testing.assert_close(seen["low"][name], expected, rtol=1e-10, atol=1e-12)
    if training:
        assert seen["low"]["stem.1.num_batches_tracked"] == 8
        assert seen["low"]["cells.0._ops.0._ops.4.op.3.num_batches_tracked"] == 8


@pytest.mark.parametrize("k", [1, 2])
def test_under_autocast(k):
    seen = {}
    for memory, net in pair(k, torch.float32, 8).items():
        weights, leaves = make_weights(k, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            y = net(images(torch.float32), weights)
        # The backward is outside, as it should be: what is made again is cast all the same.
        seen[memory] = torch.autograd.grad(F.cross_entropy(y.float(), torch.arange(4)),
                                           [*leaves, *net.parameters()])  # fmt: skip
    for a, b in zip(seen["low"], seen["default"], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def kept_bytes(net: Supernet, k: int, x: Tensor) -> int:
    """Storages that live between a forward and its backward, beyond those there before.

    Autograd's hooks see what it saves; this sees what is there, whoever holds it.
    """
    seen: dict[int, tuple[weakref.ref, int]] = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for t in result if isinstance(result, (list, tuple)) else [result]:
                for each in t if isinstance(t, (list, tuple)) else [t]:
                    if isinstance(each, Tensor):
                        storage = each.untyped_storage()
                        seen[storage._cdata] = (storage._weak_ref(), storage.nbytes())
            return result

    weights, _ = make_weights(k, x.dtype)
    gc.collect()
    gc.disable()
    try:
        with Watch():
            loss = loss_of(net, weights, x)
        total = sum(size for ref, size in seen.values() if not torch.UntypedStorage._expired(ref))
    finally:
        gc.enable()
    loss.backward()
    return total


@pytest.mark.parametrize(("k", "share"), [(1, 0.79), (2, 0.75)])
def test_a_part_of_the_memory_is_kept(k, share):
    x = torch.randn(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    bytes_kept = {}
    for memory, net in pair(k, torch.float32, 8).items():
        net.to(memory_format=torch.channels_last)
        bytes_kept[memory] = kept_bytes(net, k, x)
    assert bytes_kept["low"] < share * bytes_kept["default"], bytes_kept


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func.overloadpacket).partition(".")[2]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("wanted", ["all", "architecture"])
def test_nothing_is_made_twice_in_one_backward(wanted):
    """Each group of convolutions once more, and nothing that was kept."""
    net = pair()["low"]
    net.requires_grad_(wanted == "all")
    weights, _ = make_weights(1)
    with Calls() as forward:
        loss = loss_of(net, weights, images())
    with Calls() as backward:
        loss.backward()
    # The first states do not depend on the architecture: nothing flows back through them.
    groups = 3 * 5  # one for each source; and one for all second halves that it has
    for op in ("separable_group", "separable_each"):
        assert forward.counts[op] == groups
    assert 0 < backward.counts["separable_group"] <= groups
    assert backward.counts["separable_group"] == groups or wanted == "architecture"
    assert backward.counts["separable_each"] == 0
    assert backward.counts["mixed_batch_norm"] == 0
    pool = "pool_pair"
    assert 0 < backward.counts[pool] <= forward.counts[pool]


def test_a_graph_that_is_kept_and_second_derivatives():
    """Twice through one graph, and through the gradient: a product with the Hessian in alpha."""
    seen = {}
    for memory, net in pair().items():
        weights, leaves = make_weights(1)
        parameter = net.cells[0]._ops[0]._ops[4].op[1].weight
        inputs = [*leaves, parameter]
        loss = loss_of(net, weights, images())
        once = torch.autograd.grad(loss, inputs, retain_graph=True)
        twice = torch.autograd.grad(loss, inputs, create_graph=True)
        torch.testing.assert_close(twice, once, rtol=1e-9, atol=1e-12)
        product = sum(g.square().sum() for g in twice)
        seen[memory] = [*once, *torch.autograd.grad(product, inputs)]
    torch.testing.assert_close(seen["low"], seen["default"], rtol=1e-8, atol=1e-11)


def test_memory_is_given_back_after_the_backward():
    net = pair()["low"]
    weights, _ = make_weights(1)
    notes = []
    original = Recompute._find

    def find(self, t, exact=False):
        note = original(self, t, exact)
        notes.append(weakref.ref(note)) if note is not None and exact else None
        return note

    gc.collect()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Recompute, "_find", find)
            loss = loss_of(net, weights, images())
        assert any(note() is not None for note in notes)
        loss.backward()
        assert not any(note() is not None for note in notes)
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["weight", "state"])
def test_a_tensor_that_changed_meanwhile_is_an_error(name):
    net = pair()["low"]
    weights, _ = make_weights(1)
    states = []
    net.cells[0].preprocess1.register_forward_hook(lambda m, x, y: states.append(y))
    loss = loss_of(net, weights, images())
    with torch.no_grad():
        if name == "weight":
            net.cells[0]._ops[0]._ops[4].op[1].weight.mul_(2)
        else:
            states[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_that_were_replaced_meanwhile():
    """What counts is what the forward used (``torch.func.functional_call`` swaps it and back)."""
    seen = {}
    for memory, net in pair().items():
        weights, leaves = make_weights(1)
        other = {n: (2 * p).detach().requires_grad_() for n, p in net.named_parameters()}
        y = torch.func.functional_call(net, other, (images(), weights))
        seen[memory] = torch.autograd.grad(y.square().sum(), [*leaves, *other.values()])
    torch.testing.assert_close(seen["low"], seen["default"], rtol=1e-9, atol=1e-12)


def test_hooks_fire_as_often_as_by_default():
    counts = {}
    for memory, net in pair().items():
        calls = Counter()
        for place in ("cells.0._ops.2", "cells.0.preprocess0.op.1", "cells.1._ops.0._ops.3.relu",
                      "cells.1._ops.4._ops.6.op.2", "cells.2._ops.1._ops.1.0"):  # fmt: skip
            module = net.get_submodule(place)
            module.register_forward_hook(lambda *_, p=place, c=calls: c.update([p]))
            module.register_full_backward_hook(lambda *_, p=place, c=calls: c.update([p + "'"]))
        weights, _ = make_weights(1)
        loss_of(net, weights, images()).backward()
        counts[memory] = calls
    assert counts["low"] == counts["default"]
    assert len(counts["low"]) == 10


def test_hooks_around_a_forward_get_what_is_kept():
    """``save_on_cpu`` and its like see every tensor that stays."""
    net, kept = pair()["low"], []
    weights, leaves = make_weights(1)

    def pack(t):
        kept.append(t.numel() * t.element_size())
        return t.clone()

    expected = torch.autograd.grad(loss_of(net, weights, images()), leaves)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = loss_of(net, weights, images())
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), expected)
    # More than the inputs of the mixing calls of one cell, and less than by default.
    inside = len(kept)
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss_of(pair()["default"], weights, images())
    assert 300 < inside < len(kept)


def test_where_it_has_no_effect():
    net = pair(C=8)["low"]
    weights, leaves = make_weights(1)
    with torch.no_grad():
        assert not Recompute.is_possible()
        loss_of(net, weights, images())
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert not Recompute.is_possible()
        torch.autograd.grad(loss_of(net, weights, images()), leaves)


@pytest.mark.slow
def test_compiled():
    cell = pair(dtype=torch.float32)["low"].cells[0]
    inputs = [torch.randn(2, 12, 8, 8) for _ in range(2)]
    ops = torch.randn(14, 8, requires_grad=True)
    compiled = torch.compile(cell, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(
        copy.deepcopy(cell)(*inputs, CellWeights(ops)).square().sum(), ops
    )
    found = torch.autograd.grad(compiled(*inputs, CellWeights(ops)).square().sum(), ops)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_layers_one_by_one_as_on_a_gpu(monkeypatch):
    """Where no fused convolutions are used, ReLUs and inner BatchNorms are made again."""
    monkeypatch.setattr("fastnas.nn.source._FASTER", dict.fromkeys(_FASTER, ()))
    seen = {m: observe(net, 1, images()) for m, net in pair().items()}
    for name, expected in seen["default"].items():
        torch.testing.assert_close(seen["low"][name], expected, rtol=1e-9, atol=1e-11)
    x = torch.randn(4, 3, 16, 16)
    kept = {m: kept_bytes(net, 1, x) for m, net in pair(dtype=torch.float32, C=8).items()}
    assert kept["low"] < 0.4 * kept["default"], kept


def test_a_norm_in_evaluation_keeps_what_it_used():
    """Its running statistics may have moved on by the time of the backward."""
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    norm = randomise_statistics(nn.Sequential(nn.BatchNorm2d(4).double()))[0].eval()
    conv = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False).double()
    after = nn.Conv2d(4, 4, 1, bias=False).double()
    wanted = [x, after.weight]
    expected = torch.autograd.grad(after(NormConvolution(norm, conv)(x)).square().sum(), wanted)
    again = Recompute()
    y = again.run(after, again.run(NormConvolution(norm, conv), x))
    norm.running_mean.add_(1)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), wanted), expected)


def test_an_unknown_memory_is_refused():
    with pytest.raises(ValueError, match="memory must be one of default, low, got 'less'"):
        Supernet(4, 3, memory="less")
