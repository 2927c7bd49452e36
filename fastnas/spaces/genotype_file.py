# SPDX-License-Identifier: Apache-2.0
"""What genotypes of all spaces share: texts of limited length, JSON, files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["JSONGenotype", "check_length", "short"]


def short(value: object) -> str:
    """A value for a message, not too long."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # lists in lists without end, a number of too many digits
        text = f"a value of the type {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def check_length(text: object, most: int) -> None:
    """Raise a ValueError for what is no text, or has more characters than a genotype has."""
    if not isinstance(text, str):
        raise ValueError(f"genotype: wanted text, got {type(text).__name__}")
    if len(text) > most:
        raise ValueError(f"genotype: text of more than {most} characters")


class JSONGenotype:
    """A genotype that is written as JSON; a space subclasses this with its own form."""

    MAX_TEXT: ClassVar[int]
    """Characters of a text or file."""

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build from what ``to_dict`` returned; ValueError where it is anything else."""
        raise NotImplementedError

    def to_json(self) -> str:
        """Return ``to_dict`` as JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what ``to_json`` returned.

        Raises:
            ValueError: not JSON, too long, or not a genotype of this space.
        """
        check_length(text, cls.MAX_TEXT)
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"genotype: not JSON ({error})") from None
        return cls.from_dict(data)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a JSON file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a genotype of this space; the message names it.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"genotype file {str(path)!r} does not exist")
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(cls.MAX_TEXT + 1)
        try:
            return cls.from_json(text)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
