# SPDX-License-Identifier: Apache-2.0
"""Where a candidate ends in BatchNorm: the cut that lets one kernel take the norm and the sum.

Six of the eight DARTS candidates end in ``BatchNorm2d``. The fused op wants what enters that
norm and the norm itself; this file finds the cut without calling anything. A candidate is cut
when its ``forward`` is known to be "layers, then BatchNorm":

* ``nn.BatchNorm2d``, and an ``nn.Sequential`` whose last child can be cut,
* the classes of ``fastnas.nn.candidates``,
* any class with a method ``split_batch_norm() -> (body, norm)`` where ``forward(x)`` equals
  ``norm(body(x))`` and ``norm`` is an ``nn.BatchNorm2d`` inside the module; it is asked again
  whenever a module inside was replaced,
* classes that ``fastnas.accelerate`` has proved to be of one of these forms.

Whatever else comes is called as it is and enters the sum as a plain tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torch import nn
from torch.nn.modules import module as _module

from fastnas.nn.candidates import DilConv, FactorizedReduce, ReLUConvBN, SepConv, Zero
from fastnas.nn.halves import TwoHalves
from fastnas.nn.source import Layer, Recipe, make_recipe

__all__ = [
    "FORMS",
    "Form",
    "Route",
    "Tail",
    "find_tail",
    "has_global_hook",
    "hook_tables",
    "make_route",
]

Form = Literal["zero", "factorized_reduce"] | tuple[str, ...]
"""What a class's ``forward`` is: nothing but zeros, DARTS' factorized reduce, or the children of
these names, called one after the other."""

FORMS: Mapping[type[nn.Module], Form] = {
    Zero: "zero",
    ReLUConvBN: ("op",),
    SepConv: ("op",),
    DilConv: ("op",),
    FactorizedReduce: "factorized_reduce",
}


class Tail(NamedTuple):
    """A candidate cut in two: ``norm(layers[-1](... layers[0](x)))`` is what it returns."""

    layers: tuple[Layer, ...]
    norm: nn.BatchNorm2d
    #: Modules whose call, and with it their hooks, the cut skips: candidate, containers, norm.
    bypassed: tuple[nn.Module, ...]


class Route(NamedTuple):
    """How a mixed op evaluates one candidate."""

    candidate: nn.Module
    recipe: Recipe
    norm: nn.BatchNorm2d | None
    #: Modules that are not called, so that their hooks would not fire.
    bypassed: tuple[nn.Module, ...]
    #: The candidate is ``none``: it is not evaluated at all.
    zero: bool

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Called one after the other, they give what enters the norm, or the candidate's output."""
        return self.recipe.layers

    def audible(self) -> Route:
        """The nearest route on which every hook fires.

        This is the one place that decides between the fused ways and the general way of a
        candidate.
        """
        if _listens(self.bypassed):
            return plain_route(self.candidate)
        if _listens(self.recipe.bypassed):
            return self._replace(recipe=Recipe(self.recipe.layers))
        return self


def plain_route(candidate: nn.Module) -> Route:
    """Call ``candidate``, add what it returns."""
    return Route(candidate, Recipe((candidate,)), None, (), False)


def make_route(candidate: nn.Module, forms: Mapping[type[nn.Module], Form] = FORMS) -> Route:
    """Choose how ``candidate`` is evaluated, by its structure alone.

    Args:
        candidate: any module that maps ``(N, C, H, W)`` to ``(N, C', H', W')``.
        forms: what is known of classes, by exact class: a subclass may compute something else.
    """
    if forms.get(type(candidate)) == "zero" and not _is_patched(candidate):
        return Route(candidate, Recipe((candidate,)), None, (candidate,), True)
    tail = find_tail(candidate, forms)
    if tail is None:
        return plain_route(candidate)
    recipe = make_recipe(tail.layers)
    return Route(candidate, recipe, tail.norm, tail.bypassed, False)


def find_tail(module: nn.Module, forms: Mapping[type[nn.Module], Form] = FORMS) -> Tail | None:
    """Cut ``module`` before the BatchNorm2d it ends in; None when it is not known to end in one."""
    if _is_patched(module):
        return None
    if _is_batch_norm(module):
        return Tail((), module, (module,))  # type: ignore[arg-type]  # just checked
    if children := _children_in_a_row(module, forms):
        return _join(module, children, forms)
    if forms.get(type(module)) == "factorized_reduce" and _is_batch_norm(
        bn := module._modules.get("bn")
    ):
        relu: Any = module.relu
        return Tail((relu, TwoHalves(module)), bn, (module, bn))  # type: ignore[arg-type]
    if _follows_protocol(type(module)):
        return _split_by_protocol(module)
    return None


def _children_in_a_row(module: nn.Module, forms: Mapping[type[nn.Module], Form]) -> list[nn.Module]:
    """What ``module`` calls one after the other and nothing else; empty if that is not known."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        return list(module)
    names = forms.get(type(module))
    children = [module._modules.get(name) for name in names] if isinstance(names, tuple) else []
    return children if all(isinstance(m, nn.Module) for m in children) else []  # type: ignore[return-value]


def _join(
    outer: nn.Module, children: Sequence[nn.Module], forms: Mapping[type[nn.Module], Form]
) -> Tail | None:
    """The tail of the last child behind the layers of the others."""
    *before, last = children
    tail = find_tail(last, forms)
    if tail is None:
        return None
    layers: list[Layer] = []
    bypassed = [outer]
    while before:
        child = before.pop(0)
        inside = [] if _is_patched(child) else _children_in_a_row(child, forms)
        if inside:
            bypassed.append(child)
            before[:0] = inside
        else:
            layers.append(child)
    return Tail((*layers, *tail.layers), tail.norm, (*bypassed, *tail.bypassed))


def _is_patched(module: nn.Module) -> bool:
    """Whether somebody gave this one instance a ``forward`` of its own."""
    return "forward" in module.__dict__


def _is_batch_norm(module: object) -> bool:
    """A BatchNorm2d that computes what BatchNorm2d does; SyncBatchNorm, say, does not."""
    return (
        isinstance(module, nn.BatchNorm2d)
        and type(module).forward is nn.BatchNorm2d.forward
        and not _is_patched(module)
    )


def _follows_protocol(cls: type[nn.Module]) -> bool:
    """Whether ``split_batch_norm`` speaks for this class's ``forward``.

    A subclass that overrides ``forward`` alone inherits a method that describes another class.
    """
    if not callable(getattr(cls, "split_batch_norm", None)):
        return False
    owners = [
        next(i for i, c in enumerate(cls.__mro__) if name in vars(c))
        for name in ("split_batch_norm", "forward")
    ]
    return owners[0] <= owners[1]


def _split_by_protocol(module: nn.Module) -> Tail | None:
    body, norm = module.split_batch_norm()  # type: ignore[operator]  # callable: _follows_protocol
    if not callable(body) or not any(norm is m for m in module.modules()):
        raise TypeError(
            f"{type(module).__name__}.split_batch_norm: expected (callable, BatchNorm2d of this "
            f"module), but got ({type(body).__name__}, {type(norm).__name__})"
        )
    # A norm of another class (converted to SyncBatchNorm, say) leaves the candidate whole. Which
    # containers the body steps over is its own affair, so a hook on any module inside counts.
    return Tail((body,), norm, tuple(module.modules())) if _is_batch_norm(norm) else None


def hook_tables(module: nn.Module) -> Iterator[dict[int, Callable[..., object]]]:
    """The hooks that calling ``module`` would fire; the tables stay the same objects for life."""
    yield module._forward_hooks
    yield module._forward_pre_hooks
    yield module._backward_hooks
    yield module._backward_pre_hooks


def has_global_hook() -> bool:
    """Whether a hook is registered for every module (``torch.nn.modules.module.register_...``)."""
    return bool(_module._has_any_global_hook())


def _listens(modules: Sequence[nn.Module]) -> bool:
    """Whether a hook waits for the call of one of ``modules``."""
    return len(modules) > 0 and (has_global_hook() or any(any(hook_tables(m)) for m in modules))
