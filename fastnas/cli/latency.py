# SPDX-License-Identifier: Apache-2.0
"""``fastnas latency``: a table of block times for this machine, and how well it predicts."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Annotated, Any

import tyro
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fastnas.cli.options import choices
from fastnas.cli.terminal import console, error_console
from fastnas.data import load
from fastnas.evaluate import PRESETS
from fastnas.latency import LatencyTable, MeasureConfig, Measurement
from fastnas.latency.check import Check, CheckConfig
from fastnas.latency.table import block_rules
from fastnas.spaces import SPACES, get_space

__all__ = ["main"]

_WORDS = {
    "measure": "Time every distinct block of a space on this machine, into a table.",
    "check": "Time whole random networks and compare them with what a table predicts.",
}

_PRESET_HELP = (
    "Take the sizes of the networks that `fastnas eval` trains with this preset (demo, cifar10, "
    "imagenet, proxyless) as defaults of the options for these."
)

_DATA_HELP = (
    "Images (fashion-mnist-mini, cifar10:DIR, ...) whose size, channels and number of classes are "
    "the defaults of the options for these."
)


_PACE = 0.05
"""A machine that differs by more from what it was is worth a line."""


def main(argv: Sequence[str]) -> int:
    """Run the command with the words after ``fastnas latency``.

    Raises:
        ValueError: the first word is no command, or a value is wrong.
    """
    words = list(argv)
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0
    commands = {"measure": _measure, "check": _check}
    if words[0] not in commands:
        raise ValueError(f"fastnas latency: expected {' or '.join(commands)}, but got {words[0]!r}")
    return commands[words[0]](words[1:])


def _help() -> str:
    rows = "\n".join(f"  {name:<8} {what}" for name, what in _WORDS.items())
    return f"usage: fastnas latency COMMAND [OPTIONS]\n\ncommands:\n{rows}"


def _measure(argv: Sequence[str]) -> int:
    config = _measure_config(argv)
    with _Bar("timing", "calls") as bar:
        measurement = Measurement(config, bar.show)
        table = measurement.run()
    total = sum(time.ms for time in table.blocks.values())
    out = console()
    c = table.conditions
    out.print(
        f"{len(table.blocks)} blocks of {table.space}, {total:.3g} ms together, "
        f"on {c.machine} ({c.threads} threads, batch {c.batch}, {c.dtype}, {c.memory_format}).\n"
        f"Written to {measurement.path}. Check it with: "
        f"fastnas latency check --calibrate --seed 0 --table {measurement.path}",
        markup=False,
    )
    return 0


def _measure_config(argv: Sequence[str]) -> MeasureConfig:
    """The options over the defaults: of space, preset and ``--data``, or of the table begun."""
    chosen = choices(argv, space="", preset="", data="", out="latency.json")
    config = _begun(chosen) if "--resume" in argv else _fresh(chosen)
    # No name: the fields of the configuration stand beside the others.
    options = dataclasses.make_dataclass(
        "Options",
        [
            ("preset", Annotated[str | None, tyro.conf.arg(help=_PRESET_HELP)]),
            ("data", Annotated[str | None, tyro.conf.arg(help=_DATA_HELP)]),
            ("config", Annotated[MeasureConfig, tyro.conf.arg(name="")]),
        ],
    )
    parsed: Any = tyro.cli(
        options,
        prog="fastnas latency measure",
        description=f"{_WORDS['measure']}\n\nSpaces: {', '.join(_spaces())}.",
        default=options(None, None, config),
        args=list(argv),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return parsed.config


def _spaces() -> list[str]:
    return [name for name, space in SPACES.items() if space.blocks is not None]


def _of_preset(preset: str, space: str) -> dict[str, Any]:
    """The sizes of the networks that a search with a preset finds, as `fastnas eval` trains them.

    Raises:
        ValueError: an unknown preset.
    """
    if not preset:
        return {}
    if preset not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, but got {preset!r}")
    network = get_space(space).presets.get(preset, {}).get("network")
    values = {**PRESETS[preset], **({} if network is None else vars(network))}
    known = {field.name for field in dataclasses.fields(block_rules(space).shape)}
    return {name: value for name, value in values.items() if name in known and value is not None}


def _of_data(spec: str) -> dict[str, int]:
    if not spec:
        return {}
    data = load(spec)
    height, width = data.image_size
    if height != width:
        raise ValueError(
            f"data: expected square images, but {spec} has {height}x{width}; say --image-size, "
            "--in-channels and --num-classes instead"
        )
    return {
        "image_size": height,
        "in_channels": data.channels,
        "num_classes": data.num_classes,
    }


def _fresh(chosen: Mapping[str, str]) -> MeasureConfig:
    """Defaults for a new table."""
    space = chosen["space"] or "darts"
    shape = block_rules(space).shape
    fields = _of_preset(chosen["preset"], space)
    if chosen["preset"] not in ("", "demo") and not chosen["data"]:
        raise ValueError(
            f"data: expected the images of the preset {chosen['preset']!r} (their size, channels "
            "and classes), for example cifar10:DIR, but got none"
        )
    return MeasureConfig(space=space, shape=shape(**(fields | _of_data(chosen["data"]))))


def _begun(chosen: Mapping[str, str]) -> MeasureConfig:
    """The configuration with which a table was begun.

    Raises:
        ValueError: another one is chosen.
    """
    out = chosen["out"]
    table = LatencyTable.load(out)
    for name, wanted in (("space", table.space), ("preset", None), ("data", None)):
        if chosen[name] not in ("", wanted):
            raise ValueError(
                f"{name}: expected {wanted or 'none'} with --resume, which goes on with the "
                f"networks of {out}, but got {chosen[name]!r}"
            )
    c, procedure = table.conditions, table.procedure
    return MeasureConfig(
        space=table.space,
        out=out,
        device=c.device,
        threads=c.threads,
        batch=c.batch,
        dtype=c.dtype,
        memory_format=c.memory_format,
        warmup=procedure.warmup,
        repeats=procedure.repeats,
        seed=procedure.seed,
        shape=table.shape,
    )


def _check(argv: Sequence[str]) -> int:
    config = tyro.cli(
        CheckConfig,
        prog="fastnas latency check",
        description=f"{_WORDS['check']} Prints Spearman's rank correlation, the root mean squared "
        "error and the bias, both relative to the measured time.",
        args=list(argv),
    )
    with _Bar("timing", "passes") as bar:
        check = Check(config, bar.show)
        agreement = check.run()
    figures = agreement.figures()
    if abs(check.pace - 1) > _PACE:
        error_console().print(
            f"Single blocks take {check.pace:.2f} times as long now as when the table was "
            "measured: something else runs here, or the machine has changed its pace. The figures "
            "allow for it; for times as they are now, measure the table again.",
            style="yellow",
            markup=False,
        )
    if config.json:
        print(json.dumps(figures))
        return 0
    low, high = min(agreement.measured), max(agreement.measured)
    calibration = check.table.calibration
    factor = "not calibrated" if calibration is None else f"calibrated by {calibration.factor:.4g}"
    out = console()
    rows = [
        ("networks", f"{config.nets}, {low:.4g} to {high:.4g} ms"),
        ("table", f"{check.path}, {factor}"),
        ("pace", f"{check.pace:.3f} of the table's times"),
        ("Spearman", f"{figures['spearman']:.4f}"),
        ("RMSE", f"{figures['rmse_percent']:.2f} %"),
        ("bias", f"{figures['bias_percent']:+.2f} %"),
    ]
    for name, value in rows:
        out.print(f"{name:<9} {value}", markup=False)
    if config.plot is not None:
        out.print(f"Plot written to {config.plot}.", markup=False)
    return 0


class _Bar:
    """A bar on standard error while something is timed; on a log, a line now and then.

    It draws when told to, and seldom: a thread of its own would disturb what is timed.
    """

    def __init__(self, what: str, unit: str) -> None:
        self._console = error_console()
        self._live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._every = 0.25 if self._live else 60.0
        self._last = -math.inf if self._live else time.monotonic()
        self._what, self._unit = what, unit
        self._bar = Progress(
            TextColumn(what),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:.0f}/{task.total:.0f} " + unit),
            TimeRemainingColumn(),
            console=self._console,
            auto_refresh=False,
            transient=True,
        )
        self._task = self._bar.add_task(what, total=1)

    def __enter__(self) -> _Bar:
        if self._live:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live:
            self._bar.stop()

    def show(self, done: int, total: int) -> None:
        """Take it that so many of the calls are done."""
        now = time.monotonic()
        if now - self._last < self._every and done < total:
            return
        self._last = now
        if self._live:
            self._bar.update(self._task, completed=done, total=total)
            self._bar.refresh()
        elif done:
            self._console.print(f"{self._what}: {done} of {total} {self._unit}", markup=False)
