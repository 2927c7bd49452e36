# SPDX-License-Identifier: Apache-2.0
"""What a module's ``forward`` is made of, read off its compiled code without running it.

Running something shows what it did, not what it would do when a global variable, the gradient
mode or the time of day is another. So whatever a ``forward`` names must be known: tensor
functions of ``OPERATIONS``, a few builtins without side effects, settings of the module, and
functions of its own, which are read in turn.
"""

from __future__ import annotations

import builtins
import dis
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fastnas.nn.proof.settled import PLAIN, Place, idle_instructions, nested_codes

__all__ = ["EVERY_MODULE_HAS", "OPERATIONS", "Reading", "nested_codes", "own_classes", "read"]

EVERY_MODULE_HAS = frozenset(vars(nn.Module()))

_ARITHMETIC = (
    "add add_ sub sub_ mul mul_ neg sum matmul mm bmm mv dot einsum tensordot zeros zeros_like "
    "new_zeros arange"
)
_STRUCTURE = (
    "cat concat concatenate stack split chunk narrow select unbind view view_as reshape flatten "
    "unflatten permute transpose swapaxes movedim contiguous clone expand expand_as unsqueeze "
    "squeeze t index_select channel_shuffle detach data to type_as"
)
_FACTS = "shape size dim ndim device dtype"

OPERATIONS = frozenset(f"{_ARITHMETIC} {_STRUCTURE} {_FACTS}".split())
"""Functions and attributes of tensors that a weighted sum may be written with.

All results are polynomials in the entries of the arguments, or say nothing of them.
"""

_LISTS = frozenset(("append", "extend", "insert"))
_BUILTINS = (sum, zip, enumerate, range, len, list, tuple, reversed, super, int)
_CONSTANTS = (torch.dtype, torch.layout, torch.memory_format)
# Ways to keep something for later, to fetch something from elsewhere, or to hide an error.
_STATEMENTS = {
    "STORE_ATTR": "sets attributes",
    "DELETE_ATTR": "deletes attributes",
    "STORE_GLOBAL": "sets global variables",
    "DELETE_GLOBAL": "deletes global variables",
    "IMPORT_NAME": "imports modules",
    "LOAD_BUILD_CLASS": "defines classes",
    "SETUP_FINALLY": "has a try or with statement",
    "SETUP_WITH": "has a try or with statement",
    "PUSH_EXC_INFO": "has a try or with statement",
}
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")
_COMPARISONS = ("COMPARE_OP", "CONTAINS_OP", "IS_OP")
_BEFORE_A_JUMP = ("TO_BOOL", "UNARY_NOT", "COPY", "DUP_TOP", "EXTENDED_ARG", "NOP")


@dataclass(frozen=True)
class Reading:
    """What was read.

    Attributes:
        codes: the code of ``forward`` and of everything of its own that it may call.
        settings: the names among them that are settings, children or class attributes.
        numbers: the integers written in them.
        fault: why the code may do more than multiply, add and rearrange tensors; None if not.
        idle: what of the codes was not read, as it does not run with the defaults of arguments.
    """

    codes: tuple[CodeType, ...]
    settings: frozenset[str]
    numbers: frozenset[int]
    fault: str | None
    idle: frozenset[Place] = frozenset()


def own_classes(cls: type[nn.Module]) -> list[type]:
    """The classes that make ``cls`` differ from ``nn.Module``."""
    return [c for c in cls.__mro__ if c not in nn.Module.__mro__]


def read(module: nn.Module, defaults: Mapping[str, object] | None = None) -> Reading:
    """Read the ``forward`` of the module's class, and what it calls.

    Args:
        module: somebody's.
        defaults: arguments that have these values in all calls that it is read for.
    """
    reader = _Reader(module, defaults or {})
    reader.read_forward()
    return Reading(
        tuple(code for f in reader.functions for code in nested_codes(f.__code__)),
        frozenset(reader.settings),
        frozenset(reader.numbers),
        reader.fault(),
        reader.idle,
    )


class _Reader:
    """Walks from function to function."""

    def __init__(self, module: nn.Module, defaults: Mapping[str, object]) -> None:
        self.idle: frozenset[Place] = frozenset()
        self._defaults = defaults
        self.functions: dict[FunctionType, None] = {}
        self.settings: set[str] = set()
        self.numbers: set[int] = set()
        self.methods: dict[str, list[FunctionType]] = {}
        self._cls = type(module)
        self._own = set(vars(module)) - EVERY_MODULE_HAS | set(module._modules) | {"training"}
        for cls in own_classes(self._cls):
            for name, value in vars(cls).items():
                function = getattr(value, "__func__", value)  # of a static or class method
                if isinstance(function, FunctionType):
                    self.methods.setdefault(name, []).append(function)
                elif not name.startswith("__"):
                    self._own.add(name)
        self._faults: dict[str, dict[str, None]] = {}

    def read_forward(self) -> None:
        """Judge ``forward``, and whatever it may call."""
        forward = inspect.getattr_static(self._cls, "forward")
        if forward in self.methods.get("forward", []):
            self.idle = idle_instructions(forward.__code__, self._defaults)
            self.read_function(forward)
        else:
            self._blame("is not a function written in Python")

    def fault(self) -> str | None:
        """The first kind of fault, with all names of that kind."""
        for kind, names in self._faults.items():
            return f"its forward {kind}" + (f": {', '.join(names)}" if any(names) else "")
        return None

    def _blame(self, kind: str, name: str = "") -> None:
        self._faults.setdefault(kind, {})[name] = None

    def read_function(self, function: FunctionType) -> None:
        """Judge every name that ``function`` uses."""
        if function in self.functions:
            return
        self.functions[function] = None
        defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        if not all(isinstance(d, PLAIN) for d in defaults):
            self._blame("keeps values in default arguments", function.__name__)
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            if name != "__class__":  # of super()
                self._judge(name, _contents(cell))
        self._read_code(function.__code__, function.__globals__)

    def _read_code(self, code: CodeType, variables: dict[str, Any]) -> None:
        module: ModuleType | None = None  # that the instruction before this one loaded
        instructions = [i for i in dis.get_instructions(code) if i.opname != "EXTENDED_ARG"]
        for k, instruction in enumerate(instructions):
            operation, name = instruction.opname, instruction.argval
            if (id(code), instruction.offset) in self.idle:
                continue
            if isinstance(name, CodeType):
                self._read_code(name, variables)
            if operation in _STATEMENTS:
                self._blame(_STATEMENTS[operation], name if "ATTR" in operation else "")
            elif operation in _COMPARISONS and not _decides_a_jump(instructions[k + 1 :]):
                self._blame("computes with the result of a comparison")
            if operation in ("LOAD_CONST", "LOAD_SMALL_INT") and type(name) is int:
                self.numbers.add(name)
            if operation in ("LOAD_GLOBAL", "LOAD_NAME"):
                value = variables.get(name, getattr(builtins, name, None))
                module = self._judge(name, value)
            elif operation in _ATTRIBUTES:
                if module is not None:
                    module = self._judge(name, getattr(module, name, None))
                else:
                    self._judge_attribute(name)
            elif module is not None:
                self._blame("passes a module on", module.__name__)
                module = None

    def _judge(self, name: str, value: object) -> ModuleType | None:
        """Judge a global variable or a part of a module; give it back if it is a module."""
        if isinstance(value, ModuleType):
            return value
        if any(value is known for known in _BUILTINS) or isinstance(value, _CONSTANTS):
            return None
        if isinstance(value, type) and issubclass(value, Exception):
            return None
        called = getattr(value, "__name__", name)
        if called in OPERATIONS and any(
            value is getattr(place, called, None) for place in (torch, functional)
        ):
            return None
        if isinstance(value, FunctionType) and not _is_of_torch(value):
            self.read_function(value)
        elif callable(value):
            self._blame("does more than the weighted sum", name)
        else:
            self._blame("reads variables from outside", name)
        return None

    def _judge_attribute(self, name: str) -> None:
        if name in self._own:
            self.settings.add(name)
        elif name in self.methods:
            for function in self.methods[name]:
                self.read_function(function)
        elif name not in OPERATIONS and name not in _LISTS:
            self._blame("does more than the weighted sum", name)


def _is_of_torch(function: FunctionType) -> bool:
    return (function.__module__ or "").split(".")[0] == "torch"


def _contents(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _decides_a_jump(following: list[dis.Instruction]) -> bool:
    """Whether a comparison before ``following`` only chooses what runs next."""
    after = next((i.opname for i in following if i.opname not in _BEFORE_A_JUMP), "")
    return "JUMP" in after and "_IF_" in after
