# SPDX-License-Identifier: Apache-2.0
"""EnTranNAS (Yang et al., CVPR 2021, arXiv 2101.11342), and what its variant DST shares with it.

A few cells of the supernet, the Engine-cells, mix all candidates and carry the gradient of the
architecture. All others, the Transit-cells, host what would be derived now: the connections of the
genotype, added up without weights, and nothing else is executed in them. What is hosted is derived
anew in every iteration, and hosted in the next.

EnTranNAS derives two connections a node by a hand-made rule. EnTranNAS-DST has a threshold at each
node, learnt along with the alphas, and derives what exceeds it: any number of edges, and several
candidates on an edge. ``docs/entrannas.md`` says what is the authors' and what is our choice.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from fastnas.methods.base import MethodOptions, Moment, register_method
from fastnas.methods.darts import Darts, DartsOptions
from fastnas.methods.learner import Batch, Learner, Outcome
from fastnas.methods.parameters import ArchParameters
from fastnas.methods.target import CostTerm
from fastnas.spaces.base import (
    CellRoles,
    CellSelection,
    CellSpec,
    CellWeights,
    Connections,
    Space,
    Weighting,
)
from fastnas.spaces.connections import strongest_edges, strongest_pairs

__all__ = ["PRESETS", "EnTranNAS", "EnTranNASOptions", "EngineAndTransit", "EngineOptions"]


LEAST_TAU = 1e-6
"""Beyond it and its inverse float32 holds no differences of logits any more."""


@dataclass(frozen=True)
class EngineOptions(DartsOptions):
    """Options that both methods have."""

    engine_cells: str = "last"
    """Which cells are Engine-cells, which mix all candidates, while the others host what would be
    derived now: last is the last of each kind; 2,5 or 0,2,5 their numbers from 0, at least one of
    each kind; all is every cell. The later, the less memory it takes."""
    share: bool = True
    """A candidate that leaves a state is one for all later nodes, and computed once (feature
    sharing)."""
    tau: float = 1.0
    """Temperature of the softmax over an edge's candidates."""

    def __post_init__(self) -> None:
        """Check the form of the Engine-cells; whether they exist is for the supernet to say."""
        engine_cells(self.engine_cells)
        if not (isinstance(self.tau, (int, float)) and LEAST_TAU <= self.tau <= 1 / LEAST_TAU):
            raise ValueError(
                f"tau: expected a number from {LEAST_TAU} to {1 / LEAST_TAU:.0f}, "
                f"but got {self.tau!r}"
            )


def engine_cells(text: str) -> tuple[int, ...] | str:
    """Read ``last``, ``all`` or numbers of cells with commas between them.

    Raises:
        ValueError: anything else.
    """
    if not isinstance(text, str):
        raise ValueError(
            f"engine_cells: expected last, all or numbers of cells (2,5) as text, but got {text!r}"
        )
    if text in ("last", "all"):
        return text
    parts = text.replace(" ", "").split(",")
    if not all(part.isascii() and part.isdecimal() and len(part) < 5 for part in parts):
        raise ValueError(
            f"engine_cells: expected last, all or numbers of cells (2,5), but got {text!r}"
        )
    return tuple(map(int, parts))


class EngineAndTransit(Darts):
    """What both methods share: the two kinds of cells, and what the Transit-cells host."""

    needs: ClassVar[frozenset[str]] = frozenset({"engine_cells"})
    options: EngineOptions

    def __init__(
        self,
        specs: Mapping[str, CellSpec],
        options: MethodOptions | None = None,
        *,
        seed: int = 0,
        term: CostTerm | None = None,
    ) -> None:
        """Nothing is derived yet."""
        super().__init__(specs, options, seed=seed, term=term)
        self._derived: dict[str, Connections] = {}
        #: The parameters that ``_derived`` is of, and their versions.
        self._source: list[tuple[Tensor, int]] = []
        #: During an iteration what was derived before it.
        self._hosted: dict[str, Connections] | None = None

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuse a target of cost: its tables have the candidate `none`, which is not searched."""
        if config.target is not None:
            raise ValueError(
                f"target: expected none with the method {cls.name!r}, which searches without the "
                f"candidate none, but got {config.target!r}"
            )

    @classmethod
    def supernet_options(cls, options: MethodOptions) -> dict[str, Any]:
        """Edges without `none`, and which cells are Engine-cells."""
        o = cast(EngineOptions, options)
        return {"none": False, "engine_cells": engine_cells(o.engine_cells), "share": o.share}

    @abc.abstractmethod
    def strengths(self, arch: ArchParameters) -> dict[str, Tensor]:
        """By cell kind ``[E, K]``: the weights of the connections in an Engine-cell."""

    @abc.abstractmethod
    def choose(self, strengths: list[list[float]], spec: CellSpec) -> Connections:
        """The connections that are derived, given the strengths of one kind, on the host."""

    def scores(self, arch: ArchParameters) -> dict[str, Tensor]:
        """``softmax(alpha / tau)`` per edge."""
        tau = self.options.tau
        return {kind: torch.softmax(arch.alpha(kind) / tau, dim=-1) for kind in self.specs}

    def connections(self, arch: ArchParameters) -> dict[str, Connections]:
        """What would be derived now, by cell kind.

        Read off the device only where the parameters have changed since, and then in one transfer.
        """
        return self._derive(arch, self.strengths)

    def _derive(
        self, arch: ArchParameters, strengths: Callable[[ArchParameters], Mapping[str, Tensor]]
    ) -> dict[str, Connections]:
        # Versions tell every way in which parameters change in place: steps of the optimizer,
        # checkpoints that are loaded, values set by hand.
        source: list[tuple[Tensor, int]] = [(p, p._version) for p in arch.parameters()]
        if len(source) != len(self._source) or not all(
            p is q and version == before
            for (p, version), (q, before) in zip(source, self._source, strict=True)
        ):
            with torch.no_grad():
                found = strengths(arch)
                numbers = iter(torch.cat([found[k].reshape(-1) for k in self.specs]).tolist())
            self._derived = {
                kind: self.choose(
                    [[next(numbers) for _ in spec.primitives] for _ in range(spec.edges)], spec
                )
                for kind, spec in self.specs.items()
            }
            self._source = source
        return self._derived

    def weights(self, arch: ArchParameters, moment: Moment) -> Mapping[str, Weighting]:
        """The strengths for the Engine-cells, the derived connections for the Transit-cells."""
        strengths = self.strengths(arch)
        derived = self._derive(arch, lambda _: strengths)
        hosted = derived if self._hosted is None else self._hosted
        return {
            kind: CellRoles(
                self._engine(strengths[kind], derived[kind]), CellSelection(hosted[kind])
            )
            for kind in self.specs
        }

    def _engine(self, strengths: Tensor, derived: Connections) -> CellWeights | CellSelection:
        """What Engine-cells execute: everything."""
        return CellWeights(strengths)

    def iteration(
        self, learner: Learner, train: Batch, val: Callable[[], Batch] | None, moment: Moment
    ) -> tuple[Outcome, Outcome | None]:
        """Both steps; the Transit-cells host what was derived after the iteration before."""
        self._hosted = self.connections(learner.arch)
        try:
            return super().iteration(learner, train, val, moment)
        finally:
            self._hosted = None

    def graph_obstacle(self) -> str | None:
        """What is derived decides what is executed."""
        return "every step executes the connections that the host read after the one before"

    def derive(self, arch: ArchParameters, space: Space) -> Any:
        """The genotype of what the Transit-cells would host next."""
        with torch.no_grad():
            scores = self.scores(arch)
            derived = self.connections(arch)
            stay = {
                kind: torch.zeros(score.shape, dtype=torch.bool) for kind, score in scores.items()
            }
            for kind, edges in derived.items():
                for edge, candidates in enumerate(edges):
                    stay[kind][edge, list(candidates)] = True
            return space.derive(scores, self.specs, stay)

    def entropy(self, arch: ArchParameters) -> dict[str, float]:
        """Mean entropy of ``softmax(alpha / tau)`` over the edges of each kind, in nats."""
        with torch.no_grad():
            return {
                kind: torch.special.entr(p).sum(dim=-1).mean().item()
                for kind, p in self.scores(arch).items()
            }

    def pruned_weights(
        self, arch: ArchParameters, one_hot: Mapping[str, CellWeights]
    ) -> Mapping[str, Weighting]:
        """All cells as Transit-cells of the genotype, of which nothing else is executed."""
        return {kind: CellSelection(_nonzero(w.ops), w.ops) for kind, w in one_hot.items()}


def _nonzero(ops: Tensor) -> Connections:
    return tuple(tuple(k for k, w in enumerate(row) if w != 0) for row in ops.tolist())


PRESETS: Mapping[str, Mapping[str, Any]] = {
    # Two Engine-cells and three Transit-cells; few steps, so that the alphas are fast.
    "demo": {"layers": 5, "arch_lr": 0.05},
    # The authors' are not known; these are those of DARTS.
    "cifar10": {
        "batch_size": 64,
        "lr": 0.025,
        "lr_min": 0.001,
        "arch_lr": 3e-4,
        "arch_warmup_epochs": 0,
        "validate": "every",
    },
}


@dataclass(frozen=True)
class EnTranNASOptions(EngineOptions):
    """Options of the method ``entrannas``."""

    derive: Literal["edges", "pairs"] = "edges"
    """Which two connections a node keeps: edges takes the best candidate of each edge and of these
    the two best, as DARTS does; pairs takes the two best of all, which may stand on one edge."""


@register_method("entrannas")
class EnTranNAS(EngineAndTransit):
    """Engine- and Transit-cells; two connections a node are derived."""

    Options: ClassVar[type[MethodOptions]] = EnTranNASOptions
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS
    options: EnTranNASOptions

    def strengths(self, arch: ArchParameters) -> dict[str, Tensor]:
        """``softmax(alpha / tau)`` per edge."""
        return self.scores(arch)

    def choose(self, strengths: list[list[float]], spec: CellSpec) -> Connections:
        """Two connections a node, by the rule of the options."""
        rule = strongest_edges if self.options.derive == "edges" else strongest_pairs
        return rule(strengths, spec)
