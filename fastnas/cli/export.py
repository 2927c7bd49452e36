# SPDX-License-Identifier: Apache-2.0
"""``fastnas export``: a trained network as a file that needs no fastnas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastnas.cli.terminal import console
from fastnas.evaluate.export import Exported, export_classifier

__all__ = ["main"]

_DESCRIPTION = "\n\n".join(
    (  # paragraphs of one line: the parser does not wrap them
        "Write the best network that `fastnas eval` has trained as a file that classifies images "
        "without fastnas. It takes batches of any size, normalises images itself, and says what "
        "it takes and what the classes are called.",
        "FILE.pt2 is a program for PyTorch (torch.export), FILE.onnx one for other runtimes; for "
        'that, install with: pip install ".[onnx]".',
    )
)


@dataclass(frozen=True)
class Options:
    """What to write, and where."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[RUN]")] = "runs/demo/eval"
    """Folder of an evaluation, over or not: its best network so far is written. Of a search, the
    evaluation in its folder."""
    out: str | None = None
    """File to write, which ends in .pt2 or .onnx; by default network.pt2 in RUN."""


def main(argv: Sequence[str]) -> int:
    """Run the command with the words after ``fastnas export``.

    Raises:
        FileNotFoundError: there is no trained network, or no folder for the file.
        ValueError: the file has another ending.
        ImportError: onnx is needed and missing.
        CheckpointError: the network is damaged.
    """
    options = tyro.cli(Options, prog="fastnas export", description=_DESCRIPTION, args=list(argv))
    run = Path(options.run)
    if not (run / "best.pt").is_file() and (run / "eval" / "best.pt").is_file():
        run = run / "eval"
    if not (run / "best.pt").is_file():
        raise FileNotFoundError(
            f"{options.run}: expected the folder of an evaluation, but there is no best.pt; a "
            f"network is trained by: fastnas eval{_named(run)}"
        )
    with console().status("writing and checking the network ..."):
        exported = export_classifier(run, options.out)
    for name, value in _summary(exported):
        console().print(f"{name:<10}  {value}", markup=False, highlight=False)
    return 0


def _named(run: Path) -> str:
    """The folder as a word of a command, where it is that of a search."""
    return f" {run}" if (run / "genotype.json").is_file() else ""


def _summary(exported: Exported) -> list[tuple[str, str]]:
    classifier = exported.classifier
    facts = classifier.describe()
    names = facts["classes"]
    checked = "not run: that takes onnxruntime"
    if exported.difference is not None:
        checked = f"run, logits within {exported.difference:.0e} of the network's"
    rows = [
        ("file", f"{exported.path} ({exported.path.stat().st_size / 1e6:.2f} MB)"),
        ("input", facts["input"]),
        ("output", facts["output"]),
        ("classes", "without names" if names is None else _shortened(names)),
        ("accuracy", f"{facts['test_accuracy']:.2%} of the test images (epoch {facts['epoch']})"),
        ("checked", checked),
    ]
    return rows


def _shortened(names: Sequence[str], most: int = 10) -> str:
    more = f", ... ({len(names)})" if len(names) > most else ""
    text = ", ".join(names[:most]) + more
    return "".join(letter if letter.isprintable() else "?" for letter in text)
