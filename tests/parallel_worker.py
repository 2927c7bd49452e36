# SPDX-License-Identifier: Apache-2.0
"""What each process of a run of several does, in a module that the processes can import."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import proxyless_tiny
import search_tiny
import torch
import torch.distributed as dist
from search_tiny import TinySupernet, config, images
from torch import nn

from fastnas.data import Augment
from fastnas.evaluate import Evaluation
from fastnas.evaluate import preset_config as evaluate_preset
from fastnas.methods import METHODS
from fastnas.parallel import ALONE, Group, ProcessesError, current_group
from fastnas.search import RunInterrupted, Search, layout, preset_config
from fastnas.search.gap import with_new_statistics
from fastnas.search.hessian import alpha_eigenvalue
from fastnas.spaces import SPACES, mbconv

PROCESSES = 2


class PlainSupernet(TinySupernet):
    """Without norms and dropout: a batch in shares then gives what it gives as a whole."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.stem = nn.Sequential(self.stem[0])
        for conv in self.convs:
            conv[2] = nn.Identity()


@contextmanager
def registered() -> Iterator[None]:
    """Within the block the space is known as ``plain``."""
    with search_tiny.registered():
        SPACES["plain"] = replace(SPACES["tiny"], name="plain", supernet=PlainSupernet)
        try:
            yield
        finally:
            del SPACES["plain"]


def options(method: str, **values: object) -> Any:
    return METHODS[method].Options(**values)


# One name each; the validation has a last batch of three images, which go to the processes as one
# and two.
PLAIN = {
    "darts": {"method": "darts", "hessian_every": 1, "arch_share": 35 / 96},
    "second": {"method": "darts", "options": options("darts", order="second")},
    "pc_darts": {"method": "pc_darts"},
    "da2s": {"method": "da2s"},
}

# Norms see a share of the batch. Of two epochs of three steps.
_MBCONV = {
    "method": "proxyless",
    "space": "mbconv",
    "network": mbconv.MBConvOptions(**proxyless_tiny.OPTIONS),
}
REAL = {
    "tiny": {"method": "pc_darts"},
    "entrannas": {"method": "entrannas", "space": "darts", "val_batches": 1},
    "entrannas_dst": {"method": "entrannas_dst", "space": "darts", "val_batches": 1},
    "two": {**_MBCONV, "options": options("proxyless", estimator="two", arch_every=2)},
    "reinforce": {
        **_MBCONV,
        "options": options("proxyless", estimator="reinforce", rl_samples=2, rl_updates=2),
    },
}


def search(group: Group, fields: dict[str, Any], out: Path | None = None, **more: Any) -> Search:
    values = {"lr": 0.02, "out": None if out is None else str(out), **fields, **more}
    if values.get("space") == "mbconv":
        of_tiny = vars(config())
        shared = ("epochs", "batch_size", "weight_share", "arch_share", "arch_warmup_epochs")
        common = {name: of_tiny[name] for name in (*shared, "memory_format", "device", "log_every")}
        made = preset_config("demo", **{**common, **values})
    else:
        made = config(**values)
    return Search(made, data=images(), group=group)


def plain(group: Group, name: str) -> Any:
    """The state after a search without norms."""
    run = search(group, {"space": "plain", "label_smoothing": 0.1, **PLAIN[name]})
    run.run()
    return run.state_dict()


def evaluation(group: Group, out: Path | None = None, **fields: Any) -> Evaluation:
    values: dict[str, Any] = {
        "source": "DARTS_V1",
        "C": 4,
        "layers": 3,
        "epochs": 2,
        "batch_size": 16,
        "augment": Augment(crop_padding=1, flip=True, cutout=2),
        "drop_path": 0.5,
        "auxiliary": True,
        "device": "cpu",
        "memory_format": "contiguous",
        "out": None if out is None else str(out),
        **fields,
    }
    return Evaluation(evaluate_preset("demo", **values), data=images(size=16), group=group)


def stopped(run: Search | Evaluation, step: int) -> str:
    """Run until a signal comes to the last process alone; what was said then."""
    last = run.group.share.rank == run.group.size - 1
    group = run.group
    calls = itertools.count(1)

    class Told(Group):
        def largest(self, number: int) -> int:
            if last and next(calls) == step:
                run._interrupts.note(signal.SIGINT)
                number = signal.SIGINT
            return super().largest(number)

    run.group = Told(group.share, group.local_rank)
    save = run._save

    def save_slowly() -> None:
        time.sleep(0.3)  # the others must not leave before
        save()

    run._save = save_slowly  # type: ignore[method-assign]
    try:
        run.run()
    except RunInterrupted as stop:
        return str(stop)
    raise AssertionError("the run was not stopped")


def again(make: Callable[..., Any], group: Group, path: Path, steps: tuple[int, ...]) -> Any:
    """States after a run, and after one that was stopped in these steps and resumed."""
    whole, said = make(group, out=path / "whole"), []
    whole.run()
    for number, step in enumerate(steps):
        said.append(stopped(make(group, out=path / "parts", resume=number > 0), step))
    parts = make(group, out=path / "parts", resume=True)
    parts.run()
    assert parts.resumed
    return whole.state_dict(), parts.state_dict(), said


def masks(group: Group) -> Any:
    """This process's generator in the steps in which an evaluation drops paths."""
    run, drawn = evaluation(group), []
    step = run.trainee.step

    def train_step(x: torch.Tensor, y: torch.Tensor) -> Any:
        if run.network.drop_path_prob:
            drawn.append(torch.get_rng_state())
        return step(x, y)

    run.trainee.step = train_step  # type: ignore[method-assign]
    run.run()
    return drawn


def other_seed(group: Group) -> str:
    try:
        search(group, REAL["tiny"], seed=1 + group.share.rank).run()
    except ProcessesError as error:
        return str(error)
    return ""


def other_weights(group: Group) -> str:
    """The last process has made something else of the same seed."""
    run = search(group, REAL["tiny"])
    with torch.no_grad():
        next(run.supernet.parameters()).add_(group.share.rank)
    try:
        run.run()
    except ProcessesError as error:
        return str(error)
    return ""


def other_images(group: Group, what: str) -> str:
    """The processes have other numbers of images to train on, or to test on, or other labels."""
    data = images()
    count = 8 * (group.size - group.share.rank)
    cut = {"test_images": data.test_images[:count], "test_labels": data.test_labels[:count]}
    own = {
        "training": images(96 + count),
        "test": replace(data, **cut),
        "labels": replace(data, train_labels=data.train_labels.roll(group.share.rank)),
    }[what]
    try:
        Search(config(), data=own, group=group).run()
    except ProcessesError as error:
        return str(error)
    return ""


def other_genotype(group: Group) -> str:
    """The last process derives something of its own in the first epoch."""
    run = search(group, REAL["tiny"])
    derive = run.method.derive

    def derive_else(arch: Any, space: Any) -> Any:
        found = derive(arch, space)
        (op, source), *rest = found.normal
        other = "max_pool_3x3" if op == "skip_connect" else "skip_connect"
        return found if group.leads else replace(found, normal=((other, source), *rest))

    run.method.derive = derive_else  # type: ignore[method-assign]
    try:
        run.run()
    except ProcessesError as error:
        return str(error)
    return ""


def eigenvalues(group: Group) -> tuple[float, float]:
    """Of one batch whose shares are not equal: by all processes, and by one alone."""
    x, y = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(5)), torch.arange(5) % 3
    found = []
    for owner in (group, ALONE):
        run = search(owner, {"space": "plain", **PLAIN["darts"]})
        with torch.no_grad():
            for alpha in run.arch.parameters():
                alpha.copy_(torch.linspace(-1, 1, alpha.numel()).view_as(alpha))
        rows = owner.share.of(0, len(y))
        batch = x[rows], y[rows]
        found.append(alpha_eigenvalue(run.learner, batch, run.moment("validation")))
    return found[0], found[1]


def files_at_the_end(group: Group, path: Path) -> bool:
    """Whether another run may read what a search found, as soon as that has returned."""
    run = search(group, REAL["tiny"], out=path)
    save = run._save

    def save_slowly() -> None:
        time.sleep(0.5)
        save()

    run._save = save_slowly  # type: ignore[method-assign]
    result = run.run()
    lines = (path / "metrics.jsonl").read_text().splitlines()
    genotype = (path / "genotype.json").read_text()
    return len(lines) == len(result.history) and genotype == result.genotype.to_json()


def chosen_layout(group: Group) -> str:
    """The memory format, of which only the first process makes a trial."""
    least, layout.LEAST_STEPS = layout.LEAST_STEPS, 1
    try:
        run = search(group, REAL["tiny"], memory_format="auto")
        run.run()
    finally:
        layout.LEAST_STEPS = least
    return str(run.config.memory_format)


def new_statistics(group: Group) -> list[torch.Tensor]:
    """Buffers of the norms after their statistics were made anew from shares of the batches."""
    run = search(group, REAL["tiny"])
    weights = run.method.weights(run.arch, run.moment("validation"))
    batches = run.halves.weights.iterate(0)
    with torch.no_grad():
        with_new_statistics(run.learner, batches, weights, lambda: None)
    return list(run.supernet.buffers())


def together(group: Group) -> dict[str, Any]:
    """Each method of a group once."""
    rank = group.share.rank
    tensors = [
        torch.full((2, 3), 1.0 + rank),
        torch.full((4,), 1.0 + 2 * rank, dtype=torch.float64),
        torch.full((1, 2, 3, 3), 3.0 * rank).contiguous(memory_format=torch.channels_last),
    ]
    own = [t.clone(memory_format=torch.preserve_format) for t in tensors]
    counter = torch.tensor(rank)
    group.equalize([*own, counter])
    loss, correct, count = group.total(torch.tensor(1.0 + rank), torch.tensor(3), 4 - rank)
    try:
        group.check_same({"a name": "", "a word": str(rank)})
        differs = ""
    except ProcessesError as error:
        differs = str(error)
    return {
        "mean": group.mean(tensors),
        "equal": own,
        "strides": own[2].stride(),
        "counter": int(counter),
        "total": (loss.item(), correct.item(), count),
        "largest": group.largest(10 * rank),
        "told": (group.told(f"of {rank}"), group.told(None)),
        "differs": differs,
    }


def in_processes(rank: int, path: Path, number: int) -> None:
    """All of the above, as one of several processes; what they bring is written to files."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{path}/store", rank=rank, world_size=number
    )
    try:
        with registered():
            group = current_group()
            found = {
                "together": together(group),
                "masks": masks(group),
                "other_seed": other_seed(group),
                "eigenvalues": eigenvalues(group),
                "files": files_at_the_end(group, path / "files"),
                "other_weights": other_weights(group),
                "other_images": [
                    other_images(group, what) for what in ("training", "test", "labels")
                ],
                "other_genotype": other_genotype(group),
                "layout": chosen_layout(group),
                "statistics": new_statistics(group),
                "evaluation": again(evaluation, group, path / "evaluation", (2, 3)),
            }
            for name in PLAIN:
                found[f"plain/{name}"] = plain(group, name)
            for name, fields in REAL.items():

                def make(group: Group, fields: Any = fields, **more: Any) -> Search:
                    return search(group, fields, **more)

                found[f"real/{name}"] = again(make, group, path / name, (2, 3))
        torch.save(found, path / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def alone(name: str) -> Any:
    """The state of :func:`plain` after a search by one process."""
    with registered():
        return plain(ALONE, name)
