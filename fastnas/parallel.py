# SPDX-License-Identifier: Apache-2.0
"""Several processes that make one run: each takes a share of every batch, all make the same steps.

Gradients and running statistics are averaged, losses and numbers of images are those of the whole
batch, so that all processes hold the same weights and alphas and come to one genotype. They are
those of ``torch.distributed``: ``torchrun`` starts them, NCCL connects GPUs and gloo CPUs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = [
    "ALONE",
    "MEETING",
    "Group",
    "ProcessEndedError",
    "ProcessesError",
    "Share",
    "current_group",
    "joined",
]

MEETING = "FASTNAS_PROCESSES_MEET"
"""The environment variable with the folder in which processes of ``--processes`` find each other.

Those of ``torchrun`` do without.
"""

_PATIENCE = timedelta(minutes=30)


class ProcessesError(RuntimeError):
    """The processes of a run do not go together any more; the message says which and why."""


class ProcessEndedError(ProcessesError):
    """Another process has ended; it has told why, if it could."""


class Share(NamedTuple):
    """Which part of every batch a process takes.

    Attributes:
        rank: number of the process, from 0.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    def of(self, begin: int, count: int) -> slice:
        """The rows that this process takes of ``count`` rows from ``begin`` on."""
        return slice(
            begin + count * self.rank // self.size, begin + count * (self.rank + 1) // self.size
        )


@dataclass(frozen=True)
class Group:
    """The processes of a run as one of them sees them. Alone, every method is the identity.

    All processes call the same methods in the same order; each call waits for the others.

    Attributes:
        share: which of them this is.
        local_rank: number of the process on its machine, and of its GPU.
    """

    share: Share = field(default_factory=Share)
    local_rank: int = 0

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.share.size

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files and tells how it goes."""
        return self.share.rank == 0

    def option(self) -> str:
        """What a command needs beside its other words to have as many processes again."""
        return f" --processes {self.size}" if self.size > 1 and os.environ.get(MEETING) else ""

    def place(self, device: torch.device) -> torch.device:
        """The device of this process: of the GPUs of a machine each takes its own.

        Raises:
            ValueError: one GPU was named for all processes, or there are fewer than processes.
        """
        if self.size == 1 or device.type != "cuda":
            return device
        if device.index is not None:
            raise ValueError(
                f"device: expected 'cuda' for {self.size} processes, of which each takes its own "
                f"GPU, but got {str(device)!r}"
            )
        count = torch.cuda.device_count()
        if self.local_rank >= count:
            raise ValueError(
                f"device: expected no more processes on a machine than it has GPUs ({count}), but "
                f"this is process {self.local_rank + 1} here; start {count}, or take --device cpu"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def batch_size(self, asked: int, images: int, *, tested: bool = False) -> int:
        """Images of a batch of all processes together.

        Args:
            asked: by the configuration.
            images: how many there are.
            tested: the last batch of a test may be a smaller one, but each process needs a part.

        Raises:
            ValueError: ``asked`` does not go into equal shares, or there are too few images.
        """
        most = min(asked, images)
        if self.size == 1:
            return most
        if asked % self.size:
            raise ValueError(
                f"batch_size: expected a multiple of {self.size}, the number of processes that "
                f"share a batch, but got {asked}; take another size, or another number of processes"
            )
        sizes = list(range(most - most % self.size, 0, -self.size))
        if tested:
            sizes += range(most, self.size - 1, -1)
            sizes = [n for n in sizes if images % n == 0 or images % n >= self.size]
        if not sizes:
            raise ValueError(
                f"batch_size: {self.size} processes cannot share {images} images in batches of "
                f"{asked}; start fewer of them, or take another batch size"
            )
        return sizes[0]

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The mean of each tensor over the processes; all tensors are floating-point."""
        if self.size == 1:
            return list(tensors)
        means: list[Tensor] = list(tensors)
        kinds = {(t.dtype, t.device) for t in tensors}
        for kind in sorted(kinds, key=str):  # the same order everywhere
            numbers = [i for i, t in enumerate(tensors) if (t.dtype, t.device) == kind]
            flat = torch.cat([tensors[i].detach().reshape(-1) for i in numbers])
            self._sum_(flat)
            flat /= self.size
            parts = flat.split([tensors[i].numel() for i in numbers])
            for i, part in zip(numbers, parts, strict=True):
                means[i] = part.view(tensors[i].shape)
        return means

    @torch.no_grad()
    def equalize(self, tensors: Iterable[Tensor]) -> None:
        """Replace each floating-point tensor by its mean over the processes."""
        if self.size == 1:
            return
        own = [t for t in tensors if t.is_floating_point()]
        if own:
            torch._foreach_copy_(own, self.mean(own))

    def total(self, loss: Tensor, correct: Tensor, images: int) -> tuple[Tensor, Tensor, int]:
        """Mean loss, right answers and images of a batch, given those of this process's share."""
        if self.size == 1:
            return loss, correct, images
        count = torch.tensor(images)
        self._sum_(count)
        sums = torch.stack([loss.detach().double() * images, correct.double()])
        self._sum_(sums)
        together = int(count)
        return sums[0] / together, sums[1].round().long(), together

    def largest(self, number: int) -> int:
        """The largest of the numbers that the processes give."""
        if self.size == 1:
            return number
        value = torch.tensor(number)
        with _together():
            dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def wait(self) -> None:
        """Return when all processes have come here."""
        self.largest(0)

    def told(self, text: str | None) -> str | None:
        """What the first process gives."""
        if self.size == 1:
            return text
        words = [text]
        with _together():
            dist.broadcast_object_list(words, src=0, device=torch.device("cpu"))
        return words[0]

    def check_same(self, texts: Mapping[str, str]) -> None:
        """Raise unless all processes give the same texts.

        Args:
            texts: by what they say; these names are the same in all processes.

        Raises:
            ProcessesError: they do not; it names what differs.
        """
        if self.size == 1 or not texts:
            return
        own = torch.tensor([_number_of(text) for text in texts.values()])
        others = [torch.empty_like(own) for _ in range(self.size)]
        with _together():
            dist.all_gather(others, own)
        for rank, other in enumerate(others):
            for what, number, first in zip(texts, other.tolist(), others[0].tolist(), strict=True):
                if number != first:
                    raise ProcessesError(f"process {rank} has {what} other than process 0")

    def check_same_state(self, module: nn.Module, what: str) -> None:
        """Raise a :class:`ProcessesError` unless a module has the same values everywhere."""
        if self.size == 1:
            return
        digest = hashlib.blake2b()
        for tensor in [*module.parameters(), *module.buffers()]:
            values = tensor.detach().cpu().contiguous().view(-1)
            digest.update(values.view(torch.uint8).numpy().tobytes())
        self.check_same({what: digest.hexdigest()})

    def _sum_(self, tensor: Tensor) -> None:
        with _together():
            dist.all_reduce(tensor)


def _number_of(text: str) -> int:
    """A number that two texts share only if they are equal."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


ALONE = Group()
"""One process."""


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Within the block, that another process has ended is told in words."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessEndedError(
            "another process of this run has ended: see what it said"
        ) from error


def current_group() -> Group:
    """The processes of ``torch.distributed``, where its default group was initialised.

    Returns:
        One process alone where it was not.
    """
    if not dist.is_available() or not dist.is_initialized():
        return ALONE
    rank, size = dist.get_rank(), dist.get_world_size()
    return Group(Share(rank, size), int(os.environ.get("LOCAL_RANK", rank)))


@contextlib.contextmanager
def joined() -> Iterator[Group]:
    """Within the block, the processes that ``torchrun`` started are connected.

    Yields:
        The group; one process alone where ``torchrun`` started none, or one. Where
        ``torch.distributed`` is initialised already, ``current_group()``, which stays.

    Raises:
        ValueError: of the variables that ``torchrun`` sets, some are missing.
    """
    if dist.is_available() and dist.is_initialized():
        yield current_group()
        return
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield ALONE
        return
    try:
        rank, size = (int(os.environ.get(name, "")) for name in ("RANK", "WORLD_SIZE"))
    except ValueError:
        raise ValueError(
            "TORCHELASTIC_RUN_ID is set, as torchrun does, but RANK and WORLD_SIZE are not: "
            "start by torchrun, or unset it"
        ) from None
    if size == 1:
        yield ALONE
        return
    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    # A port that is found free may be taken before it is used; a file is nobody else's.
    folder = os.environ.get(MEETING)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpus else "gloo",
        init_method=f"file://{folder}/store" if folder else "env://",
        rank=rank,
        world_size=size,
        timeout=_PATIENCE,
    )
    try:
        yield current_group()
    except Exception:  # an orderly end would wait for the others, which may be gone
        raise
    except BaseException:
        dist.destroy_process_group()
        raise
    else:
        dist.destroy_process_group()
