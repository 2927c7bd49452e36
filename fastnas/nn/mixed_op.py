# SPDX-License-Identifier: Apache-2.0
"""The mixed op of DARTS: all candidates of an edge, weighted, in one fused call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastnas.nn.batch_norm import (
    FORMS,
    Form,
    Route,
    has_global_hook,
    hook_tables,
    make_route,
    plain_route,
)
from fastnas.nn.candidates import DARTS_PRIMITIVES, build_candidate
from fastnas.nn.carriers import Carriers, can_carry
from fastnas.nn.source import evaluate_source
from fastnas.ops._common import stack_weights
from fastnas.ops.mixed_batch_norm import mix_apart

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["MixedOp"]

Weights = Tensor | Sequence[Tensor | float]

_POOLS = (nn.MaxPool2d, nn.AvgPool2d)


class Plan(NamedTuple):
    """What a forward needs to know of the candidates, kept until a module is replaced."""

    owner: nn.ModuleList
    routes: tuple[Route, ...]
    #: The child tables the routes were read from, and the children they held then.
    tables: tuple[Mapping[str, nn.Module | None], ...]
    children: list[nn.Module | None]
    #: Every hook table that some route bypasses; all empty in ordinary training.
    hooks: tuple[Mapping[int, Any], ...]
    #: Whether a candidate begins with what changes its input in place.
    in_place: bool
    #: Identities of what has buffers inside the candidates, but for the norms that they end in.
    stateful: frozenset[int]
    #: Identities of those norms.
    last: frozenset[int]

    def is_current(self, owner: nn.ModuleList) -> bool:
        """Whether the candidates, and what matters inside them, are still the same objects."""
        return owner is self.owner and self.children == _children(self.tables)

    def current_routes(self) -> tuple[Route, ...]:
        """The routes, with those that would leave out a hook replaced by such as do not."""
        if any(self.hooks) or has_global_hook():
            return tuple(route.audible() for route in self.routes)
        return self.routes


def make_plan(candidates: nn.ModuleList, forms: Mapping[type[nn.Module], Form]) -> Plan:
    """Look at the candidates and decide how each is evaluated."""
    routes = _apart(tuple(make_route(candidate, forms) for candidate in candidates))
    bypassed = [module for route in routes for module in route.bypassed]
    tables: list[Mapping[str, nn.Module | None]] = [candidates._modules]
    tables += (module._modules for module in bypassed if module._modules)
    children = _children(tables)
    bypassed += [module for route in routes for module in route.recipe.bypassed]
    hooks = tuple(table for module in bypassed for table in hook_tables(module))
    in_place = any(map(_changes_input, routes))
    stateful = frozenset().union(*map(_stateful, routes))
    last = frozenset(id(route.norm) for route in routes if route.norm is not None)
    return Plan(candidates, routes, tuple(tables), children, hooks, in_place, stateful, last)


def _stateful(route: Route) -> set[int]:
    """Identities of what has buffers inside a candidate, but for the norm that it ends in."""
    modules = route.candidate.modules()
    return {id(module) for module in modules if module._buffers and module is not route.norm}


def _apart(routes: tuple[Route, ...]) -> tuple[Route, ...]:
    """Candidates that share what has buffers, other than their last norms, are called in order."""
    inner = Counter(number for route in routes for number in _stateful(route))
    last = {id(route.norm) for route in routes}
    shared = {number for number, count in inner.items() if count > 1 or number in last}
    if not shared:
        return routes
    return tuple(
        plain_route(r.candidate) if shared & {*_stateful(r), id(r.norm)} else r for r in routes
    )


def _children(tables: Iterable[Mapping[str, nn.Module | None]]) -> list[nn.Module | None]:
    return [*chain.from_iterable([table.values() for table in tables])]


def _changes_input(route: Route) -> bool:
    first = route.layers[0] if route.layers else None
    return isinstance(first, nn.Module) and any(
        getattr(module, "inplace", False) for module in first.modules()
    )


class MixedOp(nn.Module):
    """``y = sum_k weights[k] * candidate_k(x)`` (DARTS, arXiv 1806.09055, equation 2).

    Takes the place of the mixed op of a DARTS code base: the candidates live in ``_ops`` under the
    published names, so state dicts load both ways, strictly. The BatchNorms that candidates end in
    and the weighted sum are one fused call; ``none`` is not evaluated, but its weight gets its
    gradient, zero.

    Two things differ from the published loop. A NaN or infinity in ``x`` does not come out of
    ``none``. And a wrong number of weights is an error, where ``zip`` drops what is left over.

    A candidate with hooks is called as it is, so that they fire; so is one that does not end in
    ``BatchNorm2d`` (``fastnas.nn.batch_norm`` says what is recognised). A ``forward`` that is
    patched into a candidate later, or another setting of a layer in it (stride, padding), is
    noticed at the next ``train()`` or ``eval()``.

    The backward needs ``x``, which must not be written to before. ``torch.func``, forward-mode
    differentiation and batched gradients (``is_grads_batched``) are refused with PyTorch's errors.

    Args:
        C: channels, in and out.
        stride: 1, or 2 on the edges of a reduction cell that leave the cell's inputs.
        primitives: names of the candidates (``fastnas.nn.candidates``); pools get a BatchNorm.
        skip_zero: leave out candidates whose weight is exactly zero: they are not evaluated and
            their BatchNorms keep their statistics. Reads the weights, so a GPU is waited for.

    Raises:
        ValueError: no primitives, an unknown one, or a ``C`` or ``stride`` that cannot be.

    Example:
        >>> edge = MixedOp(16, stride=1)
        >>> weights = torch.softmax(torch.zeros(8), dim=-1)
        >>> edge(torch.randn(2, 16, 8, 8), weights).shape
        torch.Size([2, 16, 8, 8])
    """

    _ops: nn.ModuleList
    #: Channels of x if they are known; a mixed op of given candidates leaves that check to them.
    _channels: int | None = None

    def __init__(
        self,
        C: int,
        stride: int,
        primitives: Sequence[str] = DARTS_PRIMITIVES,
        *,
        skip_zero: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(primitives, str):
            raise TypeError(
                f"{self._get_name()}: expected primitives to be names, got {primitives!r}"
            )
        candidates = [build_candidate(name, C, stride, affine=False) for name in primitives]
        self._adopt(
            nn.Sequential(op, nn.BatchNorm2d(C, affine=False)) if isinstance(op, _POOLS) else op
            for op in candidates
        )
        self._channels = C
        self.stride = stride
        self.primitives = tuple(primitives)
        self.skip_zero = skip_zero

    @classmethod
    def from_candidates(
        cls,
        candidates: Iterable[nn.Module],
        *,
        skip_zero: bool = False,
        forms: Mapping[type[nn.Module], Form] = FORMS,
    ) -> Self:
        """Build a mixed op of any modules, used as they are: nothing is wrapped or copied.

        Args:
            candidates: modules that map ``(N, C, H, W)`` to one common shape. A ``ModuleList``
                becomes ``_ops`` itself.
            skip_zero: as in the constructor.
            forms: what is known of the candidates' classes (``fastnas.nn.batch_norm.Form``).

        Raises:
            ValueError: there is no candidate.
            TypeError: one is not a module.
        """
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._adopt(candidates, forms)
        self.skip_zero = skip_zero
        return self

    def _adopt(
        self, candidates: Iterable[nn.Module], forms: Mapping[type[nn.Module], Form] = FORMS
    ) -> None:
        """Take ``candidates`` as ``_ops``."""
        kept = candidates if isinstance(candidates, nn.ModuleList) else list(candidates)
        for k, candidate in enumerate(kept):
            if not isinstance(candidate, nn.Module):
                raise TypeError(
                    f"{self._get_name()}: expected candidate {k} to be an nn.Module, "
                    f"but got {type(candidate).__name__}"
                )
        if len(kept) == 0:
            raise ValueError(f"{self._get_name()}: expected at least one candidate, but got none")
        self._ops = kept if isinstance(kept, nn.ModuleList) else nn.ModuleList(kept)
        self._forms = dict(forms)
        self._plan = make_plan(self._ops, self._forms)

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        """Mix the candidates' outputs.

        Args:
            x: ``(N, C, H, W)``, floating point. Never written to.
            weights: one per candidate, in their order: a 1-D tensor (also a row of a 2-D one), or a
                list or tuple of 0-d tensors or numbers. They may have any sign and sum.

        Returns:
            A new tensor ``(N, C, H', W')`` in the memory format of the candidates' outputs. Its
            dtype is the one these promote to; the weights' dtype does not count.

        Raises:
            ValueError: another number of weights than of candidates; a shape that does not fit.
            TypeError: ``x`` or ``weights`` is of another type.
        """
        self._check(x, weights)
        carriers = Carriers()
        carry = can_carry(self.training)
        xs, weights, norms = self._evaluate(x, weights, carriers if carry else None)
        y = mix_apart(xs, weights, norms, carriers.take(xs))
        if y.dtype != x.dtype and any(route.zero for route in self._plan.routes):
            # `none` would have returned x's dtype, under autocast wider than a convolution's.
            y = y.to(torch.promote_types(y.dtype, x.dtype))
        return y

    def _check(self, x: Tensor, weights: Weights) -> None:
        """Raise for what the fused op would not put down to its argument."""
        name = self._get_name()
        if x.dim() != 4 or (self._channels is not None and x.shape[1] != self._channels):
            wanted = "C" if self._channels is None else self._channels
            raise ValueError(
                f"{name}: expected x of shape (N, {wanted}, H, W), but got {list(x.shape)}"
            )
        if not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point x, but got {x.dtype}")
        count = len(self._ops)
        if isinstance(weights, Tensor):
            if weights.dim() != 1 or weights.shape[0] != count:
                raise ValueError(
                    f"{name}: expected {count} weights, one per candidate, "
                    f"but got a tensor of shape {list(weights.shape)}"
                )
        elif not isinstance(weights, (list, tuple)):
            raise TypeError(
                f"{name}: expected weights to be a tensor, list or tuple, "
                f"but got {type(weights).__name__}"
            )
        elif len(weights) != count:
            raise ValueError(
                f"{name}: expected {count} weights, one per candidate, but got {len(weights)}"
            )

    def _evaluate(
        self, x: Tensor, weights: Weights, carriers: Carriers | None = None
    ) -> tuple[list[Tensor], Weights, list[Any]]:
        """Run the candidates up to their BatchNorms; give what enters the fused op."""
        routes = self._routes()
        used = [k for k, route in enumerate(routes) if not route.zero]
        if self.skip_zero:
            values = weights.tolist() if isinstance(weights, Tensor) else weights
            used = [k for k in used if values[k] != 0]
            if not used:
                return [_zeros_like_output(routes, x)], [0.0], [None]
        if not used:  # nothing but `none`: one of them has to say the shape
            used = [0]
        (xs,) = evaluate_source(x, [[routes[k].recipe for k in used]], carriers=carriers)
        if len(used) < len(routes):
            weights = select_weights(weights, used)
        return xs, weights, [routes[k].norm for k in used]

    def _routes(self) -> tuple[Route, ...]:
        """How each candidate is evaluated now."""
        owner = self._ops
        if not self._plan.is_current(owner):
            self._plan = make_plan(owner, self._forms)
        return self._plan.current_routes()

    def train(self, mode: bool = True) -> Self:
        """Set training mode, and look at the candidates anew."""
        super().train(mode)
        self._plan = make_plan(self._ops, self._forms)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # The plan holds tables of this very object; a copy has its own.
        return {name: value for name, value in self.__dict__.items() if name != "_plan"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan = make_plan(self._ops, self._forms)

    def extra_repr(self) -> str:
        """Show what the children do not."""
        return "skip_zero=True" if self.skip_zero else ""


def select_weights(weights: Weights, used: Sequence[int]) -> Weights:
    """The weights at ``used`` (ascending); views where that is possible, and no index tensor."""
    if not isinstance(weights, Tensor):
        left_out = [w for k, w in enumerate(weights) if k not in used]
        asking = [w for w in left_out if isinstance(w, Tensor) and w.requires_grad]
        if not asking:
            return [weights[k] for k in used]
        # Cutting them out of one tensor is what gives those left out their gradient of zero.
        weights = stack_weights(weights, asking[0].dtype, asking[0].device)
    runs = [weights[start:stop] for start, stop in _runs(used)]
    return runs[0] if len(runs) == 1 else torch.cat(runs)


def _runs(used: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Half-open intervals that cover ``used`` (ascending) and nothing else."""
    start = stop = used[0]
    for k in used:
        if k != stop:
            yield start, stop
            start = k
        stop = k + 1
    yield start, stop


def _zeros_like_output(routes: Sequence[Route], x: Tensor) -> Tensor:
    """Zeros of the shape and dtype of the candidates' output.

    The shape comes from running the candidate with the fewest modules, `none` and pools first, up
    to the BatchNorm it ends in, which therefore keeps its statistics.
    """
    lightest = min(routes, key=lambda r: (not r.zero, sum(1 for _ in r.candidate.modules())))
    with torch.no_grad():
        h = x
        for layer in lightest.layers:
            h = layer(h)
        return torch.zeros_like(h)
