# SPDX-License-Identifier: Apache-2.0
"""What a search method is: architecture parameters, their way into a mixed op, and back out.

A method knows nothing of convolutions. It answers four questions: how the architecture parameters
become the weights of the mixed ops (:meth:`Method.weights`), which extra loss they carry
(:meth:`Method.objective`), how an architecture step is made (:meth:`Method.architecture_step`,
:meth:`Method.iteration`) and how a genotype is read off (:meth:`Method.scores`,
:meth:`Method.derive`). A new method is one file with a subclass and ``@register_method``.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from fastnas.spaces.base import CellSpec, CellWeights, Space

if TYPE_CHECKING:
    from fastnas.methods.learner import Batch, Learner, Outcome

Phase = Literal["weights", "architecture", "validation"]


@dataclass(frozen=True)
class Moment:
    """When something happens in a search; schedules and samplers are functions of it.

    Attributes:
        epoch: current epoch, from 0.
        epochs: number of epochs of the search.
        step: iterations done since the search began.
        phase: what the forward pass is for.
    """

    epoch: int
    epochs: int
    step: int
    phase: Phase = "weights"

    def during(self, phase: Phase) -> Moment:
        """The same moment in another phase."""
        return Moment(self.epoch, self.epochs, self.step, phase)


@dataclass(frozen=True)
class MethodOptions:
    """Options that only one method has; a method with options subclasses this."""


class ArchParameters(nn.Module):
    """The architecture parameters of a search, in one module.

    ``alpha_<kind>`` holds the logits of the candidates, ``[edges, candidates]``; ``beta_<kind>``
    those of the edges (or thresholds, as the method has it). They are in the ``state_dict``, move
    with ``.to()``, and belong to no supernet, so that an optimizer of ``supernet.parameters()``
    never touches them.

    Args:
        alphas: initial values by cell kind.
        betas: initial values by cell kind; none for a method without them.
    """

    def __init__(
        self, alphas: Mapping[str, Tensor], betas: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__()
        self._kinds = tuple(alphas)
        for kind, value in alphas.items():
            self.register_parameter(f"alpha_{kind}", nn.Parameter(value))
        for kind, value in (betas or {}).items():
            self.register_parameter(f"beta_{kind}", nn.Parameter(value))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The cell kinds."""
        return self._kinds

    def alpha(self, kind: str) -> nn.Parameter:
        """The candidates' logits of one cell kind."""
        return self.get_parameter(f"alpha_{kind}")

    def beta(self, kind: str) -> nn.Parameter:
        """The edges' logits of one cell kind."""
        return self.get_parameter(f"beta_{kind}")

    def entropy(self) -> dict[str, float]:
        """Mean entropy of ``softmax(alpha)`` over the edges of each cell kind, in nats."""
        with torch.no_grad():
            return {kind: _mean_entropy(self.alpha(kind)).item() for kind in self.kinds}


class Method(abc.ABC):
    """Base of all methods; the defaults are those of DARTS where most methods agree.

    Args:
        specs: cell kind -> choices, as the supernet states them (``supernet.cell_specs``).
        options: an instance of the class's ``Options``.

    Attributes:
        name: key in the registry, the value of ``--method``.
        Options: dataclass of the options that only this method has.
        presets: preset name -> configuration fields in which the method differs from the preset.
    """

    name: ClassVar[str]
    Options: ClassVar[type[MethodOptions]] = MethodOptions
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __init__(self, specs: Mapping[str, CellSpec], options: MethodOptions | None = None) -> None:
        self.specs = dict(specs)
        self.options = self.Options() if options is None else options
        if not isinstance(self.options, self.Options):
            raise TypeError(
                f"options: expected {self.Options.__name__} for method {self.name!r}, "
                f"but got {type(options).__name__}"
            )

    @classmethod
    def supernet_options(cls, options: MethodOptions) -> dict[str, Any]:
        """Keyword arguments the method adds when the supernet is built."""
        return {}

    @abc.abstractmethod
    def parameters(self) -> ArchParameters:
        """New architecture parameters; random values come from torch's default generator."""

    def parameter_groups(self, arch: ArchParameters) -> list[dict[str, Any]]:
        """Groups for the optimizer of the architecture, in the order of ``arch.parameters()``.

        A method whose alphas and betas learn at different rates overrides this; a group's settings
        go before those of the configuration.
        """
        return [{"params": list(arch.parameters())}]

    @abc.abstractmethod
    def weights(self, arch: ArchParameters, moment: Moment) -> dict[str, CellWeights]:
        """The weights of the mixed ops, by cell kind.

        The caller switches gradients off where the architecture is held fixed, so a method need
        not look at the phase for that.
        """

    @abc.abstractmethod
    def scores(self, arch: ArchParameters) -> dict[str, Tensor]:
        """By cell kind, ``[edges, candidates]``: how strong each candidate is, for the genotype."""

    def objective(self, loss: Tensor, arch: ArchParameters, moment: Moment) -> Tensor:
        """The loss to differentiate, given that of the task; extra terms are added here."""
        return loss

    def derive(self, arch: ArchParameters, space: Space) -> Any:
        """The genotype: the space's rule applied to the method's scores."""
        with torch.no_grad():
            return space.derive(self.scores(arch), self.specs)

    def iteration(
        self, learner: Learner, train: Batch, val: Callable[[], Batch] | None, moment: Moment
    ) -> tuple[Outcome, Outcome | None]:
        """One iteration: architecture step, then weight step on the same training batch.

        Args:
            learner: supernet, architecture parameters and their optimizers.
            train: batch of the half the weights are trained on.
            val: draws a batch of the half the architecture is trained on; None in the epochs in
                which the architecture is frozen.
            moment: when.

        Returns:
            Outcome of the weight step, and of the architecture step if there was one.
        """
        outcome = None
        if val is not None:
            outcome = self.architecture_step(learner, train, val(), moment.during("architecture"))
        return learner.weight_step(train, moment.during("weights")), outcome

    def architecture_step(
        self, learner: Learner, train: Batch, val: Batch, moment: Moment
    ) -> Outcome:
        """Step the architecture parameters down the validation loss (first order)."""
        return learner.architecture_step(val, moment)

    def state_dict(self) -> dict[str, Any]:
        """State that must survive beside the architecture parameters; most methods have none."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`."""
        if state:
            raise ValueError(f"method {self.name!r} has no state, but got {sorted(state)}")


M = TypeVar("M", bound=type[Method])

METHODS: dict[str, type[Method]] = {}


def register_method(name: str) -> Callable[[M], M]:
    """Class decorator: enter a method in ``METHODS`` under ``name``.

    Raises:
        ValueError: the name is taken.
    """

    def enter(cls: M) -> M:
        if name in METHODS:
            raise ValueError(f"register_method: the name {name!r} is taken by {METHODS[name]}")
        cls.name = name
        METHODS[name] = cls
        return cls

    return enter


def normal_logits(*shape: int, std: float = 1e-3) -> Tensor:
    """Logits drawn from N(0, std^2): nearly uniform weights, ties broken."""
    return std * torch.randn(*shape)


def softmax_per_node(beta: Tensor, spec: CellSpec) -> Tensor:
    """Softmax over the incoming edges of each node; ``beta`` and the result are ``[edges]``."""
    return torch.cat([torch.softmax(beta[rows], dim=0) for rows in spec.node_slices])


def _mean_entropy(logits: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits.float(), dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1).mean()


def trainable(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a module that require gradients."""
    return (p for p in module.parameters() if p.requires_grad)
