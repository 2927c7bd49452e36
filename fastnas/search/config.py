# SPDX-License-Identifier: Apache-2.0
"""The configuration of a search: one dataclass for Python and the command line, with presets.

``preset_config("cifar10", method="darts", epochs=10)`` takes the values of a preset, then what the
method has of its own for it, then what is given. ``SearchConfig()`` is the preset ``demo`` with the
method ``pc_darts``.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
import tyro

from fastnas.data import DEFAULT, Augment
from fastnas.methods import METHODS, MethodOptions
from fastnas.methods.graphs import Graphs
from fastnas.methods.target import Form
from fastnas.nn.recompute import Memory
from fastnas.search.early_stop import FIRST_EPOCH, LEAST_MEASUREMENTS
from fastnas.search.fields import SEEDS, check_range, from_dict, to_dict
from fastnas.search.runtime import resolve_device
from fastnas.search.target import check_target
from fastnas.spaces import SPACES, SpaceOptions, get_space


@dataclass(frozen=True)
class SearchConfig:
    """Everything that decides how a search goes."""

    space: str = "darts"
    """What is searched: darts (two cells, stacked), nasbench201 (one cell with an operation on each
    edge) or mbconv (a chain of blocks, as in ProxylessNAS)."""
    method: str = "pc_darts"
    """How it is searched: darts (in every space), pc_darts, da2s, entrannas, entrannas_dst (in the
    spaces darts and nasbench201) or proxyless (in mbconv and nasbench201)."""
    data: str = DEFAULT
    """Images to search on: fashion-mnist-mini (in the package), fashion-mnist:DIR, cifar10:DIR,
    cifar100:DIR or folder:DIR (a sub-folder a class)."""
    image_size: int | None = None
    """Side of the images in pixels: those of a folder are resized to it, others get a black border.
    None keeps the size of the data."""
    out: str | None = "runs/demo"
    """Folder of the run; None writes nothing."""
    resume: bool = False
    """Continue the run in --out from its checkpoint."""

    C: int = 8
    """Channels of the first cell's nodes (spaces darts and nasbench201)."""
    layers: int = 3
    """Number of cells of the supernet (spaces darts and nasbench201)."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """First layers: cifar keeps the image size, imagenet divides it by eight (space darts)."""

    epochs: int = 4
    """Passes over the images that the weights are trained on (--weight-share of them)."""
    batch_size: int = 32
    """Images in a batch of the weights, and in one of the architecture; no more than there are."""
    lr: float = 0.05
    """Learning rate of the weights (SGD) at the start; it falls along a cosine."""
    lr_min: float = 0.0
    """Learning rate of the weights at the end."""
    lr_warmup_epochs: int = 0
    """Epochs in which the learning rate of the weights rises linearly."""
    momentum: float = 0.9
    """Momentum of the weights."""
    nesterov: bool = False
    """Nesterov's form of the momentum."""
    weight_decay: float = 3e-4
    """L2 factor of the weights."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over all classes, in steps of the weights only."""
    grad_clip: float = 5.0
    """Largest gradient norm of the weights; 0 for no limit."""

    arch_lr: float = 0.02
    """Learning rate of the architecture parameters (Adam)."""
    arch_betas: tuple[float, float] = (0.5, 0.999)
    """Adam's decay factors for the architecture parameters."""
    arch_weight_decay: float = 1e-3
    """L2 factor of the architecture parameters."""
    arch_grad_clip: float = 0.0
    """Largest gradient norm of the architecture parameters; 0 for no limit."""
    arch_warmup_epochs: int = 1
    """First epochs in which only the weights are trained."""

    target: str | None = None
    """What the network that is found may cost: macs=300M, params=4M or latency=12ms. In a chain of
    blocks (mbconv) a network under it is derived, the best by the weights of its candidates."""
    target_loss: Form = "constraint"
    """How the target enters the loss. constraint: an augmented Lagrangian of log E - log T <= 0,
    with a multiplier lambda that adapts itself. linear: weight (E - T) / T. log_ratio: the loss
    times (log E / log T)^weight."""
    target_weight: float | None = None
    """Factor of linear, exponent of log_ratio, first lambda of constraint; None: 0.1, 0.3, 0."""
    target_rate: float = 0.02
    """Step of the lambda of constraint."""
    latency_table: str | None = None
    """Table of block times for a target of latency, as `fastnas latency measure` writes it."""
    foreign_table: bool = False
    """Take a latency table of another machine or version of PyTorch as well."""

    weight_share: float = 0.16
    """Share of the training images that the weights are trained on."""
    arch_share: float = 0.16
    """Share of the training images that the architecture is trained on."""
    split: Literal["auto", "order", "random"] = "random"
    """Which images these are: random shuffles them by the seed; order takes the first and the last
    ones, as DARTS does with CIFAR-10; auto is random for images that are streamed from a folder or
    Dataset (a folder comes sorted by class), and order for those kept in memory."""
    augment: Augment = field(default_factory=lambda: Augment(flip=True))
    """What is done to the images."""
    validate: Literal["every", "last", "never"] = "last"
    """After which epochs the supernet is tested on the images of the architecture."""
    val_batches: int = 0
    """Batches of a test of the supernet; 0 for all."""
    gap: bool = True
    """At the end, test the supernet pruned to what was found as well, as `fastnas gap` does."""
    hessian_every: int = 0
    """Epochs between two measurements of the largest eigenvalue of the validation loss' Hessian in
    the alphas, which grows where they overfit; 0 for none, but with --early-stop one an epoch."""
    early_stop: Literal["off", "hessian"] = "off"
    """hessian: stop where the eigenvalue of the Hessian rises; what was found before is the result
    (R-DARTS)."""

    seed: int = 2
    """Seed of everything random."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes CUDA where there is a device."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Mixed precision of the supernet."""
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    """Layout of images and weights; auto times both at the start and keeps the faster one. Runs of
    less than 400 steps (2000, where they are replayed as CUDA graphs) take channels_last on a CPU
    and contiguous elsewhere."""
    memory: Memory = "default"
    """low keeps less of a forward for its backward, which computes again what is cheap: the same
    numbers from less memory, in 1.05 to 1.3 times the time."""
    cuda_graphs: Graphs = "auto"
    """Replay recorded steps on a GPU, for the same numbers without the time of thousands of
    launches; auto does so where it can, and says why where not."""
    deterministic: bool = False
    """Allow only deterministic algorithms of PyTorch (on a GPU; slower)."""
    threads: int = 0
    """CPU threads, of each process where there are several; 0 leaves PyTorch's choice."""
    log_every: int = 10
    """Iterations between two reports of progress."""

    network: Annotated[SpaceOptions, tyro.conf.arg(name="space")] = field(
        default_factory=SpaceOptions
    )
    """Options of the space alone; from Python, those of its demo where none are given."""
    options: Annotated[MethodOptions, tyro.conf.arg(name="method")] = field(
        default_factory=MethodOptions
    )
    """Options of the method alone; from Python, those of its demo where none are given."""

    def __post_init__(self) -> None:
        """Check ranges and names, and give the method its own kind of options."""
        self._check_space()
        options = method_class(self.method).Options
        if type(self.options) is MethodOptions:
            demo = method_class(self.method).presets.get("demo", {})
            object.__setattr__(self, "options", demo.get("options", options()))
        if not isinstance(self.options, options):
            raise TypeError(
                f"options: expected {options.__name__} for the method {self.method!r}, "
                f"but got {type(self.options).__name__}"
            )
        from_dict(type(self.options), to_dict(self.options), "options")  # types and names of values
        for name in ("C", "layers", "epochs", "batch_size", "log_every"):
            check_range(name, getattr(self, name), 1)
        for name in _NOT_NEGATIVE:
            check_range(name, getattr(self, name), 0)
        check_range("seed", self.seed, 0, SEEDS)
        if self.image_size is not None:
            check_range("image_size", self.image_size, 1)
        for name in ("weight_share", "arch_share"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(
                    f"{name}: expected more than 0 and less than 1, but got {getattr(self, name)}"
                )
        if self.weight_share + self.arch_share > 1:
            raise ValueError(
                "weight_share and arch_share: expected a sum of at most 1, "
                f"but got {self.weight_share} and {self.arch_share}"
            )
        if not all(0 <= beta < 1 for beta in self.arch_betas):
            raise ValueError(f"arch_betas: expected 0 <= beta < 1, but got {self.arch_betas}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing: expected 0 or more and less than 1, got {self.label_smoothing}"
            )
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: expected momentum above 0, but got 0")
        check_target(self)
        method_class(self.method).check(self)
        self._check_hessian()
        if self.resume and self.out is None:
            raise ValueError("resume: expected a folder in out, but got none")

    def _check_space(self) -> None:
        """Give the space its own kind of options, and refuse what it does not know."""
        space = get_space(self.space)
        if type(self.network) is SpaceOptions:
            demo = space.presets.get("demo", {})
            object.__setattr__(self, "network", demo.get("network", space.options()))
        if not isinstance(self.network, space.options):
            raise TypeError(
                f"network: expected {space.options.__name__} for the space {self.space!r}, "
                f"but got {type(self.network).__name__}"
            )
        for name in CELL_FIELDS:
            default = type(self).__dataclass_fields__[name].default
            if name not in space.fields and getattr(self, name) != default:
                raise ValueError(
                    f"{name}: the space {self.space!r} has no such option, "
                    f"but got {getattr(self, name)}"
                )
        if (
            self.memory != "default"
            and "memory" not in inspect.signature(space.supernet).parameters
        ):
            raise ValueError(
                f"memory: expected 'default' for the space {self.space!r}, which knows no other, "
                f"but got {self.memory!r}"
            )
        if missing := method_class(self.method).needs - space.features:
            fit = [s.name for s in SPACES.values() if method_class(self.method).needs <= s.features]
            raise ValueError(
                f"method: {self.method!r} needs a space with {', '.join(sorted(missing))} "
                f"({', '.join(fit)}), but got {self.space!r}"
            )

    @property
    def hessian_interval(self) -> int:
        """Epochs between two measurements of the eigenvalue; 0 for none."""
        return self.hessian_every or int(self.early_stop == "hessian")

    def _check_hessian(self) -> None:
        if self.hessian_interval and "gates" in method_class(self.method).needs:
            raise ValueError(
                f"hessian_every: the method {self.method!r} runs one path at a time, whose loss "
                "has no Hessian in the alphas; expected 0, and early_stop off"
            )
        if self.early_stop == "off":
            return
        # Measurements count from the epoch on in which the alphas begin to move.
        rested, every = self.arch_warmup_epochs, self.hessian_interval
        least = max(FIRST_EPOCH, (rested // every + LEAST_MEASUREMENTS) * every)
        if self.epochs < least:
            raise ValueError(
                f"early_stop: expected at least {least} epochs, since it compares means of "
                f"measurements, {LEAST_MEASUREMENTS} in all, one every {self.hessian_interval} "
                f"epochs, none in the {rested} of arch_warmup_epochs, from epoch {FIRST_EPOCH} on, "
                f"but got {self.epochs}"
            )

    def torch_device(self) -> torch.device:
        """The device that ``device`` names; ValueError if there is none."""
        return resolve_device(self.device)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return to_dict(self)

    @classmethod
    def from_dict(cls, data: Any, where: str = "configuration") -> SearchConfig:
        """Build from what :meth:`to_dict` gave, checking every field.

        Raises:
            ValueError: an unknown key, a wrong type or a value out of range; one sentence that
                begins with ``where``.
        """
        if isinstance(data, Mapping) and "options" in data:
            method = data.get("method", cls.method)
            if not isinstance(method, str) or method not in METHODS:
                raise ValueError(f"{where}: method: unknown name {method!r}")
            options = from_dict(METHODS[method].Options, data["options"], f"{where}: options")
            data = {**data, "options": options}
        if isinstance(data, Mapping) and "network" in data:
            space = data.get("space", cls.space)
            if not isinstance(space, str) or space not in SPACES:
                raise ValueError(f"{where}: space: unknown name {space!r}")
            network = from_dict(SPACES[space].options, data["network"], f"{where}: network")
            data = {**data, "network": network}
        return from_dict(cls, data, where)


# Fields that a continuation may change: places and means. (Last bits may, of device and threads.)
RUNTIME_FIELDS = frozenset("out resume device memory threads log_every gap cuda_graphs".split())

_NOT_NEGATIVE = (
    *("lr", "lr_min", "lr_warmup_epochs", "momentum", "weight_decay", "grad_clip"),
    *("arch_lr", "arch_weight_decay", "arch_grad_clip", "arch_warmup_epochs"),
    *("val_batches", "threads", "hessian_every"),
)

CELL_FIELDS = ("C", "layers", "stem")
"""Fields that not every space knows (``Space.fields``)."""

PRESETS: dict[str, dict[str, Any]] = {
    # The defaults: eight hundred images for the weights, as many for the architecture, and a
    # learning rate of the architecture that shows something after a hundred steps.
    "demo": {},
    # DARTS, appendix A.1.1, with the values of the released scripts where paper and code differ.
    "cifar10": {
        "data": "cifar10:data/cifar10",
        "C": 16,
        "layers": 8,
        "epochs": 50,
        "weight_share": 0.5,
        "arch_share": 0.5,
        "split": "auto",
        "augment": Augment.cifar(),
        "out": "runs/cifar10",
    },
    # PC-DARTS on ImageNet: a tenth of the images for the weights, a fortieth for the architecture.
    "imagenet": {
        "data": "folder:data/imagenet",
        "image_size": 224,
        "C": 16,
        "layers": 8,
        "stem": "imagenet",
        "epochs": 50,
        "batch_size": 1024,
        "lr": 0.5,
        "lr_min": 0.0,
        "lr_warmup_epochs": 5,
        "arch_lr": 6e-3,
        "arch_grad_clip": 5.0,
        "arch_warmup_epochs": 35,
        "weight_share": 0.1,
        "arch_share": 0.025,
        "augment": Augment(resized_crop=0.08, flip=True),
        "validate": "last",
        "out": "runs/imagenet",
    },
}
"""Fields of each preset; a method's own values (``Method.presets``) come on top."""


def preset_config(
    preset: str = "demo", *, method: str = "pc_darts", space: str = "darts", **fields: Any
) -> SearchConfig:
    """The configuration of a preset.

    Args:
        preset: ``demo`` (minutes on a CPU, the images in the package), ``cifar10`` or ``imagenet``.
        method: name of the method; what it has of its own for the preset is taken.
        space: name of the space.
        fields: fields of :class:`SearchConfig` that differ from the preset.

    Raises:
        ValueError: an unknown preset, method or space, or a value out of range.
        TypeError: a field that :class:`SearchConfig` does not have.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, but got {preset!r}")
    chosen, chosen_space = method_class(method), get_space(space)
    values = {
        "options": chosen.Options(),
        "network": chosen_space.options(),
        **PRESETS[preset],
        **chosen_space.presets.get(preset, {}),
        **chosen.presets.get(preset, {}),
    }
    # What presets say of cells is nothing to a space without them.
    foreign = set(CELL_FIELDS) - set(chosen_space.fields)
    values = {name: value for name, value in values.items() if name not in foreign} | fields
    known = {f.name for f in dataclasses.fields(SearchConfig)}
    if unknown := sorted(set(values) - known):
        raise TypeError(f"preset_config: SearchConfig has no field {unknown[0]!r}")
    return SearchConfig(space=space, method=method, **values)


def method_class(name: str) -> Any:
    """The method called ``name``.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in METHODS:
        raise ValueError(f"method: unknown name {name!r}, known are {', '.join(METHODS)}")
    return METHODS[name]
