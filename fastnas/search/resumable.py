# SPDX-License-Identifier: Apache-2.0
"""What every run that can be stopped and continued shares: its folder, checkpoints and signals."""

from __future__ import annotations

import abc
import contextlib
import json
import math
import signal
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from fastnas.data.images import ImageData
from fastnas.data.interface import Data
from fastnas.parallel import ALONE, Group, ProcessesError
from fastnas.search.checkpoint import (
    CheckpointError,
    RandomState,
    load_checkpoint,
    save_checkpoint,
)
from fastnas.search.files import RunDirectory, read_json
from fastnas.search.interrupts import Interrupts, RunInterrupted
from fastnas.search.layout import LayoutChoice, Step, choose_layout
from fastnas.search.meters import Meter
from fastnas.search.runtime import is_out_of_memory, memory_layout, runtime

__all__ = ["NonFiniteLossError", "Resumable", "data_identity", "difference"]


class NonFiniteLossError(FloatingPointError):
    """A loss became NaN or infinite; the last checkpoint is from before that."""


# Settings that processes of one run may have for themselves.
_OF_A_PROCESS = frozenset(("out", "source", "device", "threads"))


class Resumable(abc.ABC):
    """A run in epochs and steps. Subclasses say what its state is and call in at each boundary.

    Args:
        config: the configuration as JSON can hold it.
        out: folder of the run, None to write nothing.
        resume: go on with the run in ``out``.
        group: the processes that make this run together; the first of them writes its files.

    Attributes:
        kind: the word for such a run, also the kind of its checkpoints.
        runtime_fields: fields of the configuration that may differ when a run goes on.
        epoch: epochs finished.
        step: iterations done in the current epoch.
        history: records of the finished epochs.
        resumed: whether a checkpoint was loaded.

    Raises:
        FileExistsError: ``out`` holds a run and ``resume`` is off.
        FileNotFoundError: there is nothing to resume.
        ValueError: the run to resume has another configuration.
    """

    kind: ClassVar[str]
    runtime_fields: ClassVar[Collection[str]] = ()
    config: Any
    device: torch.device
    random: RandomState
    progress: Any
    steps_per_epoch: int

    def __init__(
        self, config: Mapping[str, Any], out: str | None, resume: bool, group: Group = ALONE
    ) -> None:
        self.group = group
        self.epoch = 0
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.resumed = False
        self._begun_with = dict(config)
        self._continues = resume
        self._interrupts = Interrupts()
        self._stamp: tuple[int, int] | None = None
        # The other processes open a folder only to read a checkpoint, and let it go after that.
        if out is None or not (group.leads or resume):
            self._directory = None
        else:
            self._directory = self._open(out)

    @property
    def path(self) -> Path | None:
        """The run's folder, None when nothing is written."""
        return None if self._directory is None else self._directory.path

    @abc.abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how the run goes on; tensors are not copied."""

    @abc.abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of :meth:`state_dict`."""

    @abc.abstractmethod
    def how_to_go_on(self) -> str:
        """The command that continues this run."""

    @abc.abstractmethod
    def meters(self) -> Mapping[str, Meter]:
        """The losses that must stay finite, by what they are the loss of."""

    @abc.abstractmethod
    def _trial(self, layout: torch.memory_format) -> Step:
        """A step of a copy of this run, in a memory format, that changes nothing here."""

    @property
    def _lead(self) -> int:
        """Steps that a trial makes before the one it returns."""
        return 0

    @abc.abstractmethod
    def _lay_out(self, layout: torch.memory_format) -> None:
        """Bring network and batches into a memory format."""

    def _open(self, out: str) -> RunDirectory:
        """The run's folder, checked but not yet written to."""
        if not self._continues:
            return RunDirectory.free(out)
        directory = RunDirectory.resume(out)
        begun = read_json(directory.config)
        if not isinstance(begun, dict):
            raise ValueError(f"{directory.config}: expected an object with fields")
        self._adopt_layout(begun)
        if found := difference(begun, self._begun_with, self.runtime_fields):
            raise ValueError(
                f"{directory.path} was begun with {found}: continue it with the same options, "
                "or start another run with another --out"
            )
        return directory

    # --- the memory format ---------------------------------------------------------------------

    def _adopt_layout(self, begun: Mapping[str, Any]) -> None:
        """Keep the memory format that the run was begun with, where ``auto`` leaves it open."""
        name = begun.get("memory_format")
        if self.config.memory_format == "auto" and name in ("contiguous", "channels_last"):
            self._set_layout(name)

    def _set_layout(self, name: str) -> None:
        self.config = replace(self.config, memory_format=name)
        self._begun_with["memory_format"] = name

    def _choose_layout(self) -> None:
        """Choose the memory format of a new run, once: another one would give other last bits."""
        if self.config.memory_format != "auto":
            return
        steps = self.config.epochs * self.steps_per_epoch
        choice = None
        if self.group.leads:
            # Whatever the trial draws, the run's own generators do not notice.
            with RandomState(self.config.seed, self.device).use():
                choice = choose_layout(
                    self._trial,
                    steps,
                    self.device,
                    lambda: self._interrupts.received is not None,
                    self._lead,
                )
        choice = self._agreed(choice)
        if choice is None:
            return
        self._set_layout(choice.name)
        self._lay_out(memory_layout(choice.name, self.device))
        if self._directory is not None:
            # Before the first step: a run that is killed after it goes on in the same format.
            self._directory.amend_config(memory_format=choice.name)
        if choice.found is not None:
            self._tell(self.progress.note, f"memory format: {choice.found}")

    def _meet(self, data: Data, batch_size: int, *modules: nn.Module) -> None:
        """Begin together, where several processes make this run.

        With other settings or other numbers of images they would wait for each other for ever.
        """
        if self.group.size == 1:
            return
        fields = {n: v for n, v in self.config.to_dict().items() if n not in _OF_A_PROCESS}
        images = [*data_identity(data), data.num_test]
        if isinstance(data, ImageData):
            images.append(data.train_labels.tolist())
        self.group.check_same(
            {**{name: json.dumps(value) for name, value in fields.items()}, "data": str(images)}
        )
        for module in modules:
            self.group.check_same_state(module, "weights at the start")
        share = batch_size // self.group.size
        self._tell(
            self.progress.note,
            f"processes: {self.group.size}, each with {share} images of a batch of {batch_size}",
        )

    def _agreed(self, choice: LayoutChoice | None) -> LayoutChoice | None:
        """The choice of the first process, which alone has made the trial."""
        told = self.group.told(None if choice is None else json.dumps(choice))
        return None if told is None else LayoutChoice(*json.loads(told))

    # --- the time of a run ---------------------------------------------------------------------

    @contextlib.contextmanager
    def _running(self, threads: int, deterministic: bool) -> Iterator[None]:
        """The time of a run: its folder is ours alone, signals wait, and its end is told."""
        with contextlib.ExitStack() as stack:
            if self._directory is not None:
                stack.enter_context(self._files(self._directory))
            stack.enter_context(runtime(threads, deterministic))
            stack.enter_context(self.random.use())
            self._interrupts = stack.enter_context(Interrupts())
            try:
                yield
            except BaseException as reason:
                # Where this cannot be told, the reason itself is what matters.
                with contextlib.suppress(OSError):
                    self.progress.stop(reason)
                raise

    @contextlib.contextmanager
    def _files(self, directory: RunDirectory) -> Iterator[None]:
        """The run's folder, locked.

        A new run that its configuration makes fail at once, and would make fail again, leaves none.

        Raises:
            BlockingIOError: another process runs there, or did since the checkpoint was read.
            FileExistsError: another run was begun there meanwhile.
        """
        if self._continues:
            with directory.lock():
                if directory.stamp() != self._stamp:
                    raise BlockingIOError(
                        f"{directory.path} has gone on in another process meanwhile: "
                        "run the command again"
                    )
                if self.resumed:
                    directory.rewrite_metrics(self.history)
                yield
            return
        with directory.begun(self._begun_with, undo=_comes_again):
            yield

    def _tell(self, event: Callable[..., None], *facts: Any) -> None:
        """Tell the progress something; where nobody listens any more, the run is to stop."""
        try:
            event(*facts)
        except OSError as error:
            # A terminal that was closed gives other errors, after its signal.
            if not isinstance(error, BrokenPipeError) and self._interrupts.received is None:
                raise
            self._interrupts.note(signal.SIGPIPE)

    def _save(self) -> None:
        assert self._directory is not None
        save_checkpoint(self._directory.checkpoint, self.state_dict(), kind=self.kind)
        self._stamp = self._directory.stamp()

    def _restore(self) -> None:
        """Load the checkpoint of the run to resume, if it got as far as writing one."""
        directory = self._directory
        assert directory is not None
        if not self.group.leads:
            self._directory = None
        checkpoint = directory.checkpoint
        self._stamp = directory.stamp()
        if not checkpoint.exists():
            if directory.metrics.exists():
                raise CheckpointError(
                    f"{checkpoint} is missing, but {directory.metrics.name} says that epochs "
                    "were finished: the run cannot be continued"
                )
            # Killed before the first checkpoint: the seed brings the same run again.
            return
        state = load_checkpoint(checkpoint, kind=self.kind)
        try:
            self.load_state_dict(state)
        # What a state of another shape than ours can make of the code that reads it.
        except (LookupError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split()[:40])
            if isinstance(error, KeyError):
                reason = f"{reason} is missing"
            raise CheckpointError(
                f"{checkpoint} does not fit this {self.kind}: {reason}"
            ) from error
        self.resumed = True

    def _check_state(self, state: Mapping[str, Any], data: Data) -> None:
        """Raise a ValueError if a state is of another configuration or of other data.

        Its epoch, step and history must make sense as well: the loop counts on them.
        """
        if self.config.memory_format == "auto":
            self._adopt_layout(state["config"])
            self._lay_out(memory_layout(self.config.memory_format, self.device))
        if found := difference(state["config"], self._begun_with, self.runtime_fields):
            raise ValueError(f"it is of a {self.kind} with {found}")
        if list(state["data"]) != data_identity(data):
            raise ValueError(f"it is of other data: {state['data']}, not {data_identity(data)}")
        for name, most in (("epoch", self._begun_with["epochs"]), ("step", self.steps_per_epoch)):
            if type(state[name]) is not int or not 0 <= state[name] <= most:
                raise ValueError(f"{name}: expected 0 to {most}, but got {state[name]!r}")
        history = state["history"]
        if [record["epoch"] for record in history] != list(range(1, state["epoch"] + 1)):
            raise ValueError(f"its history is not that of {state['epoch']} epochs")
        if not 0 <= state["seconds"] < math.inf:
            raise ValueError(f"seconds: expected 0 or more, but got {state['seconds']!r}")

    def _obey(self) -> None:
        """Stop at this boundary between iterations if a signal came."""
        interrupts = self._interrupts
        # A signal may reach the processes one after the other, or some of them only. What they have
        # told each other counts: one that came meanwhile is for the next boundary.
        number = self.group.largest(interrupts.received or 0)
        if not number:
            return
        interrupts.received = number
        self._check_finite(self.meters())
        where = f"stopped by {interrupts.name} in epoch {self.epoch + 1}, step {self.step}"
        if self._directory is None:
            advice = "nothing is saved, since the run has no folder"
        else:
            # In the middle of the choice of a format nothing is done yet that could be lost.
            if self.config.memory_format != "auto":
                self._save()
            advice = f"go on with: {self.how_to_go_on()}"
        # One that ends is the end of all: not before the checkpoint is there.
        self.group.wait()
        raise RunInterrupted(f"{where}; {advice}", number)

    def _check_finite(self, meters: Mapping[str, Meter]) -> None:
        for name, meter in meters.items():
            bad = meter.bad
            if bad is None:
                continue
            checkpoint = None if self._directory is None else self._directory.checkpoint
            if checkpoint is not None and checkpoint.exists():
                kept = f"{checkpoint} is from before"
            else:
                kept = "there is no checkpoint from before"
            raise NonFiniteLossError(
                f"the loss of the {name} became {bad.value} in epoch {self.epoch + 1}, "
                f"step {bad.step}; try a lower learning rate or --amp off ({kept})"
            )


def _comes_again(error: Exception) -> bool:
    # What ends another process, as an image that only that one reads, may come again as well.
    kinds = (ValueError, NonFiniteLossError, ProcessesError)
    return isinstance(error, kinds) or is_out_of_memory(error)


def difference(
    old: Mapping[str, Any], new: Mapping[str, Any], ignore: Collection[str] = ()
) -> str | None:
    """The first field in which two configurations differ, as ``name=old, not new``; else None."""
    for name in new:
        if name not in ignore and old.get(name) != new[name]:
            return f"{name}={old.get(name)!r}, not {new[name]!r}"
    return None


def data_identity(data: Data) -> list[Any]:
    """What tells one set of images from another in a checkpoint."""
    return [data.name, data.num_train, data.channels, *data.image_size, data.num_classes]
