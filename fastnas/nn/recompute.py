# SPDX-License-Identifier: Apache-2.0
"""``memory="low"``: what is cheap to compute again is not kept for the backward.

Where a layer would save its input, the backward gets a note of how that input came about, and
makes it again when it is asked for: depthwise convolutions of a state, the pointwise convolution
between them, ReLUs, pools. What is expensive, or was normalised by its batch in the mixing call,
is kept. The computation itself, and with it every statistic and random number, happens once; what
is made again is the same function of the same tensors, so losses and gradients are the same. It is
autograd's own graph that asks (``torch.autograd.graph.saved_tensors_hooks``), so a second
derivative, hooks on tensors and a graph that is kept work as ever.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fastnas.nn.repeat import Repeat, repeat_of

__all__ = ["MEMORY", "Memory", "Recompute"]

Memory = Literal["default", "low"]

MEMORY: tuple[Memory, ...] = get_args(Memory)


_Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


class _Call:
    """A function and its operands."""

    def __init__(self, repeat: Repeat, operands: list[Tensor | _Note | None]) -> None:
        self._function, self._selects = repeat.function, repeat.selects
        self._operands = [o.detach() if isinstance(o, Tensor) else o for o in operands]
        self._versions = [o._version if isinstance(o, Tensor) else 0 for o in self._operands]
        self._device = next(o for o in operands if o is not None).device.type
        self._autocast = _autocast_state(self._device)
        # Weak, so that neither keeps the other alive: memory is given back at once, not when the
        # garbage collector comes.
        self.notes: list[weakref.ref[_Note]] = []
        self._needed = False

    def need(self) -> None:
        """Say that the outputs will be asked for, and with them the operands."""
        if not self._needed:
            self._needed = True
            for operand in self._operands:
                if isinstance(operand, _Note):
                    operand.save()

    def repeat(self) -> None:
        """Make the outputs again, and leave them with the notes that will be asked for."""
        for operand, version in zip(self._operands, self._versions, strict=True):
            if isinstance(operand, Tensor):
                _check_version(operand, version)
        values = [o.take() if isinstance(o, _Note) else o for o in self._operands]
        found = [reference() for reference in self.notes]
        notes = [note for note in found if note is not None and note.is_needed()]
        options = {"wanted": [note.index for note in notes]} if self._selects else {}
        with torch.no_grad():
            if self._autocast == _autocast_state(self._device):
                results = _as_list(self._function(*values, **options))
            else:
                with torch.autocast(self._device, self._autocast, self._autocast is not None):
                    results = _as_list(self._function(*values, **options))
        for number, note in enumerate(notes):
            note.fill(results[number if self._selects else note.index])


def _autocast_state(device: str) -> torch.dtype | None:
    """What autocast computes in now; None where it is off."""
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return None
    return torch.get_autocast_dtype(device)


class _Note:
    """Stands for a tensor that can be made again."""

    def __init__(self, call: _Call, index: int, y: Tensor, cheap: bool) -> None:
        self._call, self.index, self.cheap = call, index, cheap
        self.device, self._stride = y.device, y.stride()
        self._value: Tensor | None = None
        #: How many places will ask for it, and how many of them have not yet.
        self._saved = self._open = 0
        call.notes.append(weakref.ref(self))

    def save(self) -> _Note:
        """Count one more place that will ask for the tensor."""
        self._call.need()
        self._saved += 1
        self._open += 1
        return self

    def take(self) -> Tensor:
        """The tensor, for one of these places; it stays here until all have asked."""
        if self._value is None:
            self._call.repeat()
        value = self._value
        assert value is not None
        self._open -= 1
        if self._open <= 0:
            # Whoever goes through a graph again asks as often again.
            self._value, self._open = None, self._saved
        return value

    def is_needed(self) -> bool:
        """Whether any place will ask."""
        return self._saved > 0

    def fill(self, y: Tensor) -> None:
        """Take what was made, with the strides it had at first: views of it build on them."""
        if y.stride() != self._stride:
            z = torch.empty_strided(y.shape, self._stride, dtype=y.dtype, device=y.device)
            y = z.copy_(y)
        self._value = y


class _View(NamedTuple):
    """Stands for a view of a tensor that can be made again."""

    note: _Note
    size: tuple[int, ...]
    stride: tuple[int, ...]
    #: From the start of the tensor.
    offset: int

    def take(self) -> Tensor:
        value = self.note.take()
        return value.as_strided(self.size, self.stride, value.storage_offset() + self.offset)


class _Box:
    """A tensor that is kept, as autograd would keep it; or a note of it that was found later."""

    def __init__(self, t: Tensor, outer: _Hooks | None) -> None:
        self._unpack: Callable[[Any], Tensor] | None = None
        self.original: Tensor | None = t
        self._content: Any = t
        self._version = t._version
        self._outer = outer

    def close(self, note: _Note | _View | None) -> None:
        """Decide what is kept, after the call that saved the tensor."""
        if note is not None:
            self._content = note
        elif self._outer is not None:
            pack, self._unpack = self._outer
            self._content = pack(self._content)
        self.original = None

    def take(self) -> Tensor:
        """What was saved."""
        if isinstance(self._content, (_Note, _View)):
            return self._content.take()
        if self._unpack is not None:
            return self._unpack(self._content)
        _check_version(self._content, self._version)
        return self._content


def _check_version(t: Tensor, version: int) -> None:
    # Autograd asks this itself, except of what a hook took over.
    if t._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: a tensor of shape {list(t.shape)} is at version {t._version}, expected "
            f"version {version}"
        )


class Recompute:
    """Runs layers and notes how their outputs came about, for one forward of a cell."""

    def __init__(self) -> None:
        """Begin without any."""
        #: By address: the tensor, as long as it lives, and its note.
        self._notes: dict[int, tuple[weakref.ref[Tensor], _Note]] = {}
        self._boxes: list[_Box] = []
        self._outer: _Hooks | None = None
        self._only_cheap = False

    @staticmethod
    def is_possible() -> bool:
        """Whether there is a backward to save for, and autograd lets its saving be changed.

        A compiler decides for itself what it keeps, and functional transforms allow no hooks.
        """
        return (
            torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
        )

    def run(self, layer: Callable[..., Any], *xs: Tensor) -> Any:
        """``layer(*xs)``, which saves notes of ``xs`` and leaves one of its outputs."""
        repeat = repeat_of(layer)
        if repeat is None:
            return layer(*xs)
        self._only_cheap = False
        operands = [*(self._find(x, exact=True) or x for x in xs), *repeat.tensors]
        with self._saving():
            ys = repeat.function(*xs, *repeat.tensors) if repeat.instead else layer(*xs)
        outputs, inputs = _as_list(ys), {_address(x) for x in xs}
        call = _Call(repeat, operands)
        for index, y in enumerate(outputs):
            if y._base is None and _address(y) not in inputs:  # no view
                note = _Note(call, index, y, repeat.cheap)
                self._notes[_address(y)] = weakref.ref(y), note
        self._close()
        return outputs[0] if repeat.instead else ys

    def mix(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(*arguments)``, which saves notes of what costs one pass to make again."""
        self._only_cheap = True
        with self._saving():
            y = function(*arguments)
        self._close()
        return y

    def _saving(self) -> saved_tensors_hooks:
        # Hooks of whoever is around us would not be asked: only the innermost are.
        self._outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
        return saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, t: Tensor) -> _Note | _View | _Box:
        found = self._find(t)
        if found is not None:
            return found
        box = _Box(t, self._outer)
        self._boxes.append(box)
        return box

    def _close(self) -> None:
        """Look once more for what was kept: it may be an output, known only now."""
        boxes, self._boxes = self._boxes, []
        for box in boxes:
            assert box.original is not None
            box.close(self._find(box.original))

    def _find(self, t: Tensor, exact: bool = False) -> Any:
        """The note of ``t``, counted as saved unless it is asked for as an operand."""
        reference, note = self._notes.get(_address(t), (None, None))
        y = None if reference is None else reference()
        if y is None or note is None or y.dtype != t.dtype or (self._only_cheap and not note.cheap):
            return None
        same = t.shape == y.shape and t.stride() == y.stride()
        same = same and t.storage_offset() == y.storage_offset()
        if exact:
            return note if same else None
        if same:
            return note.save()
        offset = int(t.storage_offset() - y.storage_offset())
        return _View(note.save(), tuple(t.shape), t.stride(), offset)


def _unpack(packed: _Note | _View | _Box) -> Tensor:
    return packed.take()


def _address(t: Tensor) -> int:
    """That of the storage object: of its data there is none in a fake tensor."""
    return t.untyped_storage()._cdata


def _as_list(ys: Any) -> list[Tensor]:
    return [ys] if isinstance(ys, Tensor) else list(ys)
