# SPDX-License-Identifier: Apache-2.0
"""What of a function does not run while its arguments have their defaults."""

from __future__ import annotations

import dis

import pytest
import torch

from fastnas.nn.proof.settled import idle_instructions, nested_codes


def _settled(x, p=0.0):
    if p > 0 and x.a:
        return x.b
    return x.c


def _settled_by_none(x, p=None):
    if p is not None:
        x.a()
    y = x.b if p is None else x.c
    while p:
        y.d()
    return y


def _settled_inside(x, p=0):
    return [y.a if p else y.b for y in x] + [y.c for y in x if not p]


def _reassigned(x, p=0.0):
    for _ in x:
        if p > 0:
            return x.a
        p = p + 1
    return x.b


def _reassigned_inside(x, p=0.0):
    def change():
        nonlocal p
        p = x.c

    change()
    return x.a if p else x.b


def _another_inside(x, p=0.0):
    return (lambda p: [y.a if p else y.b for y in x])(x.c)


def _decided_by_more(x, p=0.0):
    if (x.a if x.b else p) > 0:
        return x.c
    if 0 <= p < x.d:
        return x.e
    return x.f


def _make_far_away():
    """So much between a jump and where it leads that its offset does not fit into a byte."""
    lines = ["def _far_away(x, p=None):", "    y = x", "    if (x if y.a else p) is None:"]
    lines += ["        y = [y, x]"] * 200 + ["        return x.b", "    return x.c"]
    made: dict[str, object] = {}
    exec("\n".join(lines), made)
    return made["_far_away"]


def _from_a_generator(x, p=0.0):
    def terms():
        if not p:
            yield from x.a
        yield x.b

    return terms()


def _in_a_try(x, p=0.0):
    try:
        if p:
            return x.a
        return x.b
    except ValueError:
        return x.c


@pytest.mark.parametrize(
    ("function", "value", "names"),
    [
        (_settled, 0.0, "c"),
        (_settled, 1.0, "abc"),
        (_settled, torch.ones(()), "abc"),
        (_settled_by_none, None, "b"),
        (_settled_by_none, 0, "ac"),
        (_settled_inside, 0, "bc"),
        (_settled_inside, 1, "a"),
        (_reassigned, 0.0, "ab"),
        (_reassigned_inside, 0.0, "abc"),
        (_another_inside, 0.0, "abc"),
        (_decided_by_more, 0.0, "abcdef"),
        (_make_far_away(), None, "abc"),
        (_from_a_generator, 0.0, "ab"),
        (_in_a_try, 0.0, "bc"),
    ],
)
def test_what_does_not_run_with_a_default(function, value, names):
    idle = idle_instructions(function.__code__, {"p": value})
    left = {
        i.argval
        for code in nested_codes(function.__code__)
        for i in dis.get_instructions(code)
        if (id(code), i.offset) not in idle and i.opname in ("LOAD_ATTR", "LOAD_METHOD")
    }
    assert left == set(names)
