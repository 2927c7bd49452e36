# SPDX-License-Identifier: Apache-2.0
"""Searches small enough to run many times: a space of a few operations, and 8x8 images.

Run as a script it makes one run in a process of its own, for the tests that kill it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastnas.data import Augment, ImageData
from fastnas.methods import PCDartsOptions
from fastnas.search import Progress, Search, SearchConfig, layout, preset_config
from fastnas.spaces import SPACES, CellSpec, CellWeights, Space

CLASSES = 4
SPEC = CellSpec((2, 3), ("none", "max_pool_3x3", "skip_connect", "sep_conv_3x3"))


class TinySupernet(nn.Module):
    """Two cells of two nodes; enough for every line of the loop, in milliseconds."""

    def __init__(
        self,
        C: int,
        layers: int,
        num_classes: int,
        in_channels: int,
        stem: str,
        partial_channels: int = 1,
        none: bool = True,
    ) -> None:
        super().__init__()
        spec = SPEC if none else CellSpec(SPEC.inputs_per_node, SPEC.primitives[1:])
        self.cell_specs = {"normal": spec, "reduce": spec}
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, C, 3, 2, 1, bias=False), nn.BatchNorm2d(C), nn.Dropout(0.1)
        )
        self.convs = nn.ModuleList(
            nn.Sequential(nn.ReLU(), nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C))
            for _ in range(2 * SPEC.edges)
        )
        self.classifier = nn.Linear(C, num_classes)

    def forward(self, x: Tensor, weights: Mapping[str, CellWeights]) -> Tensor:
        h = self.stem(x)
        convs = iter(self.convs)
        for kind in ("normal", "reduce"):
            ops, edges = weights[kind]
            states = [h, h]
            edge = 0
            for inputs in SPEC.inputs_per_node:
                total: Tensor = torch.zeros_like(h)
                for source in range(inputs):
                    w, s = ops[edge], states[source]
                    pooled = nn.functional.max_pool2d(s, 3, 1, 1)
                    mixed = w[-3] * pooled + w[-2] * s + w[-1] * next(convs)(s)
                    total = total + (mixed if edges is None else edges[edge] * mixed)
                    edge += 1
                states.append(total)
            h = states[2] + states[3]
        return self.classifier(h.mean((2, 3)))


@contextmanager
def registered() -> Iterator[None]:
    """Within the block the space is known as ``tiny``."""
    darts = SPACES["darts"]
    SPACES["tiny"] = Space(
        name="tiny",
        supernet=TinySupernet,
        network=darts.network,
        genotype=darts.genotype,
        derive=darts.derive,
        one_hot=darts.one_hot,
        genotypes={},
    )
    try:
        yield
    finally:
        del SPACES["tiny"]


def images(count: int = 96, size: int = 8) -> ImageData:
    """Noise around one random pattern a class: something a network can learn in a few steps."""
    generator = torch.Generator().manual_seed(7)

    def part(n: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(n) % CLASSES
        noise = torch.randint(0, 60, (n, 1, size, size), generator=generator)
        return (patterns[labels] + noise).to(torch.uint8), labels

    patterns = torch.randint(0, 190, (CLASSES, 1, size, size), generator=generator)
    train, test = part(count), part(16)
    return ImageData("tiny", *train, *test, num_classes=CLASSES, mean=(0.5,), std=(0.3,))


def config(method: str = "darts", space: str = "tiny", **fields: object) -> SearchConfig:
    """Two epochs of three iterations on 96 images, unless ``fields`` say otherwise."""
    values: dict[str, object] = {
        "C": 4,
        "layers": 3,
        "epochs": 2,
        "batch_size": 16,
        "lr": 0.05,
        "arch_lr": 0.01,
        "arch_warmup_epochs": 0,
        "weight_share": 0.5,
        "arch_share": 0.5,
        "augment": Augment(crop_padding=1, flip=True),
        "validate": "every",
        "memory_format": "contiguous",
        "device": "cpu",
        "log_every": 1,
        "out": None,
    }
    if method == "pc_darts":
        values["options"] = PCDartsOptions(partial_channels=2)
    return preset_config("demo", method=method, space=space, **{**values, **fields})


def assert_equal(a: object, b: object, where: str = "") -> None:
    """Bit for bit, but for where and how long a run was."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in ("seconds", "out", "resume", "threads"):
                assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}/{index}")
    else:
        assert a == b, where


class Announce(Progress):
    """Prints a line after every iteration and every epoch, so that a test knows where a run is."""

    def step(self, report: object) -> None:
        print("step", flush=True)

    def epoch(self, record: object, genotype: object) -> None:
        print("epoch", flush=True)


def main() -> None:
    """Arguments: the fields of the configuration as JSON, and the number of images.

    However short the search, it tries memory formats where it is to choose one.
    """
    fields = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    torch.rand(int(fields.pop("draws", 0)))
    layout.LEAST_STEPS = 0
    with registered():
        Search(config(**fields), data=images(int(sys.argv[2])), progress=Announce()).run()


QUIET = Progress()


def run(settings: SearchConfig, **kwargs: object) -> Search:
    """A finished search on the tiny images, silent unless told otherwise."""
    search = Search(settings, data=images(), **{"progress": QUIET, **kwargs})
    search.run()
    return search


class Recorder(Progress):
    """Keeps what it is told, in short."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def start(self, search: Search) -> None:
        self.events.append(f"start {search.epoch}.{search.step}")

    def step(self, report) -> None:
        self.events.append(
            f"{report.phase} {report.epoch}/{report.epochs} {report.step}/{report.steps}"
        )
        assert report.loss > 0
        assert report.seconds_left >= 0

    def epoch(self, record, genotype) -> None:
        self.events.append(f"epoch {record['epoch']}")

    def end(self, result) -> None:
        self.events.append("end")

    def stop(self, reason: BaseException) -> None:
        self.events.append(f"stop {type(reason).__name__}")


if __name__ == "__main__":
    main()
