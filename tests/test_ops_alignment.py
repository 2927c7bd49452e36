# SPDX-License-Identifier: Apache-2.0
"""Operands that fill whole vectors, but start at an address that no vector load may have."""

from __future__ import annotations

import ops_cases as cases
import pytest
import torch
from ops_calls import CALLS, WITHOUT_IMAGES

SHAPE = (2, 8, 4, 8)
OPS = [name for name in CALLS if " of " not in name and name not in WITHOUT_IMAGES]


def misaligned(t):
    """A copy in the same format, one element off what an allocator gives."""
    whole = t.new_empty(t.numel() + 1)
    view = whole.as_strided(t.shape, t.stride(), 1)
    return view.copy_(t.detach()).requires_grad_(t.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.ids)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("name", OPS)
def test_each_operand_may_be_misaligned(name, layout, dtype, device, tolerances):
    call = CALLS[name](device, layout=layout, dtype=dtype, shape=SHAPE)
    expected = call.run(call.inputs)
    for k in range(len(call.inputs)):
        inputs = [misaligned(t) if i == k else t for i, t in enumerate(call.inputs)]
        for i, (a, b) in enumerate(zip(call.run(inputs), expected, strict=True)):
            cases.assert_near(a, b, tolerances, f"result {i} with input {k} misaligned")
