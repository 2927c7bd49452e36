# SPDX-License-Identifier: Apache-2.0
"""A search with the engine and one with the stock network, from the same start, step by step.

The stock side is the published bilevel loop in plain PyTorch: nothing of it comes from the package.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import stock
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnas.methods import METHODS
from fastnas.methods.base import Moment
from fastnas.methods.learner import Learner
from fastnas.spaces.darts import Supernet

pytestmark = pytest.mark.slow

STEPS, BATCH, CLASSES = 30, 8, 5
K = {"darts": 1, "pc_darts": 2}
NAMES = ("alphas_normal", "alphas_reduce", "betas_normal", "betas_reduce")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On tensors this small threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def optimizers(weights, arch):
    """Those of the released scripts. The architecture learns ten times as fast, so that 30 steps
    show something; the weights a fifth, so that 30 steps do not blow rounding up.
    """
    return (
        torch.optim.SGD(weights, 0.005, momentum=0.9, weight_decay=3e-4),
        torch.optim.Adam(arch, 3e-3, betas=(0.5, 0.999), weight_decay=1e-3),
    )


def batches(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """For every step one for the weights and one for the architecture: noise around patterns."""
    generator = torch.Generator().manual_seed(3)
    patterns = torch.randn(CLASSES, 3, 8, 8, generator=generator, dtype=torch.float64)
    result = []
    for _ in range(2 * STEPS):
        labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        noise = torch.randn(BATCH, 3, 8, 8, generator=generator, dtype=torch.float64)
        result.append(((patterns[labels] + noise).to(dtype), labels))
    return result


def search_stock(model: stock.Network, data: list[tuple[Tensor, Tensor]]) -> list[float]:
    """First-order DARTS as published; the losses of both steps, in order."""
    sgd, adam = optimizers(model.parameters(), model.arch_parameters())
    losses = []
    for train, val in zip(data[::2], data[1::2], strict=True):
        adam.zero_grad()
        loss = F.cross_entropy(model(val[0]), val[1])
        losses.append(loss.item())
        loss.backward()
        adam.step()
        sgd.zero_grad()
        loss = F.cross_entropy(model(train[0]), train[1])
        losses.append(loss.item())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        sgd.step()
    return losses


def search_engine(learner: Learner, data: list[tuple[Tensor, Tensor]]) -> list[float]:
    losses = []
    for step, (train, val) in enumerate(zip(data[::2], data[1::2], strict=True)):
        moment = Moment(0, 1, step)
        weights, arch = learner.method.iteration(learner, train, lambda val=val: val, moment)
        losses += [arch.loss.item(), weights.loss.item()]
    return losses


def both(
    method: str, dtype: torch.dtype, layout: torch.memory_format, **options: object
) -> tuple[list[list[float]], Learner, stock.Network]:
    """Make the two searches; their losses, and what they end with."""
    k = K[method]
    torch.manual_seed(1)
    published = stock.Network(C=4, num_classes=CLASSES, layers=3, k=k)
    published.to(dtype)
    for name in NAMES:
        leaf = getattr(published, name).detach().to(dtype).requires_grad_()
        setattr(published, name, leaf)
    engine = Supernet(4, 3, CLASSES, partial_channels=k, **options).to(dtype)
    engine.load_state_dict(published.state_dict(), strict=True)
    engine.to(memory_format=layout)
    chosen = METHODS[method](engine.cell_specs)
    arch = chosen.parameters().to(dtype)
    with torch.no_grad():
        for name, parameter in arch.named_parameters():
            kind, _, cell = name.partition("_")
            parameter.copy_(getattr(published, f"{kind}s_{cell}"))
    sgd, adam = optimizers(engine.parameters(), arch.parameters())
    learner = Learner(engine, arch, chosen, sgd, adam, nn.CrossEntropyLoss())
    data = batches(dtype)
    laid_out = [(x.contiguous(memory_format=layout), y) for x, y in data]
    return [search_engine(learner, laid_out), search_stock(published, data)], learner, published


@pytest.mark.parametrize(
    ("method", "layout"),
    [("darts", torch.contiguous_format), ("pc_darts", torch.channels_last)],
)
def test_losses_are_those_of_the_stock_network_at_every_step(method, layout):
    (ours, theirs), learner, published = both(method, torch.float64, layout)
    assert len(ours) == 2 * STEPS
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert abs(a - b) <= 1e-5 * abs(b), f"loss {step}: {a} and {b}"
    assert min(theirs[1::2]) < 0.98 * theirs[1]  # something was learned
    for name, parameter in learner.arch.named_parameters():
        kind, _, cell = name.partition("_")
        expected = getattr(published, f"{kind}s_{cell}")
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-8)

    # What one has trained the other takes, strictly, and goes on with.
    trained = {n: t.clone() for n, t in published.state_dict().items()}
    torch.testing.assert_close(learner.supernet.state_dict(), trained, rtol=1e-5, atol=1e-8)
    published.load_state_dict(learner.supernet.state_dict(), strict=True)
    learner.supernet.load_state_dict(trained, strict=True)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        logits = learner.supernet.eval()(x, learner.method.weights(learner.arch, Moment(0, 1, 0)))
        torch.testing.assert_close(logits, published.eval()(x), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("method", K)
def test_in_single_precision_the_candidates_come_out_in_the_same_order(method):
    _, learner, published = both(method, torch.float32, torch.channels_last)
    for kind in ("normal", "reduce"):
        ours = learner.arch.alpha(kind).detach()
        theirs = getattr(published, f"alphas_{kind}").detach()
        gaps = [a.unsqueeze(-1) - a.unsqueeze(-2) for a in (ours, theirs)]
        # Rounding that takes one ReLU over its kink moves them by up to a tenth of the range within
        # 30 steps, which of the two networks it hits is chance: closer ones have no order.
        clear = gaps[1].abs() > 0.1 * theirs.abs().max()
        assert clear.double().mean() > 0.5
        assert torch.equal(gaps[0].sign()[clear], gaps[1].sign()[clear])
