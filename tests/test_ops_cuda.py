# SPDX-License-Identifier: Apache-2.0
"""The ops as citizens of CUDA: streams, devices, graphs, no waiting for the GPU, huge tensors."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import ops_cases as cases
import pytest
import torch
from ops_calls import CALLS, Call, mixed_batch_norm
from torch import Tensor

import fastnas
from fastnas import _extension, ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _extension.CUDA_VERSION, reason="built without CUDA kernels"),
]

TWO_DEVICES = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
SLEEP = 400_000_000  # cycles of a GPU, about 0.2 s: longer than the host takes for any call here


EVERY = pytest.mark.parametrize("name", CALLS)
LAYOUTS = pytest.mark.parametrize("layout", cases.LAYOUTS)


def assert_all_bitwise(actual, expected):
    for k, (a, b) in enumerate(zip(actual, expected, strict=True)):
        cases.assert_bitwise(a, b, str(k))


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    """An error where the host waits for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_waiting_is_an_error_below():
    x = torch.ones(1, device="cuda")
    with no_synchronisation(), pytest.raises(RuntimeError, match="synchroniz"):
        x.item()


@EVERY
@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.ids)
def test_no_op_waits_for_the_gpu(name, layout, dtype):
    call = CALLS[name]("cuda", layout=layout, dtype=dtype)
    with no_synchronisation():
        call.run(call.inputs)


@pytest.mark.parametrize("cls", [fastnas.MixedOp, fastnas.PartialMixedOp])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("as_list", [False, True])
def test_no_mixed_op_waits_for_the_gpu(cls, training, stride, as_list):
    op = cls(8, stride).cuda().train(training)
    x = torch.randn(2, 8, 6, 6, device="cuda", requires_grad=True)
    weights = torch.randn(8, device="cuda", requires_grad=True)
    op(x, weights).sum().backward()  # libraries choose their algorithms
    with no_synchronisation():
        op(x, [0.5, *weights[1:].unbind()] if as_list else weights).sum().backward()


@EVERY
def test_runs_on_the_current_stream(name):
    """Behind a long wait on a stream of its own: what ran elsewhere would see zeros."""
    call = CALLS[name]("cuda")
    expected = call.run(call.inputs)
    stale = [torch.zeros_like(t).requires_grad_(t.requires_grad) for t in call.inputs]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        with torch.no_grad():
            for t, value in zip(stale, call.inputs, strict=True):
                t.copy_(value)
        seen = call.run(stale)
        assert not stream.query(), "the host waited for the stream"
    stream.synchronize()
    assert_all_bitwise(seen, expected)


@EVERY
def test_streams_do_not_disturb_each_other(name):
    """Scratch memory that one stream took while another still worked in it would show."""
    calls = [CALLS[name]("cuda") for _ in range(2)]
    with torch.no_grad():
        for t in calls[1].inputs:
            if t.is_floating_point():
                t.mul_(-0.5)
    expected = [call.run(call.inputs) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    seen = [[], []]
    for _ in range(20):
        for k, (call, stream) in enumerate(zip(calls, streams, strict=True)):
            with torch.cuda.stream(stream):
                seen[k].append(call.run(call.inputs))
    torch.cuda.synchronize()
    for results, wanted in zip(seen, expected, strict=True):
        for result in results:
            assert_all_bitwise(result, wanted)


def record(call: Call) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call.run(call.inputs)  # what is set up once is set up before the recording
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call.run(call.inputs)
    return graph, kept


@EVERY
@LAYOUTS
def test_is_recorded_into_a_graph(name, layout):
    call = CALLS[name]("cuda", layout=layout)
    graph, kept = record(call)
    for factor in (1.0, -0.5, 3.0):
        with torch.no_grad():
            for t in call.inputs:
                if t.is_floating_point():
                    t.mul_(factor)
        graph.replay()
        seen = [t.clone() for t in kept]
        assert_all_bitwise(seen, call.run(call.inputs))


def test_a_replay_updates_running_statistics():
    call = mixed_batch_norm("cuda")
    graph, _ = record(call)
    others = copy.deepcopy(call.norms)
    for _ in range(3):
        graph.replay()
        ops.mixed_batch_norm(call.inputs[1:8], call.inputs[0], others)
    for norm, other in zip(call.norms, others, strict=True):
        if norm is not None:
            assert_all_bitwise(norm.buffers(), other.buffers())
    assert any(n is not None and n.training and n.num_batches_tracked is not None for n in others)


@TWO_DEVICES
@EVERY
@LAYOUTS
def test_on_the_second_device_while_the_first_is_current(name, layout):
    first, second = (CALLS[name](f"cuda:{k}", layout=layout) for k in range(2))
    with torch.cuda.device(0):
        seen = second.run(second.inputs)
        assert torch.cuda.current_device() == 0
        assert {t.device.index for t in seen} == {1}
        expected = first.run(first.inputs)
    assert_all_bitwise([t.cpu() for t in seen], [t.cpu() for t in expected])


@TWO_DEVICES
@EVERY
def test_on_the_current_stream_of_the_second_device(name):
    call = CALLS[name]("cuda:1")
    expected = call.run(call.inputs)
    stale = [torch.zeros_like(t).requires_grad_(t.requires_grad) for t in call.inputs]
    stream = torch.cuda.Stream("cuda:1")
    torch.cuda.synchronize("cuda:1")
    with torch.cuda.stream(stream), torch.cuda.device(0):
        # The first device is current again; the second one's current stream stays `stream`.
        with torch.no_grad(), torch.cuda.device(1):
            torch.cuda._sleep(SLEEP)
            for t, value in zip(stale, call.inputs, strict=True):
                t.copy_(value)
        seen = call.run(stale)
    stream.synchronize()
    assert_all_bitwise(seen, expected)


@TWO_DEVICES
def test_operands_on_two_devices_are_an_error():
    xs = [torch.ones(2, 3, 4, 4, device=f"cuda:{k}") for k in range(2)]
    weights = torch.ones(2, device="cuda:0")
    with cases.raises(ValueError, "on one device", "cuda:1", "cuda:0"):
        ops.mixed_sum(xs, weights)
    with cases.raises(ValueError, "weights on cuda:1", "cuda:0"):
        ops.mixed_sum([xs[1]], weights[:1])
    for name in ("mixed_sum", "mixed_batch_norm"):  # and of a direct call
        rest = [[0, 0], [0.0, 0.0], [0, 0], [], [], [], []] if name == "mixed_batch_norm" else []
        with cases.raises(ValueError, "on one device", "cuda:1", "cuda:0"):
            getattr(torch.ops.fastnas, name)(xs, weights, *rest)
