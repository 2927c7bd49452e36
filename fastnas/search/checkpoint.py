# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: written whole, read without running anything they contain.

A checkpoint is a dict of tensors, numbers, strings, lists and dicts, written by
:func:`torch.save` under a temporary name and renamed. It is read with ``weights_only=True``, so a
file from elsewhere cannot execute code. Random generators are stored beside the rest
(:class:`RandomState`), which makes a resumed run on the CPU equal to an uninterrupted one, bit
for bit.
"""

from __future__ import annotations

import contextlib
import os
import random
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.random  # now, since numpy loads it at first use: a Ctrl-C then gets lost
import torch

from fastnas.search.files import write_atomic

_FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message is one sentence naming the file and the reason."""


def save_checkpoint(path: str | os.PathLike[str], state: Mapping[str, Any], *, kind: str) -> None:
    """Write ``state`` to ``path``; a kill at any moment leaves the old file or the new one.

    Args:
        path: the file; its folder must exist.
        state: tensors, numbers, strings, None, and lists, tuples and dicts of these.
        kind: what the state belongs to (``"search"``, ``"evaluation"``), checked when it is read.

    Raises:
        OSError: the file cannot be written; an older checkpoint of that name is kept.
    """
    content = {"fastnas": _FORMAT, "kind": kind, "state": dict(state)}
    write_atomic(path, lambda file: torch.save(content, file))


def load_checkpoint(
    path: str | os.PathLike[str], *, kind: str, map_location: str | torch.device = "cpu"
) -> dict[str, Any]:
    """Read the ``state`` given to :func:`save_checkpoint`.

    Args:
        path: the file.
        kind: the kind the reader can use.
        map_location: device the tensors are put on.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is truncated, no checkpoint of fastnas, of another format version,
            or of another kind.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such checkpoint")
    # Opened here, so that a file that may not be read is told from one that makes no sense.
    with open(source, "rb") as file:
        try:
            # torch.load looks at no checksum: what a disk has spoilt would pass for weights.
            with zipfile.ZipFile(file) as archive:
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(damaged)
            file.seek(0)
            content = torch.load(file, map_location=map_location, weights_only=True)
        except Exception as error:  # a damaged file can make torch.load raise just about any
            raise CheckpointError(
                f"{source}: expected a checkpoint of fastnas, but it is truncated, damaged or "
                f"something else ({type(error).__name__})"
            ) from error
    if not isinstance(content, dict) or not isinstance(content.get("state"), dict):
        raise CheckpointError(
            f"{source}: expected a checkpoint of fastnas, but it is something else"
        )
    if content.get("fastnas") != _FORMAT:
        raise CheckpointError(
            f"{source}: expected checkpoint format {_FORMAT}, but got {content.get('fastnas')!r} "
            "(another version of fastnas wrote it)"
        )
    if content.get("kind") != kind:
        raise CheckpointError(
            f"{source}: expected a checkpoint of kind {kind!r}, but got {content.get('kind')!r}"
        )
    return content["state"]


class RandomState:
    """The generators of Python, numpy and torch (CPU and CUDA), kept apart from the caller's.

    Between :meth:`use` blocks the state rests in this object, so whatever else the program draws
    does not change a run, and a run does not change what the program draws.

    Args:
        seed: seeds all generators.
        device: a CUDA device includes the generators of all CUDA devices.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        """Seed the generators without touching those of the caller."""
        self._cuda = torch.device(device).type == "cuda"
        before = self._capture()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        if self._cuda:
            torch.cuda.manual_seed_all(seed)
        self._state = self._capture()
        self._restore(before)
        self._in_use = False

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Run a block with these generators and give the caller his back afterwards."""
        before = self._capture()
        self._restore(self._state)
        self._in_use = True
        try:
            yield
        finally:
            self._in_use = False
            self._state = self._capture()
            self._restore(before)

    def state_dict(self) -> dict[str, Any]:
        """The state, as of now also within a :meth:`use` block, in types a checkpoint can hold."""
        return self._capture() if self._in_use else dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`; the next :meth:`use` block starts from it.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: it is no such state.
        """
        before = self._capture()
        try:
            self._restore(state)
        finally:
            self._restore(before)
        self._state = dict(state)

    def _capture(self) -> dict[str, Any]:
        version, words, gauss = random.getstate()
        name, keys, *rest = np.random.get_state(legacy=True)
        return {
            "python": [version, list(words), gauss],
            "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if self._cuda else [],
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state["torch"].cpu())
        if self._cuda and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
