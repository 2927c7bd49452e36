# SPDX-License-Identifier: Apache-2.0
"""One run of ``fastnas bench``: what is measured in which order, and what is known so far."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastnas._timing import timed
from fastnas.bench.config import BenchConfig, parse_bytes
from fastnas.bench.forms import Form, LeftOut, Scene, compiled, make_forms, make_scene
from fastnas.bench.machine import Machine, Work, describe_machine
from fastnas.bench.measure import (
    Interleaved,
    interleave,
    peak_memory,
    resident_memory,
    return_memory,
)
from fastnas.bench.work import step_work
from fastnas.search.runtime import check_threads, resolve_device, runtime

__all__ = ["Comparison", "Session"]

_COMPILING = 0.25
_ROUNDS = 3


class Comparison:
    """The forms of one method's supernet, as far as they are measured.

    Attributes:
        method: key of the method.
        batch_size: images of a step.
        work: what a step cannot do without.
        forms: those that are measured, in the table's order.
        times: seconds of their steps, in turns.
        left_out: why others are not, by name.
    """

    def __init__(self, method: str, scene: Scene, config: BenchConfig) -> None:
        self.method, self._scene, self._config = method, scene, config
        self.batch_size = len(scene.images)
        self.work: Work = step_work(
            config.channels,
            config.layers,
            scene.partial_channels,
            self.batch_size,
            config.image_size,
        )
        self.forms: list[Form] = []
        self.times = Interleaved()
        self.left_out: dict[str, str] = {}

    def measure(self, seconds: float, tell: Callable[[str], None]) -> None:
        """Measure everything within so many seconds, about."""
        stop = time.perf_counter() + seconds
        first = self._prepare(tell)
        self._compile(seconds * _COMPILING, first, tell)
        left = max(stop - time.perf_counter(), 0.0)
        tell(f"{self.method}: {len(self.forms)} forms in turns, {left:.0f} s or {_ROUNDS} rounds")
        interleave(
            {form.name: form.step for form in self.forms},
            self._scene.device,
            left,
            least=_ROUNDS,
            result=self.times,
        )

    def _prepare(self, tell: Callable[[str], None]) -> list[Tensor]:
        """Check each form and count its memory; of each of ours the faster format is kept."""
        wanted: list[Tensor] | None = None
        ours: dict[str, list[tuple[float, Form]]] = {}
        forms = make_forms(self._scene, self._config)
        for number, form in enumerate(forms, 1):
            tell(f"{self.method}: {form.name}, memory ({number} of {len(forms)} forms)")
            found = form.first_step()
            # A graph is gone before the next form makes its own: that one's peak is its own too.
            return_memory()
            try:
                wanted = found if wanted is None else wanted
                form.check(found, wanted)
            except LeftOut as reason:
                self.left_out[form.name] = str(reason)
                continue
            if form.stock:
                self.forms.append(form)
            else:
                seconds = timed(form.step, self._scene.device)
                ours.setdefault(form.title, []).append((seconds, form))
        self.forms += [min(forms, key=lambda pair: pair[0])[1] for forms in ours.values()]
        assert wanted is not None
        return wanted

    def _compile(self, seconds: float, wanted: list[Tensor], tell: Callable[[str], None]) -> None:
        tell(f"{self.method}: torch.compile, at most {seconds:.0f} s")
        try:
            form, found = compiled(self._scene, self._config, seconds)
            form.check(found, wanted)
            form.peak = peak_memory(form.step, self._scene.device)
        except LeftOut as reason:
            self.left_out["stock, torch.compile"] = str(reason)
        else:
            last = sum(form.stock for form in self.forms)
            self.forms.insert(last, form)
        finally:
            return_memory()

    # --- what the figures say --------------------------------------------------------------------

    def measured(self) -> list[Form]:
        """The forms with a time."""
        return [form for form in self.forms if self.times.seconds.get(form.name)]

    def best_stock(self) -> Form | None:
        """The fastest plain form; None before one has a time."""
        stock = [form for form in self.measured() if form.stock]
        return min(stock, key=lambda form: self.times.median(form.name), default=None)

    def largest_batch(self, form: Form, limit: int, base: int) -> int | None:
        """Images that fit ``limit`` bytes beside ``base``, if memory grows with their number."""
        if not form.peak:
            return None
        return max(int((limit - base) * self.batch_size / form.peak), 0)


class Session:
    """Measures what a configuration asks for.

    Args:
        config: what to measure.
        tell: told what is being done, in a few words.

    Attributes:
        comparisons: one a method, also of those that are not finished.
        finished: whether everything was measured.

    Raises:
        ValueError: a device or a number of threads that the machine does not have.
    """

    def __init__(
        self, config: BenchConfig, tell: Callable[[str], None] = lambda text: None
    ) -> None:
        self.config, self._tell = config, tell
        self.device = resolve_device(config.device)
        check_threads(config.threads)
        self.memory_limit = _memory_limit(config.memory_limit, self.device)
        self.comparisons: list[Comparison] = []
        self.machine: Machine | None = None
        self.finished = False
        self.base = 0

    def run(self) -> None:
        """Measure; an exception such as KeyboardInterrupt leaves what is known so far.

        Raises:
            ValueError: sizes that the supernet cannot take.
        """
        with runtime(self.config.threads):
            self._tell("the machine: copies and matrix products")
            self.machine = describe_machine(self.device, os.getloadavg()[0])
            if self.device.type == "cpu":
                return_memory()
                self.base = resident_memory() or 0
            # All of them before the first is measured: sizes may fit one method only.
            scenes = [make_scene(name, self.config, self.device) for name in self.config.methods]
            start = time.perf_counter()
            for number, (name, scene) in enumerate(zip(self.config.methods, scenes, strict=True)):
                comparison = Comparison(name, scene, self.config)
                self.comparisons.append(comparison)
                left = self.config.seconds - (time.perf_counter() - start)
                comparison.measure(max(left, 0.0) / (len(self.config.methods) - number), self._tell)
        self.finished = True

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON can hold them."""
        return {
            "machine": None if self.machine is None else self.machine.as_dict(),
            "config": self.config.to_dict(),
            "finished": self.finished,
            "memory_limit": self.memory_limit,
            "methods": {c.method: self._figures(c) for c in self.comparisons},
        }

    def share_of_floor(self, comparison: Comparison, form: Form) -> float:
        """The time of the floor over that of the form."""
        assert self.machine is not None
        return self.machine.floor(comparison.work) / comparison.times.median(form.name)

    def largest_batch(self, comparison: Comparison, form: Form) -> int | None:
        """Images that would fit the memory limit; None where the peak or the limit is unknown."""
        if self.memory_limit is None:
            return None
        return comparison.largest_batch(form, self.memory_limit, self.base)

    def _figures(self, comparison: Comparison) -> dict[str, Any]:
        best = comparison.best_stock()
        return {
            "batch_size": comparison.batch_size,
            "bytes_moved": comparison.work.bytes,
            "flops": comparison.work.flops,
            "best_stock": None if best is None else best.name,
            "forms": {
                form.name: {
                    "seconds": comparison.times.seconds[form.name],
                    "median_seconds": comparison.times.median(form.name),
                    "saved_bytes": form.saved,
                    "peak_bytes": form.peak,
                    "largest_batch": self.largest_batch(comparison, form),
                    "share_of_floor": self.share_of_floor(comparison, form),
                }
                for form in comparison.measured()
            },
            "left_out": comparison.left_out,
        }


def _memory_limit(text: str, device: torch.device) -> int | None:
    """Bytes; of ``auto`` all that the device or machine has, None where that is not known."""
    if text != "auto":
        return parse_bytes(text)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
