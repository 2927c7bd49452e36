# SPDX-License-Identifier: Apache-2.0
"""Steps of a search as CUDA graphs: recorded once, then replayed by one launch.

A step of a supernet launches thousands of small kernels, and on a GPU the host is what it waits
for. :class:`GraphedLearner` makes its first steps as any learner does, records the next one (from
the forward to the optimizer), and from then on copies each batch into the tensors that were
recorded and replays. The state is that of eager steps: a recording runs nothing, a replay runs the
same kernels on the same weights, statistics, moments and learning rates.

A step is made eagerly where its batch is of another shape, and recorded anew where the shape, the
memory format or a number of a schedule (``Method.graph_key``) has changed for good. Where something
in a step cannot be recorded all steps stay eager, and the reason is told.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastnas.methods.base import Method, Moment
from fastnas.methods.learner import Batch, Learner, Outcome
from fastnas.methods.optimizers import rates_as_tensors
from fastnas.methods.recorder import CudaRecorder, Recorder, Recording
from fastnas.nn.batch_norm import has_global_hook, hook_tables

__all__ = [
    "WARM_UP",
    "GraphError",
    "GraphedLearner",
    "Graphs",
    "obstacle",
    "with_graphs",
]

Graphs = Literal["auto", "on", "off"]

Run = Callable[[Batch, Moment], Outcome]

WARM_UP = 3
"""Eager steps before one is recorded: libraries choose their algorithms in them."""


class GraphError(RuntimeError):
    """A step that was to be recorded cannot be; the message says why."""


class _NotRecorded(Exception):
    """Why a step was not recorded; it was not made either."""


class _Recorded(NamedTuple):
    """A step that was recorded, the tensors it reads and writes, and where the state lay."""

    recording: Recording
    signature: Hashable
    inputs: Batch
    loss: Tensor
    correct: Tensor
    addresses: list[int]

    def replay(self, batch: Batch) -> Outcome:
        """Make the step on a batch."""
        for own, given in zip(self.inputs, batch, strict=True):
            own.copy_(given, non_blocking=True)
        self.recording.replay()
        # The next replay writes into these again.
        return Outcome(self.loss.clone(), self.correct.clone(), batch[1].numel())


class _Step:
    """One kind of step: eager until the same one has come a few times, then replayed."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        recorder: Recorder,
        addresses: Callable[[], list[int]],
    ) -> None:
        self._optimizer, self._recorder, self._addresses = optimizer, recorder, addresses
        self.forget()

    def forget(self) -> None:
        """Drop the recording and begin anew."""
        self._recorded: _Recorded | None = None
        self._last: Hashable = None
        self._count = 0

    def verify(self) -> None:
        """Drop the recording if it is of a state that lay elsewhere."""
        if self._recorded is not None and self._recorded.addresses != self._addresses():
            self.forget()

    def replays(self, batch: Batch, key: Hashable) -> bool:
        """Whether this batch would be replayed."""
        recorded = self._recorded
        return recorded is not None and recorded.signature == _signature(batch, key)

    def __call__(
        self, run: Run, batch: Batch, moment: Moment, key: Hashable
    ) -> tuple[Outcome, str | None]:
        """Make the step ``run``; also says what stands in the way of a recording."""
        signature = _signature(batch, key)
        if self._recorded is not None and self._recorded.signature == signature:
            self._last = signature
            return self._recorded.replay(batch), None
        if signature != self._last:
            self._last, self._count = signature, 0
        self._count += 1
        if self._count <= WARM_UP:
            return self._eager(run, batch, moment)
        return self._record(run, batch, moment, signature).replay(batch), None

    def _eager(self, run: Run, batch: Batch, moment: Moment) -> tuple[Outcome, str | None]:
        found: list[Outcome] = []
        complaint = self._recorder.warm_up(lambda: found.append(run(batch, moment)))
        self._sample = found[0]
        # The first step sets up what the device has to be waited for once.
        return found[0], complaint if self._count > 1 else None

    def _record(self, run: Run, batch: Batch, moment: Moment, signature: Hashable) -> _Recorded:
        # Its memory is for the new one.
        self._recorded = None
        inputs = (torch.empty_like(batch[0]), torch.empty_like(batch[1]))
        loss, correct = map(torch.empty_like, (self._sample.loss, self._sample.correct))

        def recorded() -> None:
            outcome = run(inputs, moment)
            # Out of the memory that recordings share.
            loss.copy_(outcome.loss)
            correct.copy_(outcome.correct)

        try:
            with _capturable(self._optimizer):
                recording = self._recorder.record(recorded)
        # Whatever it is: a step that is wrong in itself fails once more when it is made eagerly.
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise _NotRecorded(f"recording a step failed: {first}") from error
        self._recorded = _Recorded(recording, signature, inputs, loss, correct, self._addresses())
        return self._recorded


def _signature(batch: Batch, key: Hashable) -> Hashable:
    return (key, *((t.shape, t.stride(), t.dtype) for t in batch))


@dataclass
class GraphedLearner(Learner):
    """A learner that replays its steps where they can be recorded.

    Attributes:
        recorder: makes the recordings.
        demanded: whether it is an error that a step cannot be recorded.
        tell: told, once, why steps are not recorded.
        reason: why they are not; None while they are.
    """

    recorder: Recorder = field(kw_only=True)
    demanded: bool = field(default=False, kw_only=True)
    tell: Callable[[str], None] = field(default=lambda reason: None, kw_only=True)
    reason: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Move the learning rates to where a recorded step reads them."""
        for optimizer in (self.weight_optimizer, self.arch_optimizer):
            rates_as_tensors(optimizer)
        self._begin()

    def _begin(self) -> None:
        def step(optimizer: torch.optim.Optimizer) -> _Step:
            # Without a reference to the learner: what it holds of the device goes with it at once.
            where = functools.partial(_addresses, self.supernet, self.arch, optimizer)
            return _Step(optimizer, self.recorder, where)

        self._weights, self._architecture = map(step, (self.weight_optimizer, self.arch_optimizer))
        self._checked: int | None = None

    @property
    def lead(self) -> int:
        """Steps until they take the time that they are going to take."""
        return WARM_UP + 1 if self.reason is None else 0

    def weight_step(self, batch: Batch, moment: Moment) -> Outcome:
        """Step the weights on a training batch; see :meth:`Learner.weight_step`."""
        return self._make(self._weights, super().weight_step, batch, moment)

    def architecture_step(self, batch: Batch, moment: Moment) -> Outcome:
        """First-order step of the architecture; see :meth:`Learner.architecture_step`."""
        return self._make(self._architecture, super().architecture_step, batch, moment)

    def lay_out(self, layout: torch.memory_format) -> None:
        """Bring the weights into a memory format, which moves them."""
        super().lay_out(layout)
        self.forget()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; what was recorded is dropped."""
        super().load_state_dict(state)
        self.forget()

    def forget(self) -> None:
        """Drop what was recorded: steps are eager again, and recorded anew."""
        self._weights.forget()
        self._architecture.forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphedLearner:
        """A learner that records its own steps and tells nobody."""
        other = copy.copy(self)
        own = {f.name for f in dataclasses.fields(Learner)} | {"recorder"}
        # Together, so that copied optimizers step copied parameters.
        vars(other).update(copy.deepcopy({k: v for k, v in vars(self).items() if k in own}, memo))
        other.demanded, other.tell = False, lambda reason: None
        other._begin()
        return other

    def _make(self, step: _Step, eager: Run, batch: Batch, moment: Moment) -> Outcome:
        if self.reason is None and moment.epoch != self._checked:
            self._checked = moment.epoch
            self._check()
        if self.reason is not None:
            return eager(batch, moment)
        failed = None
        try:
            key = (self.supernet.training, self.method.graph_key(moment))
            if not step.replays(batch, key) and self.recorder.is_short():
                self.forget()  # what recordings hold, eager steps could not use
            outcome, complaint = step(eager, batch, moment, key)
        except _NotRecorded as error:
            failed = str(error)
        if failed is not None:
            # Not in the block above: the error holds what the recording had computed until then.
            self._give_up(failed)
            return eager(batch, moment)
        if complaint is not None:
            self._give_up(complaint)
        return outcome

    def _check(self) -> None:
        """Once an epoch: is anything in the way, does everything lie where it lay?"""
        if (reason := obstacle(self)) is not None:
            self._give_up(reason)
            return
        self._weights.verify()
        self._architecture.verify()

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        self.forget()
        # A recording that failed may leave gradients that nothing was computed into.
        for optimizer in (self.weight_optimizer, self.arch_optimizer):
            optimizer.zero_grad(set_to_none=True)
        if self.demanded:
            raise GraphError(f"cuda_graphs: steps cannot be recorded: {reason}")
        self.tell(reason)


def with_graphs(learner: Learner, mode: Graphs, tell: Callable[[str], None]) -> Learner:
    """The learner, with steps that are replayed where that is asked for and possible.

    Args:
        learner: on its device.
        mode: ``auto`` on a CUDA device where the steps can be recorded; ``on``: anything else is an
            error; ``off``: not at all.
        tell: told why they are not, now or when that is found out.

    Raises:
        ValueError: ``on``, and something is known to stand in the way.
    """
    device = next(learner.supernet.parameters()).device
    if mode == "off" or (mode == "auto" and device.type != "cuda"):
        return learner
    here = device.type == "cuda"
    reason = obstacle(learner) if here else f"there are none on a device {device.type!r}"
    if reason is not None:
        if mode == "on":
            raise ValueError(f"cuda_graphs: expected auto or off, but got 'on': {reason}")
        tell(reason)
        return learner
    values = {f.name: getattr(learner, f.name) for f in dataclasses.fields(learner)}
    return GraphedLearner(**values, recorder=CudaRecorder(device), demanded=mode == "on", tell=tell)


def obstacle(learner: Learner) -> str | None:
    """What is known to stand in the way of a recording of the learner's steps; None for nothing."""
    if learner.group.size > 1:
        return "the processes of a run wait for each other in every step"
    if learner.scaler is not None:
        return "loss scaling looks at the gradients in every step"
    if (reason := learner.method.graph_obstacle() or _undeclared(learner.method)) is not None:
        return reason
    if has_global_hook():
        return "a hook on all modules would not be called"
    for name, module in learner.supernet.named_modules():
        if isinstance(module, (nn.SyncBatchNorm, nn.parallel.DistributedDataParallel)):
            return f"{name or 'the supernet'} is {type(module).__name__}"
        if any(hook_tables(module)):
            return f"a hook on {name or 'the supernet'} would not be called"
    if any(any(hook_tables(module)) for module in learner.arch.modules()):
        return "a hook on the architecture would not be called"
    for optimizer in (learner.weight_optimizer, learner.arch_optimizer):
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            return f"a hook on {type(optimizer).__name__} would not be called"
    for parameter in (*learner.supernet.parameters(), *learner.arch.parameters()):
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            return "a hook on a parameter would not be called"
    return None


def _undeclared(method: Method) -> str | None:
    """What a class changes of a method of ours without saying that its steps can be recorded."""
    for cls in type(method).__mro__:
        if "graph_obstacle" in vars(cls) or cls.__module__.partition(".")[0] == "fastnas":
            return None
        for name in ("weights", "objective", "iteration", "weight_step", "architecture_step"):
            if name in vars(cls):
                return f"{cls.__name__} has a {name} of its own and no graph_obstacle"
    return None


@contextlib.contextmanager
def _capturable(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within the block the optimizer lets itself be recorded, where it has to be told so.

    Outside it would complain of eager steps; fused ones are the same in both cases.
    """
    groups = [group for group in optimizer.param_groups if "capturable" in group]
    before = [group["capturable"] for group in groups]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group, value in zip(groups, before, strict=True):
            group["capturable"] = value


def _addresses(supernet: nn.Module, arch: nn.Module, optimizer: torch.optim.Optimizer) -> list[int]:
    """Where everything lies that a step with this optimizer reads and writes, but for images."""
    tensors = [*supernet.parameters(), *supernet.buffers(), *arch.parameters()]
    # The rate of a group without parameters is a number, which nothing reads.
    rates = [group["lr"] for group in optimizer.param_groups]
    tensors += [rate for rate in rates if isinstance(rate, Tensor)]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return [tensor.data_ptr() for tensor in tensors]
