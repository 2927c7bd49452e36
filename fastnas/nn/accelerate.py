# SPDX-License-Identifier: Apache-2.0
"""Put our mixed ops and nodes into somebody else's supernet, where they are proved to be the same.

A mixed op is found by its shape: a module with a ``ModuleList`` called ``_ops``, or only one, and a
``forward(x, weights)``, with or without a partial-channel ``k`` and pool ``mp``. What its
``forward`` computes is not guessed: each distinct form is proved once (``fastnas.nn.proof``). Then
cells of such mixed ops are made to run node by node (``fastnas.nn.accelerate_cells``).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import FunctionType

import torch
from torch import nn

from fastnas.nn.accelerate_cells import NodeByNode, cell_obstacle, has_cell_shape, join, separate
from fastnas.nn.accelerate_report import CELL, Left, Report, Swapped
from fastnas.nn.lent import ORIGINAL, OURS, hand_over, lent_methods, lost_names
from fastnas.nn.mixed_op import MixedOp
from fastnas.nn.partial import PartialMixedOp
from fastnas.nn.proof import CellJudge, Verdict, form_of, judge
from fastnas.nn.proof.cell_parts import mixed_ops
from fastnas.nn.proof.reading import EVERY_MODULE_HAS, nested_codes, own_classes
from fastnas.nn.proof.signature import (
    arguments_needed,
    extra_defaults,
    list_name,
    parts_in_list,
    positional,
)

__all__ = ["Left", "Report", "Swapped", "accelerate", "restore"]

_NAMES = ("x", "weights")


def accelerate(model: nn.Module, *, cells: bool = True) -> Report:
    """Replace the mixed ops of ``model`` by fused ones, in place, wherever that changes nothing.

    Then its cells run node by node, which is faster than edge by edge, on the same condition.

    The replacement holds the very candidates of the original, in a ``ModuleList`` of the same name,
    so parameters, buffers, state-dict keys and optimizers built before stay as they are. Where its
    ``forward`` takes more than x and weights, with a number, a text or None as default, calls that
    give another value run the original. A mixed op stays in place if it has hooks or parts of its
    own, if its ``forward`` reads settings that may change later, or if it is not proved to be the
    weighted sum: in output, gradients of input, weights and parameters, and buffers, in training
    and in evaluation, with weights of any sign and with zeros among them (a mixed op that skips
    candidates of weight zero is replaced by one that does). Other methods of its class run on the
    replacement, which has the same candidates and settings; they may set ``k``, as where a search
    makes its edges wider.

    A cell is a module with mixed ops in ``_ops``, or in its only ``ModuleList`` (which may hold one
    list for each node), one from each of two inputs and each node to every later node, and a
    ``forward(s0, s1, weights)``, maybe with weights of edges and arguments with plain defaults
    (``drop_prob=0.0``) after them, that feeds the inputs to ``preprocess0`` and ``preprocess1``, or
    to the only two parts of other names, adds up the edges of each node and concatenates the last
    nodes. The weights are one matrix, or a list with one for each node. It stays the same object
    and has the same parts; only its class is a subclass of the former one, of the same name.
    Whenever it is called in another way than was proved (weights in a list of lists, paths to drop,
    hooks on its mixed ops, settings that changed since), it takes the ``forward`` that it had. It
    is left if it does more, if it has hooks, reads settings other than integers, names and
    switches, or draws random numbers, and if one of its mixed ops was left.

    The proof has two legs. In copies, in float64, both are run on random data and compared. And
    what the ``forward`` does beside calling its candidates is followed: it may multiply, add and
    rearrange tensors, ask whether a weight is zero, and branch as long as runs that agreed took
    every branch; a clamp, a global variable, the gradient mode or a branch on the batch size that
    no run takes leave the original in place. The model's state and the random generators stay as
    they are; a trace function (of a debugger, say) rests meanwhile.

    Not seen through, or not kept:

    * numbers computed from sizes that are the same for all sizes tried (``y + len(x) // 1000``),
    * code that is put in place of a method or function after the proof,
    * random numbers that a candidate draws only later, as a drop path of its own class that starts
      at zero: a cell draws them in another order then (``cells=False`` keeps it),
    * errors: an input that the original refuses may be taken by ours, and the other way round,
    * the dtype of the sum under ``autocast``, or with weights of a wider dtype: it is that of
      ``sum(w * op(x))`` however the original adds, and the memory format is that of the candidates,
    * NaN and infinity in ``x``: they do not come out of ``none`` (see ``MixedOp``),
    * calls from outside the model's classes by other keywords than ``x`` and ``weights``,
    * ``isinstance`` with the class of the original, and Python references to it other than its
      place in the tree: these keep the original, which works on the same parameters,
    * the class of a cell where it is compared by identity: it is a subclass now.

    Accelerate before ``torch.compile``: what is compiled already is left.

    Args:
        model: any module; mixed ops and cells are looked for at every depth.
        cells: False leaves the cells as they are.

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
    surroundings = _Surroundings(model)
    for name, module in list(model.named_modules()):
        if not _has_the_shape(module):
            continue
        reason = surroundings.obstacle(module) or _obstacle(module)
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
        swapped.append(Swapped(name, type(ours).__name__, *_count(ours)))
    for parent, child_name, child in _children(model):
        if id(child) in replacements:
            parent._modules[child_name] = replacements[id(child)]
    if cells:
        _join_cells(model, surroundings, swapped, left)
    return Report(tuple(swapped), tuple(left))


def _join_cells(
    model: nn.Module, surroundings: _Surroundings, swapped: list[Swapped], left: list[Left]
) -> None:
    """Let the cells of ``model`` run node by node, and tell of them in the lists."""
    judge_cell = CellJudge()
    for name, cell in list(model.named_modules()):
        if not has_cell_shape(cell):
            continue
        reason = surroundings.compiled(cell) or cell_obstacle(cell)
        if reason is not None:
            left.append(Left(name, reason))
            continue
        verdict = judge_cell(cell)
        if verdict.reason is not None:
            left.append(Left(name, verdict.reason, verdict.difference))
            continue
        join(cell, verdict)
        counts = [_count(edge) for edge in mixed_ops(cell)]
        swapped.append(Swapped(name, CELL, *map(sum, zip(*counts, strict=True))))


def restore(model: nn.Module) -> int:
    """Undo ``accelerate``: put the original mixed ops back, with the state they have now.

    Cells take the ``forward`` that they had.

    What was given to a replacement since goes with it: hooks, settings, other candidates.

    Args:
        model: a model that went through ``accelerate``, or a copy of one.

    Returns:
        How many mixed ops and cells were put back; 0 for a model that was never accelerated.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore: expected an nn.Module, but got {type(model).__name__}")
    restored: dict[int, nn.Module] = {}
    for parent, name, child in _children(model):
        original = child.__dict__.get(ORIGINAL)
        if original is not None:
            parent._modules[name] = original
            restored[id(child)] = child
    for child in restored.values():
        hand_over(child, vars(child)[ORIGINAL])
    joined = [module for module in model.modules() if isinstance(module, NodeByNode)]
    for cell in joined:
        separate(cell)
    return len(restored) + len(joined)


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
    candidates = parts_in_list(module)
    if type(module).__module__.split(".")[0] == "torch" or not len(candidates):
        return False
    # Lists of other names are many; what is in this one has to be called with x alone.
    if list_name(module) != "_ops" and not all(arguments_needed(c) == 1 for c in candidates):
        return False
    return arguments_needed(module) == 2


class _Surroundings:
    """What the rest of a model has to do with its mixed ops."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._compiled: set[int] = set()
        #: The strings in constant tuples: a call with keywords has their names in one.
        self._keywords: set[object] = set()
        for module in model.modules():
            if type(module).__name__ == "OptimizedModule":  # what torch.compile returns
                self._compiled |= {id(child) for child in module.children()}
        for cls in {c for module in model.modules() for c in own_classes(type(module))}:
            for function in vars(cls).values():
                if isinstance(function, FunctionType):
                    for code in nested_codes(function.__code__):
                        tuples = (c for c in code.co_consts if isinstance(c, tuple))
                        self._keywords.update(*tuples)

    def obstacle(self, module: nn.Module) -> str | None:
        """What keeps ``module`` in place because of where it is; None if nothing does."""
        if module is self._model:
            return "it is the model itself, which has no parent to hold another"
        if (reason := self.compiled(module)) is not None:
            return reason
        for ours, theirs in zip(_NAMES, _parameters(module), strict=False):
            if ours != theirs and theirs in self._keywords:
                return f"its argument {theirs}, which ours calls {ours}, may be passed by that name"
        return None

    def compiled(self, module: nn.Module) -> str | None:
        """What keeps ``module`` in place if it is compiled; None if it is not."""
        if id(module) in self._compiled or vars(module).get("_compiled_call_impl") is not None:
            return "it is compiled; accelerate a model before compiling it"
        return None


def _parameters(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def _obstacle(module: nn.Module) -> str | None:
    """What keeps ``module`` in place before anything is run; None if nothing does."""
    candidates = list_name(module)
    parts = [name for name in module._modules if name not in (candidates, "mp")]
    parts += [*module._parameters, *module._buffers]
    if parts:
        return f"it has parts besides its candidates: {', '.join(parts)}"
    if any(table for name, table in vars(module).items() if name.endswith("_hooks")):
        return "hooks are registered on it"
    if "forward" in vars(module):
        return "its forward was replaced on this instance"
    parameters = positional(module)
    if parameters is None or extra_defaults(parameters[2:]) is None:
        more = ", ".join(_parameters(module)[2:])
        return f"its forward takes more than x and weights, without a plain default: {more}"
    if any(map(_has_own_forward, module.modules())):
        return "the forward of a part was replaced on that instance, so that it cannot be copied"
    if lost := lost_names(type(module), PartialMixedOp):
        return f"its class defines what ours lacks: {', '.join(lost)}"
    if type(parts_in_list(module)) is not nn.ModuleList:
        return "its candidates are in a ModuleList of another class"
    if any(nn.parameter.is_lazy(t) for t in [*module.parameters(), *module.buffers()]):
        return "some of its parameters have no shape yet"
    return None


def _has_own_forward(module: nn.Module) -> bool:
    return "forward" in vars(module) and not isinstance(module, torch.jit.ScriptModule)


def _build(module: nn.Module, verdict: Verdict) -> MixedOp:
    """Our mixed op on the candidates of ``module`` itself."""
    ours = verdict.build(module)
    lent = lent_methods(type(module), MixedOp)
    for name, value in vars(module).items():
        # Settings that the rest of the model may read (``stride``, ``C``, ...).
        if name not in EVERY_MODULE_HAS | OURS and (name in lent or not hasattr(ours, name)):
            vars(ours)[name] = value
    # Not a child: the original must not appear in the tree beside its own candidates.
    vars(ours)[ORIGINAL] = module
    ours.training = module.training
    return ours


def _count(ours: MixedOp) -> tuple[int, int, int]:
    """Candidates with a fused BatchNorm, all of them, and those whose BatchNorm is not fused."""
    routes = ours._plan.routes
    fused = sum(route.norm is not None for route in routes)
    apart = sum(route.norm is None and _normalises(route.candidate) for route in routes)
    return fused, len(routes), apart


def _normalises(candidate: nn.Module) -> bool:
    return any(isinstance(m, nn.BatchNorm2d) for m in candidate.modules())
