# SPDX-License-Identifier: Apache-2.0
"""What a network may cost: the target of a search, and its term in the loss.

Three forms of the loss, with CE the task's loss, E the expected cost and T the target:

* ``constraint``: ``CE + (max(0, lambda + c)^2 - lambda^2) / 2`` with ``c = log E - log T``, the
  augmented Lagrangian of ``c <= 0``; its gradient is ``max(0, lambda + c) grad c``. After each
  architecture step the multiplier lambda grows by ``rate c``, and never falls below 0. The square
  of the violation acts at once and lets go at once, so that a slow multiplier does not overshoot.
  The genotype is the best network under T (``fastnas.methods.budget``).
* ``linear``: ``CE + weight (E - T) / T`` (the released code of ProxylessNAS).
* ``log_ratio``: ``CE (log E / log T)^weight`` (the released code of ProxylessNAS, up to a factor
  that Adam does not see). It needs E and T above 1, in whichever unit.

The last two have no mechanism that makes a derived network meet T.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastnas.costs import Cost

__all__ = ["CostTerm", "Form", "Target"]

Form = Literal["constraint", "linear", "log_ratio"]

_WEIGHTS: dict[str, float] = {"constraint": 0.0, "linear": 0.1, "log_ratio": 0.3}

_COUNTS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
_UNITS: dict[str, dict[str, float]] = {
    "macs": _COUNTS,
    "params": _COUNTS,
    "latency": {"us": 1e-3, "ms": 1.0, "s": 1e3},
}


@dataclass(frozen=True)
class Target:
    """A limit of a cost, as ``--target`` has it.

    Attributes:
        name: ``macs``, ``params`` or ``latency``.
        value: the limit; of a latency, in milliseconds.
    """

    name: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read ``macs=300M``, ``params=4M`` or ``latency=12ms``.

        Raises:
            ValueError: it is something else; the message shows the forms.
        """
        name, _, amount = text.partition("=")
        units = _UNITS.get(name)
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?(?:e[+-]?[0-9]+)?)([a-zA-Z]*)", amount)
        if units is None or found is None or found[2] not in units or not float(found[1]) > 0:
            raise ValueError(
                "target: expected macs=300M, params=4M or latency=12ms (k, M, G; us, ms, s), "
                f"but got {text!r}"
            )
        return cls(name, float(found[1]) * units[found[2]])


class CostTerm:
    """The term of a target in the loss of the architecture.

    Args:
        cost: what networks cost.
        limit: T, in the unit of ``cost``.
        form: see the module.
        weight: factor (``linear``), exponent (``log_ratio``) or first multiplier
            (``constraint``); None: 0.1, 0.3 or 0.
        rate: step of the multiplier.

    Raises:
        ValueError: the limit is not positive, or with ``log_ratio`` not above 1.
    """

    def __init__(
        self,
        cost: Cost,
        limit: float,
        form: Form = "constraint",
        weight: float | None = None,
        rate: float = 0.02,
    ) -> None:
        if form not in _WEIGHTS:
            raise ValueError(f"form: expected one of {', '.join(_WEIGHTS)}, but got {form!r}")
        least = 1.0 if form == "log_ratio" else 0.0
        if not least < limit < math.inf:
            raise ValueError(f"limit: expected more than {least:g}, but got {limit}")
        self.cost, self.limit, self.form, self.rate = cost, limit, form, rate
        self.weight = _WEIGHTS[form] if weight is None else weight
        # Stays on the device: no step waits for it.
        self._multiplier = torch.tensor(self.weight)

    @property
    def binding(self) -> bool:
        """Whether a derived network has to meet the limit."""
        return self.form == "constraint"

    @property
    def multiplier(self) -> float:
        """Lambda of ``constraint`` as of now."""
        return self._multiplier.item()

    def loss(self, task: Tensor, expected: Tensor) -> Tensor:
        """The task's loss with the term, both 0-d and differentiable."""
        if self.form == "linear":
            return task + self.weight * (expected - self.limit) / self.limit
        if self.form == "log_ratio":
            # Below 1 the logarithm is negative and has no fractional power.
            ratio = torch.log(expected.clamp(min=1.0 + 1e-6)) / math.log(self.limit)
            return task * ratio**self.weight
        multiplier = self._multiplier = self._multiplier.to(expected.device)
        pull = (multiplier + torch.log(expected) - math.log(self.limit)).clamp(min=0.0)
        return task + (pull.square() - multiplier.square()) / 2

    def update(self, expected: Tensor) -> None:
        """Let the multiplier follow the expected cost after an architecture step."""
        if self.form == "constraint":
            excess = torch.log(expected.detach().float()) - math.log(self.limit)
            self._multiplier = (self._multiplier.to(excess) + self.rate * excess).clamp(min=0.0)

    def state_dict(self) -> dict[str, Any]:
        """The multiplier."""
        return {"multiplier": self._multiplier.cpu()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`."""
        self._multiplier = state["multiplier"].clone()
