# SPDX-License-Identifier: Apache-2.0
"""PC-DARTS: partial channel connections and edge normalisation.

Xu et al., "PC-DARTS: Partial Channel Connections for Memory-Efficient Architecture Search",
ICLR 2020. It is DARTS with two changes: only 1/k of the channels pass through the candidates of an
edge (the supernet does that), and the edges of a node have weights of their own, the softmax of its
betas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from fastnas.methods.base import MethodOptions, Moment, register_method
from fastnas.methods.darts import Darts, DartsOptions
from fastnas.methods.parameters import ArchParameters, normal_logits, softmax_per_node
from fastnas.spaces.base import CellWeights


@dataclass(frozen=True)
class PCDartsOptions(DartsOptions):
    """Options of the method ``pc_darts``."""

    partial_channels: int = 4
    """k: one in k channels of an edge passes through the candidates. Must divide the channels of
    a cell, and leave an even number of them."""

    def __post_init__(self) -> None:
        """Check the range of k."""
        if self.partial_channels < 1:
            raise ValueError(
                f"partial_channels: expected at least 1, but got {self.partial_channels}"
            )


@register_method("pc_darts")
class PCDarts(Darts):
    """Partial channels, and softmax weights on the edges of a node (edge normalisation)."""

    Options: ClassVar[type[MethodOptions]] = PCDartsOptions
    needs: ClassVar[frozenset[str]] = frozenset({"partial_channels"})
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "demo": {"options": PCDartsOptions(partial_channels=2)},
        # Released scripts: batches of 256 fit where DARTS takes 64; the architecture is frozen
        # for 15 (35) of the 50 epochs; validation only after the last epoch.
        "cifar10": {
            "batch_size": 256,
            "lr": 0.1,
            "lr_min": 0.0,
            "arch_lr": 6e-4,
            "arch_warmup_epochs": 15,
            "validate": "last",
        },
        "imagenet": {"options": PCDartsOptions(partial_channels=2)},
    }

    @classmethod
    def supernet_options(cls, options: MethodOptions) -> dict[str, Any]:
        """The supernet's mixed ops work on one in k channels."""
        return {"partial_channels": cast(PCDartsOptions, options).partial_channels}

    def parameters(self) -> ArchParameters:
        """Alphas as in DARTS, and one beta an edge, both drawn from N(0, 1e-6)."""
        shapes = {k: (s.edges, len(s.primitives)) for k, s in self.specs.items()}
        return ArchParameters(
            {kind: normal_logits(*shape) for kind, shape in shapes.items()},
            {kind: normal_logits(shape[0]) for kind, shape in shapes.items()},
            {kind: spec.counts for kind, spec in self.specs.items()},
        )

    def weights(self, arch: ArchParameters, moment: Moment) -> dict[str, CellWeights]:
        """``softmax(alpha)`` per edge, ``softmax(beta)`` per node (edge normalisation)."""
        return {
            kind: CellWeights(
                torch.softmax(arch.alpha(kind), dim=-1),
                softmax_per_node(arch.beta(kind), spec),
            )
            for kind, spec in self.specs.items()
        }

    def pruned_weights(
        self, arch: ArchParameters, one_hot: Mapping[str, CellWeights]
    ) -> dict[str, CellWeights]:
        """The edges that stay share the weight of their node: the softmax of their betas alone."""
        pruned = {}
        for kind, weights in one_hot.items():
            assert weights.edges is not None
            beta = arch.beta(kind).masked_fill(weights.edges == 0, -math.inf)
            pruned[kind] = CellWeights(weights.ops, softmax_per_node(beta, self.specs[kind]))
        return pruned

    def scores(self, arch: ArchParameters) -> dict[str, Tensor]:
        """``softmax(alpha) softmax(beta)``: the product decides which edges are kept."""
        return {
            kind: torch.softmax(arch.alpha(kind), dim=-1)
            * softmax_per_node(arch.beta(kind), spec).unsqueeze(-1)
            for kind, spec in self.specs.items()
        }
