# SPDX-License-Identifier: Apache-2.0
"""The architecture parameters of a search, and what several methods make of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastnas.spaces.base import CellSpec

__all__ = ["ArchParameters", "normal_logits", "softmax_per_node"]


class ArchParameters(nn.Module):
    """The architecture parameters of a search, in one module.

    ``alpha_<kind>`` holds the logits of the candidates, ``[edges, candidates]``; ``beta_<kind>``
    those of the edges (or thresholds, as the method has it). They are in the ``state_dict``, move
    with ``.to()``, and belong to no supernet, so that an optimizer of ``supernet.parameters()``
    never touches them.

    Where edges differ in candidates, ``alpha_<kind>`` is a list: an edge can lack a gradient then.

    Args:
        alphas: initial values by cell kind, ``[edges, candidates]``.
        betas: initial values by cell kind; none for a method without them.
        counts: by cell kind, the number of candidates of each edge, the first ones of its row;
            None, or a kind that is not there: all of them, in one parameter.
    """

    def __init__(
        self,
        alphas: Mapping[str, Tensor],
        betas: Mapping[str, Tensor] | None = None,
        counts: Mapping[str, Sequence[int] | None] | None = None,
    ) -> None:
        super().__init__()
        self._kinds = tuple(alphas)
        self._width = {kind: value.shape[1] for kind, value in alphas.items()}
        for kind, value in alphas.items():
            ragged = (counts or {}).get(kind)
            if ragged is None:
                self.register_parameter(f"alpha_{kind}", nn.Parameter(value))
                continue
            rows = (row[:n].clone() for row, n in zip(value, ragged, strict=True))
            self.add_module(f"alpha_{kind}", nn.ParameterList(rows))
        for kind, value in (betas or {}).items():
            self.register_parameter(f"beta_{kind}", nn.Parameter(value))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The cell kinds."""
        return self._kinds

    def alpha(self, kind: str) -> Tensor:
        """The candidates' logits of one cell kind, ``[edges, candidates]``.

        -inf stands where an edge has no such candidate, so that softmax gives 0 there.
        """
        found = getattr(self, f"alpha_{kind}")
        if not isinstance(found, nn.ParameterList):
            return found
        width = self._width[kind]
        return torch.stack(
            [nn.functional.pad(row, (0, width - len(row)), value=-torch.inf) for row in found]
        )

    def rows(self, kind: str) -> list[Tensor]:
        """The parameters of each edge, where each has its own.

        Raises:
            ValueError: the edges of that kind share one parameter.
        """
        found = getattr(self, f"alpha_{kind}")
        if not isinstance(found, nn.ParameterList):
            raise ValueError(f"rows: the edges of kind {kind!r} share one parameter")
        return list(found)

    def beta(self, kind: str) -> nn.Parameter:
        """The edges' logits of one cell kind."""
        return self.get_parameter(f"beta_{kind}")

    def entropy(self) -> dict[str, float]:
        """Mean entropy of ``softmax(alpha)`` over the edges of each cell kind, in nats."""
        with torch.no_grad():
            return {kind: _mean_entropy(self.alpha(kind)).item() for kind in self.kinds}


def normal_logits(*shape: int, std: float = 1e-3) -> Tensor:
    """Logits drawn from N(0, std^2): nearly uniform weights, ties broken."""
    return std * torch.randn(*shape)


def softmax_per_node(beta: Tensor, spec: CellSpec) -> Tensor:
    """Softmax over the incoming edges of each node; ``beta`` and the result are ``[edges]``."""
    return torch.cat([torch.softmax(beta[rows], dim=0) for rows in spec.node_slices])


def _mean_entropy(logits: Tensor) -> Tensor:
    # entr(0) is 0, also where a logit is -inf.
    return torch.special.entr(torch.softmax(logits.float(), dim=-1)).sum(dim=-1).mean()
