# SPDX-License-Identifier: Apache-2.0
"""Which ways the conditional jumps of some functions went, as the interpreter ran them."""

from __future__ import annotations

import dis
import sys
from collections import defaultdict
from collections.abc import Iterable
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

from fastnas.nn.proof.settled import Place, is_conditional

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Branches"]


class Branches:
    """Watches code objects while its ``with`` block runs, and tells what they never did.

    It sets the trace function of the thread, as debuggers do, and puts the former one back.
    """

    def __init__(self, codes: Iterable[CodeType], idle: frozenset[Place] = frozenset()) -> None:
        """Watch ``codes``, apart from what is ``idle`` in them."""
        # By identity: a code object is compared by value, and hashed slowly.
        self._codes = {id(code): code for code in codes}
        self._idle = idle
        # Jumps that always go one way do run.
        self._asleep = {
            (id(code), instruction.offset)
            for code in self._codes.values()
            for instruction in dis.get_instructions(code)
            if (id(code), instruction.offset) in idle and not is_conditional(instruction)
        }
        self._woken = False
        self._kept: set[tuple[int, int, int]] = set()
        self._new: set[tuple[int, int, int]] = set()

    def __enter__(self) -> Self:
        self._new = set()
        self._former = sys.gettrace()
        sys.settrace(self._on_call)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(self._former)

    def _on_call(self, frame: FrameType, event: str, arg: object) -> Any:
        key = id(frame.f_code)
        if key not in self._codes:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        last = -1

        def on_opcode(frame: FrameType, event: str, arg: object) -> Any:
            nonlocal last
            if event == "opcode":
                self._new.add((key, last, frame.f_lasti))
                if (key, frame.f_lasti) in self._asleep:
                    self._woken = True
                last = frame.f_lasti
            return on_opcode

        return on_opcode

    def keep(self) -> None:
        """Count what the last ``with`` block saw; a block that is not kept counts for nothing."""
        self._kept |= self._new

    def not_taken(self) -> str | None:
        """A place where one way was never taken, as "file, line n"; None if there is none.

        A way that does nothing but raise need not be taken. What was idle and ran all the same has
        been called with other arguments.
        """
        if self._woken:
            return "where arguments have other values than their defaults"
        ways: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
        for key, origin, target in self._kept:
            ways[key, origin].add(target)
        # With every way of its callers taken, a function that was not called never will be.
        called = {key for key, _ in ways}
        for key, code in self._codes.items():
            if key not in called:
                continue
            instructions = list(dis.get_instructions(code))
            for i, jump in enumerate(instructions[:-1]):
                if not is_conditional(jump) or (key, jump.offset) in self._idle:
                    continue
                taken = ways[key, jump.offset]
                open_ways = {instructions[i + 1].offset, jump.argval} - taken
                if len(taken) < 2 and not all(_only_raises(instructions, w) for w in open_ways):
                    return _place(code, jump.offset)
        return None


def _only_raises(instructions: list[dis.Instruction], start: int) -> bool:
    """Whether the code from offset ``start`` on runs straight into a ``raise``."""
    for instruction in instructions:
        name = instruction.opname
        if instruction.offset < start:
            continue
        if name == "RAISE_VARARGS":
            return True
        if any(word in name for word in ("JUMP", "RETURN", "YIELD", "FOR_ITER")):
            return False
    return False


def _place(code: CodeType, offset: int) -> str:
    """Where ``offset`` is in the source, for people."""
    lines = [line for start, end, line in code.co_lines() if start <= offset < end and line]
    file = code.co_filename.replace("\\", "/").rsplit("/", 1)[-1]
    return f"{file}, line {lines[0] if lines else code.co_firstlineno}"
