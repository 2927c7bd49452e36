# SPDX-License-Identifier: Apache-2.0
"""The table of a space's blocks and their times on one machine, and its file.

The file is JSON, one line a block::

    {"format": "fastnas.latency", "version": 1, "space": "darts", "shape": {...},
     "conditions": {...}, "procedure": {...}, "date": "2026-11-24T18:30:00+00:00",
     "calibration": null,
     "blocks": {
      "stem-input:28x28x1-output:28x28x24": {"ms": 0.0412, "iqr_ms": 0.0009, "samples": [...]},
      ...

``ms`` is the median of the samples and ``iqr_ms`` the distance of their quartiles. A table from
elsewhere (a phone) may leave the samples out: ``ms`` is what counts.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastnas.latency.conditions import Conditions
from fastnas.search.fields import SEEDS, check_range, from_dict, to_dict
from fastnas.search.files import read_json, write_text
from fastnas.spaces import NetworkShape, get_space
from fastnas.spaces.base import Space
from fastnas.spaces.blocks import BlockRules
from fastnas.spaces.genotype_file import short

__all__ = ["BlockTime", "Calibration", "LatencyTable", "Procedure", "block_rules", "quartiles"]

FORMAT = "fastnas.latency"
VERSION = 1
_MAX_BLOCKS = 100_000
_MAX_KEY = 500


@dataclass(frozen=True)
class Procedure:
    """How a table is measured.

    Attributes:
        warmup: untimed calls of each block.
        repeats: timed calls of each block; one a round.
        seed: of the order within the rounds, and of the weights and images.
    """

    warmup: int
    repeats: int
    seed: int

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_range("warmup", self.warmup, 0)
        check_range("repeats", self.repeats, 0, 1_000_001)
        check_range("seed", self.seed, 0, SEEDS)


@dataclass(frozen=True)
class BlockTime:
    """The time of one block.

    Attributes:
        ms: median, milliseconds.
        iqr_ms: distance of the quartiles.
        samples: all times, in order; may be left out.
    """

    ms: float
    iqr_ms: float = 0.0
    samples: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check that these are times."""
        for name, value in (("ms", self.ms), ("iqr_ms", self.iqr_ms)):
            check_range(name, value, 0)
        for number, value in enumerate(self.samples):
            check_range(f"samples[{number}]", value, 0)

    @classmethod
    def of(cls, samples: Sequence[float]) -> BlockTime:
        """From at least one measured time."""
        kept = tuple(float(f"{value:.5g}") for value in samples)
        low, median, high = quartiles(kept)
        return cls(median, float(f"{high - low:.5g}"), kept)


@dataclass(frozen=True)
class Calibration:
    """The factor between sums of blocks and whole networks, as ``fastnas latency check`` finds it.

    Attributes:
        factor: what the sum over the blocks is multiplied by.
        nets: number of networks that were timed for it.
        seed: of their choice.
        date: when.
    """

    factor: float
    nets: int
    seed: int
    date: str

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_range("nets", self.nets, 1)
        check_range("seed", self.seed, 0, SEEDS)
        if not (0 < self.factor < math.inf):
            raise ValueError(f"factor: expected a positive number, but got {self.factor}")


@dataclass
class LatencyTable:
    """Times of the blocks of one space and shape under stated conditions.

    Attributes:
        space: key in ``fastnas.spaces.SPACES``.
        shape: what decides the shapes in its networks.
        conditions: where and how it was measured.
        procedure: how often.
        date: when it was begun, ISO 8601.
        blocks: time by block key.
        calibration: None before a check found it.
    """

    space: str
    shape: NetworkShape
    conditions: Conditions
    procedure: Procedure
    date: str
    blocks: dict[str, BlockTime] = field(default_factory=dict)
    calibration: Calibration | None = None

    @property
    def factor(self) -> float:
        """The calibration's factor, 1 without."""
        return 1.0 if self.calibration is None else self.calibration.factor

    def ms(self, key: str) -> float:
        """Milliseconds of one block, as a part of a network (calibrated).

        Raises:
            ValueError: the table does not have it.
        """
        if key not in self.blocks:
            raise ValueError(f"latency table: it has no block {key!r}")
        return self.factor * self.blocks[key].ms

    def latency(self, keys: Iterable[str]) -> float:
        """Predicted milliseconds of a network: the sum over its blocks.

        Args:
            keys: its blocks, each as often as it is there (``BlockRules.keys``).

        Raises:
            ValueError: the table lacks a block.
        """
        return sum(self.ms(key) for key in keys)

    def check_complete(self, where: str) -> None:
        """Raise a ValueError that says how to go on if measuring was stopped before its end."""
        keys = block_rules(self.space).plan(self.shape).blocks
        missing = [key for key in keys if key not in self.blocks]
        rounds = self._rounds()
        if rounds is not None and (missing or rounds < self.procedure.repeats):
            raise ValueError(
                f"{where}: {rounds} of {self.procedure.repeats} rounds are measured; "
                f"continue with: fastnas latency measure --resume --out {where}"
            )
        if missing:
            raise ValueError(f"{where}: blocks: {missing[0]!r} is missing")

    def _rounds(self) -> int | None:
        """Rounds that are done; None for a table without samples."""
        counts = [len(time.samples) for time in self.blocks.values()]
        if self.blocks and not any(counts):
            return None
        return min(counts, default=0)

    def check_here(
        self,
        where: str,
        *,
        conditions: Conditions | None = None,
        space: str | None = None,
        shape: NetworkShape | None = None,
    ) -> None:
        """Raise a ValueError if the table does not hold for what it is wanted for.

        Args:
            where: name of the table for the message.
            conditions: those of now (``fastnas.latency.here``); None: not looked at.
            space: key of the space; None: not looked at.
            shape: that of the networks; None: not looked at.
        """
        found: list[str] = []
        if space is not None and space != self.space:
            found.append(f"space {self.space}, not {space}")
        elif shape is not None and shape != self.shape:
            mine, its = to_dict(self.shape), to_dict(shape)
            found += [f"{k} {v}, not {its.get(k)}" for k, v in mine.items() if its.get(k) != v]
        advice = "measure one for this by `fastnas latency measure`"
        if conditions is not None:
            if not found:
                advice += ", or allow a foreign one"
            found += self.conditions.differences(conditions)
        if found:
            raise ValueError(
                f"{where}: the table is for something else ({'; '.join(found)}); {advice}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON can hold it."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "space": self.space,
            "shape": to_dict(self.shape),
            "conditions": to_dict(self.conditions),
            "procedure": to_dict(self.procedure),
            "date": self.date,
            "calibration": None if self.calibration is None else to_dict(self.calibration),
            "blocks": {key: to_dict(time) for key, time in self.blocks.items()},
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file; a reader sees the old one or the whole new one.

        Raises:
            OSError: the folder is missing, not writable or full.
        """
        head = self.to_dict()
        blocks = head.pop("blocks")
        # One line a block: a file that people can read and compare.
        lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in blocks.items()]
        head_text = json.dumps(head, indent=1, allow_nan=False)[:-2]
        body = ",\n".join(lines)
        write_text(path, f'{head_text},\n "blocks": {{\n{body}\n }}\n}}\n')

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Read a table.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a table; one sentence with the file and the key that is wrong.
        """
        return cls.from_dict(read_json(path), str(path))

    @classmethod
    def from_dict(cls, data: Any, where: str = "latency table") -> LatencyTable:
        """Build from what :meth:`to_dict` gave.

        Raises:
            ValueError: a key is missing, unknown or of the wrong type; it is named.
        """
        data = _checked_keys(data, where)
        space = data["space"]
        if not isinstance(space, str):
            raise ValueError(f"{where}: space: expected str, but got {type(space).__name__}")
        try:
            rules = block_rules(space)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if not isinstance(data["date"], str) or len(data["date"]) > _MAX_KEY:
            raise ValueError(f"{where}: date: expected a short text")
        found = data["calibration"]
        calibration = found if found is None else _read(Calibration, found, f"{where}: calibration")
        return cls(
            space,
            _read(rules.shape, data["shape"], f"{where}: shape"),
            _read(Conditions, data["conditions"], f"{where}: conditions"),
            _read(Procedure, data["procedure"], f"{where}: procedure"),
            data["date"],
            _blocks(data["blocks"], f"{where}: blocks"),
            calibration,
        )


def block_rules(space: str | Space) -> BlockRules:
    """How the networks of a space fall into blocks.

    Raises:
        ValueError: there is no such space, or it does not say.
    """
    space = get_space(space) if isinstance(space, str) else space
    if space.blocks is None:
        raise ValueError(f"space: {space.name!r} does not say which blocks its networks have")
    return space.blocks


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of at least one value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


_KEYS = ("space", "shape", "conditions", "procedure", "date", "calibration", "blocks")


def _checked_keys(data: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}: expected an object, but got {type(data).__name__}")
    if data.get("format") != FORMAT:
        raise ValueError(
            f"{where}: format: expected {FORMAT!r}, but got {short(data.get('format'))}"
        )
    version = data.get("version")
    if type(version) is not int or version != VERSION:
        raise ValueError(
            f"{where}: version: expected {VERSION}, but got {short(version)}; "
            "it was written by another fastnas"
        )
    if missing := [key for key in _KEYS if key not in data]:
        raise ValueError(f"{where}: {missing[0]} is missing")
    if unknown := [key for key in data if key not in (*_KEYS, "format", "version")]:
        raise ValueError(f"{where}: unknown key {unknown[0]!r:.60}")
    return data


def _read(cls: type[Any], data: Any, where: str) -> Any:
    """A dataclass of which no field without a default is left out."""
    if isinstance(data, Mapping):
        for entry in dataclasses.fields(cls):
            optional = cls is BlockTime and entry.name != "ms"
            if entry.name not in data and not optional:
                raise ValueError(f"{where}: {entry.name} is missing")
    return from_dict(cls, data, where)


def _blocks(data: Any, where: str) -> dict[str, BlockTime]:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}: expected an object, but got {type(data).__name__}")
    if len(data) > _MAX_BLOCKS:
        raise ValueError(f"{where}: expected at most {_MAX_BLOCKS}, but got {len(data)}")
    if long := [key for key in data if len(key) > _MAX_KEY]:
        raise ValueError(f"{where}: expected short keys, but got {long[0]!r:.60}...")
    return {key: _read(BlockTime, value, f"{where}: {key!r}") for key, value in data.items()}
