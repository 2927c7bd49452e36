# SPDX-License-Identifier: Apache-2.0
"""The configuration of an evaluation: one dataclass for Python and the command line, with presets.

``preset_config("cifar10", source="DARTS_V2", epochs=100)`` takes the values of a preset, then what
is given. ``EvaluateConfig()`` is the preset ``demo``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from fastnas.data import DEFAULT, Augment
from fastnas.evaluate.source import GenotypeSource, find_genotype
from fastnas.search.fields import SEEDS, check_range, from_dict, to_dict
from fastnas.search.idle import refuse_idle
from fastnas.search.runtime import resolve_device
from fastnas.search.schedule import ScheduleName
from fastnas.spaces import SPACES, get_space

__all__ = ["PRESETS", "RUNTIME_FIELDS", "EvaluateConfig", "preset_config"]


@dataclass(frozen=True)
class EvaluateConfig:
    """Everything that decides how a derived network is trained and tested."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[SOURCE]")] = "runs/demo"
    """What to train: folder of a search, genotype file or published name (`fastnas genotypes`)."""
    data: str | None = None
    """Images: fashion-mnist-mini (in the package), fashion-mnist:DIR, cifar10:DIR, cifar100:DIR or
    folder:DIR (a sub-folder a class); None: those of the search, else fashion-mnist-mini."""
    image_size: int | None = None
    """Side of the images in pixels: those of a folder are resized to it, others get a black border.
    None: that of the search, where its images are taken; else the size of the data."""
    out: str | None = "auto"
    """Folder of the run; auto: `eval` in the search's folder or runs/eval-NAME; None: no files."""
    resume: bool = False
    """Continue the run in --out from its checkpoint."""

    C: int = 8
    """Channels of the first cell's nodes (spaces darts and nasbench201)."""
    layers: int = 5
    """Number of cells (spaces darts and nasbench201)."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """First layers: cifar keeps the image size, imagenet divides it by eight (space darts)."""

    epochs: int = 6
    """Passes over the training images."""
    batch_size: int = 64
    """Images in a batch; no more than there are."""
    lr: float = 0.1
    """Learning rate (SGD) at the start."""
    lr_min: float = 0.0
    """Learning rate towards which the schedule cosine falls."""
    schedule: ScheduleName = "cosine"
    """How the learning rate falls; on ImageNet DARTS takes exponential and PC-DARTS linear."""
    lr_warmup_epochs: int = 0
    """First epochs, in which the learning rate rises linearly."""
    lr_decay: float = 0.97
    """Factor of the exponential schedule, per epoch."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Nesterov's form of the momentum."""
    weight_decay: float = 3e-4
    """L2 factor of the weights."""
    norm_decay: bool = True
    """Weight decay also of BatchNorm's weights and biases."""
    grad_clip: float = 5.0
    """Largest gradient norm; 0 for no limit."""

    auxiliary: bool = False
    """Train with an auxiliary classifier behind the second reduction cell (space darts)."""
    auxiliary_weight: float = 0.4
    """Weight of the auxiliary classifier's loss."""
    drop_path: float = 0.0
    """Probability to drop an operation's output for an image; it rises linearly over the epochs,
    from 0 (space darts)."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over all classes."""
    augment: Augment = field(default_factory=lambda: Augment(crop_padding=2, flip=True))
    """What is done to the training images."""

    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes CUDA where there is a device."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Mixed precision."""
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    """Layout of images and weights; auto times both at the start and keeps the faster one. Runs of
    less than 400 steps take channels_last on a CPU and contiguous elsewhere without a trial."""
    deterministic: bool = False
    """Allow only deterministic algorithms of PyTorch (on a GPU; slower)."""
    threads: int = 0
    """CPU threads, of each process where there are several; 0 leaves PyTorch's choice."""
    log_every: int = 10
    """Batches between two reports of progress."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("C", "layers", "epochs", "batch_size", "log_every"):
            check_range(name, getattr(self, name), 1)
        for name in _NOT_NEGATIVE:
            check_range(name, getattr(self, name), 0)
        for name in ("drop_path", "label_smoothing"):
            check_range(name, getattr(self, name), 0, 1)
        check_range("seed", self.seed, 0, SEEDS)
        if self.image_size is not None:
            check_range("image_size", self.image_size, 1)
        if not 0 <= self.lr_decay <= 1:
            raise ValueError(f"lr_decay: expected from 0 to 1, but got {self.lr_decay}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: expected momentum above 0, but got 0")
        if self.resume and self.out is None:
            raise ValueError("resume: expected a folder in out, but got none")

    def torch_device(self) -> torch.device:
        """The device that ``device`` names; ValueError if there is none."""
        return resolve_device(self.device)

    def find_source(self) -> GenotypeSource:
        """The architecture that ``source`` names.

        Raises:
            ValueError, FileNotFoundError: as ``find_genotype``.
        """
        return find_genotype(self.source, self.out if self.resume and self.out != "auto" else None)

    def idle(self, space: str) -> dict[str, str]:
        """The fields that do nothing for networks of a space -> what would make them do something.

        As in a search (``fastnas.search.idle``), only switches count, not lengths.
        """
        idle = {}
        known = get_space(space).network_fields
        if self.schedule != "cosine":
            idle["lr_min"] = f"the schedule cosine, but got {self.schedule!r}"
        if self.schedule != "exponential":
            idle["lr_decay"] = f"the schedule exponential, but got {self.schedule!r}"
        if not self.weight_decay:
            idle["norm_decay"] = "weight_decay above 0, but got 0"
        if not self.auxiliary:
            idle["auxiliary_weight"] = "auxiliary as well, but got False"
        for name in _NETWORK_FIELDS:
            if name not in known:
                others = ", ".join(s.name for s in SPACES.values() if name in s.network_fields)
                idle[name] = f"a network of a space that has it ({others}), but got {space!r}"
        return idle

    def resolve(self, source: GenotypeSource) -> EvaluateConfig:
        """The same with ``data``, ``image_size`` and ``out`` as they follow from the source.

        Fields that networks of its space do not know get their defaults, where they are from a
        preset.

        Raises:
            ValueError: such a field has a value that no preset gives it, or another that does
                nothing, unless it is that of a run that goes on.
        """
        data, image_size = self.data or source.data or DEFAULT, self.image_size
        if image_size is None and self.data is None:
            image_size = source.image_size
        out = self.out
        if out == "auto":
            name = Path(source.label).stem
            out = f"runs/eval-{name}" if source.search is None else str(source.search / "eval")
        foreign = {name: self._foreign(name, source.space) for name in _NETWORK_FIELDS}
        kept = set(get_space(source.space).network_fields)
        changes = {name: value for name, value in foreign.items() if name not in kept}
        if not self.resume:
            refuse_idle(self, self.idle(source.space), [*PRESETS.values()])
        return dataclasses.replace(self, data=data, image_size=image_size, out=out, **changes)

    def _foreign(self, name: str, space: str) -> Any:
        """The default of a field that networks of a space may not know."""
        default = type(self).__dataclass_fields__[name].default
        value = getattr(self, name)
        known = name in get_space(space).network_fields
        if not known and value not in [default, *(p.get(name, default) for p in PRESETS.values())]:
            raise ValueError(
                f"{name}: networks of the space {space!r} have no such option, but got {value}"
            )
        return default

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return to_dict(self)

    @classmethod
    def from_dict(cls, data: Any, where: str = "configuration") -> EvaluateConfig:
        """Build from what :meth:`to_dict` gave, checking every field.

        Raises:
            ValueError: an unknown key, a wrong type or a value out of range; one sentence that
                begins with ``where``.
        """
        return from_dict(cls, data, where)


# Fields that may differ between a run and its continuation: they name places and means, not the
# training itself. The genotype is compared, not the words it was asked for with.
RUNTIME_FIELDS = frozenset({"source", "out", "resume", "device", "threads", "log_every"})

_NETWORK_FIELDS = ("C", "layers", "stem", "auxiliary", "drop_path")
"""Fields that not the networks of every space know (``Space.network_fields``)."""

_NOT_NEGATIVE = (
    *("lr", "lr_min", "lr_warmup_epochs", "momentum", "weight_decay", "grad_clip"),
    *("auxiliary_weight", "threads"),
)

PRESETS: dict[str, dict[str, Any]] = {
    "demo": {},
    # DARTS, appendix A.2.1; PC-DARTS trains the same way with a drop path of 0.3.
    "cifar10": {
        "data": "cifar10:data/cifar10",
        "C": 36,
        "layers": 20,
        "epochs": 600,
        "batch_size": 96,
        "lr": 0.025,
        "auxiliary": True,
        "drop_path": 0.2,
        "augment": Augment.cifar(cutout=16),
    },
    # DARTS, appendix A.2.3.
    "imagenet": {
        "data": "folder:data/imagenet",
        "image_size": 224,
        "C": 48,
        "layers": 14,
        "stem": "imagenet",
        "epochs": 250,
        "batch_size": 128,
        "lr": 0.1,
        "schedule": "exponential",
        "weight_decay": 3e-5,
        "auxiliary": True,
        "label_smoothing": 0.1,
        "augment": Augment.imagenet(),
    },
    # The retraining of ProxylessNAS, by its released script for one machine.
    "proxyless": {
        "data": "folder:data/imagenet",
        "image_size": 224,
        "epochs": 300,
        "batch_size": 256,
        "lr": 0.05,
        "nesterov": True,
        "weight_decay": 4e-5,
        "norm_decay": False,
        "grad_clip": 0.0,
        "label_smoothing": 0.1,
        "augment": Augment(resized_crop=0.08, flip=True, color_jitter=(0.4, 0.4, 0.4, 0.1)),
    },
}
"""Fields of each preset that differ from the defaults, which are those of ``demo``."""


def preset_config(preset: str = "demo", **fields: Any) -> EvaluateConfig:
    """The configuration of a preset.

    Args:
        preset: ``demo`` (minutes on a CPU, the images in the package), ``cifar10``, ``imagenet``,
            or ``proxyless`` (ImageNet as ProxylessNAS trains).
        fields: fields of :class:`EvaluateConfig` that differ from the preset.

    Raises:
        ValueError: an unknown preset, or a value out of range.
        TypeError: a field that :class:`EvaluateConfig` does not have.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, but got {preset!r}")
    known = {f.name for f in dataclasses.fields(EvaluateConfig)}
    if unknown := sorted(set(fields) - known):
        raise TypeError(f"preset_config: EvaluateConfig has no field {unknown[0]!r}")
    return EvaluateConfig(**{**PRESETS[preset], **fields})
