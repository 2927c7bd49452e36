# SPDX-License-Identifier: Apache-2.0
"""Growth of a loss term's weight over a search, by name ("continuation" functions of DA2S).

With e = 1, 2, ..., T the number of the epoch, D the delay and U = T - D. The constants are those of
the released code at T = 50 and D = 8, which is where it uses them; for other lengths those that
stand for a share of the search are scaled with it, which is our choice.

| name | value | delayed, 0 up to e = D |
| --- | --- | --- |
| const | 1 | 1 |
| linear | (e - 1) / (T - 1) | (e - D) / U |
| log | ln e / ln T | ln(e - D + 1) / ln U |
| exp | 2^(10 (e - T) / T) | the same |
| step | 0, 1/3, 2/3, 1 in the quarters of T | in the quarters of U |
| sigmoid | 1 / (1 + exp(5 - 10 e / T)) | 1 / (1 + exp(5.25 - 10.5 (e - D) / U)) |

The delayed log passes 1 in the last epoch (1.0063 for 50 epochs), as in the released code.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

__all__ = ["ContinuationName", "continuation"]

ContinuationName = Literal[
    "const",
    "linear",
    "log",
    "exp",
    "step",
    "sigmoid",
    "delayed-const",
    "delayed-linear",
    "delayed-log",
    "delayed-exp",
    "delayed-step",
    "delayed-sigmoid",
]


def continuation(name: str, epoch: int, epochs: int, delay: int = 8) -> float:
    """The factor of a loss term in one epoch.

    Args:
        name: one of the names above, the delayed ones with ``delayed-`` before them.
        epoch: e, from 1.
        epochs: T.
        delay: D. In a search that is no longer a delayed term never sets in.

    Raises:
        ValueError: an unknown name, or an epoch outside 1 to T.

    Example:
        >>> round(continuation("delayed-log", 25, 50), 6)
        0.773309
    """
    if name not in get_args(ContinuationName):
        names = ", ".join(get_args(ContinuationName))
        raise ValueError(f"continuation: expected one of {names}, but got {name!r}")
    if not 1 <= epoch <= epochs:
        raise ValueError(f"continuation: expected an epoch from 1 to {epochs}, but got {epoch}")
    shape = name.removeprefix("delayed-")
    if shape == name:
        return _undelayed(shape, epoch, epochs)
    return 0.0 if epoch <= delay else _delayed(shape, epoch, epochs, delay)


def _undelayed(shape: str, e: int, epochs: int) -> float:
    if shape == "const" or epochs == 1:
        return 1.0
    if shape == "linear":
        return (e - 1) / (epochs - 1)
    if shape == "log":
        return math.log(e) / math.log(epochs)
    if shape == "exp":
        return 2.0 ** (10 * (e - epochs) / epochs)
    if shape == "step":
        return _quarters(e, epochs)
    return 1 / (1 + math.exp(5 - 10 * e / epochs))


def _delayed(shape: str, e: int, epochs: int, delay: int) -> float:
    length = epochs - delay
    if shape == "const" or length == 1:
        return 1.0
    if shape == "linear":
        return (e - delay) / length
    if shape == "log":
        return math.log(e - delay + 1) / math.log(length)
    if shape == "exp":
        return 2.0 ** (10 * (e - epochs) / epochs)
    if shape == "step":
        return _quarters(e - delay, length)
    return 1 / (1 + math.exp(5.25 - 10.5 * (e - delay) / length))


def _quarters(e: int, length: int) -> float:
    return (4 * (e - 1) // length) / 3
