# SPDX-License-Identifier: Apache-2.0
"""Which candidates are known in their parts, and may be cut before their norm."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastnas.nn.batch_norm import FORMS, Form, make_route
from fastnas.nn.proof.observation import Random, clean_copy, is_same
from fastnas.nn.proof.reading import Reading, read
from fastnas.nn.proof.stand_ins import StandIn
from fastnas.nn.proof.watch import Watch, opaque

__all__ = ["proved_forms"]


def proved_forms(candidates: nn.ModuleList, x: Tensor) -> dict[type[nn.Module], Form]:
    """The classes in the candidates that look like a ``Form`` and return the same.

    Args:
        candidates: of a mixed op.
        x: an input that they were run on.
    """
    forms: dict[type[nn.Module], Form] = {}
    refuted = set()
    numbers = set(map(id, candidates))
    for part in (part for candidate in candidates for part in candidate.modules()):
        cls = type(part)
        if cls in FORMS or cls in refuted or not _is_somebodys(part):
            continue
        reading = read(part)
        form = _guess(part, reading)
        if id(part) not in numbers and not isinstance(form, tuple):
            continue  # nobody knows what it takes, and nothing is cut inside it
        if form is not None and _is_proved(part, form, reading, x):
            forms[cls] = form
        else:
            refuted.add(cls)
    return {cls: form for cls, form in forms.items() if cls not in refuted}


def _is_somebodys(part: nn.Module) -> bool:
    """Whether the class of ``part`` is neither PyTorch's nor compiled."""
    return type(part).__module__.split(".")[0] != "torch" and not isinstance(
        part, torch.jit.ScriptModule
    )


def _guess(part: nn.Module, reading: Reading) -> Form | None:
    """What a module seems to be, by the names of its children and of what its forward reads."""
    children = set(part._modules)
    if part._parameters or part._buffers:
        return None
    if type(part).__call__ is not nn.Module.__call__:
        return None
    if not reading.settings <= children | {"C_in", "C_out", "stride"}:
        return None
    if type(part).__name__ == "Zero" and not children:
        return "zero"
    if children in _FACTORIZED_REDUCE:
        return "factorized_reduce"
    return tuple(part._modules) if children and None not in part._modules.values() else None


_FACTORIZED_REDUCE = ({"relu", "conv_1", "conv_2", "bn"}, {"relu", "conv1", "conv2", "bn"})


class _Twin(NamedTuple):
    """A copy of a candidate, and what its forward should return for an input, in either mode."""

    module: nn.Module
    expect: Callable[[Tensor, bool], Tensor | float]
    #: Whether it has to; otherwise it only helps to take a branch.
    required: bool


def _is_proved(candidate: nn.Module, form: Form, reading: Reading, x: Tensor) -> bool:
    """Whether ``candidate`` is what it seems to be."""
    watch, random = Watch(reading), Random(x.device, x.dtype)
    for twin in _twins(candidate, form, x, random):
        for training, batch in product((True, False), (1, len(x))):
            twin.module.train(training)
            try:
                random.seed()
                with watch.run():
                    y = twin.module.forward(x[:batch])  # a call would fire hooks
                random.seed()
                same = _is_same(y, twin.expect(x[:batch], training))
            except Exception:  # somebody else's code, maybe with a setting it was not built for
                same = False
            if same:
                watch.keep()
            elif twin.required:
                return False
    return watch.fault() is None


def _is_same(y: Tensor, expected: Tensor | float) -> bool:
    if not isinstance(expected, Tensor):
        return bool((y == expected).all())
    return y.requires_grad == expected.requires_grad and is_same(y, expected)


def _twins(candidate: nn.Module, form: Form, x: Tensor, random: Random) -> Iterator[_Twin]:
    """Copies to run; ``x`` is an input of the candidate."""
    if form == "zero":
        yield _Twin(copy.copy(candidate), lambda x, training: 0.0, True)
        for stride in (1, 2):  # it has a branch for each, and takes only its own
            twin = copy.copy(candidate)
            vars(twin)["stride"] = stride
            yield _Twin(twin, lambda x, training: 0.0, False)
        return
    twin = clean_copy(candidate, x.dtype)
    if isinstance(form, tuple):
        shape = tuple(x.shape[1:])
        stand_ins = {name: StandIn(shape, shape, random) for name in form}
        vars(twin)["_modules"] = stand_ins
        in_a_row = nn.Sequential(*stand_ins.values())
        yield _Twin(twin, lambda x, training: in_a_row(x), True)
        return
    for child in twin.children():
        opaque(child)
    route = make_route(clean_copy(candidate, x.dtype), {type(candidate): form})

    def cut(x: Tensor, training: bool) -> Tensor:
        assert route.norm is not None
        route.candidate.train(training)
        for layer in route.layers:
            x = layer(x)
        return route.norm(x)

    yield _Twin(twin, cut, True)
