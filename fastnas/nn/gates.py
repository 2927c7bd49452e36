# SPDX-License-Identifier: Apache-2.0
"""Binary gates (ProxylessNAS, arXiv 1812.00332, section 3.2): which candidate of an edge runs.

``draw_gates`` draws for a whole network by one call and one transfer to the host;
``GatedMixedOp`` runs what was drawn; ``rescale`` ends a two-path step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastnas.ops import sample_paths

__all__ = ["Gate", "Gates", "draw_gates", "pair_importance", "rescale"]

Paths = Literal["one", "two", "full"]
ZeroPolicy = Literal["exact", "skip"]


class Gate(NamedTuple):
    """The gate of one edge.

    Attributes:
        active: the candidate that runs.
        others: candidates that do not run, but whose gate gets a gradient.
        logits: ``[K]``, the edge's architecture parameters, or None where they get no gradient.
            Softmax over ``active`` and ``others`` gives the probabilities of the gradient.
        scale: 0-d factor of the gradient, None for 1.
    """

    active: int
    others: tuple[int, ...] = ()
    logits: Tensor | None = None
    scale: Tensor | None = None


class Gates(NamedTuple):
    """The gates of a network.

    Attributes:
        edges: one gate an edge.
        skipped: edges whose architecture parameters are to get no gradient of any kind.
        scale: ``[E]``, factor of each edge's gradient, None for 1.
    """

    edges: tuple[Gate, ...]
    skipped: tuple[int, ...] = ()
    scale: Tensor | None = None


def draw_gates(
    logits: Tensor,
    seed: int,
    step: int,
    *,
    paths: Paths = "one",
    counts: Sequence[int] | None = None,
    zeros: Sequence[int | None] | None = None,
    zero_policy: ZeroPolicy = "exact",
    importance: bool = False,
) -> Gates:
    """Draw the gates of all edges from ``softmax(logits)``, one candidate an edge.

    The draw is a function of the arguments (``ops.sample_paths``): the same on every device, on
    every rank and after every resume. It waits once for the device of ``logits``.

    Args:
        logits: ``[E, K]``, floating point; -inf marks a candidate that an edge does not have.
        seed: non-negative integer below 2^64.
        step: the same; another step, another draw.
        paths: what the gradient of the logits is to be estimated from. ``one``: nothing, for
            steps of the weights. ``full``: all candidates (equation 4). ``two``: a pair drawn
            without replacement, with renormalised probabilities (section 3.2.1).
        counts: number of candidates of each edge, the first ones of its row; None: all K.
        zeros: for each edge the number of its candidate that returns zeros, None where there is
            none.
        zero_policy: ``exact``: an edge whose zero candidate is active gets its gradient like any
            other. ``skip``: it gets none, as in the released code.
        importance: with ``two``, weigh the gradient of a pair by ``(p_a + p_b)^2 / P({a, b})``.
            Then its expectation is that of ``full`` where the gates' gradients do not depend on
            which path is active; without, it is not (1/2 to 1 of it, with uniform p).

    Raises:
        ValueError: an unknown mode or policy, or lists of another length than ``logits``.
        TypeError: ``logits`` are not floating point.
    """
    edges, width = logits.shape if logits.dim() == 2 else (0, 0)
    _check_choice("paths", paths, ("one", "two", "full"))
    _check_choice("zero_policy", zero_policy, ("exact", "skip"))
    for name, given in (("counts", counts), ("zeros", zeros)):
        if given is not None and len(given) != edges:
            raise ValueError(f"draw_gates: expected {edges} {name}, but got {len(given)}")
    live = logits.detach()
    if counts is not None:
        column = torch.arange(width, device=live.device)
        limits = torch.tensor(list(counts), device=live.device)
        live = live.masked_fill(column >= limits.unsqueeze(1), -torch.inf)
    drawn = sample_paths(live, seed, step, two=paths == "two")
    active, inactive = drawn.tolist()
    if paths == "one":
        return Gates(tuple(Gate(a) for a in active))
    scale = pair_importance(live, drawn.active, drawn.inactive) if importance else None
    gates, skipped = [], []
    for edge, row in enumerate(logits.unbind(0)):
        a = active[edge]
        if zero_policy == "skip" and zeros is not None and a == zeros[edge]:
            skipped.append(edge)
            gates.append(Gate(a))
            continue
        if paths == "full":
            others = tuple(k for k in range(width if counts is None else counts[edge]) if k != a)
        else:
            others = () if inactive[edge] < 0 else (inactive[edge],)
        gates.append(Gate(a, others, row, None if scale is None else scale[edge]))
    return Gates(tuple(gates), tuple(skipped), scale)


def pair_importance(logits: Tensor, active: Tensor, inactive: Tensor) -> Tensor:
    """``(p_a + p_b)^2 / P({a, b})`` of each edge's pair, 1 where there is no pair.

    ``P({a, b}) = p_a p_b (1 / (1 - p_a) + 1 / (1 - p_b))`` is the chance that two draws without
    replacement give that pair.

    Args:
        logits: ``[E, K]``, without gradient.
        active: ``[E]`` int64.
        inactive: ``[E]`` int64, -1 for none.

    Returns:
        ``[E]``.
    """
    p = torch.softmax(logits.detach(), dim=1)
    pair = torch.stack([active, inactive.clamp(min=0)], dim=1)
    a, b = p.gather(1, pair).unbind(1)
    chance = a * b * (1 / (1 - a) + 1 / (1 - b))
    return torch.where(inactive >= 0, (a + b) ** 2 / chance, torch.ones_like(a))


def rescale(row: Tensor, before: Tensor, pair: Sequence[int]) -> None:
    """Shift a pair's logits so that all other probabilities are what they were (section 3.2.1).

    ``delta = logsumexp(row[pair]) - logsumexp(before[pair])`` is taken off both, which leaves
    ``sum exp(row[pair])``, and with it the softmax' denominator, as before the step.

    Args:
        row: ``[K]``, logits after the step of the optimizer; changed in place.
        before: ``[K]``, logits before it.
        pair: the two candidates that were drawn.
    """
    with torch.no_grad():
        index = torch.tensor(list(pair), device=row.device)
        new, old = row[index], before[index]
        row[index] = new - (torch.logsumexp(new, 0) - torch.logsumexp(old, 0))


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(
            f"draw_gates: expected {name} to be one of {', '.join(choices)}, but got {value!r}"
        )
