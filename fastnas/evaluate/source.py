# SPDX-License-Identifier: Apache-2.0
"""Where the architecture to train comes from: a run of a search, a file, or a published name."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastnas.search.files import RunDirectory, read_json, read_jsonl
from fastnas.spaces import SPACES
from fastnas.spaces.mbconv.form import NAME as PROXYLESS_NAME

__all__ = ["GenotypeSource", "find_genotype", "space_of"]

_MAX_BYTES = 100_000
"""Size of a genotype file; a real one has about 1 kB."""


@dataclass(frozen=True)
class GenotypeSource:
    """An architecture and where it came from.

    Attributes:
        genotype: the architecture, an instance of its space's genotype class.
        space: key of its space in ``fastnas.spaces.SPACES``.
        label: the words it was asked for with.
        search: folder of the search that found it, None when it came from elsewhere.
        data: the data that search used, as ``fastnas.data.load`` reads it, else None.
        image_size: side of its images, where the search was told one.
        epochs_left: epochs that search still had to do when it was looked at.
    """

    genotype: Any
    space: str
    label: str
    search: Path | None = None
    data: str | None = None
    image_size: int | None = None
    epochs_left: int = 0


def find_genotype(source: str | os.PathLike[str], own: str | None = None) -> GenotypeSource:
    """Find the architecture that ``source`` names.

    Args:
        source: a published name (``PC_DARTS_cifar``), a cell as NAS-Bench-201 writes it
            (``|skip_connect~0|+|...|``), the folder of a search, or a file: JSON as a search, or
            the released code of ProxylessNAS, writes it, or text: such a cell, or with one
            ``Genotype(...)`` in it, as DARTS prints it. A file or folder that has the name of a
            published architecture is reached as ``./NAME``.
        own: folder of an evaluation that goes on; it has its own copy of the architecture, should
            ``source`` be gone.

    Raises:
        FileNotFoundError: nothing has that name, or the search has not written a genotype yet.
        ValueError: the file is too large or holds no valid genotype.
    """
    name = os.fspath(source)
    for space in SPACES.values():
        if name in space.genotypes:
            return GenotypeSource(space.genotypes[name], space.name, name)
    if name.startswith("|"):
        return GenotypeSource(SPACES["nasbench201"].genotype.parse(name), "nasbench201", name)
    path = Path(name)
    if path.is_dir():
        return _from_search(path)
    if path.is_file():
        genotype, space_name = _from_file(path)
        return GenotypeSource(genotype, space_name, name)
    if own is not None and (copy := RunDirectory(own).genotype).is_file():
        return replace(find_genotype(copy), label=name)
    published = ", ".join(n for space in SPACES.values() for n in space.genotypes)
    raise FileNotFoundError(
        f"{name}: expected the folder of a search, a genotype file or a published name "
        f"({published}), but there is none of these; a first search is made by: fastnas search"
    )


def space_of(genotype: Any) -> str:
    """The name of the space whose genotypes are of this class.

    Raises:
        TypeError: there is none.
    """
    for space in SPACES.values():
        if isinstance(genotype, space.genotype):
            return space.name
    raise TypeError(
        f"genotype: expected one of the spaces {', '.join(SPACES)}, "
        f"but got {type(genotype).__name__}"
    )


def _from_search(folder: Path) -> GenotypeSource:
    run = RunDirectory(folder)
    if not run.genotype.is_file():
        if run.config.is_file():
            raise FileNotFoundError(
                f"{folder}: the search there has not written {run.genotype.name} yet; "
                f"continue it with: fastnas search --resume --out {folder}"
            )
        raise FileNotFoundError(
            f"{folder}: expected the folder of a search, but it holds no {run.genotype.name}"
        )
    genotype, space = _from_file(run.genotype)
    config = read_json(run.config) if run.config.is_file() else {}
    fields = config if isinstance(config, dict) else {}
    data, size, epochs = (fields.get(name) for name in ("data", "image_size", "epochs"))
    records = read_jsonl(run.metrics) if run.metrics.is_file() else []
    # A search that was stopped early has nothing left to do.
    over = bool(records) and records[-1].get("stopped") is not None
    return GenotypeSource(
        genotype,
        space,
        str(folder),
        search=folder,
        data=data if isinstance(data, str) else None,
        image_size=size if type(size) is int and size > 0 else None,
        epochs_left=max(0, epochs - len(records)) if isinstance(epochs, int) and not over else 0,
    )


def _from_file(path: Path) -> tuple[Any, str]:
    """The genotype in a file and the name of its space."""
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(f"{path}: expected a genotype, but the file has over {_MAX_BYTES} bytes")
    text = content.decode("utf-8-sig", errors="replace")
    try:
        if text.lstrip().startswith("{"):
            return _from_json(text)
        if text.lstrip().startswith("|"):
            return SPACES["nasbench201"].genotype.parse(text), "nasbench201"
        return SPACES["darts"].genotype.parse(_call(text)), "darts"
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _from_json(text: str) -> tuple[Any, str]:
    """The genotype class checks the whole; only the name of the space is looked at here."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a JSON file ({error})") from None
    # The released code of ProxylessNAS writes no space.
    name = "mbconv" if data.get("name") == PROXYLESS_NAME else data.get("space")
    if not isinstance(name, str) or name not in SPACES:
        raise ValueError(f"expected a genotype of one of the spaces {', '.join(SPACES)}")
    return SPACES[name].genotype.from_dict(data), name


def _call(text: str) -> str:
    """The one ``Genotype(...)`` in a text such as a log or a line ``NAME = Genotype(...)``."""
    calls = text.count("Genotype(")
    if calls != 1:
        raise ValueError(
            f"expected JSON or a text with one Genotype(...), but it has {calls or 'none'} of these"
        )
    start = text.index("Genotype(")
    depth = 0
    for end, character in enumerate(text[start:], start):
        depth += (character == "(") - (character == ")")
        if depth == 0 and character == ")":
            return text[start : end + 1]
    return text[start:]  # unbalanced: the parser says so
