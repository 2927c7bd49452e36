# SPDX-License-Identifier: Apache-2.0
"""What of a function never runs while some of its arguments have their default values.

A cell may drop paths when it is told to (``drop_prob=0.0``), a mixed op run one candidate alone
(``selected_idx=None``). Called without these it does the ordinary thing, and only that is proved:
for any other value the original runs. So jumps that nothing but such an argument decides are
followed one way, and what they lead around is not looked at.
"""

from __future__ import annotations

import dis
import operator
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, NoneType
from typing import Any

__all__ = ["PLAIN", "Place", "idle_instructions", "is_conditional", "nested_codes"]

PLAIN = (bool, int, float, str, NoneType)
"""Types of defaults that can be compared with what is given later."""

Place = tuple[int, int]
"""The identity of a code object, which is compared by value and hashed slowly; an offset in it."""

_LOADS = ("LOAD_FAST", "LOAD_DEREF", "LOAD_CLASSDEREF")
_CONSTANTS = ("LOAD_CONST", "LOAD_SMALL_INT")
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    ">=": operator.ge,
}
_JUMPS = frozenset((*dis.hasjrel, *dis.hasjabs))
_ONE_WAY = ("JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_ABSOLUTE", "JUMP_BACKWARD_NO_INTERRUPT")
_ENDS = ("RETURN_VALUE", "RETURN_CONST", "RAISE_VARARGS", "RERAISE")
_UNKNOWN = object()


def nested_codes(code: CodeType) -> Iterator[CodeType]:
    """``code`` and that of the functions and comprehensions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from nested_codes(constant)


def is_conditional(instruction: dis.Instruction) -> bool:
    """Whether one of two instructions follows."""
    name = instruction.opname
    return name == "FOR_ITER" or ("JUMP" in name and "_IF_" in name)


def idle_instructions(code: CodeType, values: Mapping[str, object]) -> frozenset[Place]:
    """What does not run, and the jumps that always go the same way.

    Args:
        code: of a function; those inside it count as well.
        values: those of some of its arguments.
    """
    fixed = {n: v for n, v in values.items() if not any(_stores(c, n) for c in nested_codes(code))}
    return frozenset(_idle_places(code, fixed))


def _idle_places(code: CodeType, fixed: Mapping[str, object]) -> Iterator[Place]:
    for offset in _idle(code, fixed):
        yield id(code), offset
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _idle_places(
                inner, {n: v for n, v in fixed.items() if n in inner.co_freevars}
            )


def _idle(code: CodeType, fixed: Mapping[str, object]) -> set[int]:
    """Offsets in ``code`` alone, given what ``fixed`` variables are."""
    flow = _Flow(code)
    settled = {
        i: way
        for i in range(len(flow.instructions))
        if (way := _settled_way(flow, i, fixed)) is not None
    }
    if not settled:
        return set()
    # What neither reaches, as handlers of exceptions, is none of this function's business.
    idle = flow.reached({}) - flow.reached(settled)
    return {flow.instructions[i].offset for i in idle | settled.keys()}


class _Flow:
    """The instructions of a code object, and what may follow each."""

    def __init__(self, code: CodeType) -> None:
        everything = list(dis.get_instructions(code))
        self.instructions = [i for i in everything if i.opname not in ("EXTENDED_ARG", "CACHE")]
        # A jump may lead to an EXTENDED_ARG, which belongs to the instruction after it.
        self._numbers: dict[int, int] = {}
        number = 0
        for instruction in everything:
            self._numbers[instruction.offset] = number
            number += instruction.opname not in ("EXTENDED_ARG", "CACHE")
        #: Numbers of those that are not only reached from the one before.
        self.targets = {self._numbers[i.argval] for i in everything if i.opcode in _JUMPS}

    def reached(self, settled: Mapping[int, bool]) -> set[int]:
        """Numbers of the instructions that the first one leads to, apart from exceptions.

        Args:
            settled: for the number of a jump, whether it is taken.
        """
        reached: set[int] = set()
        waiting = [0]
        while waiting:
            i = waiting.pop()
            if i not in reached and i < len(self.instructions):
                reached.add(i)
                waiting += self._following(i, settled.get(i))
        return reached

    def _following(self, i: int, jumps: bool | None) -> Iterator[int]:
        instruction = self.instructions[i]
        if instruction.opname in _ENDS:
            return
        if instruction.opcode in _JUMPS and jumps is not False:
            yield self._numbers[instruction.argval]
        if instruction.opname not in _ONE_WAY and jumps is not True:
            yield i + 1


def _stores(code: CodeType, name: str) -> bool:
    """Whether ``code`` gives the variable ``name`` another value."""
    for instruction in dis.get_instructions(code):
        operation, variables = instruction.opname, instruction.argval
        if operation == "STORE_FAST_LOAD_FAST":
            variables = variables[:1]
        if "STORE" in operation or "DELETE" in operation:
            if name in (variables if isinstance(variables, tuple) else (variables,)):
                return True
    return False


def _settled_way(flow: _Flow, i: int, fixed: Mapping[str, object]) -> bool | None:
    """Whether instruction ``i`` jumps; None if it is no jump or more than ``fixed`` decides."""
    jump = flow.instructions[i]
    if not is_conditional(jump) or jump.opname == "FOR_ITER":
        return None
    value = _condition(flow, i, fixed)
    if value is _UNKNOWN:
        return None
    if jump.opname.endswith("NOT_NONE"):
        return value is not None
    if jump.opname.endswith("NONE"):
        return value is None
    return bool(value) is ("IF_TRUE" in jump.opname)


def _condition(flow: _Flow, i: int, fixed: Mapping[str, object]) -> Any:
    """What instruction ``i``, a jump, asks for the truth of."""
    instructions, start = flow.instructions, i
    while start > 0 and (
        instructions[start - 1].opname in ("TO_BOOL", "NOP", "DUP_TOP")
        or (instructions[start - 1].opname == "COPY" and instructions[start - 1].arg == 1)
    ):
        start -= 1
    found: Any = _UNKNOWN
    last = instructions[start - 1] if start else None
    if last is None:
        return _UNKNOWN
    if last.opname in ("COMPARE_OP", "IS_OP") and start >= 3:
        start -= 3
        found = _compared(last, *(_loaded(instructions[start + n], fixed) for n in (0, 1)))
    else:
        start -= 1
        found = _loaded(last, fixed)
    if found is _UNKNOWN or flow.targets & set(range(start + 1, i + 1)):
        return _UNKNOWN
    return found


def _loaded(instruction: dis.Instruction, fixed: Mapping[str, object]) -> Any:
    """What ``instruction`` puts on the stack, if it is nothing but a known value."""
    operation, value = instruction.opname, instruction.argval
    if operation in _CONSTANTS:
        return value if isinstance(value, PLAIN) else _UNKNOWN
    if operation.startswith(_LOADS) and isinstance(value, str):
        return fixed.get(value, _UNKNOWN)
    if operation == "STORE_FAST_LOAD_FAST":
        return fixed.get(value[1], _UNKNOWN)
    return _UNKNOWN


def _compared(instruction: dis.Instruction, left: Any, right: Any) -> Any:
    if left is _UNKNOWN or right is _UNKNOWN:
        return _UNKNOWN
    if instruction.opname == "IS_OP":
        # Numbers and texts that are equal need not be the same object.
        if left is not None and right is not None:
            return _UNKNOWN
        return (left is right) is not bool(instruction.arg)
    try:
        return _COMPARE[instruction.argval](left, right)
    except (KeyError, TypeError):
        return _UNKNOWN
