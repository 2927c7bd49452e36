# SPDX-License-Identifier: Apache-2.0
"""The network of a cell, as it is trained after the search (NAS-Bench-201, section 2.1)."""

from __future__ import annotations

from functools import reduce
from operator import add

import torch
from torch import Tensor, nn

from fastnas.nn.candidates import build_candidate
from fastnas.spaces.nasbench201.backbone import Backbone
from fastnas.spaces.nasbench201.genotype import Genotype

__all__ = ["Cell", "Network"]


class Cell(nn.Module):
    """A cell of a genotype: a node is the sum of its operations' outputs.

    Like the benchmark it runs all operations, those that lead nowhere too: they count among its
    parameters and multiply-adds.
    """

    def __init__(self, genotype: Genotype, C: int) -> None:
        """Build for C channels; BatchNorms are affine, convolutions have no bias, pools neither."""
        super().__init__()
        self._sources = tuple(
            tuple(source for source, op in enumerate(node) if op != "none")
            for node in genotype.nodes
        )
        self._ops = nn.ModuleList(
            build_candidate(op, C, 1, affine=True) for op in genotype.ops if op != "none"
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to the last node, ``(N, C, H, W)``."""
        states = [x]
        ops = iter(self._ops)
        for sources in self._sources:
            node = [next(ops)(states[source]) for source in sources]
            states.append(reduce(add, node) if node else torch.zeros_like(x))
        return states[-1]


class Network(Backbone):
    """Stem, three stages of cells with a residual block between two, and a linear classifier."""

    def __init__(
        self,
        genotype: Genotype,
        C: int = 16,
        layers: int = 15,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        """Build with PyTorch's default initialisation; the defaults are those of the benchmark.

        Args:
            genotype: the cell.
            C: channels of the first stage; the others have 2 C and 4 C.
            layers: number of cells, a third in each stage.
            num_classes: width of the classifier.
            in_channels: channels of the images.

        Raises:
            TypeError: ``genotype`` is not a Genotype.
            ValueError: a number that is not positive, or fewer than three cells.
        """
        if not isinstance(genotype, Genotype):
            raise TypeError(f"genotype: wanted a Genotype, got {type(genotype).__name__}")
        super().__init__(C, layers, num_classes, in_channels, lambda width: Cell(genotype, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, in_channels, H, W)`` to logits ``(N, num_classes)``.

        Raises:
            ValueError: other images, or height or width that is no multiple of 4.
        """
        return self.run(x, lambda _, cell, h: cell(h))
