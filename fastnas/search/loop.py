# SPDX-License-Identifier: Apache-2.0
"""The search loop: joins a space, a method and data, and survives being killed at any moment.

All state is in :class:`Search` and its ``state_dict``. Batches are functions of (seed, epoch,
position), learning rates functions of the epoch, and the random generators belong to the search, so
a run that continues from a checkpoint does what the uninterrupted run would have done, bit for bit
on a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch

from fastnas.data import load
from fastnas.data.interface import Data
from fastnas.methods import ArchParameters, Batch, Method, Moment, Phase
from fastnas.methods.graphs import with_graphs
from fastnas.parallel import ALONE, Group
from fastnas.search.assembly import build_halves, build_learner, cut_batches, noise_batch
from fastnas.search.checkpoint import RandomState
from fastnas.search.collapse import observe
from fastnas.search.config import RUNTIME_FIELDS, SearchConfig
from fastnas.search.files import write_text
from fastnas.search.frozen import frozen_architecture
from fastnas.search.gap import BN_BATCHES, Gap, measure_gap
from fastnas.search.idle import refuse_idle_values, with_data
from fastnas.search.layout import Step, begin_trial
from fastnas.search.meters import Meter, Pace
from fastnas.search.progress import Progress, StepReport, TextProgress
from fastnas.search.remaining import seconds_left
from fastnas.search.result import SearchResult
from fastnas.search.resumable import Resumable, data_identity
from fastnas.search.runtime import check_threads
from fastnas.search.schedule import learning_rate
from fastnas.spaces import get_space


class Search(Resumable):
    """A bilevel search: weights on one part of the training images, architecture on another.

    Args:
        config: everything that decides how it goes.
        data: images to use instead of ``config.data``, as they are.
        progress: told what happens; lines of text on standard output by default.
        group: the processes that make this search together (:mod:`fastnas.parallel`). Each takes
            its share of every batch; the first writes the files and tells how it goes.

    Attributes:
        learner: supernet, architecture parameters, their optimizers and steps.
        epoch: epochs finished.
        step: iterations done in the current epoch.
        steps_per_epoch: iterations in an epoch.
        history: records of the finished epochs.
        resumed: whether a checkpoint was loaded.
        pace: how long its parts take.

    Raises:
        ValueError: the configuration does not fit space, method, data or machine, or is not that
            of the run to resume.
        FileExistsError: ``config.out`` holds a run and ``config.resume`` is off.
        FileNotFoundError: there is nothing to resume, or the data is missing.
        CheckpointError: the checkpoint is damaged or of another search.
    """

    kind = "search"
    runtime_fields = RUNTIME_FIELDS

    def __init__(
        self,
        config: SearchConfig,
        *,
        data: Data | None = None,
        progress: Progress | None = None,
        group: Group = ALONE,
    ) -> None:
        if data is not None:
            config = with_data(config, data)
        self.config = config
        if not config.resume:
            refuse_idle_values(config)
        self.device = group.place(config.torch_device())
        check_threads(config.threads)
        if not group.leads:
            progress = Progress()  # which is silent
        self.progress = TextProgress() if progress is None else progress
        # Before anything that takes time: it checks the folder.
        super().__init__(config.to_dict(), config.out, config.resume, group)
        config = self.config
        self.space = get_space(config.space)
        if data is None:
            data = load(config.data, image_size=config.image_size)
        self.data = data.to(self.device)
        self.halves = build_halves(self.data, config, self.device, group)
        self.steps_per_epoch = len(self.halves.weights)
        self.random = RandomState(config.seed, self.device)
        with self.random.use():
            learner = build_learner(self.data, config, self.device, group)
        self._remarks: list[str] = []
        self.learner = with_graphs(learner, config.cuda_graphs, self._remarks.append)
        self._statistics = list(self.supernet.buffers())
        self._train, self._arch = Meter(self.device), Meter(self.device)
        self.pace = Pace()
        self._seconds = 0.0
        if config.resume:
            self._restore()

    @property
    def supernet(self) -> torch.nn.Module:
        """The network that is searched."""
        return self.learner.supernet

    @property
    def arch(self) -> ArchParameters:
        """The architecture parameters."""
        return self.learner.arch

    @property
    def method(self) -> Method:
        """The method."""
        return self.learner.method

    @property
    def stopped(self) -> int | None:
        """The epoch whose architecture is the result, where the search was stopped early."""
        return self.history[-1].get("stopped") if self.history else None

    @property
    def over(self) -> bool:
        """Whether there is nothing left to do."""
        return self.epoch >= self.config.epochs or self.stopped is not None

    @property
    def seconds_left(self) -> float | None:
        """Estimate for the rest; None before the first iteration."""
        return seconds_left(self)

    def genotype(self) -> Any:
        """The architecture that would be derived now; of an earlier epoch after an early stop."""
        return self.genotype_of(self.stopped)

    def genotype_of(self, epoch: int | None) -> Any:
        """The architecture derived after an earlier epoch, from 1; None for now."""
        if epoch is None:
            return self.method.derive(self.arch, self.space)
        return self.space.genotype.from_dict(self.history[epoch - 1]["genotype"])

    def measure_gap(self, genotype: Any = None, supernet: float | None = None) -> Gap:
        """Test the supernet as it is and pruned to a genotype, on the architecture's images.

        Args:
            genotype: the architecture, by default that of :meth:`genotype`.
            supernet: accuracy of the supernet, where it is known already.

        Raises:
            ValueError: a supernet of this space cannot be pruned.
        """
        return measure_gap(
            self.learner,
            self.space,
            self.genotype() if genotype is None else genotype,
            self.moment("validation"),
            validation=lambda: islice(self.halves.validation.iterate(0), self.test_steps),
            training=lambda: islice(self.halves.weights.iterate(0), BN_BATCHES),
            supernet=supernet,
            pause=self._obey,
        )

    def run(self) -> SearchResult:
        """Search to the end, from the start or from where the checkpoint was taken.

        Returns:
            The genotype and the record of every epoch.

        Raises:
            RunInterrupted: SIGINT, SIGTERM or SIGHUP came, or ``progress`` met a broken pipe; the
                checkpoint is of the last iteration.
            NonFiniteLossError: a loss became NaN or infinite.
            BlockingIOError: another process searches in that folder.
            OSError: a file of the run cannot be written.
        """
        with self._running(self.config.threads, self.config.deterministic):
            self._meet(self.data, self.halves.weights.batch_size, self.supernet, self.arch)
            self._tell(self.progress.start, self)
            for cut in cut_batches(self.config.batch_size, self.halves.trained):
                self._tell(self.progress.note, cut)
            if frozen := frozen_architecture(self.config, self.steps_per_epoch):
                self._tell(self.progress.warning, frozen)
            self._choose_layout()
            while not self.over:
                self._obey()
                self._run_epoch()
            # Again, for a run that was killed between its last checkpoint and this file.
            gap = self.history[-1].get("gap")
            result = SearchResult(
                self._write_genotype(),
                self.history,
                self.path,
                self.stopped,
                None if gap is None else Gap(**gap),
            )
            self._tell(self.progress.end, result)
            self.group.wait()  # until the files are there, which another run may read
        return result

    def _run_epoch(self) -> None:
        config = self.config
        lr = self._learning_rate(0)
        frozen = self.epoch < config.arch_warmup_epochs
        draw = None if frozen else self.halves.architecture.__next__
        self.supernet.train()
        clock = time.perf_counter()
        for batch in self.halves.weights.iterate(self.epoch, self.step):
            moment = self.moment("weights")
            self.learner.set_rate(self._learning_rate(self.step))
            outcome, arch_outcome = self.method.iteration(self.learner, batch, draw, moment)
            self.group.equalize(self._statistics)
            self.step += 1
            while self._remarks:
                self._tell(self.progress.note, f"CUDA graphs: off, {self._remarks.pop()}")
            self._train.add(outcome, self.step)
            if arch_outcome is not None:
                self._arch.add(arch_outcome, self.step)
            now = time.perf_counter()
            self.pace.add("plain" if frozen else "architecture", now - clock)
            self._seconds += now - clock
            clock = now
            if self.step % config.log_every == 0 or self.step == self.steps_per_epoch:
                self._check_finite(self.meters())
                self._tell(self.progress.step, self._report("train", self._train, lr))
            self._obey()
        val = self._validate(lr)
        signs = observe(self, val.accuracy)
        self._seconds += time.perf_counter() - clock
        self._finish_epoch(val, lr, signs)

    @property
    def test_steps(self) -> int:
        """Batches of a test of the supernet."""
        return min(len(self.halves.validation), self.config.val_batches or 2**31)

    def _learning_rate(self, step: int) -> float:
        """The rate of the weights at a step of this epoch."""
        config = self.config
        done = self.epoch * self.steps_per_epoch + step
        moment = Moment(self.epoch, config.epochs, done, "weights", self.steps_per_epoch)
        position, length, high = self.method.lr_span(moment)
        return learning_rate(
            position,
            length,
            config.lr if high is None else high,
            config.lr_min,
            warmup_epochs=config.lr_warmup_epochs,
        )

    def _validate(self, lr: float) -> Meter:
        """Test the supernet, BatchNorm in eval mode; no batches where the epoch has no test.

        A run that was stopped here continues with this test: the epoch's iterations are all done.
        """
        config, meter = self.config, Meter(self.device)
        last = self.epoch == config.epochs - 1
        if config.validate == "never" or (config.validate == "last" and not last):
            return meter
        steps = self.test_steps
        self.supernet.eval()
        clock = time.perf_counter()
        # The same order in every epoch: this is a measurement.
        batches = self.halves.validation.iterate(0)
        for number, batch in zip(range(1, steps + 1), batches, strict=False):
            outcome = self.method.evaluate(self.learner, batch, self.moment("validation"))
            meter.add(outcome, number)
            now = time.perf_counter()
            self.pace.add("test", now - clock)
            clock = now
            if number % config.log_every == 0 or number == steps:
                report = self._report("validation", meter, lr, (number, steps))
                self._tell(self.progress.step, report)
            self._obey()
        # On a GPU the last report has waited for the batches before it.
        self.pace.add("test", time.perf_counter() - clock, 0)
        self.supernet.train()
        return meter

    def _finish_epoch(self, val: Meter, lr: float, signs: dict[str, Any]) -> None:
        record = {
            "epoch": self.epoch + 1,
            "train_loss": self._train.loss,
            "train_accuracy": self._train.accuracy,
            "arch_loss": self._arch.loss,
            "arch_accuracy": self._arch.accuracy,
            "val_loss": val.loss,
            "val_accuracy": val.accuracy,
            "lr": lr,
            **self.method.facts(self.arch, self.moment("validation")),
            **signs,
            "seconds": round(self._seconds, 3),
        }
        self.history.append(record)
        self._train.reset()
        self._arch.reset()
        self.epoch, self.step, self._seconds = self.epoch + 1, 0, 0.0
        self.group.check_same({"a genotype": self.genotype().to_json()})
        if self._directory is not None:
            # The checkpoint holds the history: a kill between these lines loses nothing.
            self._save()
            self._directory.append_metrics(record)
            self._write_genotype()
        self._tell(self.progress.epoch, record, self.genotype())
        for warning in record["warnings"].values():
            self._tell(self.progress.warning, warning)

    def moment(self, phase: Phase) -> Moment:
        """Now."""
        done = self.epoch * self.steps_per_epoch + self.step
        return Moment(self.epoch, self.config.epochs, done, phase, self.steps_per_epoch)

    def _report(
        self, phase: Any, meter: Meter, lr: float, done: tuple[int, int] | None = None
    ) -> StepReport:
        step, steps = done or (self.step, self.steps_per_epoch)
        return StepReport(
            phase=phase,
            epoch=self.epoch + 1,
            epochs=self.config.epochs,
            step=step,
            steps=steps,
            loss=meter.loss,
            accuracy=meter.accuracy,
            arch_loss=self._arch.loss,
            lr=lr,
            seconds_left=seconds_left(self, step if phase == "validation" else 0),
        )

    def _trial(self, layout: torch.memory_format) -> Step:
        def noise() -> Batch:
            return noise_batch(self.halves.weights, self.data.num_classes, self.device, layout)

        frozen = self.config.epochs <= self.config.arch_warmup_epochs
        return begin_trial(self.learner, layout, noise, frozen, self.moment("weights"))

    @property
    def _lead(self) -> int:
        return self.learner.lead

    def _lay_out(self, layout: torch.memory_format) -> None:
        self.halves.lay_out(layout)
        self.learner.lay_out(layout)

    # --- files and state ---------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how the search goes on; tensors are not copied."""
        return {
            "config": self.config.to_dict(),
            "data": data_identity(self.data),
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self._seconds,
            "history": list(self.history),
            **self.learner.state_dict(),
            "architecture_batches": self.halves.architecture.state_dict(),
            "meters": [self._train.state_dict(), self._arch.state_dict()],
            "random": self.random.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of :meth:`state_dict`.

        Raises:
            ValueError: it is of a search with another configuration or other data.
        """
        self._check_state(state, self.data)
        self.learner.load_state_dict(state)
        self.halves.architecture.load_state_dict(state["architecture_batches"])
        for meter, sums in zip((self._train, self._arch), state["meters"], strict=True):
            meter.load_state_dict(sums)
        self.random.load_state_dict(state["random"])
        self.epoch, self.step = state["epoch"], state["step"]
        self._seconds = state["seconds"]
        self.history = list(state["history"])

    def meters(self) -> Mapping[str, Meter]:
        """The losses of both steps."""
        return {"weights": self._train, "architecture": self._arch}

    def how_to_go_on(self) -> str:
        """The command that continues this search."""
        return f"fastnas search --resume{self.group.option()} --out {self.path}"

    def _write_genotype(self) -> Any:
        genotype = self.genotype()
        if self._directory is not None:
            write_text(self._directory.genotype, genotype.to_json())
        return genotype
