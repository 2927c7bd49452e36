# SPDX-License-Identifier: Apache-2.0
"""ProxylessNAS (Cai, Zhu, Han, ICLR 2019, arXiv 1812.00332): binary gates, one path at a time.

One path of the supernet, drawn from the softmax of the alphas, runs in each step. The weights of
that path are trained in every iteration; every few iterations the alphas take a step, by the
gradient of the binary gates (section 3.2, from all candidates or from two) or by REINFORCE
(section 3.3.2, ``reinforce``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from fastnas.methods.base import Method, MethodOptions, Moment, register_method
from fastnas.methods.learner import Batch, Learner, Outcome, frozen, parameters_of
from fastnas.methods.parameters import ArchParameters, normal_logits
from fastnas.methods.reinforce import Baseline, BaselineRule, reinforce_step
from fastnas.nn.gated import frozen_statistics
from fastnas.nn.gates import Gate, Gates, Paths, draw_gates, rescale
from fastnas.spaces.base import CellGates, CellWeights, Weighting

_DRAWS = 20
"""Bits of the sampler's step for the draws within one iteration."""

_OF_REINFORCE = ("rl_samples", "rl_updates", "rl_exponent", "rl_baseline")
# The reward of REINFORCE has the cost in it, and its steps no other loss.
_OF_GATES = ("arch_every", "arch_steps", "zero_policy", "target_weight", "target_rate")
"""Options that only one kind of estimator looks at."""


@dataclass(frozen=True)
class ProxylessOptions(MethodOptions):
    """Options of the method ``proxyless``."""

    estimator: Literal["full", "two", "reinforce"] = "full"
    """Gradient of the architecture, of which one path runs in a step: full takes it from all
    candidates (run once more, one by one, without storing anything), two from two candidates that
    are drawn, reinforce from the accuracy of whole networks, by REINFORCE."""
    arch_every: int = 5
    """Iterations from one architecture step to the next; not of REINFORCE."""
    arch_steps: int = 1
    """Architecture steps at a time; not of REINFORCE."""
    warmup_epochs: int = 0
    """First epochs with a cosine of the learning rate of their own; the architecture is frozen for
    arch_warmup_epochs, which are at least as many."""
    warmup_lr: float = 0.05
    """Learning rate at the start of that cosine."""
    zero_policy: Literal["exact", "skip"] = "exact"
    """What a block learns while it is skipped: its gradient like any other, or, as in the released
    code, nothing; not of REINFORCE."""
    importance: bool = False
    """With the estimator two: weigh each pair so that the mean over the pairs is the gradient of
    full."""
    rl_samples: int = 10
    """Networks that are tested for one step of REINFORCE (the options rl_... are of it alone)."""
    rl_updates: int = 300
    """Steps of REINFORCE in an epoch, spread evenly over it."""
    rl_exponent: float = 0.1
    """w in the reward of REINFORCE where there is a target T: accuracy (T / cost)^w."""
    rl_baseline: BaselineRule = "released"
    """What REINFORCE takes off the rewards. released: 0.99 of the new mean reward and 0.01 of the
    old baseline, as in the released code. average: the ordinary moving average, 0.01 of the new
    and 0.99 of the old."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("arch_every", "arch_steps", "rl_samples", "rl_updates"):
            if not 1 <= getattr(self, name) < 1 << 15:
                raise ValueError(
                    f"{name}: expected 1 to {(1 << 15) - 1}, but got {getattr(self, name)}"
                )
        for name in ("warmup_epochs", "warmup_lr", "rl_exponent"):
            if not 0 <= getattr(self, name) < 1 << 31:
                raise ValueError(f"{name}: expected at least 0, but got {getattr(self, name)}")


@register_method("proxyless")
class Proxyless(Method):
    """One path a step; the weights first, then, every few iterations, the architecture."""

    Options: ClassVar[type[MethodOptions]] = ProxylessOptions
    needs: ClassVar[frozenset[str]] = frozenset({"gates"})
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # One path a step: each candidate needs more steps than in a search that runs all of them.
        "demo": {
            "options": ProxylessOptions(arch_every=2),
            "epochs": 10,
            "weight_share": 0.6,
            "arch_share": 0.2,
            "label_smoothing": 0.1,
            "arch_betas": (0.0, 0.999),
            "arch_weight_decay": 0.0,
            "arch_warmup_epochs": 3,
        },
        "cifar10": {
            "arch_betas": (0.0, 0.999),
            "arch_weight_decay": 0.0,
            "arch_lr": 6e-3,
            "label_smoothing": 0.1,
        },
        # The schedule of the released script: 40 epochs of warm-up and 120 of search, no
        # architecture step in the first of these; 50,000 images for the architecture, all others
        # for the weights.
        "imagenet": {
            "options": ProxylessOptions(warmup_epochs=40, warmup_lr=0.05),
            "epochs": 160,
            "batch_size": 256,
            "lr": 0.025,
            "lr_warmup_epochs": 0,
            "weight_decay": 4e-5,
            "nesterov": True,
            "grad_clip": 0.0,
            "label_smoothing": 0.1,
            "arch_lr": 1e-3,
            "arch_betas": (0.0, 0.999),
            "arch_weight_decay": 0.0,
            "arch_grad_clip": 0.0,
            "arch_warmup_epochs": 41,
            "weight_share": 1 - 50_000 / 1_281_167,
            "arch_share": 50_000 / 1_281_167,
            "validate": "every",
        },
    }

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._baseline = Baseline(self.choices.rl_baseline)

    @property
    def choices(self) -> ProxylessOptions:
        """The options."""
        return cast(ProxylessOptions, self.options)

    @classmethod
    def check(cls, config: Any) -> None:
        """What must hold between the method's options and the others."""
        options = config.options
        if options.warmup_epochs > config.arch_warmup_epochs:
            raise ValueError(
                f"arch_warmup_epochs: expected at least warmup_epochs={options.warmup_epochs}, "
                f"but got {config.arch_warmup_epochs}"
            )
        if options.warmup_epochs and config.lr_warmup_epochs:
            raise ValueError(
                "lr_warmup_epochs: expected 0 with warmup_epochs, whose rates have a course of "
                f"their own, but got {config.lr_warmup_epochs}"
            )
        if options.importance and options.estimator != "two":
            raise ValueError(
                f"importance: expected the estimator 'two', but got {options.estimator!r}"
            )
        if options.estimator == "two":
            # Momentum or decay would move logits that were not drawn.
            for name, value in (
                ("arch_betas[0]", config.arch_betas[0]),
                ("arch_weight_decay", config.arch_weight_decay),
            ):
                if value != 0:
                    raise ValueError(f"{name}: expected 0 with two paths, but got {value}")

    @classmethod
    def idle(cls, config: Any) -> dict[str, str]:
        """What belongs to another estimator, to a warm-up or to a target that is not there."""
        o, idle = cast(ProxylessOptions, config.options), {}
        found = f"but got {o.estimator!r}"
        if not o.warmup_epochs:
            idle["warmup_lr"] = "warmup_epochs above 0, but got 0"
        if o.estimator != "two":
            idle["importance"] = f"the estimator 'two', {found}"
        if o.estimator != "reinforce":
            return idle | dict.fromkeys(_OF_REINFORCE, f"the estimator 'reinforce', {found}")
        idle |= dict.fromkeys(_OF_GATES, f"the estimator 'full' or 'two', {found}")
        if config.target is None:
            idle["rl_exponent"] = "a target as well, but got None"
        return idle

    @classmethod
    def frozen(cls, config: Any, steps_per_epoch: int) -> str | None:
        """All of it, where an epoch is over before it is time for a step."""
        if (o := config.options).estimator == "reinforce" or o.arch_every <= steps_per_epoch:
            return None
        return (
            f"the architecture takes no step: one is made after every {o.arch_every} iterations of "
            f"an epoch (--arch-every), which has {steps_per_epoch}, and the genotype is read off "
            f"the initial logits; try --arch-every {steps_per_epoch} or less"
        )

    def parameters(self) -> ArchParameters:
        """Alphas drawn from N(0, 1e-6), a parameter for each edge."""
        return ArchParameters(
            {k: normal_logits(s.edges, len(s.primitives)) for k, s in self.specs.items()},
            counts={kind: spec.candidates for kind, spec in self.specs.items()},
        )

    def lr_span(self, moment: Moment) -> tuple[float, float, float | None]:
        """One cosine over the warm-up and one over what follows, by iterations."""
        position = moment.step / moment.steps_per_epoch
        warmup = self.choices.warmup_epochs
        if moment.epoch < warmup:
            return position, warmup, self.choices.warmup_lr
        return position - warmup, max(moment.epochs - warmup, 1), None

    # --- paths -------------------------------------------------------------------------------

    def weights(self, arch: ArchParameters, moment: Moment) -> Mapping[str, CellGates]:
        """One path: drawn in a step; in validation that of the network that would be derived."""
        if moment.phase == "validation":
            with torch.no_grad():
                scores = self._final_scores(arch)
            return {
                kind: CellGates(tuple(map(Gate, scores[kind].argmax(dim=1).tolist())))
                for kind in self.specs
            }
        paths = "one" if moment.phase == "weights" else self._paths
        return self.split(self.draw(arch, moment, paths, index=int(moment.phase != "weights")))

    def pruned_weights(
        self, arch: ArchParameters, one_hot: Mapping[str, CellWeights]
    ) -> dict[str, Weighting]:
        """The one path that is left: nothing else is run."""
        return {
            kind: CellGates(tuple(map(Gate, weights.ops.argmax(dim=1).tolist())))
            for kind, weights in one_hot.items()
        }

    @property
    def _paths(self) -> Paths:
        estimator = self.choices.estimator
        return "one" if estimator == "reinforce" else estimator

    def draw(self, arch: ArchParameters, moment: Moment, paths: Paths, index: int) -> Gates:
        """Draw the gates of all edges of the network, kind after kind.

        Args:
            arch: the architecture parameters.
            moment: when; only its iteration counts.
            paths: what the gradient is to be estimated from.
            index: number of the draw within the iteration; 0 is that of the weights.
        """
        return draw_gates(
            self.table(arch),
            self.seed,
            moment.step << _DRAWS | index,
            paths=paths,
            counts=[n for spec in self.specs.values() for n in spec.candidates],
            zeros=[z for spec in self.specs.values() for z in spec.zeros],
            zero_policy=self.choices.zero_policy,
            importance=self.choices.importance,
        )

    def table(self, arch: ArchParameters) -> Tensor:
        """The logits of all kinds, one below the other."""
        tables = [arch.alpha(kind) for kind in self.specs]
        width = max(t.shape[1] for t in tables)
        pad = torch.nn.functional.pad
        return torch.cat([pad(t, (0, width - t.shape[1]), value=-torch.inf) for t in tables])

    def split(self, gates: Gates) -> dict[str, CellGates]:
        """The gates by kind, as a supernet takes them."""
        edges = iter(gates.edges)
        return {
            kind: CellGates(tuple(next(edges) for _ in range(spec.edges)))
            for kind, spec in self.specs.items()
        }

    def rows(self, arch: ArchParameters) -> list[Tensor]:
        """The logits of each edge, in the order of :meth:`table`."""
        return [row for kind in self.specs for row in arch.rows(kind)]

    # --- steps -------------------------------------------------------------------------------

    def iteration(
        self, learner: Learner, train: Batch, val: Callable[[], Batch] | None, moment: Moment
    ) -> tuple[Outcome, Outcome | None]:
        """A step of the weights and, when it is time, steps of the architecture."""
        outcome = learner.weight_step(train, moment.during("weights"))
        if val is None:
            return outcome, None
        arch_outcome = None
        at = moment.during("architecture")
        for number in range(self._steps_at(moment)):
            if self.choices.estimator == "reinforce":
                first = 1 + number * self.choices.rl_samples
                arch_outcome = reinforce_step(self, learner, val(), at, first, self._baseline)
            else:
                arch_outcome = self._gradient_step(learner, val(), at, 1 + number)
            self.settle(learner.arch, at)
        return outcome, arch_outcome

    def _steps_at(self, moment: Moment) -> int:
        """How many architecture steps follow this iteration."""
        options, length = self.choices, moment.steps_per_epoch
        i = moment.step % length
        if options.estimator == "reinforce":
            n = options.rl_updates
            return (i + 1) * n // length - i * n // length
        return options.arch_steps if (i + 1) % options.arch_every == 0 else 0

    def graph_obstacle(self) -> str | None:
        """Each iteration runs another path of the network."""
        return "every step runs another path of the network, which the host reads"

    def architecture_step(
        self, learner: Learner, train: Batch, val: Batch, moment: Moment
    ) -> Outcome:
        """One step by the gradient of the gates."""
        return self._gradient_step(learner, val, moment, 1)

    def _gradient_step(self, learner: Learner, val: Batch, moment: Moment, index: int) -> Outcome:
        arch = learner.arch
        rows = self.rows(arch)
        gates = self.draw(arch, moment, self._paths, index)
        with frozen(parameters_of(learner.weight_optimizer)):
            loss, outcome = learner.forward(val, self.split(gates))
            if self.term is not None:
                weights = self._expectation_of(arch, gates)
                loss = self.term.loss(loss, self.term.cost.expected(weights))
            gradient: list[Tensor | None] = list(learner.gradient(loss, rows))
        for edge in gates.skipped:
            gradient[edge] = None
        before = [row.detach().clone() for row in rows]
        self.apply(learner, gradient)
        if self.choices.estimator == "two":
            for row, old, gate in zip(rows, before, gates.edges, strict=True):
                if gate.others:
                    rescale(row.detach(), old, (gate.active, *gate.others))
        return outcome

    def apply(self, learner: Learner, gradient: Sequence[Tensor | None]) -> None:
        """Step along a gradient that is given edge by edge, in the order of :meth:`rows`."""
        by_row = {id(r): g for r, g in zip(self.rows(learner.arch), gradient, strict=True)}
        in_order = [by_row[id(parameter)] for parameter in learner.arch.parameters()]
        learner.apply_architecture_gradient(in_order)

    def evaluate(self, learner: Learner, batch: Batch, moment: Moment) -> Outcome:
        """Test the most probable path by the statistics of the batch, as in the released code.

        Running statistics of a candidate are those of all the paths it was drawn in.
        """
        if len(batch[1]) == 1:  # which may be too little for statistics
            return learner.evaluate(batch, moment)
        learner.supernet.train()
        try:
            with frozen_statistics(learner.supernet):
                return learner.evaluate(batch, moment)
        finally:
            learner.supernet.eval()

    # --- costs and scores --------------------------------------------------------------------

    def expectation(self, arch: ArchParameters, moment: Moment) -> Mapping[str, Tensor]:
        """``softmax(alpha)``."""
        return {kind: torch.softmax(arch.alpha(kind), dim=1) for kind in self.specs}

    def _expectation_of(self, arch: ArchParameters, gates: Gates) -> Mapping[str, Tensor]:
        """``softmax(alpha)`` with the gradient that the gates' own estimate has.

        With two paths that is the gradient of the pair's renormalised probabilities: unsampled
        logits get none.
        """
        if self.choices.estimator != "two":
            return self.expectation(arch, Moment(0, 1, 0))
        logits = self.table(arch)
        kept = torch.zeros(logits.shape, dtype=torch.bool)
        for row, gate in zip(kept, gates.edges, strict=True):
            row[[gate.active, *gate.others]] = True
        q = torch.softmax(logits.masked_fill(~kept.to(logits.device), -torch.inf), dim=1)
        if gates.scale is not None:
            q = q * gates.scale.unsqueeze(1)
        weights = torch.softmax(logits, dim=1).detach() + (q - q.detach())
        parts = weights.split([spec.edges for spec in self.specs.values()])
        return {
            kind: part[:, : len(spec.primitives)]
            for (kind, spec), part in zip(self.specs.items(), parts, strict=True)
        }

    def scores(self, arch: ArchParameters) -> dict[str, Tensor]:
        """``softmax(alpha)``."""
        return dict(self.expectation(arch, Moment(0, 1, 0)))

    # --- state -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The target's multiplier, and the baseline of REINFORCE."""
        state = super().state_dict()
        if self.choices.estimator == "reinforce":
            state["baseline"] = self._baseline.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`."""
        super().load_state_dict(state)
        if "baseline" in state:
            self._baseline.load_state_dict(state["baseline"])
