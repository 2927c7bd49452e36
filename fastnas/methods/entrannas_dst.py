# SPDX-License-Identifier: Apache-2.0
"""EnTranNAS-DST: EnTranNAS with a threshold at each node, learnt along with the alphas.

See ``fastnas.methods.entrannas`` for the paper and for the two kinds of cells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastnas import ops
from fastnas.methods.base import MethodOptions, Moment, register_method
from fastnas.methods.entrannas import PRESETS, EngineAndTransit, EngineOptions
from fastnas.methods.parameters import ArchParameters, normal_logits
from fastnas.spaces.base import (
    CellRoles,
    CellSelection,
    CellSpec,
    CellWeights,
    Connections,
    Weighting,
)

__all__ = ["EnTranNASDST", "EnTranNASDSTOptions"]


@dataclass(frozen=True)
class EnTranNASDSTOptions(EngineOptions):
    """Options of the method ``entrannas_dst``."""

    norm: Literal["edge", "node"] = "edge"
    """Over what the weights of the connections are normalised: the candidates of an edge, or all
    connections of a node. An edge of which one candidate is left learns nothing more with edge."""
    detach_max: bool = False
    """Let no gradient through the largest weight of a node, which the others are compared with."""
    beta_init: float = 0.0
    """First value of the nodes' thresholds, as logits; what exceeds them stays. At 0 a connection
    stays that is half as strong as its node's strongest; lower ones keep more."""
    sparsity_lambda: float = 0.0
    """Weight of a term that raises the thresholds: the mean over all connections of how much they
    exceed them. Ours, not the authors'."""
    keep_weights: bool = False
    """In the pruned supernet of `fastnas gap`, let Engine-cells keep the weights of the connections
    instead of 1."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if not math.isfinite(self.beta_init):
            raise ValueError(f"beta_init: expected a finite number, but got {self.beta_init}")
        if not 0 <= self.sparsity_lambda < math.inf:
            raise ValueError(
                "sparsity_lambda: expected a finite number of at least 0, but got "
                f"{self.sparsity_lambda}"
            )


@register_method("entrannas_dst")
class EnTranNASDST(EngineAndTransit):
    """EnTranNAS with a learnt topology: every node keeps what exceeds its threshold."""

    Options: ClassVar[type[MethodOptions]] = EnTranNASDSTOptions
    # A threshold tells nearly equal weights apart.
    decides_by_entropy: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **PRESETS,
        # A threshold that something falls below within these steps.
        "demo": {**PRESETS["demo"], "options": EnTranNASDSTOptions(beta_init=1.0)},
    }
    options: EnTranNASDSTOptions

    def parameters(self) -> ArchParameters:
        """Alphas from N(0, 1e-6), one row an edge; a beta for each node."""
        return ArchParameters(
            {k: normal_logits(spec.edges, len(spec.primitives)) for k, spec in self.specs.items()},
            {
                kind: torch.full((len(spec.inputs_per_node),), self.options.beta_init)
                for kind, spec in self.specs.items()
            },
        )

    def strengths(self, arch: ArchParameters) -> dict[str, Tensor]:
        """``fastnas.ops.sparse_connections``: exactly 0 for what is not derived."""
        o = self.options
        return {
            kind: ops.sparse_connections(
                arch.alpha(kind),
                arch.beta(kind),
                spec.inputs_per_node,
                o.tau,
                o.norm,
                o.detach_max,
            )
            for kind, spec in self.specs.items()
        }

    def choose(self, strengths: list[list[float]], spec: CellSpec) -> Connections:
        """All connections with a weight.

        A node has none where its alphas are NaN; then it keeps all, until the loop has seen the
        loss that made them so.
        """
        found = [tuple(k for k, q in enumerate(row) if q > 0) for row in strengths]
        for rows in spec.node_slices:
            if not any(found[rows]):
                found[rows] = [tuple(range(len(spec.primitives)))] * (rows.stop - rows.start)
        return tuple(found)

    def _engine(self, strengths: Tensor, derived: Connections) -> CellWeights | CellSelection:
        """What has a weight: the others would add exact zeros, and have no gradient."""
        return CellSelection(derived, strengths)

    def objective(self, loss: Tensor, arch: ArchParameters, moment: Moment) -> Tensor:
        """The loss of the task, and the term of ``sparsity_lambda``."""
        loss = super().objective(loss, arch, moment)
        if self.options.sparsity_lambda == 0:
            return loss
        return loss + self.options.sparsity_lambda * self.excess(arch)

    def excess(self, arch: ArchParameters) -> Tensor:
        """Mean over the connections of ``relu(p / max p - sigmoid(beta))``, summed over the kinds.

        The strongest connection of a node always has a share in it, so that it raises the threshold
        also where the task gives it no gradient.
        """
        terms = []
        for kind, p in self.scores(arch).items():
            rows = self.specs[kind].node_slices
            thresholds = torch.sigmoid(arch.beta(kind)).unbind()
            parts = [
                torch.relu(p[r] / p[r].max() - t) for r, t in zip(rows, thresholds, strict=True)
            ]
            terms.append(torch.cat(parts).mean())
        return torch.stack(terms).sum()

    def pruned_weights(
        self, arch: ArchParameters, one_hot: Mapping[str, CellWeights]
    ) -> Mapping[str, Weighting]:
        """Weights of 1, or in Engine-cells those of now if the options say so."""
        pruned = super().pruned_weights(arch, one_hot)
        if not self.options.keep_weights:
            return pruned
        strengths, roles = self.strengths(arch), {}
        for kind, all_alike in pruned.items():
            assert isinstance(all_alike, CellSelection)
            ops_there = strengths[kind] * (one_hot[kind].ops > 0)
            engine = CellSelection(all_alike.connections, ops_there)
            roles[kind] = CellRoles(engine, all_alike)
        return roles
