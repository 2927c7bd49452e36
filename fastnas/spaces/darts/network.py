# SPDX-License-Identifier: Apache-2.0
"""The network of a genotype, as it is trained and deployed after the search.

DARTS (Liu et al., ICLR 2019), section 3.1 and appendix A.2: BatchNorms are affine, none follows a
pool, drop path and an auxiliary head help the training. Attribute names are those of the published
code, so that its state dicts load strictly.
"""

from __future__ import annotations

from functools import reduce
from operator import add

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnas.nn.candidates import build_candidate
from fastnas.spaces.darts.backbone import (
    LayerPlan,
    Stemmed,
    check_positive,
    plan_layers,
    preprocess_layers,
)
from fastnas.spaces.darts.genotype import Genotype

__all__ = ["AuxiliaryHead", "Cell", "Network", "drop_path"]

STEM_MULTIPLIER = 3
"""Width of the CIFAR stem in multiples of C; the ImageNet stem has C."""


def drop_path(x: Tensor, probability: float) -> Tensor:
    """Zero each sample of ``x`` with ``probability``, divide the kept ones by ``1 - probability``.

    Args:
        x: ``(N, C, H, W)``; not written to.
        probability: from 0 to below 1. The masks come from torch's generator of ``x``'s device.
    """
    keep = 1.0 - probability
    mask = torch.empty((x.shape[0], 1, 1, 1), dtype=x.dtype, device=x.device).bernoulli_(keep)
    return x * (mask / keep)


class Cell(nn.Module):
    """A cell of a genotype: a node is the sum of its operations' outputs, one or more."""

    def __init__(self, genotype: Genotype, plan: LayerPlan) -> None:
        """Build the normal or the reduction cell of ``genotype`` for the widths of ``plan``."""
        super().__init__()
        self.reduction = plan.reduction
        nodes = genotype.nodes("reduce" if plan.reduction else "normal")
        self._concat = genotype.reduce_concat if plan.reduction else genotype.normal_concat
        self._sources = tuple(tuple(source for _, source in node) for node in nodes)
        self.preprocess0, self.preprocess1 = preprocess_layers(plan, affine=True)
        self._ops = nn.ModuleList(
            build_candidate(op, plan.C, 2 if plan.reduction and source < 2 else 1, affine=True)
            for node in nodes
            for op, source in node
        )

    def forward(self, s0: Tensor, s1: Tensor, drop_probability: float = 0.0) -> Tensor:
        """Map the outputs of the two cells before to this cell's output.

        ``drop_probability`` above 0 drops operations' outputs, but never an identity, which would
        cut a path that costs nothing to keep.
        """
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        ops = iter(self._ops)
        for sources in self._sources:
            node = []
            for source in sources:
                op = next(ops)
                h = op(states[source])
                if drop_probability > 0.0 and not isinstance(op, nn.Identity):
                    h = drop_path(h, drop_probability)
                node.append(h)
            states.append(reduce(add, node))
        return torch.cat([states[i] for i in self._concat], dim=1)


class _PoolTo2x2(nn.Module):
    """Average pooling of the auxiliary head; whatever the image size, its output is 2x2.

    The published pools are kernel 5 with stride 3 (8x8 maps, CIFAR) or 2 (7x7, ImageNet). They are
    used as they are wherever they give 2x2. Elsewhere the four windows stand in the corners, of
    size 5 or, if that leaves a gap, half the map, rounded up; at most the map less one.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        height, width = self._geometry(x.shape[2]), self._geometry(x.shape[3])
        return F.avg_pool2d(x, (height[0], width[0]), stride=(height[1], width[1]))

    def _geometry(self, size: int) -> tuple[int, int]:
        """Return (kernel, stride) along an axis of ``size`` >= 2 pixels."""
        if size >= 5 and (size - 5) // self.stride == 1:
            return 5, self.stride
        kernel = min(max(5, (size + 1) // 2), size - 1)
        return kernel, size - kernel


class AuxiliaryHead(nn.Module):
    """The second classifier, behind the second reduction cell, used in training only."""

    def __init__(self, C: int, num_classes: int, stem: str) -> None:
        """Build for ``C`` channels; ``stem`` chooses the CIFAR or the ImageNet form."""
        super().__init__()
        layers: list[nn.Module] = [
            nn.ReLU(),
            _PoolTo2x2(stride=2 if stem == "imagenet" else 3),
            nn.Conv2d(C, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
        ]
        if stem != "imagenet":
            # The published ImageNet head lacks this BatchNorm; its results were obtained so.
            layers.append(nn.BatchNorm2d(768))
        self.features = nn.Sequential(*layers, nn.ReLU())
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to logits ``(N, num_classes)``.

        Raises:
            ValueError: a map of less than 2x2.
        """
        if x.shape[2] < 2 or x.shape[3] < 2:
            raise ValueError(
                f"auxiliary head: its input is {x.shape[2]}x{x.shape[3]}, at least 2x2 is wanted; "
                "use larger images or auxiliary=False"
            )
        return self.classifier(self.features(x).flatten(1))


class Network(Stemmed):
    """Stem, a stack of cells, global average pooling and a linear classifier.

    Cells floor(L/3) and floor(2L/3) are reduction cells. With one or two layers every cell is a
    reduction cell, and the genotype's normal cell does not occur.
    """

    def __init__(
        self,
        genotype: Genotype,
        C: int,
        layers: int,
        num_classes: int,
        auxiliary: bool = False,
        drop_path: float = 0.0,
        stem: str = "cifar",
        in_channels: int = 3,
    ) -> None:
        """Build with PyTorch's default initialisation.

        Args:
            genotype: the cells.
            C: channels of the first cell's nodes (36 on CIFAR, 48 on ImageNet in the papers).
            layers: number of cells (20 and 14).
            num_classes: width of the classifier.
            auxiliary: add the auxiliary head.
            drop_path: first value of ``drop_path_prob``.
            stem: ``cifar`` (image size kept) or ``imagenet`` (an eighth of it).
            in_channels: channels of the images.

        Raises:
            TypeError: ``genotype`` is not a Genotype.
            ValueError: a number that is not positive, ``drop_path`` outside 0 <= p < 1, odd C with
                the ``imagenet`` stem, unknown stem.
        """
        if not isinstance(genotype, Genotype):
            raise TypeError(f"genotype: wanted a Genotype, got {type(genotype).__name__}")
        check_positive(C=C, layers=layers, num_classes=num_classes, in_channels=in_channels)
        multiplier = 1 if stem == "imagenet" else STEM_MULTIPLIER
        super().__init__(stem, in_channels, C, multiplier, layers)
        self.drop_path_prob = drop_path
        widths = (len(genotype.normal_concat), len(genotype.reduce_concat))
        plans = plan_layers(C, layers, multiplier * C, stem, widths)
        self.cells = nn.ModuleList(Cell(genotype, plan) for plan in plans)
        self._auxiliary_layer = 2 * layers // 3
        channels = [plan.C * widths[plan.reduction] for plan in plans]
        self.auxiliary_head = (
            AuxiliaryHead(channels[self._auxiliary_layer], num_classes, stem) if auxiliary else None
        )
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels[-1], num_classes)

    @property
    def drop_path_prob(self) -> float:
        """Probability that a sample loses an operation's output in training; 0 <= p < 1."""
        return self._drop_path_prob

    @drop_path_prob.setter
    def drop_path_prob(self, value: float) -> None:
        if not 0.0 <= value < 1.0:
            raise ValueError(f"drop_path_prob must be at least 0 and below 1, got {value!r}")
        self._drop_path_prob = float(value)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Map images ``(N, in_channels, H, W)`` to logits ``(N, num_classes)``.

        In training with an auxiliary head: ``(logits, auxiliary_logits)``.

        Raises:
            ValueError: wrong shape of ``x``, see ``check_images``.
        """
        s0, s1 = self.stem_outputs(x)
        probability = self._drop_path_prob if self.training else 0.0
        auxiliary_logits = None
        for index, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, probability)
            if index == self._auxiliary_layer and self.training and self.auxiliary_head is not None:
                auxiliary_logits = self.auxiliary_head(s1)
        logits = self.classifier(self.global_pooling(s1).flatten(1))
        return logits if auxiliary_logits is None else (logits, auxiliary_logits)
