# SPDX-License-Identifier: Apache-2.0
"""Whether somebody's mixed op may be replaced by ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastnas.nn.batch_norm import FORMS, Form, has_global_hook
from fastnas.nn.mixed_op import MixedOp
from fastnas.nn.partial import PartialMixedOp
from fastnas.nn.proof.forms import proved_forms
from fastnas.nn.proof.observation import (
    Random,
    Trial,
    clean_copy,
    first_difference,
    observe,
    one_line,
)
from fastnas.nn.proof.reading import EVERY_MODULE_HAS, Reading, read
from fastnas.nn.proof.stand_ins import fault_around_candidates

__all__ = ["Verdict", "form_of", "judge"]

# Settings of the published mixed ops that are fixed when the edge is built.
_FIXED = frozenset({"_ops", "mp", "k", "training", "stride", "C"})
# Not square: an op that confuses height with width shows itself.
_BATCH, _HEIGHT, _WIDTH = 3, 8, 6


@dataclass(frozen=True)
class Verdict:
    """Whether, and as what, a form of mixed op may be replaced.

    Attributes:
        reason: why it may not; None if it may.
        difference: the relative difference of what is named, when that is the reason.
        k: one channel in ``k`` is mixed; None if it is not a partial-channel one.
        skip_zero: it does not run candidates of weight zero.
        forms: what was proved of the candidates' classes.
    """

    reason: str | None = None
    difference: float | None = None
    k: int | None = None
    skip_zero: bool = False
    forms: Mapping[type[nn.Module], Form] = field(default_factory=dict)

    def build(self, module: nn.Module) -> MixedOp:
        """Our mixed op on the very candidates (and pool) of ``module``."""
        candidates = _candidates(module)
        ours: MixedOp
        if self.k is not None:
            ours = PartialMixedOp.from_candidates(
                candidates, k=self.k, skip_zero=self.skip_zero, forms=self.forms
            )
            ours._modules["mp"] = module._modules["mp"]
        else:
            ours = MixedOp.from_candidates(candidates, skip_zero=self.skip_zero, forms=self.forms)
        return ours


def form_of(module: nn.Module) -> object:
    """A key that two mixed ops share only if one proof holds for both."""
    tensors = tuple(
        (name, tuple(t.shape), t.dtype, t.device)
        for name, t in [*module.named_parameters(), *module.named_buffers()]
    )
    parts = tuple(
        (name, type(m), tuple(sorted(_settings(m)))) for name, m in module.named_modules()
    )
    return parts, tensors


def _settings(module: nn.Module) -> Iterator[tuple[str, str]]:
    for name, value in vars(module).items():
        if name not in EVERY_MODULE_HAS:
            plain = isinstance(value, (bool, int, float, str, tuple, type(None)))
            yield name, repr(value) if plain else str(id(value))


def judge(module: nn.Module) -> Verdict:
    """Compare ``module`` with our mixed op on its candidates, in copies of both."""
    if has_global_hook():
        return Verdict("hooks for every module are registered, which the fused way would bypass")
    reading = read(module)
    settings = sorted(reading.settings - _FIXED)
    if settings:
        return Verdict(f"its forward reads settings that may change: {', '.join(settings)}")
    channels = _channels(_candidates(module))
    if channels is None:
        return Verdict("no Conv2d or BatchNorm2d among its candidates says what x is")
    device = _tensors(module)[0].device
    if device.type == "meta":
        return Verdict("its parameters hold no numbers yet")
    verdict = Verdict("it has a pool `mp`, but no `k` that says what part is mixed")
    with _plain_mode(device):
        for k in _parts(module, reading):
            verdict = _judge(module, reading, k, channels, device)
            if verdict.reason is None:
                break
    return verdict


def _parts(module: nn.Module, reading: Reading) -> Sequence[int | None]:
    """The values of ``k`` that come into question."""
    if "mp" not in module._modules:
        return [None]
    if "k" not in vars(module):  # published code has it as a number in the forward, too
        return sorted(number for number in reading.numbers if number > 1)
    k = vars(module)["k"]
    return [k] if isinstance(k, int) and not isinstance(k, bool) and k > 0 else []


@contextmanager
def _plain_mode(device: torch.device) -> Iterator[None]:
    """The modes that a proof runs in, whatever the caller's are; random generators are put back."""
    with ExitStack() as modes:
        modes.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.enable_grad())
        if torch.amp.is_autocast_available(device.type):
            modes.enter_context(torch.autocast(device.type, enabled=False))
        yield


def _judge(
    module: nn.Module, reading: Reading, k: int | None, channels: int, device: torch.device
) -> Verdict:
    """Judge in double precision, or in the module's own where its candidates know no other."""
    dtypes = {t.dtype for t in _tensors(module) if t.is_floating_point()}
    reason = ""
    for dtype in dict.fromkeys([torch.float64, *dtypes] if len(dtypes) < 2 else [torch.float64]):
        try:
            theirs = clean_copy(module, dtype)
        except Exception as error:  # somebody else's code may raise anything
            return Verdict(f"it cannot be copied for the proof: {one_line(error)}")
        try:
            proof = _Proof(module, theirs, k, channels, Random(device, dtype))
        except Exception as error:
            reason = f"it does not run on random data: {one_line(error)}"
            continue
        verdict = proof.with_candidates()
        return verdict if verdict.reason else proof.around_candidates(verdict, reading)
    return Verdict(reason)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _candidates(module: nn.Module) -> nn.ModuleList:
    candidates = module._modules["_ops"]
    assert isinstance(candidates, nn.ModuleList)
    return candidates


def _channels(candidates: nn.ModuleList) -> int | None:
    """How many channels the candidates expect, read off a convolution or a BatchNorm."""
    parts = list(candidates.modules())
    for part in parts:
        if isinstance(part, nn.Conv2d):
            return part.in_channels
    for part in parts:
        if isinstance(part, nn.BatchNorm2d):
            return part.num_features
    return None


class _Proof:
    """What ``module`` makes of random data, and the comparison of ours with that."""

    def __init__(
        self, module: nn.Module, theirs: nn.Module, k: int | None, channels: int, random: Random
    ) -> None:
        """Run ``theirs``, a copy of ``module``; may raise whatever it raises."""
        self._module, self._k, self._random = module, k, random
        count = len(_candidates(module))
        self._part = random.normal(_BATCH, channels, _HEIGHT, _WIDTH)
        self._x = random.normal(_BATCH, channels * (k or 1), _HEIGHT, _WIDTH)
        weights = random.normal(2, count)
        weights[1, ::2] = 0  # where implementations part ways
        self._trials = [
            Trial(mode + which, self._x, weights[row], mode == "training")
            for mode in ("training", "evaluation")
            for row, which in enumerate(("", ", with zero weights"))
        ]
        self._expected = self._observe(theirs)

    def _observe(self, op: nn.Module) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        for trial in self._trials:
            seen |= observe(op, trial, self._random)
        return seen

    def with_candidates(self) -> Verdict:
        """Find out whether one of our two ways with zero weights gives what was expected."""
        module, dtype = self._module, self._random.dtype
        forms = {**FORMS, **proved_forms(_candidates(module), self._part)}
        reasons = []
        for skip_zero in (False, True):
            verdict = Verdict(None, None, self._k, skip_zero, forms)
            try:
                observed = self._observe(verdict.build(clean_copy(module, dtype)))
            except Exception as error:
                reasons.append(Verdict(f"ours does not run on its candidates: {one_line(error)}"))
                continue
            found = first_difference(observed, self._expected, dtype)
            if found is None:
                return verdict
            reasons.append(Verdict(f"it computes something else: {found[0]} differs", found[1]))
        return reasons[0]

    def around_candidates(self, verdict: Verdict, reading: Reading) -> Verdict:
        """Find out whether that holds for other data, too."""
        y = self._expected[f"the output ({self._trials[0].name})"]
        fault = fault_around_candidates(
            self._module, verdict.build, reading, self._x, y, self._part.shape[1]
        )
        return verdict if fault is None else Verdict(*fault)
