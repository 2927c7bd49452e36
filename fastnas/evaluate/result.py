# SPDX-License-Identifier: Apache-2.0
"""What an evaluation leaves behind: the result, and trained networks that can be loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastnas.data.interface import Data
from fastnas.evaluate.config import EvaluateConfig
from fastnas.evaluate.source import GenotypeSource
from fastnas.search.checkpoint import CheckpointError, load_checkpoint
from fastnas.spaces import count_parameters, get_space

if TYPE_CHECKING:
    from fastnas.evaluate.train import Evaluation

__all__ = ["NETWORK_KIND", "EvaluationResult", "load_network", "network_state"]

NETWORK_KIND = "network"

ARGUMENT_FIELDS = ("C", "layers", "auxiliary", "stem")
"""Fields of the configuration that a network may be built with."""


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation measured.

    Attributes:
        source: what was asked for.
        genotype: the architecture.
        space: its space.
        data: the images.
        epochs: passes over the training images.
        accuracy: share of test images classified rightly after the last epoch, 0 to 1.
        accuracy_top5: share with the right class among the first five; None for up to five classes.
        best_accuracy: highest accuracy of any epoch. It is chosen on the test images, so it
            flatters; ``accuracy`` does not.
        best_epoch: that epoch, from 1.
        parameters: without the auxiliary head, as the papers count.
        parameters_with_auxiliary: with it.
        macs: multiply-accumulates of convolutions and linear layers for one image.
        macs_with_elementwise: the same with two per BatchNorm element and one per ReLU element.
        seconds: time spent, interruptions not counted.
        device: where.
        history: one record an epoch, as in ``metrics.jsonl``.
        path: the run's folder, None when nothing was written.
    """

    source: str
    genotype: Any
    space: str
    data: str
    epochs: int
    accuracy: float
    accuracy_top5: float | None
    best_accuracy: float
    best_epoch: int
    parameters: int
    parameters_with_auxiliary: int
    macs: int
    macs_with_elementwise: int
    seconds: float
    device: str
    history: list[dict[str, Any]]
    path: Path | None

    @classmethod
    def of(cls, evaluation: Evaluation) -> EvaluationResult:
        """What an evaluation has measured that is over."""
        e, last = evaluation, evaluation.history[-1]
        assert e.best is not None
        return cls(
            source=e.source.label,
            genotype=e.source.genotype,
            space=e.source.space,
            data=e.data.name,
            epochs=e.epoch,
            accuracy=last["test_accuracy"],
            accuracy_top5=last["test_accuracy_top5"],
            best_accuracy=e.best[0],
            best_epoch=e.best[1],
            parameters=e.parameters,
            parameters_with_auxiliary=count_parameters(e.network, auxiliary=True),
            macs=e.operations.macs,
            macs_with_elementwise=e.operations.with_elementwise,
            seconds=round(sum(record["seconds"] for record in e.history), 3),
            device=str(e.device),
            history=e.history,
            path=e.path,
        )

    def to_dict(self) -> dict[str, Any]:
        """The content of ``result.json``: everything but the history and the folder."""
        content = {k: v for k, v in vars(self).items() if k not in ("history", "path")}
        return {**content, "genotype": self.genotype.to_dict(), "torch": torch.__version__}

    def summary(self) -> list[tuple[str, str]]:
        """What to show of it: names and values."""
        rows = [("test accuracy", f"{self.accuracy:.2%}")]
        if self.accuracy_top5 is not None:
            rows.append(("top-5 accuracy", f"{self.accuracy_top5:.2%}"))
        rows.append(("best epoch", f"{self.best_accuracy:.2%} (epoch {self.best_epoch})"))
        parameters = f"{self.parameters:,}"
        if self.parameters_with_auxiliary != self.parameters:
            parameters += f" ({self.parameters_with_auxiliary:,} with auxiliary head)"
        rows.append(("parameters", parameters))
        rows.append(("MACs per image", f"{self.macs:,}"))
        rows.append(("time", f"{self.seconds:.0f} s"))
        return rows


def network_state(
    network: nn.Module,
    source: GenotypeSource,
    config: EvaluateConfig,
    data: Data,
    record: Mapping[str, Any],
) -> dict[str, Any]:
    """A trained network with all that is needed to build it again."""
    return {
        "space": source.space,
        "genotype": source.genotype.to_dict(),
        "arguments": network_arguments(source, config, data),
        "images": image_facts(data),
        "record": dict(record),
        "state_dict": network.state_dict(),
    }


def network_arguments(source: GenotypeSource, config: EvaluateConfig, data: Data) -> dict[str, Any]:
    """What the network of a genotype is built with, beside the genotype."""
    known = get_space(source.space).network_fields
    fields = {name: getattr(config, name) for name in ARGUMENT_FIELDS if name in known}
    return {**fields, "num_classes": data.num_classes, "in_channels": data.channels}


def image_facts(data: Data) -> dict[str, Any]:
    """What images a network was trained on: the shape of one, how they are normalised, names.

    ``scaled``: normalised are values from 0 to 1; else images came as floating-point numbers, which
    are taken as they are.
    """
    return {
        "shape": [data.channels, *data.image_size],
        "scaled": not data.image_dtype.is_floating_point,
        "mean": list(data.mean),
        "std": list(data.std),
        "classes": None if data.classes is None else list(data.classes),
    }


def load_network(folder: str | os.PathLike[str]) -> nn.Module:
    """The best network of an evaluation, on the CPU and in eval mode; it takes normalised images.

    ``load_classifier`` of this module takes others, and knows the names of the classes.

    Args:
        folder: folder of the evaluation; its ``best.pt`` is read.

    Raises:
        FileNotFoundError: no epoch of an evaluation was finished there.
        CheckpointError: the file is damaged or something else.
    """
    return read_network(folder)[0]


def read_network(folder: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, Any]]:
    """The same, and what ``best.pt`` holds (``network_state``)."""
    path = Path(folder) / "best.pt"
    state = load_checkpoint(path, kind=NETWORK_KIND)
    try:
        space = get_space(state["space"])
        genotype = space.genotype.from_dict(state["genotype"])
        network = space.network(genotype, **state["arguments"])
        network.load_state_dict(state["state_dict"])
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: does not describe a network ({reason})") from error
    return network.eval(), state
