# SPDX-License-Identifier: Apache-2.0
"""How well a table predicts: whole random networks are timed and compared with it."""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fastnas.latency.conditions import Conditions, here
from fastnas.latency.pace import Pace, without_pace
from fastnas.latency.plot import check_plot, write_plot
from fastnas.latency.table import Calibration, LatencyTable, block_rules, quartiles
from fastnas.latency.timing import deployed, images, measuring, stopwatch
from fastnas.search.fields import SEEDS, check_range
from fastnas.search.runtime import check_threads, resolve_device

__all__ = [
    "Agreement",
    "Check",
    "CheckConfig",
    "best_factor",
    "spearman",
    "time_networks",
    "without_pace",
]

_GROUP_BYTES = 2**30
"""Parameters of the networks that are in memory at once and take turns."""
_BURST = 2
"""Timed passes in a row; one before them is not timed."""

Tell = Callable[[int, int], None]
"""Told ``(passes done, passes in all)``."""


@dataclass(frozen=True)
class CheckConfig:
    """What is timed to check a table, and what is done with the result."""

    table: str = "latency.json"
    """File of the table."""
    nets: int = 50
    """Number of random networks to time."""
    repeats: int = 24
    """Timed passes of each network."""
    seed: int = 1
    """Seed of the networks; check a calibration with another one than it was made with."""
    device: str = "auto"
    """Device to time on; auto takes the kind of device that the table was measured on."""
    allow_foreign: bool = False
    """Take a table of another machine, number of threads or version of PyTorch as well."""
    calibrate: bool = False
    """Write the factor that fits the networks best into the table."""
    plot: str | None = None
    """Image file of measured against predicted times (.png, .svg, .pdf); needs matplotlib."""
    json: bool = False
    """Print one JSON object and nothing else."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_range("nets", self.nets, 2)
        check_range("repeats", self.repeats, 1)
        check_range("seed", self.seed, 0, SEEDS)


@dataclass(frozen=True)
class Agreement:
    """Predicted and measured times of whole networks.

    Attributes:
        predicted: milliseconds by the table.
        measured: milliseconds of the whole networks (``time_networks``).
    """

    predicted: tuple[float, ...]
    measured: tuple[float, ...]

    @property
    def spearman(self) -> float:
        """Rank correlation, 1 where the order is the same; 0 where one side is constant."""
        return spearman(self.predicted, self.measured)

    @property
    def rmse_percent(self) -> float:
        """Root of the mean squared relative error, percent of the measured time."""
        errors = self._errors()
        return 100 * math.sqrt(sum(error * error for error in errors) / len(errors))

    @property
    def bias_percent(self) -> float:
        """Mean relative error, percent of the measured time; positive: predicted too slow."""
        errors = self._errors()
        return 100 * sum(errors) / len(errors)

    def scaled(self, factor: float) -> Agreement:
        """The same with other predictions."""
        return Agreement(tuple(factor * p for p in self.predicted), self.measured)

    def figures(self) -> dict[str, float]:
        """The three figures, rounded."""
        return {
            "spearman": round(self.spearman, 4),
            "rmse_percent": round(self.rmse_percent, 3),
            "bias_percent": round(self.bias_percent, 3),
        }

    def _errors(self) -> list[float]:
        return [p / m - 1 for p, m in zip(self.predicted, self.measured, strict=True)]


class Check:
    """One check of a table; :meth:`run` times the networks.

    Args:
        config: what and how.
        tell: told how far it is.

    Attributes:
        table: the table; after a calibration, with it.
        pace: after a run, how long blocks take now, as a factor of what the table says; 1 for a
            table of another machine.

    Raises:
        FileNotFoundError: there is no such table.
        ValueError: it is no table, not complete, or of another machine or version.
        ImportError: a plot is wanted, and matplotlib is missing.
    """

    def __init__(self, config: CheckConfig, tell: Tell = lambda done, total: None) -> None:
        self.config = config
        self.path = Path(os.path.expanduser(config.table))
        self.table = LatencyTable.load(self.path)
        self.table.check_complete(str(self.path))
        c = self.table.conditions
        device = c.device if config.device == "auto" else config.device
        threads = c.threads
        if config.allow_foreign:
            # Of a larger machine, or one with a GPU: as much of it as there is here.
            threads = min(threads, os.cpu_count() or 1)
            if config.device == "auto" and not _is_here(device):
                device = "cpu"
        self.device = resolve_device(device)
        check_threads(threads)
        self.conditions = here(device, threads, c.batch, c.dtype, c.memory_format)
        self.pace = 1.0
        if not config.allow_foreign:
            self.table.check_here(str(self.path), conditions=self.conditions)
        if config.plot is not None:
            check_plot(config.plot)  # complains now rather than after the measurement
        self._tell = tell

    def run(self) -> Agreement:
        """Time the networks, and do what the configuration asks for.

        Returns:
            Predictions at the present pace of the machine, and measured times; after a
            calibration, the calibrated predictions.

        Raises:
            ValueError: the table lacks a block of a network.
            OSError: a file cannot be written.
        """
        rules = block_rules(self.table.space)
        shape = self.table.shape
        generator = torch.Generator().manual_seed(self.config.seed)
        genotypes = [rules.sample(shape, generator) for _ in range(self.config.nets)]
        predicted = [self.table.latency(rules.keys(genotype, shape)) for genotype in genotypes]
        paces: list[float] = []
        measured = time_networks(
            [partial(rules.network, genotype, shape) for genotype in genotypes],
            (shape.in_channels, shape.image_size, shape.image_size),
            self.conditions,
            self.device,
            repeats=self.config.repeats,
            seed=self.config.seed,
            between=self._pace_into(paces),
            tell=self._tell,
        )
        self.pace = quartiles(paces)[1] if paces else 1.0
        agreement = Agreement(tuple(predicted), tuple(measured)).scaled(self.pace)
        if self.config.calibrate:
            agreement = self._calibrate(agreement)
        if self.config.plot is not None:
            write_plot(self.config.plot, agreement, self.table)
        return agreement

    def _pace_into(self, paces: list[float]) -> Callable[[], None]:
        """What notes the pace of the machine; nothing where it cannot be compared."""
        if self.table.conditions != self.conditions:
            return lambda: None
        pace = Pace(self.table, self.device)
        return lambda: paces.append(pace.now())

    def _calibrate(self, agreement: Agreement) -> Agreement:
        plain = agreement.scaled(1 / self.table.factor)
        factor = best_factor(plain)
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        calibration = Calibration(factor, self.config.nets, self.config.seed, now)
        self.table = dataclasses.replace(self.table, calibration=calibration)
        self.table.save(self.path)
        return plain.scaled(factor)


def _is_here(device: str) -> bool:
    try:
        resolve_device(device)
    except ValueError:
        return False
    return True


def time_networks(
    builds: Sequence[Callable[[], nn.Module]],
    image_shape: Sequence[int],
    conditions: Conditions,
    device: torch.device,
    *,
    repeats: int = 24,
    seed: int = 0,
    between: Callable[[], None] = lambda: None,
    tell: Tell = lambda done, total: None,
) -> list[float]:
    """Time whole networks, a few at a time in turns.

    Args:
        builds: each builds one network.
        image_shape: ``(C, H, W)``.
        conditions: threads, batch, dtype and memory format.
        device: where to time.
        repeats: timed passes of each network.
        seed: of weights and images.
        between: called after every turn.
        tell: told ``(timed passes, passes in all)``.

    Returns:
        Milliseconds of a forward pass of each, in eval mode; the median, but for ``without_pace``.
    """
    generator = torch.Generator().manual_seed(seed)
    x = images(image_shape, conditions, device, generator)
    found: list[float] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for group in _groups(builds, image_shape, conditions, device):
            turns: list[list[float]] = []
            with measuring(conditions, device):
                for done in _time_group(group, turns, x, device, repeats, between):
                    tell(repeats * len(found) + done, repeats * len(builds))
            found += without_pace(turns)
    return found


def _groups(
    builds: Sequence[Callable[[], nn.Module]],
    image_shape: Sequence[int],
    conditions: Conditions,
    device: torch.device,
) -> Iterator[list[nn.Module]]:
    """The networks, as many at a time as memory should hold."""
    group: list[nn.Module] = []
    size = 0
    for build in builds:
        group.append(_settled(build(), image_shape, conditions, device))
        size += sum(p.numel() * p.element_size() for p in group[-1].parameters())
        if size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _time_group(
    networks: Sequence[nn.Module],
    turns: list[list[float]],
    x: Tensor,
    device: torch.device,
    repeats: int,
    between: Callable[[], None],
) -> Iterator[int]:
    """Time each a few passes in a row, as a deployed network runs again and again, in turns.

    Appends to ``turns`` the median milliseconds of each network; gives the timed passes so far.
    """
    watch = stopwatch(device)
    done = 0
    while repeats:
        passes = min(_BURST, repeats)
        repeats -= passes
        turn = [0.0] * len(networks)
        # In an order of its own each turn: nobody runs behind the same one all the time.
        for number in torch.randperm(len(networks)).tolist():
            network = networks[number]
            network(x)
            for _ in range(passes):
                watch.time(partial(network, x))
            turn[number] = quartiles(watch.read())[1]
            done += passes
            yield done
        turns.append(turn)
        between()


def _settled(
    network: nn.Module,
    image_shape: Sequence[int],
    conditions: Conditions,
    device: torch.device,
) -> nn.Module:
    """The network as deployed, with the BatchNorm statistics of one batch of noise.

    With those of its birth the activations of a deep network fade away, and arithmetic with
    numbers near zero is slow.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        # Two images: a map of one pixel has no statistics otherwise.
        network.train()(torch.randn((2, *image_shape)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return deployed(network, conditions, device)


def best_factor(agreement: Agreement) -> float:
    """The factor on the predictions that makes the mean squared relative error least."""
    ratios = [p / m for p, m in zip(agreement.predicted, agreement.measured, strict=True)]
    return float(f"{sum(ratios) / sum(ratio * ratio for ratio in ratios):.6g}")


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation of two sequences; equal values share their mean rank."""
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale else 0.0


def _ranks(values: Sequence[float]) -> Tensor:
    v = torch.tensor(values, dtype=torch.float64)
    below = (v[:, None] > v[None, :]).sum(1)
    equal = (v[:, None] == v[None, :]).sum(1)
    return below + (equal - 1) / 2
