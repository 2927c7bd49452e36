# SPDX-License-Identifier: Apache-2.0
"""The discretization gap: what a supernet loses when it is pruned to what was derived from it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastnas.methods import Batch, Learner, Moment
from fastnas.search.meters import Meter
from fastnas.spaces.base import CellWeights, Space, Weighting

__all__ = ["BN_BATCHES", "Gap", "measure_gap"]

BN_BATCHES = 100
"""Training batches of which the statistics of BatchNorm are made anew, at most."""

Batches = Callable[[], Iterable[Batch]]


@dataclass(frozen=True)
class Gap:
    """Accuracies on the validation images, in percent, all with the same weights.

    Attributes:
        supernet: of the supernet.
        pruned: of the supernet with nothing left but the derived architecture.
        pruned_bn: the same, its BatchNorm statistics estimated anew.
    """

    supernet: float
    pruned: float
    pruned_bn: float

    def to_dict(self) -> dict[str, float]:
        """The accuracies by name, to a thousandth of a percent."""
        return {name: round(value, 3) for name, value in dataclasses.asdict(self).items()}

    def __str__(self) -> str:
        """One line of text."""
        return (
            f"supernet {self.supernet:.1f}%, pruned to the genotype {self.pruned:.1f}%, "
            f"with new BatchNorm statistics {self.pruned_bn:.1f}%"
        )


def measure_gap(
    learner: Learner,
    space: Space,
    genotype: Any,
    moment: Moment,
    validation: Batches,
    training: Batches,
    supernet: float | None = None,
    pause: Callable[[], None] = lambda: None,
) -> Gap:
    """Test a supernet before and after it is pruned; the learner stays as it is.

    Args:
        learner: supernet, architecture parameters and method.
        space: prunes, by its ``one_hot``.
        genotype: what was derived.
        moment: now, in validation.
        validation: the batches to test on.
        training: batches for the statistics of BatchNorm: their mean replaces the running ones.
        supernet: accuracy of the supernet, 0 to 1, where it is known already.
        pause: called between two batches.

    Raises:
        ValueError: the space does not prune, or the genotype is of another supernet.
    """
    if space.one_hot is None:
        raise ValueError(f"gap: a supernet of the space {space.name!r} cannot be pruned")
    arch = learner.arch
    like = next(arch.parameters())
    # A copy: whatever stops this leaves the supernet's mode and statistics as they were.
    tester = dataclasses.replace(learner, supernet=copy.deepcopy(learner.supernet).eval())
    with torch.no_grad():
        one_hot = {
            kind: CellWeights(*(None if t is None else t.to(like) for t in weights))  # type: ignore[arg-type]
            for kind, weights in space.one_hot(genotype, learner.method.specs).items()
        }
        pruned = learner.method.pruned_weights(arch, one_hot)

        def accuracy(weights: Mapping[str, Weighting] | None) -> float:
            meter = Meter(like.device)
            for number, batch in enumerate(validation(), 1):
                if weights is None:
                    meter.add(learner.method.evaluate(tester, batch, moment), number)
                else:
                    meter.add(tester.forward(batch, weights)[1], number)
                pause()
            return meter.accuracy or 0.0

        before = accuracy(None) if supernet is None else supernet
        after = accuracy(pruned)
        with_new_statistics(tester, training(), pruned, pause)
        renewed = accuracy(pruned)
    return Gap(100 * before, 100 * after, 100 * renewed)


def with_new_statistics(
    learner: Learner,
    batches: Iterable[Batch],
    weights: Mapping[str, Weighting],
    pause: Callable[[], None],
) -> None:
    """Replace the running statistics of every BatchNorm by their plain mean over ``batches``.

    Everything else stays in evaluation mode, so that no dropout disturbs them.
    """
    norms = [m for m in learner.supernet.modules() if isinstance(m, _BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the cumulative mean
        norm.train()
    for batch in batches:
        learner.forward(batch, weights)
        pause()
    learner.group.equalize(learner.supernet.buffers())
    nn.Module.eval(learner.supernet)
