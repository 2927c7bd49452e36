# SPDX-License-Identifier: Apache-2.0
"""Whether somebody's mixed op may be replaced by ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor, nn

from fastnas.nn.batch_norm import FORMS, Form, has_global_hook
from fastnas.nn.carriers import carrying_anything
from fastnas.nn.lent import lend, lent_methods
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
from fastnas.nn.proof.signature import extra_defaults, list_name, parts_in_list, positional
from fastnas.nn.proof.stand_ins import fault_around_candidates

__all__ = ["Verdict", "channels_of", "device_of", "dtypes_of", "form_of", "judge", "plain_mode"]

# Settings of the published mixed ops that are fixed when the edge is built.
_FIXED = frozenset({"mp", "k", "training", "stride", "C"})
_BATCH = 3
# Not square: an op that confuses height with width shows itself. The larger ones are for candidates
# that want more pixels, to pad with or to pool.
_SIZES = ((8, 6), (32, 24))
_LARGEST_K = 64
# What each mixed op of ours has for itself: it follows from the rest, or is the one it replaced.
_PER_INSTANCE = frozenset(("_plan", "_forms", "_original"))


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
        candidates = parts_in_list(module)
        ours: MixedOp
        if self.k is not None:
            ours = PartialMixedOp.from_candidates(
                candidates, k=self.k, skip_zero=self.skip_zero, forms=self.forms
            )
            if (pool := module._modules.get("mp")) is not None:
                ours._modules["mp"] = pool
        else:
            ours = MixedOp.from_candidates(candidates, skip_zero=self.skip_zero, forms=self.forms)
        lend(ours, type(module), list_name(module) or "_ops")
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
    ours = isinstance(module, MixedOp)
    for name, value in vars(module).items():
        if ours and name in _PER_INSTANCE:
            if name == "_forms":
                yield name, str(sorted((id(cls), form) for cls, form in value.items()))
        elif name not in EVERY_MODULE_HAS:
            plain = isinstance(value, (bool, int, float, str, tuple, type(None)))
            yield name, repr(value) if plain else str(id(value))


def judge(module: nn.Module) -> Verdict:
    """Compare ``module`` with our mixed op on its candidates, in copies of both."""
    if has_global_hook():
        return Verdict("hooks for every module are registered, which the fused way would bypass")
    parameters = positional(module) or []
    reading = read(module, dict(extra_defaults(parameters[2:]) or ()))
    settings = sorted(reading.settings - _FIXED - {list_name(module)})
    if settings:
        return Verdict(f"its forward reads settings that may change: {', '.join(settings)}")
    channels = channels_of(parts_in_list(module))
    if channels is None:
        return Verdict("no Conv2d or BatchNorm2d among its candidates says what x is")
    device = device_of(module)
    if device.type == "meta":
        return Verdict("its parameters hold no numbers yet")
    with plain_mode(device):
        return _judge(module, reading, channels, device)


def _judge(module: nn.Module, reading: Reading, channels: int, device: torch.device) -> Verdict:
    """Judge by the first kind of random data that ``module`` runs on."""
    verdict = Verdict("it has a pool `mp`, but no `k` that says what part is mixed")
    for size, k, dtype in product(_SIZES, _parts(module, reading), dtypes_of(module)):
        try:
            theirs = clean_copy(module, dtype)
        except Exception as error:  # somebody else's code may raise anything
            return Verdict(f"it cannot be copied for the proof: {one_line(error)}")
        try:
            proof = _Proof(module, theirs, k, (channels, *size), Random(device, dtype))
        except Exception as error:
            verdict = Verdict(f"it does not run on random data: {one_line(error)}")
            continue
        verdict = proof.with_candidates()
        if verdict.reason is None and lent_methods(type(module), PartialMixedOp):
            verdict = _with_methods(module, verdict, reading)
        return verdict if verdict.reason else proof.around_candidates(verdict, reading)
    return verdict


def _with_methods(module: nn.Module, verdict: Verdict, reading: Reading) -> Verdict:
    """Whether what the methods of a mixed op may set means the same to ours."""
    followed = {list_name(module), "training"} | ({"k", "mp"} if verdict.k is not None else set())
    settings = sorted(reading.settings - followed)
    if settings:
        return Verdict(
            f"its forward reads settings that its methods may set: {', '.join(settings)}"
        )
    if verdict.k is not None and "k" not in reading.settings:
        return Verdict("its methods may set k, which its forward does not read")
    return verdict


def _parts(module: nn.Module, reading: Reading) -> Sequence[int | None]:
    """The values of ``k`` that come into question; None stands for the whole."""
    k = vars(module).get("k")
    usable = isinstance(k, int) and not isinstance(k, bool) and k > 0
    if "mp" not in module._modules:  # only a reduction needs it
        return [None, k] if usable else [None]
    if "k" in vars(module):
        return [k] if usable else []
    # Published code has it as a number in the forward, too.
    return sorted(number for number in reading.numbers if 1 < number <= _LARGEST_K)


def dtypes_of(module: nn.Module) -> Sequence[torch.dtype]:
    """Double precision, then the module's own in case its candidates know no other."""
    dtypes = {t.dtype for t in _tensors(module) if t.is_floating_point()}
    return [torch.float64] if len(dtypes) != 1 else list(dict.fromkeys([torch.float64, *dtypes]))


@contextmanager
def plain_mode(device: torch.device) -> Iterator[None]:
    """The modes that a proof runs in, whatever the caller's are; random generators are put back."""
    with ExitStack() as modes:
        # Threads that wait for each other at every tiny tensor are slower than one, and where
        # others share the cores, by far.
        modes.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        modes.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        modes.enter_context(torch.inference_mode(False))  # which turns gradients on as well
        if torch.amp.is_autocast_available(device.type):
            modes.enter_context(torch.autocast(device.type, enabled=False))
        modes.enter_context(carrying_anything())
        yield


def device_of(module: nn.Module) -> torch.device:
    """Where ``module`` is."""
    return next((t.device for t in _tensors(module)), torch.device("cpu"))


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def channels_of(module: nn.Module) -> int | None:
    """How many channels ``module`` expects, read off a convolution or a BatchNorm inside."""
    parts = list(module.modules())
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
        self,
        module: nn.Module,
        theirs: nn.Module,
        k: int | None,
        image: tuple[int, int, int],
        random: Random,
    ) -> None:
        """Run ``theirs``, a copy of ``module``; may raise whatever it raises.

        Args:
            module: what it is all about.
            theirs: changes.
            k: one channel in ``k`` is mixed; None if all are.
            image: channels of the mixed part, height, width.
            random: the source of everything.
        """
        self._module, self._k, self._random = module, k, random
        count = len(parts_in_list(module))
        channels, *size = image
        self._part = random.normal(_BATCH, channels, *size)
        self._x = random.normal(_BATCH, channels * (k or 1), *size)
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
        forms = {**FORMS, **proved_forms(parts_in_list(module), self._part)}
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
