# SPDX-License-Identifier: Apache-2.0
"""The optimizers of searches and evaluations: how they are implemented, decided in one place.

One call steps hundreds of small tensors (``fused``), where PyTorch has that for the device. On a
GPU a learning rate is a tensor there, which a recorded step (``fastnas.methods.graphs``) reads anew
at every replay; states hold it as a number, so that a run may go on on another kind of device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "adam",
    "follow_layout",
    "load_optimizer",
    "optimizer_state",
    "rates_as_tensors",
    "set_rate",
    "sgd",
]

# Settings of a group that say how a step is computed, not what: those of the present device stay.
_MEANS = ("foreach", "fused", "capturable", "differentiable")


def sgd(
    parameters: Iterable[Tensor],
    lr: float,
    *,
    momentum: float,
    weight_decay: float,
    nesterov: bool = False,
    undecayed: Iterable[Tensor] = (),
) -> torch.optim.SGD:
    """SGD for the weights of a network, which are on their device already.

    ``undecayed`` are parameters like the others, but without weight decay.
    """
    given, others = list(parameters), list(undecayed)
    groups: list[dict[str, Any]] = [{"params": given}]
    if others:
        groups.append({"params": others, "weight_decay": 0.0})
    optimizer = torch.optim.SGD(
        groups,
        lr,
        momentum=momentum,
        weight_decay=weight_decay,
        nesterov=nesterov,
        fused=_have_type([*given, *others], "cpu", "cuda") or None,
    )
    _begin_momentum(optimizer)
    return _on_device(optimizer)


def adam(
    groups: list[dict[str, Any]], lr: float, *, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Adam:
    """Adam for the few tensors of an architecture, which are on their device already."""
    # As lists: an iterator is empty for the optimizer once it was looked at.
    groups = [{**group, "params": _listed(group["params"])} for group in groups]
    given = [parameter for group in groups for parameter in group["params"]]
    return _on_device(
        torch.optim.Adam(
            groups,
            lr,
            betas=betas,
            weight_decay=weight_decay,
            fused=_have_type(given, "cuda") or None,
        )
    )


def set_rate(group: dict[str, Any], rate: float | Tensor) -> None:
    """Give a group a learning rate, in place where it is a tensor."""
    if not isinstance(group["lr"], Tensor):
        group["lr"] = rate
    elif isinstance(rate, Tensor):
        group["lr"].copy_(rate)
    else:
        group["lr"].fill_(rate)


def rates_as_tensors(optimizer: torch.optim.Optimizer) -> None:
    """Keep the learning rates in tensors, 0-d float32, beside the parameters."""
    for group in optimizer.param_groups:
        if not isinstance(group["lr"], Tensor) and group["params"]:
            device = group["params"][0].device
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=device)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's ``state_dict``, learning rates as numbers."""
    state = optimizer.state_dict()
    groups = [{**group, "lr": float(group["lr"])} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Take over a state of :func:`optimizer_state`, of whichever device.

    Raises:
        ValueError: it is of an optimizer with other groups.
    """
    own = [{k: g[k] for k in _MEANS if k in g} for g in optimizer.param_groups]
    tensors = any(isinstance(group["lr"], Tensor) for group in optimizer.param_groups)
    if len(own) == len(state["param_groups"]):
        groups = [{**g, **mine} for g, mine in zip(state["param_groups"], own, strict=True)]
        state = {**state, "param_groups": groups}
    optimizer.load_state_dict(dict(state))
    _begin_momentum(optimizer)
    follow_layout(optimizer)
    if tensors:
        rates_as_tensors(optimizer)


def follow_layout(optimizer: torch.optim.Optimizer) -> None:
    """Bring the state of each parameter into its memory format, which a fused step counts on."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if not isinstance(value, Tensor) or value.shape != parameter.shape:
                continue
            if value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter).copy_(value)


def _begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Let every momentum begin at 0, which steps as the lack of one does.

    A fused step takes weights whose gradients came at different times only so, those of a network
    of which one path a step is trained, and the first step is none of another kind.
    """
    for group in optimizer.param_groups:
        if not (group.get("momentum") and group.get("fused")):
            continue
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)


def _on_device(optimizer: Any) -> Any:
    if _have_type([p for group in optimizer.param_groups for p in group["params"]], "cuda"):
        rates_as_tensors(optimizer)
    return optimizer


def _listed(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


def _have_type(parameters: Iterable[Tensor], *types: str) -> bool:
    return all(parameter.device.type in types for parameter in parameters)
