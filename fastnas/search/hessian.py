# SPDX-License-Identifier: Apache-2.0
"""The largest eigenvalue of the Hessian of the validation loss in the alphas.

Zela et al., "Understanding and Robustifying Differentiable Architecture Search", ICLR 2020: it
grows where a search overfits its alphas. The products of the Hessian with vectors are exact, by
differentiating twice; the Hessian itself is never formed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from fastnas.methods import Batch, Learner, Moment

__all__ = ["alpha_eigenvalue", "largest_eigenvalue"]


def alpha_eigenvalue(learner: Learner, batch: Batch, moment: Moment) -> float:
    """The largest eigenvalue of d2 L / d alpha2; L is the loss of the task on one batch.

    Alphas of all cell kinds together, the weights as they are (first order), BatchNorm by the
    statistics of the batch as in an architecture step. Full precision, whatever ``learner.amp``
    says. The learner stays as it is.

    Args:
        learner: supernet, alphas and method.
        batch: images and labels.
        moment: now.

    Raises:
        ValueError: the loss has no second derivative in the alphas.
    """
    # Where the edges differ in their candidates each has a parameter of its own.
    named = learner.arch.named_parameters()
    alphas = [parameter for name, parameter in named if name.startswith("alpha_")]
    # A copy: running statistics must not see this pass.
    supernet = copy.deepcopy(learner.supernet).train().requires_grad_(False)
    x, y = batch
    # What is drawn here, by dropout or a method, is not missing from the search afterwards.
    devices = [x.device] if x.is_cuda else []
    with torch.enable_grad(), torch.random.fork_rng(devices):
        loss = learner.criterion(supernet(x, learner.method.weights(learner.arch, moment)), y)
        gradients = torch.autograd.grad(
            loss, alphas, create_graph=True, allow_unused=True, materialize_grads=True
        )
    gradient = _flat(gradients)
    if not gradient.requires_grad:
        raise ValueError(
            f"hessian_every: the method {learner.method.name!r} gives a loss without a second "
            "derivative in the alphas"
        )

    # Shares of one batch may differ by an image.
    images = torch.tensor(len(y), dtype=torch.float64)
    part = images / learner.group.mean([images])[0]

    def product(vector: Tensor) -> Tensor:
        rows = torch.autograd.grad(
            gradient @ vector.to(gradient),
            alphas,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return learner.group.mean([_flat(rows).double().cpu() * part])[0]

    return largest_eigenvalue(product, gradient.numel())


def largest_eigenvalue(
    product: Callable[[Tensor], Tensor], size: int, tolerance: float = 1e-3, most: int = 60
) -> float:
    """The largest eigenvalue of a symmetric matrix, by Lanczos iteration.

    Every new vector is made orthogonal to all before it, so that rounding brings no copies of
    eigenvalues; the start is random, but the same in every call.

    Args:
        product: multiplies the matrix with a vector, ``[size]``, float64 on the CPU.
        size: number of rows.
        tolerance: bound of the error, relative to the largest absolute eigenvalue.
        most: products to make at most.
    """
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(size, generator=generator, dtype=torch.float64)
    vector /= vector.norm()
    basis: list[Tensor] = []
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    while True:
        basis.append(vector)
        rest = product(vector).double()
        diagonal.append(vector @ rest)
        known = torch.stack(basis)
        for _ in range(2):  # twice is enough
            rest = rest - known.T @ (known @ rest)
        length = rest.norm()
        values, vectors = torch.linalg.eigh(_tridiagonal(diagonal, beside))
        scale = values.abs().max()
        if (
            len(basis) == min(size, most)
            or length * vectors[-1, -1].abs() <= tolerance * scale
            or length <= 1e-12 * scale
        ):
            return values[-1].item()
        beside.append(length)
        vector = rest / length


def _tridiagonal(diagonal: list[Tensor], beside: list[Tensor]) -> Tensor:
    matrix = torch.diag(torch.stack(diagonal))
    if beside:
        off = torch.stack(beside)
        matrix += torch.diag(off, 1) + torch.diag(off, -1)
    return matrix


def _flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])
