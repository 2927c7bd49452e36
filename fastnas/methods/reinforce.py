# SPDX-License-Identifier: Apache-2.0
"""REINFORCE on the paths of a supernet (ProxylessNAS, section 3.3.2).

``grad J = mean_m (R_m - b) grad log p(paths_m)`` for M networks, all tested on one batch; the
reward is ``accuracy (T / cost)^w``, the accuracy alone where there is no target.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fastnas.nn.gated import frozen_statistics

if TYPE_CHECKING:
    from fastnas.methods.base import Moment
    from fastnas.methods.learner import Batch, Learner, Outcome
    from fastnas.methods.proxyless import Proxyless

__all__ = ["Baseline", "BaselineRule", "policy_gradient", "reinforce_step", "reward"]

BaselineRule = Literal["released", "average"]

_DECAY = 0.99


def reward(accuracy: Tensor, cost: float, target: float, exponent: float) -> Tensor:
    """``accuracy (target / cost)^exponent``.

    Example:
        >>> round(reward(torch.tensor(0.5), 100.0, 80.0, 0.1).item(), 6)
        0.488966
    """
    return accuracy * (target / cost) ** exponent


class Baseline:
    """A moving mean of rewards, which starts at the first one.

    ``released`` is what the authors' code does: ``b + 0.99 (mean - b)``, nearly the new mean;
    ``average`` is the ordinary moving average, ``b + 0.01 (mean - b)``. Both take the new mean in
    before the advantages are formed.
    """

    def __init__(self, rule: BaselineRule = "released") -> None:
        self._step = _DECAY if rule == "released" else 1 - _DECAY
        self.value: Tensor | None = None

    def update(self, mean: Tensor) -> Tensor:
        """Take in the mean of new rewards and return the baseline."""
        b = mean if self.value is None else self.value.to(mean)
        self.value = b + self._step * (mean - b)
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """The value, None before the first update."""
        return {"value": None if self.value is None else self.value.cpu()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`."""
        self.value = state["value"]


def policy_gradient(probs: Tensor, drawn: Tensor, advantages: Tensor) -> Tensor:
    """``mean_m A_m (p - onehot(s_m))``, the gradient of ``-mean_m A_m log p(s_m)`` in the logits.

    Args:
        probs: ``[E, K]``, softmax of the logits.
        drawn: ``[M, E]`` int64.
        advantages: ``[M]``.

    Returns:
        ``[E, K]``.
    """
    chosen = torch.nn.functional.one_hot(drawn, probs.shape[1]).to(probs)
    return ((probs - chosen) * advantages.to(probs)[:, None, None]).mean(dim=0)


def reinforce_step(
    method: Proxyless,
    learner: Learner,
    val: Batch,
    moment: Moment,
    index: int,
    baseline: Baseline,
) -> Outcome:
    """One step of the architecture; ``index`` is the number of its first draw.

    The networks are tested in training mode, by the statistics of the batch, as in the released
    code; their running statistics stay as they are.

    Returns:
        The mean outcome of the networks.
    """
    options, rewards, outcomes, drawn = method.choices, [], [], []
    for number in range(options.rl_samples):
        gates = method.draw(learner.arch, moment, "one", index + number)
        paths = method.split(gates)
        with torch.no_grad(), frozen_statistics(learner.supernet):
            _, outcome = learner.forward(val, paths)
        accuracy = outcome.correct.float() / outcome.images
        if method.term is not None:
            cost = method.term.cost.of({k: [g.active for g in p.edges] for k, p in paths.items()})
            accuracy = reward(accuracy, cost, method.term.limit, options.rl_exponent)
        rewards.append(accuracy)
        outcomes.append(outcome)
        drawn.append([gate.active for gate in gates.edges])
    all_rewards = torch.stack(rewards)
    advantages = all_rewards - baseline.update(all_rewards.mean())
    with torch.no_grad():
        probs = torch.softmax(method.table(learner.arch), dim=1)
        table = policy_gradient(probs, torch.tensor(drawn, device=probs.device), advantages)
    rows = method.rows(learner.arch)
    method.apply(learner, [g[: len(row)] for g, row in zip(table, rows, strict=True)])
    mean = torch.stack([o.loss for o in outcomes]).mean()
    correct = torch.stack([o.correct for o in outcomes]).sum() // len(outcomes)
    return type(outcomes[0])(mean, correct, outcomes[0].images)
