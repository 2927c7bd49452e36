# SPDX-License-Identifier: Apache-2.0
"""A network that is trained: what one step of it is."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastnas.evaluate.config import EvaluateConfig
from fastnas.evaluate.optimizer import network_sgd
from fastnas.methods import Outcome
from fastnas.methods.optimizers import follow_layout, load_optimizer, optimizer_state, set_rate
from fastnas.parallel import ALONE, Group
from fastnas.search.assembly import lay_out
from fastnas.search.runtime import amp_dtype, memory_layout

__all__ = ["Trainee"]


class Trainee:
    """A network, its optimizer, and the step that they take together.

    Args:
        network: is moved to ``device``.
        config: what the step is made of.
        device: where it runs.
        group: the processes that take each step together, each with its part of the batch.

    Attributes:
        network: the network.
        optimizer: that of its parameters.
        group: as given.
    """

    def __init__(
        self, network: nn.Module, config: EvaluateConfig, device: torch.device, group: Group = ALONE
    ) -> None:
        self.network, self.group = network.to(device), group
        self._config, self._device = config, device
        lay_out(network, memory_layout(config.memory_format, device))
        self.optimizer = network_sgd(network, config)
        self._scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        self._criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        self._take_lists()

    def _take_lists(self) -> None:
        self._parameters = list(self.network.parameters())
        self._statistics = list(self.network.buffers())

    def copy(self) -> Trainee:
        """One with the same state that trains alone."""
        twin = copy.copy(self)
        twin.group = ALONE
        # Together, so that the copied optimizer steps the copied weights.
        twin.network, twin.optimizer, twin._scaler = copy.deepcopy(
            (self.network, self.optimizer, self._scaler)
        )
        twin._take_lists()
        return twin

    def lay_out(self, layout: torch.memory_format) -> None:
        """Take another memory format."""
        lay_out(self.network, layout)
        follow_layout(self.optimizer)

    def set_rate(self, lr: float) -> None:
        """Set the learning rate."""
        for group in self.optimizer.param_groups:
            set_rate(group, lr)

    def step(self, x: Tensor, y: Tensor) -> Outcome:
        """Learn from one batch.

        Args:
            x: images, ``(N, C, H, W)``.
            y: labels, int64 ``(N,)``.

        Returns:
            Loss and correct answers before the step, of the batch of the whole group.
        """
        c = self._config
        logits, auxiliary = self.forward(x)
        loss = task_loss = self._criterion(logits, y)
        if auxiliary is not None:
            loss = loss + c.auxiliary_weight * self._criterion(auxiliary, y)
        self.optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()
        self.group.equalize(p.grad for p in self._parameters if p.grad is not None)
        if c.grad_clip > 0:
            self._scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self._parameters, c.grad_clip)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        correct = (logits.detach().argmax(dim=1) == y).sum()
        outcome = Outcome(*self.group.total(task_loss.detach(), correct, y.numel()))
        self.group.equalize(self._statistics)
        return outcome

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits in float32, and those of the auxiliary head if there is one in this mode."""
        dtype = amp_dtype(self._config.amp)
        with torch.autocast(self._device.type, dtype=dtype, enabled=dtype is not None):
            output = self.network(x)
        if isinstance(output, tuple):
            return output[0].float(), output[1].float()
        return output.float(), None

    def state_dict(self) -> dict[str, Any]:
        """What decides how it goes on; tensors are not copied."""
        return {
            "network": self.network.state_dict(),
            "optimizer": optimizer_state(self.optimizer),
            "scaler": self._scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of :meth:`state_dict`; other entries are not looked at."""
        self.network.load_state_dict(state["network"])
        load_optimizer(self.optimizer, state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
