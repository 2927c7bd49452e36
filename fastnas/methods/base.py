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
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, cast

import torch
from torch import Tensor

from fastnas.methods.budget import cheapest, is_chain, within_budget
from fastnas.methods.parameters import ArchParameters
from fastnas.methods.target import CostTerm
from fastnas.spaces.base import CellSpec, CellWeights, Space, Weighting

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
        steps_per_epoch: iterations in an epoch.
    """

    epoch: int
    epochs: int
    step: int
    phase: Phase = "weights"
    steps_per_epoch: int = 1

    def during(self, phase: Phase) -> Moment:
        """The same moment in another phase."""
        return replace(self, phase=phase)


@dataclass(frozen=True)
class MethodOptions:
    """Options that only one method has; a method with options subclasses this."""


class Method(abc.ABC):
    """Base of all methods; the defaults are those of DARTS where most methods agree.

    Args:
        specs: cell kind -> choices, as the supernet states them (``supernet.cell_specs``).
        options: an instance of the class's ``Options``.
        seed: of what the method draws, if it draws.
        term: what a network may cost, and its term in the loss; None for no target.

    Raises:
        TypeError: options of another method.
        ValueError: not even the cheapest network meets the target.

    Attributes:
        name: key in the registry, the value of ``--method``.
        Options: dataclass of the options that only this method has.
        presets: preset name -> configuration fields in which the method differs from the preset.
        needs: features that a space must have for it (``Space.features``).
        term: the target of the search, None for none.
        decides_by_entropy: whether nearly equal weights mean that nothing was decided.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    Options: ClassVar[type[MethodOptions]] = MethodOptions
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    decides_by_entropy: ClassVar[bool] = True

    def __init__(
        self,
        specs: Mapping[str, CellSpec],
        options: MethodOptions | None = None,
        *,
        seed: int = 0,
        term: CostTerm | None = None,
    ) -> None:
        self.specs = dict(specs)
        self.seed = seed
        self.term = term
        self.options = self.Options() if options is None else options
        if not isinstance(self.options, self.Options):
            raise TypeError(
                f"options: expected {self.Options.__name__} for method {self.name!r}, "
                f"but got {type(options).__name__}"
            )
        if self._budgeted:
            assert term is not None
            least = term.cost.fixed + cheapest(term.cost.values, self.specs)
            if least > term.limit:
                raise ValueError(
                    f"target: no network of this space is so cheap: expected at least "
                    f"{least:.6g} {term.cost.unit}, but got {term.limit:.6g}"
                )

    @property
    def _budgeted(self) -> bool:
        """Whether genotypes are chosen within a budget."""
        return self.term is not None and self.term.binding and is_chain(self.specs)

    @classmethod
    def check(cls, config: Any) -> None:
        """Raise a ValueError where a configuration of a search makes no sense for this method."""
        return

    @classmethod
    def idle(cls, config: Any) -> Mapping[str, str]:
        """Options that do nothing as the others are -> what would make them do something."""
        return {}

    @classmethod
    def frozen(cls, config: Any, steps_per_epoch: int) -> str | None:
        """What of the architecture is not trained in so short a search, and which option helps.

        Of the epochs in which the weights alone are trained in all methods the search itself
        tells. None where nothing is left out.
        """
        return None

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

    def lr_span(self, moment: Moment) -> tuple[float, float, float | None]:
        """Where on its way the learning rate of the weights is.

        Returns:
            Position and length in epochs, and the rate at position 0, None for that of the
            configuration. By default the position is the epoch, constant within it.
        """
        return moment.epoch, moment.epochs, None

    @abc.abstractmethod
    def weights(self, arch: ArchParameters, moment: Moment) -> Mapping[str, Weighting]:
        """The weights of the mixed ops, or what was chosen or drawn among them, by cell kind.

        The caller switches gradients off where the architecture is held fixed.
        """

    @abc.abstractmethod
    def scores(self, arch: ArchParameters) -> dict[str, Tensor]:
        """By cell kind, ``[edges, candidates]``: how strong each candidate is, for the genotype."""

    def objective(self, loss: Tensor, arch: ArchParameters, moment: Moment) -> Tensor:
        """The loss to differentiate, given that of the task; extra terms are added here."""
        if self.term is None:
            return loss
        return self.term.loss(loss, self.term.cost.expected(self.expectation(arch, moment)))

    def expectation(
        self, arch: ArchParameters, moment: Moment
    ) -> Mapping[str, Tensor | CellWeights]:
        """The weights under which the cost of a network is expected; differentiable."""
        return cast("Mapping[str, CellWeights]", self.weights(arch, moment))

    def pruned_weights(
        self, arch: ArchParameters, one_hot: Mapping[str, CellWeights]
    ) -> Mapping[str, Weighting]:
        """The weights of the mixed ops when the supernet is pruned to a genotype.

        Args:
            arch: the architecture parameters.
            one_hot: what ``space.one_hot`` gives for the genotype: 1 for each candidate and each
                edge that stays, else 0.

        Returns:
            ``one_hot`` itself. A method that weighs the edges shares their weight among those that
            stay; one that runs single paths returns the path.
        """
        return dict(one_hot)

    def entropy(self, arch: ArchParameters) -> dict[str, float]:
        """Mean entropy of the candidates' weights over the edges of each cell kind, in nats."""
        return arch.entropy()

    def derive(self, arch: ArchParameters, space: Space) -> Any:
        """The genotype: the space's rule applied to the method's scores.

        In a chain of blocks with a target, the best network under it (``fastnas.methods.budget``).
        """
        with torch.no_grad():
            return space.derive(self._final_scores(arch), self.specs)

    def _final_scores(self, arch: ArchParameters) -> Mapping[str, Tensor]:
        scores = self.scores(arch)
        if not self._budgeted:
            return scores
        assert self.term is not None
        cost = self.term.cost
        return within_budget(scores, cost.values, self.specs, self.term.limit - cost.fixed)

    def facts(self, arch: ArchParameters, moment: Moment) -> dict[str, Any]:
        """What the record of an epoch says of the target: nothing where there is none."""
        if self.term is None:
            return {}
        term, cost = self.term, self.term.cost
        with torch.no_grad():
            expected = cost.expected(self.expectation(arch, moment)).item()
            found: dict[str, Any] = {"expected": expected}
            if is_chain(self.specs):
                scores = self._final_scores(arch)
                choices = {kind: scores[kind].argmax(dim=1).tolist() for kind in self.specs}
                found["derived"] = cost.of(choices)
        found |= {"target": term.limit, "unit": cost.unit}
        if term.binding:
            found["multiplier"] = term.multiplier
        return {cost.name: found}

    def iteration(
        self, learner: Learner, train: Batch, val: Callable[[], Batch] | None, moment: Moment
    ) -> tuple[Outcome, Outcome | None]:
        """One iteration: architecture step, then weight step on the same training batch.

        Args:
            learner: supernet, architecture parameters and their optimizers.
            train: batch of the half the weights are trained on.
            val: draws a batch of the half the architecture is trained on; None while it is frozen.
            moment: when.

        Returns:
            Outcome of the weight step, and of the architecture step if there was one.
        """
        outcome = None
        if val is not None:
            outcome = self.architecture_step(learner, train, val(), moment.during("architecture"))
            if self.term is not None:
                self.settle(learner.arch, moment)
        return learner.weight_step(train, moment.during("weights")), outcome

    def settle(self, arch: ArchParameters, moment: Moment) -> None:
        """After an architecture step: the target's multiplier follows the expected cost."""
        if self.term is not None:
            with torch.no_grad():
                self.term.update(self.term.cost.expected(self.expectation(arch, moment)))

    def architecture_step(
        self, learner: Learner, train: Batch, val: Batch, moment: Moment
    ) -> Outcome:
        """Step the architecture parameters down the validation loss (first order)."""
        return learner.architecture_step(val, moment)

    def graph_obstacle(self) -> str | None:
        """Why steps cannot be recorded as CUDA graphs; None where all run the same kernels.

        In a step nothing may then be read or drawn by the host, or bound to a new tensor.
        """
        return f"the method {self.name!r} does not say that its steps can be recorded"

    def graph_key(self, moment: Moment) -> Hashable:
        """What a step takes from schedules; where that changes, a step is recorded anew."""
        return None

    def evaluate(self, learner: Learner, batch: Batch, moment: Moment) -> Outcome:
        """Test the supernet on a batch; it is in eval mode, and is left so."""
        return learner.evaluate(batch, moment)

    def state_dict(self) -> dict[str, Any]:
        """State that must survive beside the architecture parameters; most methods have none."""
        return {} if self.term is None else {"term": self.term.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`."""
        if set(state) != set(self.state_dict()):
            wanted = ", ".join(self.state_dict()) or "no state"
            raise ValueError(f"method {self.name!r} has {wanted}, but got {sorted(state)}")
        if self.term is not None:
            self.term.load_state_dict(state["term"])


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
