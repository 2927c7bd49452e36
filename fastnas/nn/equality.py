# SPDX-License-Identifier: Apache-2.0
"""The proof behind ``accelerate``: somebody's mixed op and ours, run on the same random data."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import CodeType, FunctionType

import torch
from torch import Tensor, nn

from fastnas.nn.batch_norm import FORMS, Form, has_global_hook, hook_tables, make_route
from fastnas.nn.mixed_op import MixedOp
from fastnas.nn.partial import PartialMixedOp

__all__ = ["Verdict", "form_of", "judge"]

# What running somebody else's module on data it was not made for may raise.
_FOREIGN = (
    RuntimeError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
)
# Settings of the published mixed ops that are fixed when the edge is built.
_FIXED = frozenset({"_ops", "mp", "k", "training", "stride", "C"})
_EVERY_MODULE_HAS = frozenset(vars(nn.Module()))
_SEED = 20190501
# Not square: an op that confuses height with width shows itself.
_BATCH, _HEIGHT, _WIDTH = 3, 8, 6
# Largest relative difference of two orders of summation; anything above is another formula.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# Results smaller than this are compared absolutely: a gradient that is zero on paper is noise.
_SMALL = 1e-3


@dataclass(frozen=True)
class Verdict:
    """Whether, and as what, a form of mixed op may be replaced.

    Attributes:
        reason: why it may not; None if it may.
        difference: the relative difference of what is named, when that is the reason.
        partial: it is a partial-channel one.
        skip_zero: it does not run candidates of weight zero.
        forms: what was proved of the candidates' classes.
    """

    reason: str | None = None
    difference: float | None = None
    partial: bool = False
    skip_zero: bool = False
    forms: Mapping[type[nn.Module], Form] = field(default_factory=dict)

    def build(self, module: nn.Module) -> MixedOp:
        """Our mixed op on the very candidates (and pool) of ``module``."""
        candidates = module._modules["_ops"]
        assert isinstance(candidates, nn.ModuleList)
        ours: MixedOp
        if self.partial:
            ours = PartialMixedOp.from_candidates(
                candidates, k=vars(module)["k"], skip_zero=self.skip_zero, forms=self.forms
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
        (name, type(m), m.extra_repr(), tuple(sorted(_settings(m))))
        for name, m in module.named_modules()
    )
    return parts, tensors


def _settings(module: nn.Module) -> Iterator[tuple[str, str]]:
    for name, value in vars(module).items():
        if name not in _EVERY_MODULE_HAS:
            plain = isinstance(value, (bool, int, float, str, tuple, type(None)))
            yield name, repr(value) if plain else str(id(value))


def judge(module: nn.Module) -> Verdict:
    """Compare ``module`` with our mixed op on its candidates, in copies of both."""
    if has_global_hook():
        return Verdict("hooks for every module are registered, which the fused way would bypass")
    partial = "mp" in module._modules
    k = vars(module).get("k")
    if partial and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
        return Verdict("it has a pool `mp`, but no `k` that says what part is mixed")
    settings = sorted(_reads(module) - _FIXED)
    if settings:
        return Verdict(f"its forward reads settings that may change: {', '.join(settings)}")
    device = next((t.device for t in module.state_dict().values()), torch.device("cpu"))
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda), torch.enable_grad():
        return _judge(module, partial, device)


def _judge(module: nn.Module, partial: bool, device: torch.device) -> Verdict:
    dtypes = {t.dtype for t in module.state_dict().values() if t.is_floating_point()}
    reason = ""
    for dtype in dict.fromkeys([torch.float64, *dtypes] if len(dtypes) < 2 else [torch.float64]):
        try:
            theirs = _clean_copy(module, dtype)
            data = _Data(theirs, partial, device, dtype)
            expected = data.observe_all(theirs)
        except _FOREIGN as error:
            reason = f"it does not run on random data: {_one_line(error)}"
            continue
        forms = {**FORMS, **_proved_forms(module, data, dtype)}
        return _compare(module, partial, forms, data, expected, dtype)
    return Verdict(reason)


def _compare(
    module: nn.Module,
    partial: bool,
    forms: Mapping[type[nn.Module], Form],
    data: _Data,
    expected: dict[str, Tensor],
    dtype: torch.dtype,
) -> Verdict:
    """Find out whether one of our two ways with zero weights gives what was expected."""
    verdicts = []
    for skip_zero in (False, True):
        verdict = Verdict(None, None, partial, skip_zero, forms)
        try:
            observed = data.observe_all(verdict.build(_clean_copy(module, dtype)))
        except _FOREIGN as error:
            verdicts.append(Verdict(f"ours does not run on its candidates: {_one_line(error)}"))
            continue
        differences = {n: _difference(observed[n], t) for n, t in expected.items()}
        wrong = [n for n, difference in differences.items() if difference > _TOLERANCE[dtype]]
        if not wrong:
            return verdict
        reason = f"it computes something else: {wrong[0]} differs"
        verdicts.append(Verdict(reason, differences[wrong[0]]))
    return verdicts[0]


def _one_line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text[:200]}"


def _clean_copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose hooks do not fire and whose parameters all ask for gradients."""
    clone = copy.deepcopy(module).to(dtype)
    for part in clone.modules():
        for table in hook_tables(part):
            table.clear()
    for parameter in clone.parameters():
        parameter.requires_grad_()
        parameter.grad = None
    return clone


def _channels(module: nn.Module) -> int:
    """How many channels the candidates expect, read off a convolution or a BatchNorm."""
    parts = list(module.modules())
    for part in parts:
        if isinstance(part, nn.Conv2d):
            return part.in_channels
    for part in parts:
        if isinstance(part, nn.BatchNorm2d):
            return part.num_features
    return 4


class _Data:
    """Random inputs, and what a mixed op makes of them."""

    def __init__(
        self, module: nn.Module, partial: bool, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.device = device
        self.seed()
        ops = module._modules["_ops"]
        assert isinstance(ops, nn.ModuleList)
        shape = (_BATCH, _channels(ops), _HEIGHT, _WIDTH)
        self.part = torch.randn(shape, dtype=dtype, device=device)
        k = vars(module)["k"] if partial else 1
        self.x = torch.randn(_BATCH, shape[1] * k, _HEIGHT, _WIDTH, dtype=dtype, device=device)
        self.grad = torch.randn(self.x.shape, dtype=dtype, device=device)
        # One row per trial. Any sign, any sum; then with zeros, where implementations part ways.
        self.weights = torch.randn(2, len(ops), dtype=dtype, device=device)
        self.weights[1, ::2] = 0

    def seed(self) -> None:
        """Start the generators alike, for candidates that draw random numbers."""
        torch.default_generator.manual_seed(_SEED)
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(_SEED)

    def observe_all(self, op: nn.Module) -> dict[str, Tensor]:
        """Everything a training or evaluation step takes from ``op``, by name."""
        seen: dict[str, Tensor] = {}
        for training in (True, False):
            mode = "training" if training else "evaluation"
            for row, which in enumerate(("", ", with zero weights")):
                op.train(training)
                for what, value in self._observe(op, row).items():
                    seen[f"{what} ({mode}{which})"] = value
        return seen

    def _observe(self, op: nn.Module, row: int) -> dict[str, Tensor]:
        self.seed()
        x = self.x.clone().requires_grad_()
        weights = self.weights.clone().requires_grad_()
        y = op(x, weights[row])
        if not isinstance(y, Tensor):
            raise TypeError(f"it returns {type(y).__name__}, not a tensor")
        seen = {"the output": y.detach().clone()}
        named = {"x": x, "the weights": weights, **dict(op.named_parameters())}
        grads: tuple[Tensor | None, ...] = (None,) * len(named)
        if y.requires_grad:
            grad = self.grad.flatten()[: y.numel()].view(y.shape)
            grads = torch.autograd.grad(y, list(named.values()), grad, allow_unused=True)
        for (name, tensor), g in zip(named.items(), grads, strict=True):
            seen[f"the gradient of {name}"] = torch.zeros_like(tensor) if g is None else g
        for name, buffer in op.named_buffers():
            seen[f"the buffer {name}"] = buffer.clone()
        if not torch.equal(x, self.x):
            raise RuntimeError("it writes to its input")
        return seen


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest value; infinite where the two cannot be compared."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return float("inf")
    if theirs.numel() == 0:
        return 0.0
    a, b = ours.detach().double(), theirs.detach().double()
    if not (a.isfinite().all() and b.isfinite().all()):
        return 0.0 if torch.equal(a.nan_to_num(), b.nan_to_num()) else float("inf")
    return float((a - b).abs().max() / b.abs().max().clamp(min=_SMALL))


def _proved_forms(
    module: nn.Module, data: _Data, dtype: torch.dtype
) -> dict[type[nn.Module], Form]:
    """The candidates' classes that look like DARTS' own and return the same as those."""
    candidates = module._modules["_ops"]
    assert isinstance(candidates, nn.ModuleList)
    forms: dict[type[nn.Module], Form] = {}
    for candidate in candidates:
        form = None if type(candidate) in FORMS else _guess(candidate)
        if form is not None:
            forms[type(candidate)] = form
    refuted = {
        type(candidate)
        for candidate in candidates
        if type(candidate) in forms and not _is_proved(candidate, forms, data, dtype)
    }
    return {cls: form for cls, form in forms.items() if cls not in refuted}


def _guess(candidate: nn.Module) -> Form | None:
    """What a candidate seems to be, by the names of its children and of what its forward reads."""
    children = set(candidate._modules)
    if candidate._parameters or candidate._buffers:
        return None
    if type(candidate).__name__ == "Zero" and not children:
        return "zero"
    if not _reads(candidate) <= children | {"C_in", "C_out", "stride"}:
        return None
    if children == {"op"}:
        return "op"
    return "factorized_reduce" if children == {"relu", "conv_1", "conv_2", "bn"} else None


def _is_proved(
    candidate: nn.Module,
    forms: Mapping[type[nn.Module], Form],
    data: _Data,
    dtype: torch.dtype,
) -> bool:
    """Whether the cut of ``candidate`` returns what calling it returns."""
    for training in (True, False):
        whole = _clean_copy(candidate, dtype).train(training)
        route = make_route(_clean_copy(candidate, dtype).train(training), forms)
        if route.norm is None and not route.zero:
            return False
        data.seed()
        try:
            expected = whole(data.part)
            h = data.part
            data.seed()
            for layer in route.layers:
                h = layer(h)
        except _FOREIGN:
            return False
        h = torch.zeros_like(h) if route.zero else route.norm(h) if route.norm is not None else h
        if _difference(h, expected) > _TOLERANCE[dtype]:
            return False
    return True


def _reads(module: nn.Module) -> set[str]:
    """Names that the class's methods use and that are settings or children of ``module``.

    Found in the compiled code, as attribute names and as strings (``getattr``); a name that
    happens to be used for something else counts too, which errs on the safe side.
    """
    classes = [c for c in type(module).__mro__ if c not in nn.Module.__mro__]
    used: set[str] = set()
    settings = set(vars(module)) - _EVERY_MODULE_HAS | set(module._modules)
    for cls in classes:
        for name, value in vars(cls).items():
            function = getattr(value, "__func__", value)
            if isinstance(function, FunctionType):
                if name not in ("__init__", "extra_repr"):
                    used |= _names(function.__code__)
            elif not name.startswith("__"):
                settings.add(name)
    return used & settings


def _names(code: CodeType) -> set[str]:
    """Attribute names and strings in ``code`` and in the functions inside it."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
        elif isinstance(constant, str):
            names.add(constant)
    return names
