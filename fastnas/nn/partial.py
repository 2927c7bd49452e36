# SPDX-License-Identifier: Apache-2.0
"""The mixed op of PC-DARTS: a part of the channels is mixed, the rest passes by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fastnas import ops
from fastnas.nn.batch_norm import FORMS, Form, has_global_hook, hook_tables
from fastnas.nn.candidates import DARTS_PRIMITIVES
from fastnas.nn.mixed_op import MixedOp, Weights

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["PartialMixedOp"]


class PartialMixedOp(MixedOp):
    """Mixed op on the first ``C / k`` channels, bypass of the others, channel shuffle.

    The partial channel connection of PC-DARTS (arXiv 1907.05737, section 3.2): the candidates are
    built for ``c = C / k`` channels and see channels ``0 .. c-1`` of the input. The others pass by,
    through a 2x2 max pool when the output is lower than the input. With ``z`` the two parts
    concatenated, ``out[:, o] = z[:, (o % k) * c + o // k]``. BatchNorms, weighted sum, pool,
    concatenation and shuffle are one fused call.

    Attribute names are the published ones: ``_ops``, ``mp`` (the pool) and ``k``. With ``k = 1``
    this is ``MixedOp``.

    Args:
        C: channels, in and out; a multiple of ``k``.
        stride: as in ``MixedOp``.
        k: one channel in ``k`` is mixed: 4 on CIFAR-10, 2 on ImageNet in the paper.
        primitives: as in ``MixedOp``.
        skip_zero: as in ``MixedOp``.

    Raises:
        ValueError: ``k`` below 1, or ``C`` is not a multiple of ``k``.

    Example:
        >>> edge = PartialMixedOp(16, stride=2, k=4)
        >>> weights = torch.softmax(torch.zeros(8), dim=-1)
        >>> edge(torch.randn(2, 16, 8, 8), weights).shape
        torch.Size([2, 16, 4, 4])
    """

    def __init__(
        self,
        C: int,
        stride: int,
        k: int = 4,
        primitives: Sequence[str] = DARTS_PRIMITIVES,
        *,
        skip_zero: bool = False,
    ) -> None:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"PartialMixedOp: k must be a positive integer, got {k!r}")
        if C % k:
            raise ValueError(f"PartialMixedOp: C must be a multiple of k, got C = {C}, k = {k}")
        super().__init__(C // k, stride, primitives, skip_zero=skip_zero)
        self._channels = C
        self.k = k
        self.mp = nn.MaxPool2d(2, 2)

    @classmethod
    def from_candidates(
        cls,
        candidates: Iterable[nn.Module],
        *,
        k: int = 4,
        skip_zero: bool = False,
        forms: Mapping[type[nn.Module], Form] = FORMS,
    ) -> Self:
        """Build it of any modules that map ``(N, C / k, H, W)`` to one common shape.

        Args:
            candidates: as in ``MixedOp.from_candidates``.
            k: one channel in ``k`` is mixed.
            skip_zero: as in the constructor.
            forms: as in ``MixedOp.from_candidates``.

        Raises:
            ValueError: there is no candidate, or ``k`` is below 1.
            TypeError: one is not a module.
        """
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"PartialMixedOp: k must be a positive integer, got {k!r}")
        self = super().from_candidates(candidates, skip_zero=skip_zero, forms=forms)
        self.k = k
        self.mp = nn.MaxPool2d(2, 2)
        return self

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        """Mix a part of the channels.

        Args:
            x: ``(N, C, H, W)``, floating point, ``C`` a multiple of ``k``. Never written to.
            weights: as in ``MixedOp.forward``.

        Returns:
            A new tensor ``(N, C, H', W')``.

        Raises:
            ValueError: another number of weights than of candidates; a shape that does not fit.
            TypeError: ``x`` or ``weights`` is of another type.
        """
        if self.k == 1:
            return super().forward(x, weights)
        self._check(x, weights)
        c = x.shape[1] // self.k  # no divmod: torch.compile has none for sizes that may change
        if x.shape[1] % self.k:
            raise ValueError(
                f"PartialMixedOp: expected the channels of x to be a multiple of k = {self.k}, "
                f"but got {list(x.shape)}"
            )
        # One split gives autograd one concatenation; two slices would cost two padded gradients.
        mixed, rest = x.split([c, x.shape[1] - c], 1)
        xs, weights, norms = self._evaluate(mixed, weights)
        if xs[0].shape[2] != x.shape[2] and not self._pool_is_fused():
            rest = self.mp(rest)
            if rest.shape[2:] != xs[0].shape[2:]:
                raise ValueError(
                    f"PartialMixedOp: expected mp to return {list(xs[0].shape[2:])} like the "
                    f"candidates, but got {list(rest.shape[2:])}"
                )
        return ops.partial_channel_mix(rest, xs, weights, self.k, norms)

    def _pool_is_fused(self) -> bool:
        """Whether ``mp`` is what the fused op computes, and nobody listens to its call."""
        pool = self.mp
        return (
            type(pool) is nn.MaxPool2d
            and (pool.kernel_size, pool.stride, pool.padding) in ((2, 2, 0), ((2, 2), (2, 2), 0))
            and (pool.dilation, pool.ceil_mode) == (1, False)
            and not any(map(bool, hook_tables(pool)))
            and not has_global_hook()
        )

    def extra_repr(self) -> str:
        """Show what the children do not."""
        return ", ".join(filter(None, [f"k={self.k}", super().extra_repr()]))
