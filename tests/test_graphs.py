# SPDX-License-Identifier: Apache-2.0
"""Recorded steps without a GPU: a tape stands in for the graph and calls what it was given."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from graph_cases import STEPS, Tape, assert_same, batches, darts_supernet, learner, state_of, train

from fastnas.methods import DA2SOptions, Moment
from fastnas.methods.graphs import WARM_UP, GraphedLearner, GraphError

NOW = Moment(0, 4, 0)
METHODS = pytest.mark.parametrize("name", ["darts", "pc_darts", "da2s"])


pytestmark = pytest.mark.usefixtures("one_thread")


@METHODS
@pytest.mark.parametrize("build", [None, darts_supernet])
def test_as_eager_bit_for_bit(name, build):
    tape = Tape()
    recorded, eager = (learner(name, r, dropout=0.2, build=build) for r in (tape, None))
    losses = []
    for one in (recorded, eager):
        torch.manual_seed(5)
        losses.append(train(one, 6))
    assert_same(recorded, eager)
    assert torch.equal(*map(torch.stack, losses))
    assert tape.replays and tape.recorded


def test_what_is_recorded_and_replayed():
    tape = Tape()
    one = learner("pc_darts", tape)
    train(one, WARM_UP)
    assert (tape.warm_ups, tape.recorded, tape.replays) == (2 * WARM_UP, 0, 0)
    train(one, 1, WARM_UP)
    assert (tape.warm_ups, tape.recorded, tape.replays) == (2 * WARM_UP, 2, 2)
    train(one, 4, WARM_UP + 1)
    assert (tape.warm_ups, tape.recorded, tape.replays) == (2 * WARM_UP, 2, 10)
    assert one.lead == WARM_UP + 1
    assert one.reason is None


def test_recording_does_nothing():
    one = learner("pc_darts", Tape())
    train(one, WARM_UP)
    before = state_of(one)
    batch = next(batches())
    one._weights._record(super(GraphedLearner, one).weight_step, batch, None, "signature")
    assert all(torch.equal(value, before[name]) for name, value in state_of(one).items())


def test_the_architecture_joins_in_later():
    tape = Tape()
    recorded, eager = learner("darts", tape), learner("darts", Tape(complaint="stay eager"))
    for one in (recorded, eager):
        train(one, 9, frozen=4)
    assert_same(recorded, eager)
    assert tape.recorded == 2
    assert tape.replays == (9 - WARM_UP) + (5 - WARM_UP)


def test_batches_are_copied_and_outcomes_are_kept():
    tape = Tape()
    one = learner("darts", tape)
    data = batches()
    train(one, WARM_UP + 1, train_batches=data)
    inputs = one._weights._recorded.inputs
    addresses = [t.data_ptr() for t in inputs]
    outcomes = [one.weight_step(next(data), NOW) for _ in range(3)]
    assert [t.data_ptr() for t in one._weights._recorded.inputs] == addresses
    expected = list(zip(range(WARM_UP + 4), batches(), strict=False))[-1][1]
    assert torch.equal(inputs[0], expected[0])
    assert torch.equal(inputs[1], expected[1])
    # A later replay has not written over them.
    assert len({outcome.loss.item() for outcome in outcomes}) == 3
    assert [outcome.images for outcome in outcomes] == [6, 6, 6]


def test_in_eval_mode_it_is_another_step():
    tape = Tape()
    one = learner("darts", tape)
    train(one, WARM_UP + 1)
    one.supernet.eval()
    for number in range(1, WARM_UP + 1):
        one.weight_step(next(batches()), NOW)
        assert tape.warm_ups == 2 * WARM_UP + number
    one.weight_step(next(batches()), NOW)
    assert tape.recorded == 3


def test_optimizers_let_themselves_be_recorded_only_then():
    class Asking(Tape):
        def record(self, run):
            asked.append([group["capturable"] for group in one.arch_optimizer.param_groups])
            return super().record(run)

    asked: list[list[bool]] = []
    one = learner("darts", Asking())
    train(one, WARM_UP + 1)
    assert asked == [[True], [False]]  # that of the architecture comes first
    assert not one.arch_optimizer.param_groups[0]["capturable"]


def test_rates_stay_where_they_are():
    one = learner("da2s", Tape(), options=DA2SOptions(alpha_warmup_epochs=1, delay=1))
    groups = [*one.weight_optimizer.param_groups, *one.arch_optimizer.param_groups]
    tensors = [group["lr"] for group in groups]
    train(one, 2)
    assert [rate.item() for rate in tensors] == pytest.approx([0.1 / 2, 0.0, 0.02])
    train(one, 2, STEPS)
    assert [rate.item() for rate in tensors] == pytest.approx([0.1 / 5, 0.02, 0.02])
    assert all(group["lr"] is rate for group, rate in zip(groups, tensors, strict=True))


def test_a_last_smaller_batch_is_eager():
    tape = Tape()
    recorded, eager = learner("pc_darts", tape), learner("pc_darts", Tape(complaint="stay eager"))
    for one in (recorded, eager):
        train(one, 12, train_batches=batches(sizes=(6, 6, 6, 6, 2)))
    assert_same(recorded, eager)
    assert tape.recorded == 2
    assert one._weights._recorded is None


@pytest.mark.parametrize("change", ["size", "layout"])
def test_recorded_anew_after_a_change_for_good(change):
    def second(one):
        layout = torch.channels_last if change == "layout" else torch.contiguous_format
        data = batches(sizes=(4 if change == "size" else 6,), layout=layout)
        train(one, 6, 6, train_batches=data)

    tape = Tape()
    recorded, eager = learner("darts", tape), learner("darts", Tape(complaint="stay eager"))
    for one in (recorded, eager):
        train(one, 6)
        second(one)
    assert_same(recorded, eager)
    assert tape.recorded == 3  # only the weights' batches are others


def test_recorded_anew_when_a_schedule_moves_on():
    tape = Tape()
    options = DA2SOptions(schedule="linear", delay=1, alpha_warmup_epochs=0)
    one = learner("da2s", tape, options=options)
    kept = []
    for epoch in range(3):
        for step in range(6):  # all within one epoch of STEPS steps
            train(one, 1, epoch * STEPS + step % STEPS)
        kept.append(one._architecture._recorded.signature)
    assert len(set(kept)) == 3
    assert tape.recorded == 1 + 3  # the weights' step has no number of a schedule


@pytest.mark.parametrize("by", ["state", "layout", "hand"])
def test_dropped_when_the_state_moves(by):
    tape = Tape()
    one = learner("darts", tape)
    train(one, WARM_UP + 1)
    assert one._weights._recorded is not None
    if by == "state":
        one.load_state_dict(copy.deepcopy(one.state_dict()))
    elif by == "layout":
        one.lay_out(torch.channels_last)
    else:  # noticed at the next epoch
        for parameter in one.supernet.parameters():
            parameter.data = parameter.data.clone()
        train(one, 1, 2 * STEPS)
    assert one._weights._recorded is None
    recorded = tape.recorded
    train(one, WARM_UP + 1, 2 * STEPS)
    assert tape.recorded == recorded + 2


def test_goes_on_after_a_checkpoint():
    whole, first = (learner("pc_darts", Tape()) for _ in range(2))
    train(whole, 10)
    train(first, 6)
    state = copy.deepcopy(first.state_dict())
    second = learner("pc_darts", Tape())
    train(second, 5)
    second.load_state_dict(state)
    data, val = batches(), batches(seed=12)
    for _ in range(6):
        next(data), next(val)
    train(second, 4, 6, data, val)
    assert_same(whole, second)
    assert {type(group["lr"]) for group in state["weight_optimizer"]["param_groups"]} == {float}
    # And without recordings: the state is that of any learner.
    learner("pc_darts").load_state_dict(state)


def test_a_copy_records_its_own_steps():
    told = []
    one = learner("darts", Tape(), tell=told.append, demanded=True)
    train(one, WARM_UP + 1)
    other = copy.deepcopy(one)
    before = state_of(one)
    train(other, WARM_UP + 2)
    assert all(torch.equal(value, before[name]) for name, value in state_of(one).items())
    assert other.recorder is not one.recorder and other.recorder.replays == 4
    assert other.supernet is not one.supernet
    assert {id(p) for g in other.weight_optimizer.param_groups for p in g["params"]} == {
        id(p) for p in other.supernet.parameters()
    }
    assert not other.demanded
    other.recorder.complaint = "it waits"
    other.forget()
    train(other, 2)
    assert other.reason == "it waits" and told == []


def test_what_it_holds_goes_with_it():
    class Forgetful(Tape):
        def record(self, run):
            run()
            return Tape().record(lambda: None)

    gc.collect()
    gc.disable()
    try:
        one = learner("darts", Forgetful())
        train(one, WARM_UP + 2)
        other = copy.deepcopy(one)
        train(other, WARM_UP + 2)
        networks = [weakref.ref(each.supernet) for each in (one, other)]
        del one, other
        assert [network() for network in networks] == [None, None]
    finally:
        gc.enable()


# --- what stands in the way ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tape", "reason", "replays"),
    [
        (Tape(complaint="the host waits"), "the host waits", 0),
        (Tape(fails=RuntimeError("not permitted\nwhen capturing")), "failed: not permitted", 0),
        (Tape(fails=KeyError()), "failed: KeyError", 0),
    ],
)
def test_eager_from_then_on(tape, reason, replays):
    told = []
    one, eager = learner("darts", tape, tell=told.append), learner("darts", Tape())
    for each in (one, eager):
        train(each, 7)
    assert_same(one, eager)
    assert len(told) == 1 and reason in told[0]
    assert one.reason == told[0] and one.lead == 0
    assert tape.replays == replays
    demanded = learner("darts", Tape(tape.complaint, tape.fails), demanded=True)
    with pytest.raises(GraphError, match="cuda_graphs: steps cannot be recorded"):
        train(demanded, 7)


def test_nothing_is_left_of_a_recording_that_failed():
    class Leaving(Tape):
        def record(self, run):
            for parameter in (*one.supernet.parameters(), *one.arch.parameters()):
                parameter.grad = torch.full_like(parameter, torch.nan)
            raise RuntimeError("no")

    one = learner("darts", Leaving())
    train(one, WARM_UP)
    one.architecture_step(next(batches()), NOW)
    assert one.reason is not None
    assert all(parameter.grad is None for parameter in one.supernet.parameters())


def test_an_error_of_the_step_itself_comes_through():
    one = learner("darts", Tape(fails=RuntimeError("recording")), tell=lambda reason: None)
    train(one, WARM_UP)
    one.criterion = lambda logits, labels: 1 / 0
    with pytest.raises(ZeroDivisionError):
        train(one, 1, WARM_UP)


def test_a_group_without_parameters():
    still = {"schedule": "const", "op_schedule": "const", "edge_schedule": "const"}
    one = learner("da2s", Tape(), options=DA2SOptions(keep="2,3", **still))
    assert any(not group["params"] for group in one.arch_optimizer.param_groups)
    train(one, 7)
    assert one.reason is None and one.recorder.recorded == 2


def test_the_eager_step_after_a_failed_recording_has_its_memory():
    class Failing(Tape):
        def record(self, run):
            kept = torch.zeros(3)
            alive.append(weakref.ref(kept))
            raise RuntimeError("no memory")

    alive: list[weakref.ref] = []
    one = learner("darts", Failing())
    train(one, WARM_UP)
    plain = one.criterion
    seen = []
    one.criterion = lambda *given: seen.append(alive[0]() if alive else None) or plain(*given)
    train(one, 1, WARM_UP)
    assert one.reason is not None and alive and seen == [None] * len(seen)


def test_recordings_make_room_where_memory_is_short():
    one = learner("darts", Tape())
    train(one, 7)
    assert one.recorder.recorded == 2
    one.recorder.short = True
    train(one, 1, 7)
    assert one.recorder.recorded == 2  # both replayed: nothing is short for that
    one.weight_step(next(batches(sizes=(3,))), NOW)
    assert one._weights._recorded is None and one._architecture._recorded is None
