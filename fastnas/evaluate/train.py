# SPDX-License-Identifier: Apache-2.0
"""Trains the network of a genotype and tests it after every epoch (DARTS, appendices A.2.1, A.2.3).

All state is in :class:`Evaluation` and its ``state_dict``. Batches are functions of (seed, epoch,
position), learning rate and drop path functions of the epoch, and the random generators belong to
the evaluation, so a run that continues from a checkpoint does what the uninterrupted run would have
done, bit for bit on a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastnas.data import Data, load
from fastnas.data.batches import generator_of
from fastnas.evaluate.config import RUNTIME_FIELDS, EvaluateConfig
from fastnas.evaluate.progress import Progress, StepReport, TextProgress
from fastnas.evaluate.result import (
    NETWORK_KIND,
    EvaluationResult,
    network_arguments,
    network_state,
)
from fastnas.evaluate.source import GenotypeSource, space_of
from fastnas.evaluate.trainee import Trainee
from fastnas.methods import Outcome
from fastnas.parallel import ALONE, Group
from fastnas.search.assembly import cut_batches, noise_batch
from fastnas.search.checkpoint import RandomState, save_checkpoint
from fastnas.search.files import write_json, write_text
from fastnas.search.idle import with_data
from fastnas.search.layout import Step
from fastnas.search.meters import Meter, Pace
from fastnas.search.resumable import Resumable, data_identity
from fastnas.search.runtime import check_threads, memory_layout
from fastnas.search.schedule import learning_rate
from fastnas.spaces import count_operations, count_parameters, get_space

__all__ = ["Evaluation"]

_TOP = 5


class Evaluation(Resumable):
    """Trains a derived network from scratch and measures it on the test images.

    Args:
        config: everything that decides how it goes.
        genotype: architecture to train instead of the one ``config.source`` names, or a
            :class:`GenotypeSource`, where it is to be of a space with another's genotypes.
        data: images to use instead of ``config.data``, as they are.
        progress: told what happens; lines of text on standard output by default.
        group: the processes that train together (:mod:`fastnas.parallel`). Each takes its share of
            every batch; the first writes the files and tells how it goes.

    Attributes:
        trainee: the network with its optimizer.
        source: its genotype, and where it came from.
        parameters: number of its parameters without the auxiliary head.
        steps_per_epoch: batches of an epoch.
        best: accuracy on the test images and epoch (from 1) of the best test so far, or None.

    Raises:
        ValueError: the configuration does not fit genotype, data or machine, or is not that of the
            run to resume.
        FileExistsError: ``config.out`` holds a run and ``config.resume`` is off.
        FileNotFoundError: there is no such genotype, nothing to resume, or the data is missing.
        CheckpointError: the checkpoint is damaged or of another evaluation.
    """

    kind = "evaluation"
    runtime_fields = RUNTIME_FIELDS

    def __init__(
        self,
        config: EvaluateConfig,
        *,
        genotype: Any = None,
        data: Data | None = None,
        progress: Progress | None = None,
        group: Group = ALONE,
    ) -> None:
        self.device = group.place(config.torch_device())
        check_threads(config.threads)
        if genotype is None:
            self.source = config.find_source()
        elif isinstance(genotype, GenotypeSource):
            self.source = genotype
        else:
            self.source = GenotypeSource(genotype, space_of(genotype), "genotype")
        if data is not None:
            config = with_data(config, data)
        self.config = config = config.resolve(self.source)
        if not group.leads:
            progress = Progress()  # which is silent
        self.progress = TextProgress() if progress is None else progress
        super().__init__(config.to_dict(), config.out, config.resume, group)
        if data is None:
            assert config.data is not None  # resolved above
            data = load(config.data, image_size=config.image_size)
        self.data = data.to(self.device)
        self.random = RandomState(config.seed, self.device)
        self._build_batches()
        with self.random.use():
            self._build_trainee()
        self.best: tuple[float, int] | None = None
        self._train = Meter(self.device)
        self._pace = Pace()
        self._seconds = 0.0
        if config.resume:
            self._restore()

    def _build_batches(self) -> None:
        c, layout = self.config, memory_layout(self.config.memory_format, self.device)
        size = self.group.batch_size
        self._batches = self.data.train_batches(
            size(c.batch_size, self.data.num_train),
            augment=c.augment,
            device=self.device,
            seed=c.seed,
            # BatchNorm cannot learn from a last batch of one image: an incomplete one is left out.
            drop_last=True,
            memory_format=layout,
        )
        self._tests = self.data.test_batches(
            size(c.batch_size, self.data.num_test, tested=True),
            device=self.device,
            memory_format=layout,
        )
        self._batches.share = self._tests.share = self.group.share
        self.steps_per_epoch = len(self._batches)

    def _build_trainee(self) -> None:
        c, data = self.config, self.data
        network: nn.Module = get_space(self.source.space).network(
            self.source.genotype, **network_arguments(self.source, c, data)
        )
        # This also runs the network on shapes alone: images that do not fit are refused here.
        self.operations = count_operations(network, (1, data.channels, *data.image_size))
        self.parameters = count_parameters(network)
        self.trainee = Trainee(network, c, self.device, self.group)

    @property
    def network(self) -> nn.Module:
        """The network."""
        return self.trainee.network

    def size(self) -> str:
        """Width and depth for messages, where the configuration gives them: ``C 8, 5 layers, ``."""
        known = get_space(self.source.space).network_fields
        return f"C {self.config.C}, {self.config.layers} layers, " if "C" in known else ""

    def run(self) -> EvaluationResult:
        """Train to the end, from the start or from where the checkpoint was taken.

        Returns:
            Accuracies, sizes and the record of every epoch.

        Raises:
            RunInterrupted: SIGINT, SIGTERM or SIGHUP came, or ``progress`` met a broken pipe; the
                checkpoint is of the last iteration.
            NonFiniteLossError: the loss became NaN or infinite.
            BlockingIOError: another process trains in that folder.
            OSError: a file of the run cannot be written.
        """
        with self._running(self.config.threads, self.config.deterministic):
            self._meet(self.data, self._batches.batch_size, self.network)
            if self._directory is not None:
                write_text(self._directory.genotype, self.source.genotype.to_json())
            self._tell(self.progress.start, self)
            for cut in cut_batches(self.config.batch_size, {"training": self._batches}):
                self._tell(self.progress.note, cut)
            self._choose_layout()
            while self.epoch < self.config.epochs:
                self._obey()
                self._run_epoch()
            result = EvaluationResult.of(self)
            if self._directory is not None:
                write_json(self._directory.path / "result.json", result.to_dict())
            self._tell(self.progress.end, result)
            self.group.wait()  # until the files are there
        return result

    # --- an epoch ----------------------------------------------------------------------------

    def _run_epoch(self) -> None:
        c = self.config
        lr = learning_rate(
            self.epoch,
            c.epochs,
            c.lr,
            c.lr_min,
            schedule=c.schedule,
            warmup_epochs=c.lr_warmup_epochs,
            decay=c.lr_decay,
        )
        self.trainee.set_rate(lr)
        # Rises linearly and stays just below its limit.
        drop_path = c.drop_path * self.epoch / c.epochs
        if "drop_path" in get_space(self.source.space).network_fields:
            self.network.drop_path_prob = drop_path
        self.network.train()
        clock = time.perf_counter()
        for x, y in self._batches.iterate(self.epoch, self.step):
            if not self.group.leads:
                # Paths are dropped for each image: the run's generators would repeat those of the
                # first process. What is drawn is a function of the step, also after a resume.
                key = (c.seed, self.group.share.rank, self.epoch, self.step)
                torch.manual_seed(generator_of(*key).initial_seed())
            self._train.add(self.trainee.step(x, y), self.step + 1)
            self.step += 1
            now = time.perf_counter()
            self._pace.add("plain", now - clock)
            self._seconds += now - clock
            clock = now
            if self.step % c.log_every == 0 or self.step == self.steps_per_epoch:
                self._check_finite(self.meters())
                report = self._report("train", self._train, lr, self.step, self.steps_per_epoch)
                self._tell(self.progress.step, report)
            self._obey()
        top1, top5 = self._test(lr)
        self._seconds += time.perf_counter() - clock
        self._finish_epoch(top1, top5, lr)

    def _trial(self, layout: torch.memory_format) -> Step:
        twin = self.trainee.copy()
        twin.lay_out(layout)
        twin.network.train()
        x, y = noise_batch(self._batches, self.data.num_classes, self.device, layout)
        return lambda: twin.step(x, y)

    def _lay_out(self, layout: torch.memory_format) -> None:
        self._batches.memory_format = self._tests.memory_format = layout
        self.trainee.lay_out(layout)

    def _test(self, lr: float) -> tuple[Meter, Meter]:
        """Test the network: meters whose accuracies are top-1 and top-5.

        A run that was stopped here continues with this test: the epoch's iterations are all done.
        """
        top1, top5 = Meter(self.device), Meter(self.device)
        steps = len(self._tests)
        self.network.eval()
        clock = time.perf_counter()
        for number, (x, y) in enumerate(self._tests.iterate(0), 1):
            with torch.no_grad():
                logits, _ = self.trainee.forward(x)
                loss = nn.functional.cross_entropy(logits, y)
                ranked = logits.topk(min(_TOP, logits.shape[1]), dim=1).indices == y[:, None]
            for meter, correct in ((top1, ranked[:, 0].sum()), (top5, ranked.sum())):
                meter.add(Outcome(*self.group.total(loss, correct, len(y))), number)
            now = time.perf_counter()
            self._pace.add("test", now - clock)
            clock = now
            if number % self.config.log_every == 0 or number == steps:
                report = self._report("validation", top1, lr, number, steps)
                self._tell(self.progress.step, report)
            self._obey()
        # On a GPU the last report has waited for the batches before it.
        self._pace.add("test", time.perf_counter() - clock, 0)
        self.network.train()
        return top1, top5

    def _finish_epoch(self, top1: Meter, top5: Meter, lr: float) -> None:
        # The last step's weights are seen by no training loss; a checkpoint must not hold them.
        self._check_finite({"test images": top1})
        accuracy = top1.accuracy
        assert accuracy is not None
        record = {
            "epoch": self.epoch + 1,
            "train_loss": self._train.loss,
            "train_accuracy": self._train.accuracy,
            "test_loss": top1.loss,
            "test_accuracy": accuracy,
            "test_accuracy_top5": top5.accuracy if self.data.num_classes > _TOP else None,
            "lr": lr,
            "drop_path": getattr(self.network, "drop_path_prob", 0.0),
            "seconds": round(self._seconds, 3),
        }
        self.history.append(record)
        self._train.reset()
        self.epoch, self.step, self._seconds = self.epoch + 1, 0, 0.0
        improved = self.best is None or accuracy > self.best[0]
        if improved:
            self.best = (accuracy, self.epoch)
        if self._directory is not None:
            # The best network comes first: whatever a kill prevents is then done again.
            if improved:
                state = network_state(self.network, self.source, self.config, self.data, record)
                save_checkpoint(self._directory.path / "best.pt", state, kind=NETWORK_KIND)
            self._save()
            self._directory.append_metrics(record)
        self._tell(self.progress.epoch, record)

    @property
    def seconds_left(self) -> float | None:
        """Estimate for the rest; None before the first batch."""
        return self._left()

    def _left(self, tested: int = 0) -> float | None:
        epochs = self.config.epochs - self.epoch
        return self._pace.seconds(
            plain=epochs * self.steps_per_epoch - self.step,
            test=epochs * len(self._tests) - tested,
        )

    def _report(self, phase: Any, meter: Meter, lr: float, step: int, steps: int) -> StepReport:
        return StepReport(
            phase=phase,
            epoch=self.epoch + 1,
            epochs=self.config.epochs,
            step=step,
            steps=steps,
            loss=meter.loss,
            accuracy=meter.accuracy,
            arch_loss=None,
            lr=lr,
            seconds_left=self._left(step if phase == "validation" else 0),
        )

    # --- state -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how the training goes on; tensors are not copied."""
        return {
            "config": self.config.to_dict(),
            "genotype": self.source.genotype.to_dict(),
            "data": data_identity(self.data),
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self._seconds,
            "history": list(self.history),
            "best": self.best,
            **self.trainee.state_dict(),
            "meter": self._train.state_dict(),
            "random": self.random.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of :meth:`state_dict`.

        Raises:
            ValueError: it is of an evaluation with another configuration, genotype or data.
        """
        self._check_state(state, self.data)
        if state["genotype"] != self.source.genotype.to_dict():
            raise ValueError("it is of another genotype (has the search gone on since?)")
        self.trainee.load_state_dict(state)
        self._train.load_state_dict(state["meter"])
        self.random.load_state_dict(state["random"])
        self.epoch, self.step = state["epoch"], state["step"]
        self._seconds = state["seconds"]
        self.history = list(state["history"])
        self.best = None if state["best"] is None else (state["best"][0], state["best"][1])

    def meters(self) -> Mapping[str, Meter]:
        """The loss on the training images."""
        return {"training images": self._train}

    def how_to_go_on(self) -> str:
        """The command that continues this run."""
        return f"fastnas eval --resume{self.group.option()} --out {self.path}"
