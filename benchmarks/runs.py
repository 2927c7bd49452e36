# SPDX-License-Identifier: Apache-2.0
"""Searches and evaluations by the command line, made once: what is there is kept, what was begun is
finished."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def fastnas(*words: str) -> None:
    """Run a command without its output.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    subprocess.run([sys.executable, "-m", "fastnas", *words], check=True, stdout=subprocess.DEVNULL)


def search(words: Sequence[str], out: Path) -> dict[str, Any]:
    """The last record of ``fastnas search WORDS --out OUT``, which ends with its gap."""
    record = _last_record(out)
    if record is None or record["gap"] is None:
        begun = (out / "config.json").exists()
        fastnas("search", *([] if begun else words), "--out", str(out), *["--resume"] * begun)
        record = _last_record(out)
    assert record is not None
    return record


def evaluate(run: Path) -> dict[str, Any]:
    """The result of ``fastnas eval RUN``, RUN being the folder of a search."""
    out = run / "eval"
    if not (out / "result.json").exists():
        begun = (out / "config.json").exists()
        fastnas("eval", *(["--resume", "--out", str(out)] if begun else [str(run)]))
    return json.loads((out / "result.json").read_text())


def _last_record(out: Path) -> dict[str, Any] | None:
    metrics = out / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return json.loads(lines[-1]) if lines else None
