# SPDX-License-Identifier: Apache-2.0
"""What ``accelerate`` tells of what it did."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

__all__ = ["CELL", "Left", "Report", "Swapped"]

CELL = "Cell"
"""The kind of a cell that runs node by node."""


@dataclass(frozen=True)
class Swapped:
    """A mixed op that is ours now, or a cell of these that runs node by node.

    Attributes:
        name: where it is in the model, e.g. ``cells.0._ops.3``.
        kind: ``MixedOp``, ``PartialMixedOp`` or ``Cell``.
        fused: how many of its candidates end in a BatchNorm that is fused with the sum.
        candidates: how many there are; in a cell, those of all its mixed ops.
        apart: how many of them have a BatchNorm, none of which is fused.
    """

    name: str
    kind: str
    fused: int
    candidates: int
    apart: int = 0


@dataclass(frozen=True)
class Left:
    """A module of a mixed op's or a cell's shape that stays as it was.

    Attributes:
        name: where it is in the model.
        reason: why, in one clause.
        difference: the relative difference of what the reason names; None without one.
    """

    name: str
    reason: str
    difference: float | None = None


@dataclass(frozen=True)
class Report:
    """What ``accelerate`` did; ``str()`` of it is for people.

    Attributes:
        swapped: the mixed ops that were replaced, then the cells that run node by node.
        left: those that were not, with the reason.
    """

    swapped: tuple[Swapped, ...]
    left: tuple[Left, ...]

    def __str__(self) -> str:
        if not self.swapped and not self.left:
            return (
                "accelerate: found no mixed op to swap, that is, no module with a ModuleList "
                "(`_ops`, or its only one) and a forward(x, weights) that is not one of ours"
            )
        cells = sum(s.kind == CELL for s in self.swapped)
        what = f"{len(self.swapped) - cells} mixed ops"
        what += f" and {cells} cell{'s' * (cells != 1)}" if cells else ""
        lines = [f"accelerate: {what} swapped, {len(self.left)} left"]
        kinds = Counter((s.kind, s.fused, s.candidates, s.apart) for s in self.swapped)
        for (kind, fused, candidates, apart), count in kinds.items():
            whose = "candidates of its mixed ops" if kind == CELL else "candidates"
            line = f"  {count} x {kind}: {fused} of {candidates} {whose} with a fused BatchNorm"
            if apart:
                line += (
                    f"; {apart} keep theirs: it is found at the end of a Sequential, or of parts "
                    "that are called one after the other"
                )
            lines.append(line)
        reasons: dict[tuple[str, float | None], list[str]] = {}
        for item in self.left:
            reasons.setdefault((item.reason, item.difference), []).append(item.name)
        for (reason, difference), names in reasons.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            measured = "" if difference is None else f" (relative difference {difference:.1e})"
            lines.append(f"  left {names[0] or 'the model itself'}{more}: {reason}{measured}")
        return "\n".join(lines)
