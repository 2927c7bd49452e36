# SPDX-License-Identifier: Apache-2.0
"""sparse_connections: what it refuses, and how it says so."""

from __future__ import annotations

import math

import pytest
import torch
from ops_cases import raises

from fastnas.ops import sparse_connections

Z, B = torch.zeros(5, 3), torch.zeros(2)


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ((Z[0], B, (2, 3)), ValueError, ("alpha of shape (E, K) with K of 1 to 64", "got [3]")),
        ((torch.zeros(5, 65), B, (2, 3)), ValueError, ("K of 1 to 64", "got [5, 65]")),
        ((torch.zeros(5, 0), B, (2, 3)), ValueError, ("K of 1 to 64", "got [5, 0]")),
        ((Z.long(), B, (2, 3)), TypeError, ("floating-point alpha", "int64")),
        ((Z, B.long(), (2, 3)), TypeError, ("floating-point beta", "int64")),
        ((Z, B, (2, 2)), ValueError, ("in_degrees that sum to the 5 edges", "got [2, 2]")),
        ((Z, B, (0, 5)), ValueError, ("positive in_degrees", "got [0, 5]")),
        ((Z, B, (-1, 6)), ValueError, ("positive in_degrees", "got [-1, 6]")),
        ((Z, B, (5,)), ValueError, ("beta of shape [1] on cpu", "got [2]")),
        ((Z, B.view(1, 2), (2, 3)), ValueError, ("beta of shape [2]", "got [1, 2]")),
        ((torch.zeros(65, 3), torch.zeros(65), (1,) * 65), ValueError,
         ("at most 64 nodes in in_degrees", "got 65")),
        ((Z, B, (2, 3), 0.0), ValueError, ("positive, finite tau", "got 0.0")),
        ((Z, B, (2, 3), math.inf), ValueError, ("positive, finite tau", "got inf")),
        ((Z, B, (2, 3), math.nan), ValueError, ("positive, finite tau", "got nan")),
        ((Z, B, (2, 3), 1.0, "both"), ValueError, ("norm to be 'edge' or 'node'", "got 'both'")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) and isinstance(value[0], str) else "",
)  # fmt: skip
def test_refuses(arguments, error, parts):
    with raises(error, "sparse_connections: expected", *parts):
        sparse_connections(*arguments)


def test_the_raw_ops_check_their_arguments(device):
    forward = torch.ops.fastnas.sparse_connections
    backward = torch.ops.fastnas.sparse_connections_backward
    z, b = Z.to(device), B.to(device)
    for arguments, error, parts in (
        ((z[0], b, [2, 3], 1.0), ValueError, ("alpha of shape (E, K)", "[3]")),
        ((z.long(), b, [2, 3], 1.0), TypeError, ("alpha to be float32", "Long")),
        ((z, b.long(), [2, 3], 1.0), TypeError, ("beta to be float32", "Long")),
        ((z, b[:1], [2, 3], 1.0), ValueError, ("beta of shape [2]", "[1]")),
        ((z, b, [2, 4], 1.0), ValueError, ("sum to the 5 edges", "[2, 4]")),
        ((z, b, [2, 2], 1.0), ValueError, ("sum to the 5 edges", "[2, 2]")),
        ((z, b, [5, 0], 1.0), ValueError, ("positive in_degrees", "[5, 0]")),
        ((z, b, [2**62, 2**62], 1.0), ValueError, ("sum to the 5 edges",)),
        ((z, b, [2, 3], -1.0), ValueError, ("positive, finite tau", "-1")),
        ((z, b, [2, 3], math.nan), ValueError, ("positive, finite tau", "nan")),
        ((z, b, [1] * 65, 1.0), ValueError, ("at most 64 nodes", "65")),
    ):
        with raises(error, "sparse_connections: expected", *parts):
            forward(*arguments, False)
        with raises(error, "sparse_connections_backward: expected", *parts):
            backward(z, *arguments, False, False)
    with raises(ValueError, "sparse_connections_backward: expected grad of shape [5, 3]", "[4, 3]"):
        backward(z[1:], z, b, [2, 3], 1.0, False, False)
    with raises(TypeError, "sparse_connections_backward: expected grad to be", "Long"):
        backward(z.long(), z, b, [2, 3], 1.0, False, False)
