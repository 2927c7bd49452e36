# SPDX-License-Identifier: Apache-2.0
"""The optimizer that trains a derived network."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastnas.evaluate.config import EvaluateConfig
from fastnas.methods.optimizers import sgd

__all__ = ["network_sgd"]


def network_sgd(network: nn.Module, config: EvaluateConfig) -> torch.optim.SGD:
    """SGD for a network that is on its device already, with the settings of an evaluation."""
    norms = [] if config.norm_decay else [m for m in network.modules() if isinstance(m, _BatchNorm)]
    undecayed = {p for norm in norms for p in norm.parameters()}
    return sgd(
        [p for p in network.parameters() if p not in undecayed],
        config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
        undecayed=[p for p in network.parameters() if p in undecayed],
    )
