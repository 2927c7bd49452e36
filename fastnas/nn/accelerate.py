# SPDX-License-Identifier: Apache-2.0
"""Put our mixed ops into somebody else's supernet, where they are proved to compute the same.

A mixed op is found by its shape: a module with a ``ModuleList`` called ``_ops`` and a
``forward(x, weights)``, with or without a partial-channel ``k`` and pool ``mp``. What its
``forward`` computes is not guessed: each distinct form is run once against ours on random data, in
copies, in float64, and compared in every result a training step depends on.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from fastnas.nn.equality import Verdict, form_of, judge
from fastnas.nn.mixed_op import MixedOp

__all__ = ["Left", "Report", "Swapped", "accelerate", "restore"]

_ORIGINAL = "_original"


@dataclass(frozen=True)
class Swapped:
    """A mixed op that is ours now.

    Attributes:
        name: where it is in the model, e.g. ``cells.0._ops.3``.
        kind: ``MixedOp`` or ``PartialMixedOp``.
        fused: how many of its candidates end in a BatchNorm that is fused with the sum.
        candidates: how many there are.
    """

    name: str
    kind: str
    fused: int
    candidates: int


@dataclass(frozen=True)
class Left:
    """A module of a mixed op's shape that stays as it was.

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
        swapped: the mixed ops that were replaced.
        left: those that were not, with the reason.
    """

    swapped: tuple[Swapped, ...]
    left: tuple[Left, ...]

    def __str__(self) -> str:
        if not self.swapped and not self.left:
            return (
                "accelerate: found no mixed op, that is, no module with a ModuleList `_ops` and a "
                "forward(x, weights)"
            )
        lines = [f"accelerate: {len(self.swapped)} mixed ops swapped, {len(self.left)} left"]
        kinds = Counter((s.kind, s.fused, s.candidates) for s in self.swapped)
        lines += [
            f"  {count} x {kind}: {fused} of {candidates} candidates with a fused BatchNorm"
            for (kind, fused, candidates), count in kinds.items()
        ]
        reasons: dict[tuple[str, float | None], list[str]] = {}
        for item in self.left:
            reasons.setdefault((item.reason, item.difference), []).append(item.name)
        for (reason, difference), names in reasons.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            measured = "" if difference is None else f" (relative difference {difference:.1e})"
            lines.append(f"  left {names[0] or 'the model itself'}{more}: {reason}{measured}")
        return "\n".join(lines)


def accelerate(model: nn.Module) -> Report:
    """Replace the mixed ops of ``model`` by fused ones, in place, wherever that changes nothing.

    The replacement holds the very ``_ops`` of the original, so parameters, buffers, state-dict
    keys and optimizers built before stay as they are. A mixed op stays in place if its ``forward``
    takes other arguments, if it has hooks, parts or methods of its own, if its ``forward`` reads
    settings that may change later, or if any result differs: output, gradients of input, weights
    and parameters, and buffers, in training and in evaluation, with weights of any sign and with
    zeros among them (a mixed op that skips candidates of weight zero is replaced by one that does).

    The proof runs in deep copies in float64; the model's state and the random generators stay as
    they are. It holds for what a mixed op and its candidates are today: a ``forward`` that asks a
    global variable is not seen through. Python references to a replaced module other than its
    place in the tree keep the original, which works on the same parameters.

    Args:
        model: any module; mixed ops are looked for at every depth.

    Returns:
        What was swapped, and what was left and why.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: expected an nn.Module, but got {type(model).__name__}")
    swapped: list[Swapped] = []
    left: list[Left] = []
    verdicts: dict[object, Verdict] = {}
    replacements: dict[int, MixedOp] = {}
    for name, module in list(model.named_modules()):
        if not _has_the_shape(module):
            continue
        reason = "it is the model itself, which has no parent to hold another" if not name else None
        reason = reason or _obstacle(module)
        if reason is not None:
            left.append(Left(name, reason))
            continue
        form = form_of(module)
        if form not in verdicts:
            verdicts[form] = judge(module)
        verdict = verdicts[form]
        if verdict.reason is not None:
            left.append(Left(name, verdict.reason, verdict.difference))
            continue
        ours = _build(module, verdict)
        replacements[id(module)] = ours
        fused = sum(route.norm is not None for route in ours._plan.routes)
        swapped.append(Swapped(name, type(ours).__name__, fused, len(ours._ops)))
    for parent, child_name, child in _children(model):
        if id(child) in replacements:
            parent._modules[child_name] = replacements[id(child)]
    return Report(tuple(swapped), tuple(left))


def restore(model: nn.Module) -> int:
    """Undo ``accelerate``: put the original mixed ops back, with the state they have now.

    Args:
        model: a model that went through ``accelerate``, or a copy of one.

    Returns:
        How many mixed ops were put back; 0 for a model that was never accelerated.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore: expected an nn.Module, but got {type(model).__name__}")
    restored: set[int] = set()
    for parent, name, child in _children(model):
        original = child.__dict__.get(_ORIGINAL)
        if original is not None:
            original.training = child.training
            parent._modules[name] = original
            restored.add(id(child))
    return len(restored)


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Every (parent, name, child) of the tree; a shared module comes once for each place."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None:
                yield parent, name, child


def _has_the_shape(module: nn.Module) -> bool:
    """Whether ``module`` looks like a mixed op of somebody else."""
    if isinstance(module, (MixedOp, torch.jit.ScriptModule)):
        return False
    candidates = module._modules.get("_ops")
    if not isinstance(candidates, nn.ModuleList) or len(candidates) == 0:
        return False
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):  # a forward that is not Python
        return False
    needed = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return len(needed) == 2


def _obstacle(module: nn.Module) -> str | None:
    """What keeps ``module`` in place before anything is run; None if nothing does."""
    if len(inspect.signature(module.forward).parameters) != 2:
        return "its forward takes more than x and weights"
    parts = [name for name in module._modules if name not in ("_ops", "mp")]
    parts += [*module._parameters, *module._buffers]
    if parts:
        return f"it has parts besides its candidates: {', '.join(parts)}"
    if any(table for name, table in vars(module).items() if name.endswith("_hooks")):
        return "hooks are registered on it"
    if "forward" in vars(module):
        return "its forward was replaced on this instance"
    classes = [c for c in type(module).__mro__ if c not in nn.Module.__mro__]
    methods = sorted({n for c in classes for n, f in vars(c).items() if _is_public_method(n, f)})
    if methods:
        return f"its class has methods that ours lacks: {', '.join(methods)}"
    return None


def _is_public_method(name: str, value: object) -> bool:
    known = ("forward", "extra_repr")
    return callable(value) and not name.startswith("_") and name not in known


def _build(module: nn.Module, verdict: Verdict) -> MixedOp:
    """Our mixed op on the candidates of ``module`` itself."""
    ours = verdict.build(module)
    for name, value in vars(module).items():
        # Settings that the rest of the model may read (``stride``, ``C``, ...).
        if not name.startswith("_") and name not in ("k", "skip_zero", "training"):
            vars(ours)[name] = value
    # Not a child: the original must not appear in the tree beside its own candidates.
    vars(ours)[_ORIGINAL] = module
    ours.training = module.training
    return ours
