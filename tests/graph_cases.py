# SPDX-License-Identifier: Apache-2.0
"""Learners whose steps are recorded, on any device, and what stands in for a device's recorder.

Nothing here needs more than PyTorch. Run as a script it makes the one test that may leave a process
in a bad state: a recording that the driver declares invalid.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from fastnas.methods import METHODS, Darts, Learner, Moment
from fastnas.methods.graphs import GraphedLearner
from fastnas.methods.optimizers import adam, rates_as_tensors, sgd
from fastnas.methods.recorder import CudaRecorder
from fastnas.spaces import CellSpec, CellWeights
from fastnas.spaces.darts import Supernet

EPOCHS, STEPS = 4, 3
CLASSES = 5


class Tape:
    """Stands in for the recorder of a device: a replay calls what was recorded.

    Args:
        complaint: what a warm-up says.
        fails: what recording raises.
    """

    def __init__(self, complaint: str | None = None, fails: Exception | None = None) -> None:
        self.complaint, self.fails = complaint, fails
        self.warm_ups = self.recorded = self.replays = 0
        self.short = False

    def __deepcopy__(self, memo: dict) -> Tape:
        return Tape(self.complaint, self.fails)

    def warm_up(self, run: Callable[[], None]) -> str | None:
        self.warm_ups += 1
        run()
        return self.complaint

    def is_short(self) -> bool:
        return self.short

    def record(self, run: Callable[[], None]) -> Take:
        if self.fails is not None:
            raise self.fails
        self.recorded += 1
        return Take(self, run)


class Take:
    def __init__(self, tape: Tape, run: Callable[[], None]) -> None:
        self.tape, self.run = tape, run

    def replay(self) -> None:
        self.tape.replays += 1
        self.run()


class Counting(CudaRecorder):
    """The real recorder, which counts."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.warm_ups = self.recorded = 0

    def warm_up(self, run: Callable[[], None]) -> str | None:
        self.warm_ups += 1
        return super().warm_up(run)

    def record(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = super().record(run)
        self.recorded += 1
        return graph


class Small(nn.Module):
    """A supernet of few modules, with everything a step may disturb."""

    SPEC = CellSpec((2, 3), ("skip_connect", "tanh", "sep_conv_3x3"))

    def __init__(self) -> None:
        super().__init__()
        self.cell_specs = {"normal": self.SPEC, "reduce": self.SPEC}
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4))
        self.cells = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
            for _ in self.cell_specs
        )
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier: nn.Module = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor, weights: Mapping[str, CellWeights]) -> Tensor:
        h = self.stem(x)
        for (ops, edges), conv in zip(weights.values(), self.cells, strict=True):
            if edges is not None:
                ops = ops * edges.unsqueeze(1)
            for skip, tanh, learned in ops:
                h = skip * h + tanh * torch.tanh(h)
                last = learned
            h = h + last * conv(h)
        return self.classifier(self.global_pooling(h).flatten(1))


def darts_supernet(name: str) -> Supernet:
    """That of the package, as small as it comes."""
    k = 2 if name == "pc_darts" else 1
    return Supernet(4, 3, CLASSES, partial_channels=k, none=name != "da2s")


def learner(
    name: str = "pc_darts",
    recorder: object = None,
    device: str = "cpu",
    *,
    dropout: float = 0.0,
    layout: torch.memory_format = torch.contiguous_format,
    make: Callable[..., Darts] | None = None,
    build: Callable[[str], nn.Module] | None = None,
    options: object = None,
    **settings: object,
) -> Learner:
    """A learner of a small network; with a recorder its steps are recorded."""
    torch.manual_seed(3)
    net = (build or (lambda name: Small()))(name)
    if dropout:
        net.classifier = nn.Sequential(nn.Dropout(dropout), net.classifier)
    method = (make or METHODS[name])(net.cell_specs, options)
    net.to(device, memory_format=layout)
    arch = method.parameters().to(device)
    parts = (
        net,
        arch,
        method,
        sgd(net.parameters(), 0.1, momentum=0.9, weight_decay=3e-4),
        adam(method.parameter_groups(arch), 0.02, betas=(0.5, 0.999), weight_decay=1e-3),
        nn.CrossEntropyLoss(),
    )
    if recorder is None:
        for optimizer in parts[3:5]:  # rounded as those that are read on the device
            rates_as_tensors(optimizer)
        return Learner(*parts, **settings)
    return GraphedLearner(*parts, recorder=recorder, **settings)


def batches(
    device: str = "cpu",
    layout: torch.memory_format = torch.contiguous_format,
    sizes: tuple[int, ...] = (6,),
    seed: int = 11,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels without end, of these sizes in turns."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for n in sizes:
            x = torch.randn(n, 3, 8, 8, generator=generator).to(device)
            y = torch.randint(CLASSES, (n,), generator=generator).to(device)
            yield x.contiguous(memory_format=layout), y


def train(
    learned: Learner,
    iterations: int,
    start: int = 0,
    train_batches: Iterator | None = None,
    val_batches: Iterator | None = None,
    frozen: int = 0,
) -> list[Tensor]:
    """Iterations as a search makes them, the rate another one each time.

    Returns:
        Loss and share of rightly classified images of each outcome.
    """
    device = next(learned.supernet.parameters()).device.type
    train_batches = train_batches or batches(device)
    val_batches = val_batches or batches(device, seed=12)
    losses = []
    learned.supernet.train()
    for step in range(start, start + iterations):
        moment = Moment(step // STEPS, EPOCHS, step, "weights", STEPS)
        learned.set_rate(0.1 / (1 + step))
        val = None if step < frozen else lambda: next(val_batches)
        for outcome in learned.method.iteration(learned, next(train_batches), val, moment):
            if outcome is not None:
                losses += [outcome.loss.double(), outcome.correct.double() / outcome.images]
    return losses


def state_of(learned: Learner) -> dict[str, Tensor]:
    """Every tensor that a step may move, by name."""
    state = learned.state_dict()
    found = {f"supernet.{k}": v for k, v in state["supernet"].items()}
    found |= {f"arch.{k}": v for k, v in state["arch"].items()}
    for name in ("weight_optimizer", "arch_optimizer"):
        for number, values in state[name]["state"].items():
            found |= {f"{name}.{number}.{k}": v for k, v in values.items()}
    return {name: value.detach().clone() for name, value in found.items()}


def assert_same(a, b) -> None:
    """Of two learners, bit for bit."""
    first, second = state_of(a), state_of(b)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


class Invalid(Darts):
    """A method that asks the driver for something that makes a recording invalid."""

    name = "invalid"

    def weights(self, arch, moment):
        if torch.cuda.is_current_stream_capturing():
            event = torch.cuda.Event()
            torch.cuda.Event.record(event, torch.cuda.default_stream())
            event.query()
        return super().weights(arch, moment)


def invalidate() -> None:
    """Train on after a recording that became invalid."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    told: list[str] = []
    recorded = learner(
        "darts", Counting(torch.device("cuda")), "cuda", make=Invalid, dropout=0.3, tell=told.append
    )
    eager = learner("darts", None, "cuda", dropout=0.3)
    states = []
    for one in (recorded, eager):
        torch.cuda.manual_seed(5)
        train(one, 8)
        states.append(state_of(one))
    for name, value in states[1].items():
        torch.testing.assert_close(states[0][name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert len(told) == 1, told
    print(told[0])


if __name__ == "__main__":
    sys.exit(invalidate())
