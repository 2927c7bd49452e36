# SPDX-License-Identifier: Apache-2.0
"""The networks of the DARTS space computed from a state dict alone.

An independent statement of the cell structure in plain PyTorch: it knows the published key names
and the papers' formulas, and nothing of the modules under test. ``Keys`` records what was read, so
that a test can ask that a state dict holds these keys and no other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PRIMITIVES = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)


class Keys:
    """A state dict, the keys that were read of it, and whether BatchNorms use batch statistics."""

    def __init__(self, state: Mapping[str, Tensor], training: bool = False) -> None:
        self.state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
        self.training = training
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        self.read.add(key)
        return self.state[key]

    @property
    def unread(self) -> set[str]:
        return set(self.state) - self.read

    def conv(self, x: Tensor, key: str, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
        return F.conv2d(x, self[f"{key}.weight"], None, stride, padding, dilation, groups)

    def norm(self, x: Tensor, key: str, affine: bool) -> Tensor:
        mean, var = self[f"{key}.running_mean"], self[f"{key}.running_var"]
        weight, bias = (self[f"{key}.weight"], self[f"{key}.bias"]) if affine else (None, None)
        return F.batch_norm(x, mean.clone(), var.clone(), weight, bias, training=self.training)

    def linear(self, x: Tensor, key: str) -> Tensor:
        return F.linear(x, self[f"{key}.weight"], self[f"{key}.bias"])

    def relu_conv_norm(self, x: Tensor, key: str, affine: bool) -> Tensor:
        return self.norm(self.conv(x.relu(), f"{key}.op.1"), f"{key}.op.2", affine)

    def factorized_reduce(self, x: Tensor, key: str, affine: bool) -> Tensor:
        x = x.relu()
        halves = [
            self.conv(x, f"{key}.conv_1", stride=2),
            self.conv(x[:, :, 1:, 1:], f"{key}.conv_2", stride=2),
        ]
        return self.norm(torch.cat(halves, 1), f"{key}.bn", affine)


def operation(sd: Keys, x: Tensor, name: str, key: str, stride: int, search: bool) -> Tensor:
    """One candidate; in search pools are followed by a BatchNorm and no BatchNorm is affine."""
    affine, C = not search, x.shape[1]
    kind, _, size = name.rpartition("_")
    if name == "none":
        return torch.zeros_like(x[:, :, ::stride, ::stride])
    if name == "skip_connect":
        return x if stride == 1 else sd.factorized_reduce(x, key, affine)
    if kind in ("max_pool", "avg_pool"):
        if kind == "max_pool":
            y = F.max_pool2d(x, 3, stride, 1)
        else:
            y = F.avg_pool2d(x, 3, stride, 1, count_include_pad=False)
        return sd.norm(y, f"{key}.1", False) if search else y
    k = int(size[0])
    if kind == "sep_conv":
        for first, s in ((1, stride), (5, 1)):
            x = sd.conv(x.relu(), f"{key}.op.{first}", s, k // 2, groups=C)
            x = sd.norm(sd.conv(x, f"{key}.op.{first + 1}"), f"{key}.op.{first + 2}", affine)
        return x
    assert kind == "dil_conv"
    x = sd.conv(x.relu(), f"{key}.op.1", stride, 2 * (k // 2), dilation=2, groups=C)
    return sd.norm(sd.conv(x, f"{key}.op.2"), f"{key}.op.3", affine)


def mixed(sd: Keys, x: Tensor, weights: Tensor, key: str, stride: int, k: int) -> Tensor:
    """DARTS equation 2; with k > 1 PC-DARTS: C/k channels mixed, the rest copied, shuffled."""
    c = x.shape[1] // k
    y = sum(
        weights[i] * operation(sd, x[:, :c], name, f"{key}._ops.{i}", stride, search=True)
        for i, name in enumerate(PRIMITIVES)
    )
    if k == 1:
        return y
    rest = x[:, c:]
    if stride == 2:
        rest = F.max_pool2d(rest, 2, 2)
    z = torch.cat([y, rest], 1)
    return z[:, [(o % k) * c + o // k for o in range(k * c)]]


def stems(sd: Keys, x: Tensor, stem: str) -> tuple[Tensor, Tensor]:
    if stem == "cifar":
        x = sd.norm(sd.conv(x, "stem.0", 1, 1), "stem.1", True)
        return x, x
    x = sd.norm(sd.conv(x, "stem0.0", 2, 1), "stem0.1", True)
    s0 = sd.norm(sd.conv(x.relu(), "stem0.3", 2, 1), "stem0.4", True)
    return s0, sd.norm(sd.conv(s0.relu(), "stem1.1", 2, 1), "stem1.2", True)


def preprocess(sd: Keys, s0: Tensor, s1: Tensor, key: str, reduced: bool, affine: bool):
    shrink = sd.factorized_reduce if reduced else sd.relu_conv_norm
    return [
        shrink(s0, f"{key}.preprocess0", affine),
        sd.relu_conv_norm(s1, f"{key}.preprocess1", affine),
    ]


def supernet(
    sd: Keys,
    x: Tensor,
    ops: Mapping[str, Tensor],
    edges: Mapping[str, Tensor] | None,
    layers: int,
    k: int = 1,
    stem: str = "cifar",
) -> Tensor:
    """Logits of the supernet; ``ops`` and ``edges`` by cell kind."""
    s0, s1 = stems(sd, x, stem)
    reduced = stem == "imagenet"
    for cell in range(layers):
        reduction = cell in (layers // 3, 2 * layers // 3)
        kind = "reduce" if reduction else "normal"
        states = preprocess(sd, s0, s1, f"cells.{cell}", reduced, False)
        edge = 0
        for node in range(4):
            total = 0.0
            for source in range(2 + node):
                stride = 2 if reduction and source < 2 else 1
                factor = 1.0 if edges is None else edges[kind][edge]
                key = f"cells.{cell}._ops.{edge}"
                total = total + factor * mixed(sd, states[source], ops[kind][edge], key, stride, k)
                edge += 1
            states.append(total)
        s0, s1, reduced = s1, torch.cat(states[2:], 1), reduction
    return sd.linear(s1.mean((2, 3)), "classifier")


def auxiliary_head(sd: Keys, x: Tensor, stem: str) -> Tensor:
    stride = 3 if stem == "cifar" else 2
    x = F.avg_pool2d(x.relu(), 5, stride, 0, count_include_pad=False)
    x = sd.norm(sd.conv(x, "auxiliary_head.features.2"), "auxiliary_head.features.3", True).relu()
    x = sd.conv(x, "auxiliary_head.features.5")
    if stem == "cifar":
        x = sd.norm(x, "auxiliary_head.features.6", True)
    return sd.linear(x.relu().flatten(1), "auxiliary_head.classifier")


def network(
    sd: Keys,
    x: Tensor,
    normal: Sequence[tuple[str, int]],
    reduce: Sequence[tuple[str, int]],
    layers: int,
    stem: str = "cifar",
    auxiliary: bool = False,
    inputs: Sequence[int] = (2, 2, 2, 2),
) -> tuple[Tensor, Tensor | None]:
    """Logits of a derived network, and those of its auxiliary head.

    ``inputs`` are the numbers of pairs of the nodes, in both kinds of cell.
    """
    s0, s1 = stems(sd, x, stem)
    reduced = stem == "imagenet"
    auxiliary_logits = None
    for cell in range(layers):
        reduction = cell in (layers // 3, 2 * layers // 3)
        states = preprocess(sd, s0, s1, f"cells.{cell}", reduced, True)
        pairs = reduce if reduction else normal
        for node, count in enumerate(inputs):
            values = []
            first = sum(inputs[:node])
            for position in range(first, first + count):
                name, source = pairs[position]
                stride = 2 if reduction and source < 2 else 1
                key = f"cells.{cell}._ops.{position}"
                values.append(operation(sd, states[source], name, key, stride, search=False))
            states.append(torch.stack(values).sum(0))
        s0, s1, reduced = s1, torch.cat(states[2:], 1), reduction
        if auxiliary and cell == 2 * layers // 3:
            auxiliary_logits = auxiliary_head(sd, s1, stem)
    return sd.linear(s1.mean((2, 3)), "classifier"), auxiliary_logits


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter and running statistic a value that its place can be told by."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
                if name.endswith("running_var"):
                    tensor.abs_().add_(0.5)
                elif tensor.dim() > 1:
                    tensor.mul_(tensor[0].numel() ** -0.5)
