# SPDX-License-Identifier: Apache-2.0
"""What is measured: a case (op and shape), the forms it is computed in, and both modes."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnas.bench.machine import Work
from fastnas.bench.measure import relative_error, saved_bytes

#: Shapes of the mixed ops in a DARTS supernet of 16 channels: batch 64 at each resolution, and 256.
SHAPES = ((64, 16, 32, 32), (64, 32, 16, 16), (64, 64, 8, 8), (256, 16, 32, 32))

FORWARD, BOTH = "forward", "forward + backward"

#: Relative error in the Euclidean norm. A ReLU's mask or a pool's choice may differ where rounding
#: does, which moves few elements by much; another formula moves them all.
TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Form:
    """One way to compute a case: an implementation, a memory format, and how it is run."""

    implementation: str
    channels_last: bool = False
    #: "eager", "compiled" (torch.compile) or "graph" (replay of a CUDA graph).
    run: str = "eager"
    #: False where the case has no images, so that formats are not spoken of.
    images: bool = True

    @property
    def name(self) -> str:
        if self.run == "compiled":
            return "torch.compile"
        words = [self.implementation]
        if self.images:
            words.append("channels_last" if self.channels_last else "NCHW")
        return " ".join(words) + (", CUDA graph" if self.run == "graph" else "")

    @property
    def fused(self) -> bool:
        return self.implementation == "fastnas"

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


@dataclass(frozen=True)
class Setting:
    """What an implementation is built for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    memory_format: torch.memory_format = torch.contiguous_format

    @property
    def size(self) -> int:
        """Bytes of one tensor of this shape."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def image(self, *shape: int) -> Tensor:
        """A leaf with random values, of this setting's shape unless another is given."""
        x = torch.randn(shape or self.shape).to(self.device, self.dtype)
        return x.contiguous(memory_format=self.memory_format).requires_grad_()

    def weights(self, count: int) -> Tensor:
        """Weights of a mixed op: a softmax in float32, a leaf."""
        return torch.softmax(torch.randn(count), 0).to(self.device).requires_grad_()


class Call(NamedTuple):
    """``function(*args)`` and the leaves whose gradients a backward computes."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    wrt: tuple[Tensor, ...]
    #: Parameters: they are there with and without a graph.
    parameters: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Case:
    """An op at a shape.

    ``build(implementation, setting)`` gives the call of an implementation; the same seed precedes
    each, so that all get the same numbers. ``reference`` is one of them.
    """

    op: str
    shape: tuple[int, ...]
    build: Callable[[str, Setting], Call]
    work: Callable[[Setting], dict[str, Work]] | None = None
    modes: tuple[str, ...] = (FORWARD, BOTH)
    #: Further stock forms beside `torch loop`.
    stock: tuple[str, ...] = ()
    #: Whether it works on images, which have memory formats, and on the device alone, so that it
    #: can be compiled and recorded.
    images: bool = True
    #: By how much more than an op's its results may differ: depth amplifies rounding.
    amplification: float = 1.0
    #: Whether torch.compile is among the stock forms.
    compiled: bool = True
    #: Checks the output of an implementation, in place of the comparison with the reference.
    check: Callable[[str, Setting, Any], None] | None = None
    #: Stock forms that compute something else, what the op is an alternative to: they are not
    #: compared with the reference.
    others: tuple[str, ...] = ()
    note: str = ""

    @property
    def size(self) -> str:
        return "x".join(map(str, self.shape)) + (f" {self.note}" if self.note else "")

    @property
    def id(self) -> str:
        return f"{self.op} {self.size}"

    def forms(self, device: torch.device) -> list[Form]:
        stock = ("torch loop", *self.stock)
        if not self.images:
            return [Form(name, images=False) for name in (*stock, "fastnas")]
        runs = ("eager", "graph") if device.type == "cuda" else ("eager",)
        forms = [Form(name, last, run) for run in runs for name in stock for last in (False, True)]
        if self.compiled:
            forms.append(Form("torch loop", run="compiled"))
        return forms + [Form("fastnas", last, run) for run in runs for last in (False, True)]


class LeftOut(Exception):
    """Why a form is not measured."""


@dataclass
class Compiler:
    """torch.compile with a budget: seconds per op, after which no further shape is begun."""

    budget: float
    spent: Counter[str] = field(default_factory=Counter)
    failed: dict[str, str] = field(default_factory=dict)

    def __call__(self, op: str, call: Call, run: Callable[[Call], object]) -> Call:
        """Compile ``call`` for one shape, forward and backward, by running it once."""
        if op in self.failed:
            raise LeftOut(self.failed[op])
        if self.spent[op] >= self.budget:
            spent = f"{self.spent[op]:.0f} of {self.budget:.0f} s" if self.budget else "no seconds"
            raise LeftOut(f"torch.compile: {spent} spent on {op} (--compile-seconds)")
        torch._dynamo.reset()  # each shape anew: static sizes, and no limit of recompilations
        compiled = call._replace(function=torch.compile(call.function, dynamic=False))
        start = time.perf_counter()
        try:
            run(compiled)
        except torch._dynamo.exc.TorchDynamoException as error:
            first = str(error).strip().splitlines()[0]
            self.failed[op] = f"torch.compile failed for {op}: {first}"
            raise LeftOut(self.failed[op]) from error
        finally:
            self.spent[op] += time.perf_counter() - start
        return compiled


class Prepared:
    """A case with its tensors: what rows and ratios of one case share."""

    def __init__(
        self,
        case: Case,
        dtype: torch.dtype,
        device: torch.device,
        compiler: Compiler,
        reduced: bool = False,
    ) -> None:
        self.case, self.dtype, self.device, self.compiler = case, dtype, device, compiler
        shape = case.shape
        if reduced and case.images:
            n, channels, h, w = shape
            shape = (min(n, 2), channels, max(h // 2, 4), max(w // 2, 4))
        self.setting = Setting(shape, dtype, device)
        self._calls: dict[Form, Call] = {}
        self._expected: list[Tensor] | None = None

    def work(self, mode: str) -> Work | None:
        return self.case.work(self.setting)[mode] if self.case.work else None

    def call(self, form: Form) -> Call:
        """The call of ``form``, its results checked; raises LeftOut."""
        if form not in self._calls:
            call = self._build(form.implementation, form.memory_format)
            if form.run == "compiled":
                call = self.compiler(self.case.op, call, results)
            self._check(form, call)
            self._calls[form] = call
        return self._calls[form]

    def runner(self, form: Form, mode: str) -> Callable[[], object]:
        """What is timed: one forward, or one forward and backward, as often as it is called."""
        call = self.call(form)
        if mode == FORWARD:

            def run() -> object:
                return call.function(*call.args)

        else:
            grads = [torch.randn_like(y) for y in outputs(call)]

            def run() -> object:
                return torch.autograd.grad(outputs(call), call.wrt, grads)

        return graphed(run) if form.run == "graph" else run

    def saved_bytes(self, form: Form) -> int:
        """Of an eager form: the others do not keep their tensors where that could be seen."""
        call = self.call(form)
        return saved_bytes(lambda: outputs(call), call.parameters)

    def _build(self, implementation: str, memory_format: torch.memory_format) -> Call:
        torch.manual_seed(0)
        setting = Setting(self.setting.shape, self.dtype, self.device, memory_format)
        return self.case.build(implementation, setting)

    def _check(self, form: Form, call: Call) -> None:
        """Raise AssertionError, or LeftOut, unless ``call`` computes what the reference does."""
        if self.case.check:
            self.case.check(form.implementation, self.setting, call.function(*call.args))
            return
        if form.implementation in self.case.others:
            return
        with whole_floats():
            if self._expected is None:
                self._expected = results(self._build("reference", torch.contiguous_format))
            actual = results(call)
        names = [f"output {i}" for i in range(len(actual) - len(call.wrt))]
        names += [f"gradient {i}" for i in range(len(call.wrt))]
        for name, a, b in zip(names, actual, self._expected, strict=True):
            error = relative_error(a, b)
            if not error <= self.case.amplification * TOLERANCES[self.dtype]:
                off = f"{name} is off the reference by {error:.1e}"
                if form.run == "compiled":  # of a formula that is right: no form of it
                    raise LeftOut(f"torch.compile: of {self.case.op}, {off}")
                raise AssertionError(f"{self.case.id}, {form.name}: {off}")


@contextlib.contextmanager
def whole_floats() -> Iterator[None]:
    """Convolutions in float32 as such: a GPU takes TF32 otherwise, which is off by a thousandth."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def outputs(call: Call) -> list[Tensor]:
    """The differentiable results: all of a list, or the last of another tuple, or the only one."""
    y = call.function(*call.args)
    return y if isinstance(y, list) else [y if isinstance(y, Tensor) else y[-1]]


def results(call: Call) -> list[Tensor]:
    """Outputs and gradients, for output gradients that are the same for all forms."""
    ys = outputs(call)
    if not call.wrt:
        return ys
    torch.manual_seed(1)
    grads = [torch.randn(y.shape).to(y) for y in ys]
    return [*(y.detach() for y in ys), *torch.autograd.grad(ys, call.wrt, grads)]


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """Record ``run`` as a CUDA graph; what comes back replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # allocations and plans are made before the recording
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay() -> object:
        graph.replay()
        return kept

    return replay
