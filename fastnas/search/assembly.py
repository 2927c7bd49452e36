# SPDX-License-Identifier: Apache-2.0
"""Puts the parts of a search together: the halves of the images, their batches, the learner."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastnas.costs import Cost
from fastnas.data import Endless, EpochBatches, ImageData
from fastnas.data.interface import Data
from fastnas.methods import CostTerm, Learner, Target
from fastnas.methods.optimizers import adam, sgd
from fastnas.parallel import ALONE, Group
from fastnas.search.config import SearchConfig, method_class
from fastnas.search.runtime import amp_dtype, memory_layout
from fastnas.spaces import get_space


@dataclass
class Halves:
    """Batches of the two parts of the training images.

    Attributes:
        weights: the part the weights are trained on; one pass is an epoch.
        architecture: the part the architecture is trained on, drawn without end.
        validation: the same part, in order and without augmentation.
    """

    weights: EpochBatches
    architecture: Endless
    validation: EpochBatches

    @property
    def trained(self) -> dict[str, EpochBatches]:
        """The batches of the steps, by what is trained on them."""
        return {"weights": self.weights, "architecture": self.architecture.batches}

    def lay_out(self, layout: torch.memory_format) -> None:
        """Give all images in a memory format from now on."""
        for batches in (self.weights, self.architecture.batches, self.validation):
            batches.memory_format = layout


def build_halves(
    data: Data, config: SearchConfig, device: torch.device, group: Group = ALONE
) -> Halves:
    """Batches of both parts of the training images of ``data``, or a process's share of them."""
    first, second = split_images(data, config)

    def batches(indices: Tensor, training: bool) -> EpochBatches:
        found = data.train_batches(
            group.batch_size(config.batch_size, len(indices), tested=not training),
            indices=indices,
            augment=config.augment if training else None,
            device=device,
            seed=config.seed,
            shuffle=training,
            # BatchNorm cannot learn from a last batch of one image: incomplete ones are left out.
            drop_last=training,
            memory_format=memory_layout(config.memory_format, device),
        )
        found.share = group.share
        return found

    return Halves(batches(first, True), Endless(batches(second, True)), batches(second, False))


def cut_batches(asked: int, parts: Mapping[str, EpochBatches]) -> list[str]:
    """What to say where batches are smaller than asked for, by what is trained on them."""
    return [
        f"batch size: {part.batch_size} instead of {asked} for the {name}, "
        "since there are no more images"
        for name, part in parts.items()
        if part.batch_size < asked
    ]


def split_images(data: Data, config: SearchConfig) -> tuple[Tensor, Tensor]:
    """Positions of the training images for the weights and for the architecture.

    Returns:
        Two int64 tensors on the CPU without a common element.

    Raises:
        ValueError: a part is empty, or lacks a class that the training images have.
    """
    n = data.num_train
    if n < 2:
        raise ValueError(f"{data.name}: expected at least two training images to share, got {n}")
    shares = {"weight_share": config.weight_share, "arch_share": config.arch_share}
    # The small number undoes the rounding of, say, 0.29 * 100.
    first, second = (int(n * share + 1e-6) for share in shares.values())
    for (name, share), count in zip(shares.items(), (first, second), strict=True):
        if not count:
            raise ValueError(
                f"{name}: {share:g} of {n} training images is none; expected at least {1 / n:.2g}"
            )
    if config.split == "random" or (config.split == "auto" and not isinstance(data, ImageData)):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(config.seed))
        return order[:first], order[first : first + second]
    parts = torch.arange(first), torch.arange(n - second, n)
    if isinstance(data, ImageData):
        for (name, share), part in zip(shares.items(), parts, strict=True):
            _check_classes(f"{name} {share:g}", data.train_labels.cpu(), part)
    return parts


def _check_classes(what: str, labels: Tensor, part: Tensor) -> None:
    """Raise a ValueError if a part in order lacks a class; the cure depends on the cause."""
    counts = torch.bincount(labels)
    lacking = (counts > 0) & (torch.bincount(labels[part], minlength=len(counts)) == 0)
    if not lacking.any():
        return
    missing = int(lacking.nonzero()[0])
    # The chance that so many images, drawn in any order, are none of that class.
    by_chance = (1 - counts[missing].item() / len(labels)) ** len(part)
    cure = (
        "set split to 'random', for the images seem to be sorted by class"
        if by_chance < 1e-3
        else "take a larger share"
    )
    raise ValueError(
        f"{what}: these {len(part)} of {len(labels)} training images have none of class {missing} "
        f"({counts[missing]} in all); {cure}"
    )


def build_learner(
    data: Data, config: SearchConfig, device: torch.device, group: Group = ALONE
) -> Learner:
    """Supernet, method, architecture parameters and optimizers, newly initialised; eager steps."""
    method_type = method_class(config.method)
    # Not every space knows another way; one that does not was refused by the configuration.
    memory = {} if config.memory == "default" else {"memory": config.memory}
    space = get_space(config.space)
    supernet: nn.Module = space.supernet(
        num_classes=data.num_classes,
        in_channels=data.channels,
        **network_arguments(config),
        **memory,
        **method_type.supernet_options(config.options),
    )
    supernet.to(device)
    lay_out(supernet, memory_layout(config.memory_format, device))
    method = method_type(
        supernet.cell_specs, config.options, seed=config.seed, term=build_term(data, config)
    )
    arch = method.parameters().to(device)
    return Learner(
        supernet,
        arch,
        method,
        sgd(
            supernet.parameters(),
            config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        ),
        adam(
            method.parameter_groups(arch),
            config.arch_lr,
            betas=config.arch_betas,
            weight_decay=config.arch_weight_decay,
        ),
        nn.CrossEntropyLoss(),
        grad_clip=config.grad_clip,
        arch_grad_clip=config.arch_grad_clip,
        amp=amp_dtype(config.amp),
        scaler=torch.amp.GradScaler(device.type) if config.amp == "fp16" else None,
        weight_criterion=nn.CrossEntropyLoss(label_smoothing=config.label_smoothing),
        group=group,
    )


def network_arguments(config: SearchConfig) -> dict[str, Any]:
    """Arguments of the supernet that the space has of its own."""
    fields = {name: getattr(config, name) for name in get_space(config.space).fields}
    return {**fields, **vars(config.network)}


def build_term(data: Data, config: SearchConfig) -> CostTerm | None:
    """The target's term in the loss, None where there is no target.

    Raises:
        ValueError: images that are not square, or a space or table that tells no costs for this.
        FileNotFoundError: the table of latencies is not there.
    """
    if config.target is None:
        return None
    target, space = Target.parse(config.target), get_space(config.space)
    if space.blocks is None:
        raise ValueError(f"target: nobody has said what the blocks of {config.space!r} cost")
    height, width = data.image_size
    if height != width:
        raise ValueError(f"target: expected square images, but got {height}x{width}")
    known = {field.name for field in dataclasses.fields(space.blocks.shape)}
    shape = space.blocks.shape(
        image_size=height,
        in_channels=data.channels,
        num_classes=data.num_classes,
        # What a space has of its own may also concern the search alone.
        **{name: value for name, value in network_arguments(config).items() if name in known},
    )
    if target.name == "latency":
        # Only where it is needed: the package times networks, and depends on this one.
        from fastnas.latency.cost import load_latency_cost

        assert config.latency_table is not None  # checked by the configuration
        cost = load_latency_cost(
            config.latency_table,
            space=config.space,
            shape=shape,
            allow_foreign=config.foreign_table,
        )
    else:
        cost = Cost.counted(target.name, space.blocks.plan(shape))
    return CostTerm(
        cost, target.value, config.target_loss, config.target_weight, config.target_rate
    )


def lay_out(network: nn.Module, layout: torch.memory_format) -> None:
    """Bring the weights of a network into a memory format; they stay the same parameters."""
    network.to(memory_format=layout)  # type: ignore[call-overload]  # missing in torch's stubs


def noise_batch(
    like: EpochBatches, classes: int, device: torch.device, layout: torch.memory_format
) -> tuple[Tensor, Tensor]:
    """A batch to time steps with: what is on images costs no time, reading them would."""
    size = like.batch_size // like.share.size
    x = torch.rand(size, *like.image_shape, device=device)
    y = torch.randint(classes, (size,), device=device)
    return x.contiguous(memory_format=layout), y
