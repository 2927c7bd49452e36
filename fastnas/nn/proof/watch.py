# SPDX-License-Identifier: Apache-2.0
"""What a ``forward`` does with tensors while it runs, apart from calling its parts.

The list of ``reading.OPERATIONS`` makes a proof of a comparison on random data: with nothing but
these, a result is a polynomial in the entries of its arguments, and two polynomials that agree at
a random point agree everywhere (with probability one; in floating point, up to rounding). That
holds for one path through the code, so every branch has to be taken by a run that agreed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastnas.nn.proof.branches import Branches
from fastnas.nn.proof.reading import OPERATIONS, Reading

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Watch", "opaque"]

_OPERATORS = frozenset(("__getitem__", "__setitem__", "__len__", "__iter__", "__reversed__"))
_COMPARISONS = frozenset(("eq", "__eq__", "ne", "__ne__"))
_AS_TEXT = {"__bool__": "a branch on values"}


class Watch:
    """Runs of a ``forward``, and whether all of them together show all that it can do."""

    def __init__(self, reading: Reading) -> None:
        """Watch the code of ``reading``."""
        self._fault = reading.fault
        self._branches = Branches(reading.codes, reading.idle)
        self._more: dict[str, None] = {}

    @contextmanager
    def run(self, weights: Tensor | None = None) -> Iterator[None]:
        """Watch what runs in the ``with`` block; it may ask which of ``weights`` are zero."""
        with self._branches, _Recorder(self._more, weights):
            yield

    def keep(self) -> None:
        """Count the last run: its result was the right one."""
        self._branches.keep()

    def fault(self) -> str | None:
        """Why the runs that were kept do not speak for all others; None if they do."""
        if self._fault is not None:
            return self._fault
        if self._more:
            return f"its forward does more than the weighted sum: {', '.join(self._more)}"
        place = self._branches.not_taken()
        return place and f"its forward has a branch that no run of the proof takes ({place})"


class _Recorder(TorchFunctionMode):
    """Notes every tensor function that is not allowed."""

    def __init__(self, more: dict[str, None], weights: Tensor | None) -> None:
        super().__init__()
        self._more = more
        self._weights = weights
        self._answers: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.__name__
        if name == "__get__":  # of an attribute
            name = func.__self__.__name__  # type: ignore[attr-defined]
        if name in _COMPARISONS and self._asks_for_zero(args):
            self._answers.append(result)
        elif name == "__bool__" and self._may_decide(args[0]):
            pass
        elif name not in OPERATIONS and name not in _OPERATORS:
            self._more[_AS_TEXT.get(name, name.strip("_"))] = None
        return result

    def _asks_for_zero(self, operands: Sequence[Any]) -> bool:
        weight, number = [*operands, None, None][:2]
        return self._is_weight(weight) and type(number) in (int, float) and number == 0

    def _may_decide(self, tensor: Tensor) -> bool:
        return self._is_weight(tensor) or any(tensor is answer for answer in self._answers)

    def _is_weight(self, value: object) -> bool:
        """Whether ``value`` is the weights or a view of them, and nothing computed from them."""
        if self._weights is None or not isinstance(value, Tensor):
            return False
        memory = value.untyped_storage().data_ptr()
        return memory == self._weights.untyped_storage().data_ptr()


def opaque(module: nn.Module) -> nn.Module:
    """Keep what ``module`` does when it is called from being noted."""
    forward = module.forward

    def unwatched(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return forward(*args, **kwargs)

    vars(module)["forward"] = unwatched
    return module
