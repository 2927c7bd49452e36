# SPDX-License-Identifier: Apache-2.0
"""A whole iteration of a search, architecture step and weight step with their optimizers, on a GPU.

    python benchmarks/search_step.py --json search_step.json

measures DARTS and PC-DARTS (k = 4) at batches of 64 and 256, 16 channels and 8 cells: the stock
network as it is, in channels_last, in bfloat16, and replayed from CUDA graphs, beside the network
of fastnas, eager and replayed. Every form has the same weights and images and is measured by
itself; what has no time left within --seconds is left out. Memory is the peak of an eager
iteration, and what graphs and state keep together where it is replayed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cases import LeftOut
from torch import nn

from fastnas._timing import synchronize, timed
from fastnas.bench.machine import device_name
from fastnas.bench.stock import StockSupernet
from fastnas.methods import METHODS, Learner, Moment
from fastnas.methods.graphs import GraphedLearner, GraphError, with_graphs
from fastnas.methods.optimizers import adam, sgd
from fastnas.spaces.darts import Supernet

CLASSES = 10
LEAST, MOST, SECONDS = 4, 30, 0.4
#: Relative difference of the first loss: that of bfloat16, and far less than another formula's.
TOLERANCE = 0.05


@dataclass(frozen=True)
class Form:
    """A way to make the iteration."""

    network: str
    bfloat16: bool = False
    channels_last: bool = False
    graph: bool = False

    @property
    def name(self) -> str:
        words = [self.network, "bf16" if self.bfloat16 else "fp32"]
        words.append("channels_last" if self.channels_last else "NCHW")
        return " ".join(words) + (", CUDA graph" if self.graph else "")

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


FORMS = (
    Form("stock"),
    Form("stock", channels_last=True),
    Form("stock", bfloat16=True, channels_last=True),
    Form("stock", bfloat16=True, channels_last=True, graph=True),
    Form("fastnas"),
    Form("fastnas", graph=True),
    Form("fastnas", bfloat16=True, channels_last=True, graph=True),
)


class Scene:
    """The networks of a method, of equal weights, and its images."""

    def __init__(self, method: str, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        k = 4 if method == "pc_darts" else 1
        size = (options.channels, options.layers, CLASSES)
        stock, fused = (net(*size, partial_channels=k) for net in (StockSupernet, Supernet))
        fused.load_state_dict(stock.state_dict())
        self.networks: dict[str, nn.Module] = {"stock": stock, "fastnas": fused}
        self.method = METHODS[method](fused.cell_specs)
        self.arch = self.method.parameters()
        self.device, self.image_size = torch.device(options.device), options.image_size

    def learner(self, form: Form) -> Learner:
        """A new learner; raises LeftOut where its steps cannot be recorded."""
        net = copy.deepcopy(self.networks[form.network])
        net.to(self.device, memory_format=form.layout)
        arch = copy.deepcopy(self.arch).to(self.device)
        plain = Learner(
            net.train(),
            arch,
            self.method,
            sgd(net.parameters(), 0.025, momentum=0.9, weight_decay=3e-4),
            adam(self.method.parameter_groups(arch), 3e-4, betas=(0.5, 0.999), weight_decay=1e-3),
            nn.CrossEntropyLoss(),
            amp=torch.bfloat16 if form.bfloat16 else None,
        )
        try:
            return with_graphs(plain, "on" if form.graph else "off", lambda reason: None)
        except ValueError as error:
            raise LeftOut(str(error)) from None

    def batches(self, size: int, form: Form) -> list[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(1)
        found = []
        for _ in range(2):
            x = torch.randn(size, 3, self.image_size, self.image_size, generator=generator)
            y = torch.randint(CLASSES, (size,), generator=generator)
            x = x.to(self.device).contiguous(memory_format=form.layout)
            found.append((x, y.to(self.device)))
        return found


def measure(scene: Scene, form: Form, size: int, expected: float | None) -> dict[str, Any]:
    """Median seconds, memory and first loss of one form; raises LeftOut."""
    learner, (train, val) = scene.learner(form), scene.batches(size, form)
    moment, device = Moment(0, 1, 0), scene.device

    def iteration() -> torch.Tensor:
        return scene.method.iteration(learner, train, lambda: val, moment)[0].loss

    try:
        loss = iteration().item()
        if expected is not None and not abs(loss - expected) <= TOLERANCE * abs(expected):
            raise LeftOut(f"its first loss is {loss:.4f}, that of stock is {expected:.4f}")
        for _ in range(max(learner.lead, 2)):
            iteration()
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        seconds: list[float] = []
        while len(seconds) < LEAST or (len(seconds) < MOST and sum(seconds) < SECONDS):
            seconds.append(timed(iteration, device))
    except (torch.OutOfMemoryError, GraphError) as error:
        raise LeftOut(str(error).strip().splitlines()[0]) from None
    memory = torch.cuda.max_memory_allocated(device) if cuda else None
    if cuda and isinstance(learner, GraphedLearner):
        torch.cuda.empty_cache()
        memory = torch.cuda.memory_reserved(device)
    return {"median_seconds": statistics.median(seconds), "memory": memory, "loss": loss}


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row a form, method and batch, as they are measured."""
    start = time.monotonic()
    scenes = {method: Scene(method, options) for method in options.methods}
    for size in options.batch_sizes:
        for method, scene in scenes.items():
            expected = base = None
            for form in FORMS:
                row: dict[str, Any] = {"method": method, "batch": size, "form": form.name}
                try:
                    if time.monotonic() - start > options.seconds:
                        raise LeftOut(f"the {options.seconds:g} s are over")
                    row |= measure(scene, form, size, expected)
                except LeftOut as reason:
                    yield row | {"left_out": str(reason)}
                    continue
                finally:
                    release(scene.device)
                if form == FORMS[0]:
                    expected, base = row["loss"], row["median_seconds"]
                if base is not None:
                    row["faster"] = base / row["median_seconds"]
                yield row


def release(device: torch.device) -> None:
    """Give back what the form before has kept."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.empty_cache()


def line(row: dict[str, Any]) -> str:
    head = f"{row['method']:<9} {row['batch']:>4}  {row['form']:<38}"
    if "left_out" in row:
        return f"{head} left out: {row['left_out']}"
    memory = "" if row["memory"] is None else f"{row['memory'] / 1e9:7.2f} GB"
    faster = f"{row['faster']:6.2f}x" if "faster" in row else ""
    rate = row["batch"] / row["median_seconds"]
    return f"{head} {row['median_seconds'] * 1e3:9.2f} ms {faster} {rate:9.0f} images/s {memory}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--methods", default="darts,pc_darts", type=lambda text: text.split(","))
    parser.add_argument(
        "--batch-sizes", default="64,256", type=lambda text: [int(n) for n in text.split(",")]
    )
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=80, help="no form is begun after them")
    parser.add_argument("--json", type=Path, help="file for the rows, written after each")
    return parser.parse_args(arguments)


@contextlib.contextmanager
def as_in_a_search() -> Iterator[None]:
    """The libraries choose their algorithms by trying them, as they do in a search."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 1 if a form was left out."""
    options = parse(arguments)
    start = time.monotonic()
    found: dict[str, Any] = {
        "device": device_name(torch.device(options.device)),
        "torch": torch.__version__,
        "rows": [],
    }
    with as_in_a_search():
        for row in rows(options):
            found["rows"].append(row)
            found["seconds"] = round(time.monotonic() - start, 1)
            print(line(row), flush=True)
            if options.json is not None:
                options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{found['device']}, PyTorch {found['torch']}, {found['seconds']} s")
    return int(any("left_out" in row for row in found["rows"]))


if __name__ == "__main__":
    sys.exit(main())
