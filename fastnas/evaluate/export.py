# SPDX-License-Identifier: Apache-2.0
"""Trained networks as files that classify images without fastnas."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastnas._version import __version__
from fastnas.evaluate.result import read_network
from fastnas.search.checkpoint import CheckpointError
from fastnas.search.files import write_atomic

__all__ = ["Classifier", "Exported", "export_classifier", "load_classifier"]

DEFAULT_NAME = "network.pt2"

#: Name of what the file says about itself: of an extra file, or of a metadata entry.
METADATA = "fastnas.json"

#: Batches that an exported file is tried with: it must not remember the size it was made with.
_TRIED = (1, 3)

#: By how much its logits may differ from the network's, as a share of the largest.
_TOLERANCE = 1e-3


class Classifier(nn.Module):
    """A trained network behind the normalisation of its images.

    Attributes:
        network: without the auxiliary head, in eval mode.
        image_shape: ``(C, H, W)`` of an image.
        scaled: whether images are values from 0 to 1; else what the Dataset gave is expected.
        classes: names of the classes by number, if they have any.
        facts: what is known of it: genotype, space, accuracy on the test images, ...
    """

    def __init__(
        self, network: nn.Module, images: Mapping[str, Any], facts: Mapping[str, Any]
    ) -> None:
        """Put a network behind ``image_facts``; a ValueError says what of them cannot be."""
        super().__init__()
        _check(images)
        if "auxiliary_head" in network._modules:
            network._modules["auxiliary_head"] = None
        self.network = network.eval()
        channels, height, width = images["shape"]
        self.image_shape = int(channels), int(height), int(width)
        self.scaled: bool = images["scaled"]
        names = images["classes"]
        self.classes = None if names is None else tuple(names)
        self.facts = dict(facts)
        for name in ("mean", "std"):
            values = torch.tensor(images[name], dtype=torch.float32).view(1, channels, 1, 1)
            self.register_buffer(name, values)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Map float32 ``(N, C, H, W)`` to logits ``(N, classes)``."""
        mean, std = cast(Tensor, self.mean), cast(Tensor, self.std)
        return self.network((images - mean) / std if self.scaled else images)

    def describe(self) -> dict[str, Any]:
        """All that somebody needs to know who has nothing but the file."""
        values = "values from 0 to 1" if self.scaled else "normalised as for the training"
        return {
            "input": f"float32 images (N, {', '.join(map(str, self.image_shape))}), {values}",
            "output": "logits (N, classes)",
            "image_shape": list(self.image_shape),
            "classes": None if self.classes is None else list(self.classes),
            **self.facts,
            "fastnas": __version__,
        }


def _check(images: Mapping[str, Any]) -> None:
    """Raise a ValueError unless these are ``image_facts``."""
    shape, names = images["shape"], images["classes"]
    if len(shape) != 3 or any(type(size) is not int or size < 1 for size in shape):
        raise ValueError(f"shape: {shape}")
    if type(images["scaled"]) is not bool:
        raise ValueError(f"scaled: {images['scaled']!r}")
    if names is not None and not (
        isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    ):
        raise ValueError("classes: not a list of names")
    for name in ("mean", "std"):
        values = torch.tensor(images[name], dtype=torch.float32)
        low = 0.0 if name == "std" else -torch.inf
        if values.shape != (shape[0],) or not (values.isfinite() & (values > low)).all():
            raise ValueError(f"{name}: {images[name]}")


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        path: the file.
        classifier: what it holds.
        difference: largest difference of its logits from the classifier's, as a share of the
            largest; None where there was nothing to run it with.
    """

    path: Path
    classifier: Classifier
    difference: float | None


def load_classifier(folder: str | os.PathLike[str]) -> Classifier:
    """The best network of an evaluation behind the normalisation of its images, on the CPU.

    Args:
        folder: folder of the evaluation; its ``best.pt`` is read.

    Raises:
        FileNotFoundError: no epoch of an evaluation was finished there.
        CheckpointError: the file is damaged, something else, or does not say what images it is for.
    """
    network, state = read_network(folder)
    path = Path(folder) / "best.pt"
    if "images" not in state:
        raise CheckpointError(
            f"{path}: expected what the images are like, but a version of fastnas wrote it that "
            "did not say; train the network again, or use load_network"
        )
    try:
        facts = {
            "space": state["space"],
            "genotype": state["genotype"],
            "test_accuracy": float(state["record"]["test_accuracy"]),
            "epoch": int(state["record"]["epoch"]),
        }
        classifier = Classifier(network, state["images"], facts)
        names, count = classifier.classes, state["arguments"]["num_classes"]
        if names is not None and len(names) != count:
            raise ValueError(f"{len(names)} names for {count} classes")
        return classifier
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path}: does not say what a network was trained on ({reason})"
        ) from error


def export_classifier(
    folder: str | os.PathLike[str], out: str | os.PathLike[str] | None = None
) -> Exported:
    """Write the best network of an evaluation as a file that classifies images without fastnas.

    ``.pt2`` is a program of ``torch.export``: ``torch.export.load(file).module()`` is the
    classifier, for batches of any size. ``.onnx`` is for other runtimes. Either normalises images
    itself, says what it takes and what its classes are called (METADATA), and is run and compared
    with the network before it gets its name.

    Args:
        folder: folder of the evaluation.
        out: file to write, replaced where there is one; its ending says the format. None:
            ``network.pt2`` in ``folder``.

    Raises:
        FileNotFoundError: no epoch of an evaluation was finished in ``folder``, or there is no
            folder for ``out``.
        CheckpointError: as :func:`load_classifier`, or the network's logits are not finite.
        ValueError: ``out`` ends in neither ``.pt2`` nor ``.onnx``.
        IsADirectoryError: ``out`` is a folder.
        ImportError: onnx and onnxscript are needed and missing.
        RuntimeError: the file would compute something else than the network.
    """
    path = Path(folder) / DEFAULT_NAME if out is None else Path(out)
    if path.suffix not in _FORMATS:
        raise ValueError(f"out: expected a file that ends in .pt2 or .onnx, but got {str(path)!r}")
    if path.is_dir():
        raise IsADirectoryError(f"out: {path} is a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"out: there is no folder {path.parent} to write {path.name} in")
    classifier = load_classifier(folder)
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        if not classifier(_noise(classifier, 2)).isfinite().all():
            raise CheckpointError(
                f"{Path(folder) / 'best.pt'}: the network's logits are not finite"
            )
        program = torch.export.export(
            classifier, (_noise(classifier, 2),), dynamic_shapes={"images": {0: batch}}
        )
        content, run = _FORMATS[path.suffix](program, json.dumps(classifier.describe()))
        difference = None if run is None else _compare(classifier, run)
    write_atomic(path, lambda file: file.write(content))
    return Exported(path, classifier, difference)


Run = Callable[[Tensor], Tensor]


def _to_pt2(program: torch.export.ExportedProgram, metadata: str) -> tuple[bytes, Run]:
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={METADATA: metadata})
    content = file.getvalue()
    return content, cast(Run, torch.export.load(io.BytesIO(content)).module())


def _to_onnx(program: torch.export.ExportedProgram, metadata: str) -> tuple[bytes, Run | None]:
    onnx = _import_onnx()
    names: Any = {"input_names": ["images"], "output_names": ["logits"]}
    with _quietly():
        made = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    assert made is not None
    model = made.model_proto
    onnx.helper.set_model_props(model, {METADATA: metadata})
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    try:
        import onnxruntime
    except ImportError:
        return content, None
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


_FORMATS: dict[str, Callable[..., tuple[bytes, Run | None]]] = {".pt2": _to_pt2, ".onnx": _to_onnx}


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporter of ONNX says of itself: which libraries it has not found."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _import_onnx() -> ModuleType:
    try:
        import onnx
        import onnxscript  # noqa: F401  # torch.onnx needs it
    except ImportError as error:
        raise ImportError(
            'a .onnx file is written with onnx and onnxscript: pip install "fastnas[onnx]" '
            f"(importing them said: {error})"
        ) from error
    module: ModuleType = onnx
    return module


def _noise(classifier: Classifier, count: int) -> Tensor:
    """Images that are none, the same every time."""
    generator = torch.Generator().manual_seed(count)
    return torch.rand(count, *classifier.image_shape, generator=generator)


def _compare(classifier: Classifier, run: Run) -> float:
    largest = 0.0
    for count in _TRIED:
        images = _noise(classifier, count)
        expected, found = classifier(images), run(images)
        scale = expected.abs().max().clamp(min=1e-6)
        difference = ((found - expected).abs().max() / scale).item()
        if not difference <= _TOLERANCE:  # nor NaN
            raise RuntimeError(
                f"the exported network gives other logits than the trained one: they differ by "
                f"{difference:.2g} of the largest; please report this, with the genotype"
            )
        largest = max(largest, difference)
    return largest
