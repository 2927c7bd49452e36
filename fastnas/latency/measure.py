# SPDX-License-Identifier: Apache-2.0
"""Measures the table of a space's blocks on this machine.

table = Measurement(MeasureConfig(space="darts", out=None)).run()
print(table.latency(keys))
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import tyro
from torch import Tensor, nn

from fastnas.latency.conditions import Conditions, Precision, here
from fastnas.latency.table import BlockTime, LatencyTable, Procedure, block_rules
from fastnas.latency.timing import deployed, images, measuring, stopwatch
from fastnas.search.fields import SEEDS, check_range
from fastnas.search.interrupts import Interrupts, RunInterrupted
from fastnas.search.runtime import check_threads, resolve_device
from fastnas.spaces import BlockPlan, NetworkShape

__all__ = ["BlockCall", "MeasureConfig", "Measurement", "prepare"]

_SAVE_SECONDS = 5.0
"""A table that is being measured is written as often; a kill loses no more."""

Tell = Callable[[int, int], None]
"""Told ``(calls done, calls in all)``."""


@dataclass(frozen=True)
class MeasureConfig:
    """What is timed, and how."""

    space: str = "darts"
    """Whose blocks are timed: darts, nasbench201 or mbconv."""
    out: str | None = "latency.json"
    """File of the table; None writes nothing."""
    resume: bool = False
    """Continue the table in --out."""

    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes CUDA where there is a device."""
    threads: int = 0
    """CPU threads; 0 leaves PyTorch's choice."""
    batch: int = 1
    """Images in one pass."""
    dtype: Precision = "float32"
    """Type of weights and images."""
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    """Layout of images and weights; auto is channels_last on a CPU and contiguous elsewhere."""

    warmup: int = 5
    """Untimed calls of each block."""
    repeats: int = 50
    """Timed calls of each block."""
    seed: int = 0
    """Seed of the order of the calls."""

    shape: Annotated[NetworkShape, tyro.conf.arg(name="")] = field(default_factory=NetworkShape)
    """What decides the shapes in the networks; where none is given, the space's defaults."""

    def __post_init__(self) -> None:
        """Check ranges and names, and give the space its own kind of shape."""
        kind = block_rules(self.space).shape
        if type(self.shape) is NetworkShape and kind is not NetworkShape:
            object.__setattr__(self, "shape", kind())
        if not isinstance(self.shape, kind):
            raise TypeError(
                f"shape: expected {kind.__name__} for the space {self.space!r}, "
                f"but got {type(self.shape).__name__}"
            )
        for name, least in (("batch", 1), ("threads", 0), ("warmup", 0), ("repeats", 1)):
            check_range(name, getattr(self, name), least)
        check_range("seed", self.seed, 0, SEEDS)
        check_threads(self.threads)
        if self.out is not None and not self.out:
            raise ValueError("out: expected a file, but got an empty name")
        if self.resume and self.out is None:
            raise ValueError("resume: expected a file in out, but got none")

    def conditions(self) -> Conditions:
        """Where and how is timed.

        Raises:
            ValueError: there is no such device.
        """
        return here(self.device, self.threads, self.batch, self.dtype, self.memory_format)


class Measurement:
    """One table being measured; :meth:`run` may be stopped by Ctrl-C and gone on with later.

    Args:
        config: what and how.
        tell: told how far it is, now and then.

    Attributes:
        table: what is measured so far.
        path: its file, or None.

    Raises:
        FileExistsError: there is a file already, and ``config.resume`` is not set.
        FileNotFoundError: there is none to go on with.
        ValueError: the table that was begun is of another configuration or machine.
    """

    def __init__(self, config: MeasureConfig, tell: Tell = lambda done, total: None) -> None:
        self.config = config
        self.device = resolve_device(config.device)
        self.path = None if config.out is None else Path(os.path.expanduser(config.out))
        self.plan = block_rules(config.space).plan(config.shape)
        self._tell = tell
        self.table = self._resumed() if config.resume else self._new()
        self._samples = {
            key: list(self.table.blocks[key].samples) if key in self.table.blocks else []
            for key in self.plan.blocks
        }

    @property
    def done(self) -> int:
        """Timed calls so far."""
        return sum(map(len, self._samples.values()))

    @property
    def total(self) -> int:
        """Timed calls in all."""
        return self.config.repeats * len(self._samples)

    def run(self) -> LatencyTable:
        """Measure what is missing.

        Raises:
            RunInterrupted: a signal came; what was measured is in the file.
            OSError: the file cannot be written.
        """
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._save()
        with Interrupts() as interrupts, measuring(self.table.conditions, self.device):
            calls = prepare(self.plan, self.table.conditions, self.device, self.config.seed)
            saved = time.monotonic()
            for done in self._work(calls):
                self._tell(done, self.total)
                if interrupts.received is not None:
                    self._save()
                    raise RunInterrupted(self._how_to_go_on(interrupts.name), interrupts.received)
                if time.monotonic() - saved > _SAVE_SECONDS:
                    self._save()
                    saved = time.monotonic()
        self._save()
        return self.table

    def _new(self) -> LatencyTable:
        if self.path is not None and self.path.exists():
            raise FileExistsError(
                f"{self.path} already exists: continue it with --resume, or choose another file "
                "with --out"
            )
        config = self.config
        procedure = Procedure(config.warmup, config.repeats, config.seed)
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        return LatencyTable(config.space, config.shape, config.conditions(), procedure, now)

    def _resumed(self) -> LatencyTable:
        assert self.path is not None
        table = LatencyTable.load(self.path)
        table.check_here(
            str(self.path),
            conditions=self.config.conditions(),
            space=self.config.space,
            shape=self.config.shape,
        )
        if unknown := [key for key in table.blocks if key not in self.plan.blocks]:
            raise ValueError(f"{self.path}: blocks: the space has none with key {unknown[0]!r}")
        # More rounds may be asked for than before.
        table.procedure = Procedure(self.config.warmup, self.config.repeats, self.config.seed)
        return table

    def _work(self, calls: dict[str, BlockCall]) -> Iterator[int]:
        """Warm up, then round after round; gives the timed calls so far after each call.

        A round counts when all of it is done.
        """
        watch = stopwatch(self.device)
        for call in calls.values():  # libraries choose and compile here
            for _ in range(self.config.warmup):
                call.module(call.fresh_input())
                yield self.done
        for number in range(self.config.repeats):
            due = [key for key, samples in self._samples.items() if len(samples) <= number]
            order = torch.Generator().manual_seed((self.config.seed + number) % SEEDS)
            due = [due[i] for i in torch.randperm(len(due), generator=order).tolist()]
            for position, key in enumerate(due, 1):
                x = calls[key].fresh_input()
                watch.time(partial(calls[key].module, x))
                del x
                yield self.done + position
            for key, milliseconds in zip(due, watch.read(), strict=True):
                self._samples[key].append(milliseconds)

    def _save(self) -> None:
        self.table.blocks = {
            key: BlockTime.of(samples) for key, samples in self._samples.items() if samples
        }
        if self.path is not None:
            self.table.save(self.path)

    def _how_to_go_on(self, signal: str) -> str:
        text = f"stopped by {signal} after {self.done} of {self.total} calls"
        if self.path is None:
            return text
        return f"{text}; continue with: fastnas latency measure --resume --out {self.path}"


class BlockCall(NamedTuple):
    """A block ready to run."""

    module: nn.Module
    source: Tensor

    def fresh_input(self) -> Tensor:
        """The input, just written."""
        return self.source.clone()


def prepare(
    plan: BlockPlan, conditions: Conditions, device: torch.device, seed: int
) -> dict[str, BlockCall]:
    """Build every block of a plan, with weights and images by the seed."""
    generator = torch.Generator().manual_seed(seed)
    calls = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for key, block in plan.blocks.items():
            module = deployed(block.build(), conditions, device)
            calls[key] = BlockCall(module, images(block.input_shape, conditions, device, generator))
    return calls
