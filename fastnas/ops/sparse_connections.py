# SPDX-License-Identifier: Apache-2.0
"""Weights of the connections of a cell, exactly zero below a learned threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastnas._extension import has_kernels
from fastnas.ops import reference
from fastnas.ops._common import MAX_CANDIDATES, check_devices, differentiate

MAX_NODES = 64


def sparse_connections(
    alpha: Tensor,
    beta: Tensor,
    in_degrees: Sequence[int],
    tau: float = 1.0,
    norm: Literal["edge", "node"] = "edge",
    detach_max: bool = False,
) -> Tensor:
    """Differentiable sparsification of a cell's topology (EnTranNAS-DST, arXiv 2101.11342).

    With ``p = softmax(alpha / tau)`` of each edge, ``m`` the largest ``p`` among all edges of a
    node and ``t = sigmoid(beta)`` of that node, ``q = relu(p / m - t)`` is what a connection keeps
    and its weight is ``q / sum(q)``, summed over the edge, or over the node with ``norm="node"``.
    An edge that keeps nothing has weights of exactly 0. At least one connection of every node
    stays, whatever ``beta`` is.

    With ``norm="edge"`` an edge with a single connection left has weight 1, and no gradient: a node
    whose edges are all so, or empty, is moved by nothing that goes through these weights.

    Args:
        alpha: ``(E, K)`` floating point, K at most 64: logits of all edges of a cell, those of one
            node behind each other. A logit of -inf or NaN marks a dead connection of weight 0; one
            of +inf has all the probability of its edge, shared with others of +inf.
        beta: ``(n,)`` floating point, n at most 64: one threshold per node. Above 60, where only
            the largest is left, it is taken as 60.
        in_degrees: n positive numbers of edges, which sum to E: ``(2, 3, 4, 5)`` for DARTS' cell.
        tau: temperature of the softmax, positive.
        norm: what sums to 1: the weights of each live ``"edge"``, or those of each ``"node"``.
        detach_max: take ``m`` as a constant in the backward. Else its gradient goes to the largest
            ``p`` of the node, and among equal ones to the first in the order of ``alpha``.

    Returns:
        ``(E, K)`` in the dtype of ``alpha``; 0 for a node without any live connection.

    Raises:
        ValueError: shapes, devices, ``in_degrees``, ``tau`` or ``norm`` that do not fit.
        TypeError: tensors that are not floating point.
    """
    _check(alpha, beta, in_degrees, tau, norm)
    arguments = (tuple(in_degrees), float(tau), norm == "node", bool(detach_max))
    return SparseConnections.apply(alpha, beta, *arguments)


def _check(alpha: Tensor, beta: Tensor, in_degrees: Sequence[int], tau: float, norm: str) -> None:
    op = "sparse_connections"
    for name, t in (("alpha", alpha), ("beta", beta)):
        if not t.is_floating_point():
            raise TypeError(f"{op}: expected floating-point {name}, but got {t.dtype}")
    if alpha.dim() != 2 or not 1 <= alpha.shape[1] <= MAX_CANDIDATES:
        raise ValueError(
            f"{op}: expected alpha of shape (E, K) with K of 1 to {MAX_CANDIDATES}, "
            f"but got {list(alpha.shape)}"
        )
    nodes = len(in_degrees)
    if nodes > MAX_NODES:
        raise ValueError(f"{op}: expected at most {MAX_NODES} nodes in in_degrees, but got {nodes}")
    if any(degree < 1 for degree in in_degrees) or sum(in_degrees) != alpha.shape[0]:
        raise ValueError(
            f"{op}: expected positive in_degrees that sum to the {alpha.shape[0]} edges of alpha, "
            f"but got {list(in_degrees)}"
        )
    if beta.shape != (nodes,) or beta.device != alpha.device:
        raise ValueError(
            f"{op}: expected beta of shape [{nodes}] on {alpha.device}, one entry per node of "
            f"in_degrees, but got {list(beta.shape)} on {beta.device}"
        )
    if not 0 < tau < math.inf:
        raise ValueError(f"{op}: expected a positive, finite tau, but got {tau}")
    if norm not in ("edge", "node"):
        raise ValueError(f"{op}: expected norm to be 'edge' or 'node', but got {norm!r}")


class SparseConnections(torch.autograd.Function):
    """Autograd of :func:`sparse_connections`; a second derivative goes through the reference."""

    @staticmethod
    def forward(
        ctx: Any,
        alpha: Tensor,
        beta: Tensor,
        in_degrees: tuple[int, ...],
        tau: float,
        node_norm: bool,
        detach_max: bool,
    ) -> Tensor:
        """The weights."""
        ctx.save_for_backward(alpha, beta)
        ctx.arguments = (in_degrees, tau, node_norm, detach_max)
        if has_kernels(alpha.device.type):
            return torch.ops.fastnas.sparse_connections(alpha, beta, in_degrees, tau, node_norm)
        return reference.sparse_connections(alpha, beta, *ctx.arguments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``alpha`` and ``beta``."""
        alpha, beta = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        if not torch.is_grad_enabled() and has_kernels(alpha.device.type):
            dalpha, dbeta = torch.ops.fastnas.sparse_connections_backward(
                grad, alpha, beta, *ctx.arguments
            )
            return (dalpha if needs[0] else None, dbeta if needs[1] else None, *[None] * 4)

        def composite(alpha: Tensor, beta: Tensor) -> Tensor:
            return reference.sparse_connections(alpha, beta, *ctx.arguments)

        return (*differentiate(composite, (alpha, beta), needs, grad), *[None] * 4)


@torch.library.register_fake("fastnas::sparse_connections")
def _(alpha: Tensor, beta: Tensor, in_degrees: list[int], tau: float, node_norm: bool) -> Tensor:
    check_devices("sparse_connections", alpha, beta)
    return alpha.new_empty(alpha.shape)


@torch.library.register_fake("fastnas::sparse_connections_backward")
def _(
    grad: Tensor,
    alpha: Tensor,
    beta: Tensor,
    in_degrees: list[int],
    tau: float,
    node_norm: bool,
    detach_max: bool,
) -> tuple[Tensor, Tensor]:
    check_devices("sparse_connections_backward", alpha, grad, beta)
    return alpha.new_empty(alpha.shape), beta.new_empty(beta.shape)
