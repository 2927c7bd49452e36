# SPDX-License-Identifier: Apache-2.0
"""The forms of one supernet that are compared: the same weights, images and architecture."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnas.bench.config import BenchConfig
from fastnas.bench.measure import SavedBytes, peak_memory, relative_error
from fastnas.bench.stock import StockMixedOp, StockSupernet
from fastnas.methods import METHODS, ArchParameters, Method, Moment
from fastnas.nn.recompute import Memory
from fastnas.spaces.darts import Supernet

__all__ = ["Form", "LeftOut", "Scene", "compiled", "make_forms", "make_scene"]

CLASSES = 10
K = 4
"""Of PC-DARTS, as on CIFAR-10 in the paper."""

# Rounding that a deep network amplifies: two formats of the plain one differ by 0.6 % in the
# gradient of alpha. Another formula is off by far more.
_TOLERANCE = 5e-2


class LeftOut(Exception):
    """Why a form is not measured, in a sentence."""


@dataclass(frozen=True)
class Scene:
    """What all forms share."""

    method: Method
    arch: ArchParameters
    images: Tensor
    labels: Tensor
    partial_channels: int

    @property
    def device(self) -> torch.device:
        """Where it is measured."""
        return self.images.device


class Form:
    """One way to compute the step: a network in a memory format.

    Attributes:
        name: how it is called in the table.
        title: the name without the memory format.
        stock: whether it is the plain formula.
        saved: bytes that its graph keeps; None as long as they are unknown.
        peak: bytes that a step takes at its peak; None where that cannot be measured.
    """

    def __init__(
        self, name: str, network: nn.Module, scene: Scene, layout: torch.memory_format, stock: bool
    ) -> None:
        """Bring network and images into the format."""
        self.name, self.stock, self._scene = name, stock, scene
        self.title = name.rpartition(", ")[0]
        self.network = network.to(scene.device)
        network.to(memory_format=layout)  # type: ignore[call-overload]  # missing in torch's stubs
        self._images = scene.images.contiguous(memory_format=layout)
        self._parameters = list(network.parameters())
        self.saved: int | None = None
        self.peak: int | None = None

    def step(self) -> list[Tensor]:
        """Forward and backward: the loss and the gradients of the architecture."""
        return self._backward(self._forward())

    def first_step(self) -> list[Tensor]:
        """A step that also counts what it keeps and takes."""
        found: list[Tensor] = []

        def run() -> None:
            with SavedBytes(self._parameters) as saved:
                loss = self._forward()
            self.saved = saved.bytes
            found.extend(self._backward(loss))

        self.peak = peak_memory(run, self._scene.device)
        return found

    def check(self, found: list[Tensor], wanted: list[Tensor]) -> None:
        """Raise LeftOut unless this form computed what another one did."""
        for a, b in zip(found, wanted, strict=True):
            error = relative_error(a, b)
            if not error <= _TOLERANCE:  # nor is NaN
                raise LeftOut(f"its results are off the plain formula's by {error:.1%}")

    def _forward(self) -> Tensor:
        scene = self._scene
        logits = self.network(self._images, scene.method.weights(scene.arch, Moment(0, 1, 0)))
        return F.cross_entropy(logits, scene.labels)

    def _backward(self, loss: Tensor) -> list[Tensor]:
        arch = list(self._scene.arch.parameters())
        gradients = torch.autograd.grad(loss, [*arch, *self._parameters])
        return [loss.detach(), *gradients[: len(arch)]]


def make_scene(name: str, config: BenchConfig, device: torch.device) -> Scene:
    """Images, labels and architecture for a method, the same ones each time.

    Raises:
        ValueError: channels, layers or image size that the supernet cannot take.
    """
    k = K if name == "pc_darts" else 1
    generator = torch.Generator().manual_seed(0)
    size = (config.batch_size or (16 if device.type == "cpu" else 64), 3, *[config.image_size] * 2)
    images = torch.randn(*size, generator=generator).to(device)
    labels = torch.randint(CLASSES, (size[0],), generator=generator).to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        specs = Supernet(config.channels, config.layers, partial_channels=k).cell_specs
        method = METHODS[name](specs)
        arch = method.parameters().to(device)
    return Scene(method, arch, images, labels, k)


def make_forms(scene: Scene, config: BenchConfig) -> list[Form]:
    """The eager forms, the plain formula first. All have the same weights."""

    def fused(memory: Memory) -> nn.Module:
        size = (config.channels, config.layers, CLASSES)
        network = Supernet(*size, partial_channels=scene.partial_channels, memory=memory)
        network.load_state_dict(_stock(scene, config).state_dict())
        return network

    layouts = (
        ("contiguous", torch.contiguous_format),
        ("channels_last", torch.channels_last),
    )
    builders: tuple[tuple[str, Callable[[], nn.Module], bool], ...] = (
        ("stock", lambda: _stock(scene, config), True),
        ("fastnas", lambda: fused("default"), False),
        ("fastnas, low memory", lambda: fused("low"), False),
    )
    return [
        Form(f"{title}, {name}", build(), scene, layout, stock)
        for title, build, stock in builders
        for name, layout in layouts
    ]


def _stock(scene: Scene, config: BenchConfig) -> StockSupernet:
    """The plain network, with the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        size = (config.channels, config.layers, CLASSES)
        return StockSupernet(*size, partial_channels=scene.partial_channels)


# --- torch.compile -----------------------------------------------------------------------------


def compiled(scene: Scene, config: BenchConfig, seconds: float) -> tuple[Form, list[Tensor]]:
    """The plain formula under ``torch.compile``, made ready by a first step.

    Each mixed op is compiled by itself, and those of equal shapes once: as a whole, the network
    takes the compiler many minutes.

    Raises:
        LeftOut: it is not ready after so many seconds, or cannot be compiled.
    """
    network = _stock(scene, config)
    layout = torch.channels_last if scene.device.type == "cpu" else torch.contiguous_format
    form = Form("stock, torch.compile", network, scene, layout, stock=True)
    if not seconds:
        raise LeftOut("no seconds were given to it")
    try:
        torch._dynamo.reset()
        # Beyond its limit of shapes the compiler would let the rest run as it is, without a word.
        whole = torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True)
        with _limited(seconds), whole:
            for edge in network.modules():
                if isinstance(edge, StockMixedOp):
                    edge.compile(dynamic=False)
            return form, form.step()
    except _Expired:
        raise LeftOut(
            f"it was not ready after {seconds:.0f} s; with a larger --seconds it gets a quarter of "
            "them, and the next time what it has compiled is found again"
        ) from None
    except torch._dynamo.exc.TorchDynamoException as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LeftOut(f"it failed: {first}") from None


class _Expired(BaseException):
    """The time is up. No Exception: the compiler would take it for a mistake of its own."""


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise _Expired in the block when the time is up."""
    if threading.current_thread() is not threading.main_thread():
        raise LeftOut("its time can be limited in the main thread only")

    expired = False

    def expire(number: int, frame: FrameType | None) -> None:
        nonlocal expired
        if _imports(frame):
            return  # a module half made would fail for good: the next time
        expired = True
        raise _Expired

    before = signal.signal(signal.SIGALRM, expire)
    # Again and again: what is raised in the callback of a weak reference, Python only prints.
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.1)
    try:
        yield
    except Exception as error:
        # In the making of a class, Python itself turns it into a RuntimeError.
        if expired:
            raise _Expired from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _imports(frame: FrameType | None) -> bool:
    """Whether ``frame`` runs within an import."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False
