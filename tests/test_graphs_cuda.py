# SPDX-License-Identifier: Apache-2.0
"""Recorded steps on a GPU: the state of eager ones, no waiting, and eager where it must be."""

from __future__ import annotations

import contextlib
import copy
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import graph_cases
import pytest
import torch
from graph_cases import STEPS, Counting, batches, darts_supernet, learner, state_of, train

from fastnas.bench.stock import StockSupernet
from fastnas.methods import DA2SOptions, Darts, DartsOptions
from fastnas.methods.graphs import WARM_UP, GraphedLearner, GraphError, with_graphs

pytestmark = pytest.mark.gpu

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
ITERATIONS = 9


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


def on_gpu(name: str = "pc_darts", recorded: bool = True, **settings):
    recorder = Counting(torch.device("cuda")) if recorded else None
    return learner(name, recorder, "cuda", **{"build": darts_supernet, **settings})


def assert_close(a, b, rtol: float = 1e-3, atol: float = 1e-4) -> None:
    """The order of sums on a GPU may differ from one run to the next."""
    first, second = state_of(a), state_of(b)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(
            value, second[name], rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


def pair(iterations: int = ITERATIONS, sizes: tuple[int, ...] = (6,), frozen: int = 0, **settings):
    """A learner that records and one that does not, after the same iterations."""
    layout = settings.get("layout", torch.contiguous_format)
    learners, found = [on_gpu(recorded=r, **settings) for r in (True, False)], []
    for one in learners:
        torch.cuda.manual_seed(5)
        data = [batches("cuda", layout, sizes, seed) for seed in (11, 12)]
        losses = train(one, iterations, 0, *data, frozen=frozen)
        found.append((torch.stack(losses), torch.cuda.get_rng_state()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-2, atol=1e-2)
    assert torch.equal(found[0][1], found[1][1])
    return learners


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["darts", "pc_darts"])
def test_as_eager_in_float32(name, layout):
    recorded, eager = pair(name=name, layout=LAYOUTS[layout])
    assert recorded.reason is None
    assert (recorded.recorder.warm_ups, recorded.recorder.recorded) == (2 * WARM_UP, 2)
    assert_close(recorded, eager)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["darts", "pc_darts"])
def test_as_eager_in_bfloat16(name, layout):
    recorded, eager = pair(name=name, layout=LAYOUTS[layout], amp=torch.bfloat16)
    assert recorded.reason is None
    # A rounding that falls the other way is one of eight bits.
    assert_close(recorded, eager, 3e-2, 3e-2)


def test_as_eager_with_low_memory():
    def build(name):
        return type(darts_supernet(name))(4, 3, graph_cases.CLASSES, memory="low")

    recorded, eager = pair(name="darts", build=build)
    assert recorded.reason is None
    assert_close(recorded, eager)


def test_as_eager_with_stock_modules():
    def build(name):
        net = StockSupernet(4, 3, graph_cases.CLASSES)
        net.cell_specs = darts_supernet(name).cell_specs
        return net

    recorded, eager = pair(name="darts", build=build)
    assert recorded.reason is None
    assert_close(recorded, eager)


def test_random_numbers_are_those_of_eager_steps():
    recorded, eager = pair(dropout=0.4)
    assert recorded.recorder.recorded == 2
    assert_close(recorded, eager)


def test_schedules_and_alphas_at_rest():
    options = DA2SOptions(schedule="linear", delay=0, alpha_warmup_epochs=1)
    recorded, eager = pair(name="da2s", options=options, iterations=12)
    assert recorded.reason is None
    assert_close(recorded, eager)


def test_a_last_smaller_batch_and_a_frozen_start():
    recorded, eager = pair(sizes=(6, 6, 6, 6, 6, 3), frozen=4, iterations=14)
    assert recorded.recorder.recorded == 2
    assert_close(recorded, eager)


def test_a_replay_does_not_wait():
    one = on_gpu(amp=torch.bfloat16)
    data = [[next(b) for _ in range(8)] for b in (batches("cuda"), batches("cuda", seed=12))]
    streams = [iter(part) for part in data]
    train(one, WARM_UP + 1, 0, *streams)
    with no_synchronisation():
        train(one, 4, WARM_UP + 1, *streams)
    assert one.reason is None


def test_no_eager_step_waits():
    one = on_gpu(recorded=False)
    data = [[next(b) for _ in range(8)] for b in (batches("cuda"), batches("cuda", seed=12))]
    streams = [iter(part) for part in data]
    train(one, 2, 0, *streams)
    with no_synchronisation():
        train(one, 4, 2, *streams)


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


def test_goes_on_after_a_checkpoint():
    whole, first, second = (on_gpu() for _ in range(3))
    train(whole, 12)
    train(first, 6)
    state = copy.deepcopy(first.state_dict())
    train(second, 5)  # recorded, and to be dropped
    second.load_state_dict(state)
    data = [batches("cuda"), batches("cuda", seed=12)]
    for _ in range(6):
        for part in data:
            next(part)
    train(second, 6, 6, *data)
    assert second.recorder.recorded == 4
    assert_close(whole, second)


def test_a_state_goes_on_on_another_device():
    there = on_gpu()
    train(there, 6)
    here = learner("pc_darts", build=darts_supernet)
    file = io.BytesIO()
    torch.save(there.state_dict(), file)
    file.seek(0)
    here.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    train(here, 1)
    assert here.arch_optimizer.param_groups[0]["fused"] is None
    back = on_gpu()
    back.load_state_dict(here.state_dict())
    train(back, 6)
    assert back.reason is None and back.recorder.recorded == 2


def test_dropped_when_the_weights_move():
    recorded, eager = on_gpu("darts"), on_gpu("darts", recorded=False)
    for one in (recorded, eager):
        train(one, 5)
        one.lay_out(torch.channels_last)
        train(one, 6, 5)
    assert recorded.recorder.recorded == 4
    assert_close(recorded, eager)


def test_recordings_share_their_memory():
    one = on_gpu("darts")
    train(one, WARM_UP + 2)
    weights, architecture = one._weights._recorded, one._architecture._recorded
    assert weights.recording.pool() == architecture.recording.pool()


# --- what stands in the way ------------------------------------------------------------------


class Waiting(Darts):
    name = "waiting"

    def objective(self, loss, arch, moment):
        return loss * (1.0 if float(loss.detach()) > 0 else 2.0)


class Copying(Darts):
    """What the host lays down in memory of its own is copied at once, but cannot be recorded."""

    name = "copying"

    def weights(self, arch, moment):
        one = torch.ones(1).to("cuda", non_blocking=True)
        return {k: w._replace(ops=w.ops * one) for k, w in super().weights(arch, moment).items()}


@pytest.mark.parametrize(
    ("make", "reason"), [(Waiting, "the host waits"), (Copying, "recording a step failed")]
)
def test_eager_from_then_on(make, reason):
    told = []
    one = on_gpu("darts", make=make, tell=told.append, dropout=0.3)
    eager = on_gpu("darts", recorded=False, dropout=0.3)
    for each in (one, eager):
        torch.cuda.manual_seed(5)
        train(each, 7)
    assert len(told) == 1 and reason in told[0], told
    assert one.recorder.recorded <= 1
    assert_close(one, eager)
    with pytest.raises(GraphError, match=reason):
        train(on_gpu("darts", make=make, demanded=True), 7)


def test_eager_after_a_recording_that_the_driver_gave_up():
    """In a process of its own: what is left of such a recording must not spoil other tests."""
    done = subprocess.run(
        [sys.executable, str(Path(graph_cases.__file__))], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "recording a step failed" in done.stdout


def test_modes():
    eager = on_gpu(recorded=False)
    assert with_graphs(eager, "off", print) is eager
    one = with_graphs(eager, "auto", print)
    assert isinstance(one, GraphedLearner) and not one.demanded
    train(one, 6)
    assert one.reason is None and one._weights._recorded is not None
    assert with_graphs(on_gpu(recorded=False), "on", print).demanded
    second = on_gpu("darts", recorded=False, options=DartsOptions("second"))
    with pytest.raises(ValueError, match=r"cuda_graphs: .* second order"):
        with_graphs(second, "on", print)
    told = []
    train(with_graphs(second, "auto", told.append), 2 * STEPS)
    assert len(told) == 1 and "second order" in told[0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_the_second_device_while_the_first_is_current():
    one = learner("darts", Counting(torch.device("cuda:1")), "cuda:1", build=darts_supernet)
    data = [((b[0].to("cuda:1"), b[1].to("cuda:1")) for b in batches(seed=s)) for s in (11, 12)]
    train(one, 6, 0, *data)
    assert one.reason is None and torch.cuda.current_device() == 0
