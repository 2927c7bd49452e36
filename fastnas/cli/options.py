# SPDX-License-Identifier: Apache-2.0
"""Options from configurations: every field is an option, and a preset makes the defaults."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import tyro

from fastnas.cli.processes import PROCESSES_HELP
from fastnas.evaluate import EvaluateConfig
from fastnas.search import RunDirectory, SearchConfig
from fastnas.search.files import read_json

__all__ = ["begun_with", "choices", "given_options", "parse", "refuse_idle_options"]

C = TypeVar("C")
D = TypeVar("D", str, None)
R = TypeVar("R", SearchConfig, EvaluateConfig)

_PRESET_HELP = (
    "Defaults of all other options: demo takes minutes on a CPU, the others are for CIFAR-10 and "
    "ImageNet. With --resume these are the options of the run, and the preset only names the "
    "folder where --out does not."
)


def choices(argv: Sequence[str], **defaults: D) -> dict[str, D | str]:
    """The values of the options that decide the defaults of the others, read beforehand.

    Args:
        argv: the words of the command line.
        defaults: option -> default.

    Returns:
        Option -> value. What is wrong with an option is left for :func:`parse` to say.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in defaults:
        parser.add_argument(f"--{name}")
    try:
        known, _ = parser.parse_known_args(list(argv))
    except argparse.ArgumentError:
        return {**defaults}
    given = {name: getattr(known, name) for name in defaults}
    return {
        name: default if given[name] is None else given[name] for name, default in defaults.items()
    }


def given_options(argv: Sequence[str]) -> dict[str, str]:
    """The fields whose options stand on a command line -> the option as it stands there."""
    words = [word.partition("=")[0] for word in argv if word.startswith("--")]
    return {word[2:].replace("-", "_").removeprefix("no_"): word for word in words}


def refuse_idle_options(argv: Sequence[str], idle: Mapping[str, str]) -> None:
    """Refuse an option that does nothing, whatever its value.

    Args:
        argv: the words of the command line.
        idle: name of a field -> what would make it do something.

    Raises:
        ValueError: there is one.
    """
    for name, option in given_options(argv).items():
        if name in idle:
            raise ValueError(f"{option}: does nothing here: expected {idle[name]}")


def begun_with(kind: type[R], run: RunDirectory, purpose: str = "") -> R:
    """The configuration of the run in a folder, with the folder where it is now.

    ``purpose`` is what it is wanted for, unless to go on with it.

    Raises:
        FileNotFoundError: no run was begun there.
        ValueError: its ``config.json`` is damaged, or it is a run of another command.
    """
    saved = RunDirectory.resume(run.path).config
    content = read_json(saved)
    fields = content if isinstance(content, dict) else {}
    # A field that the runs of one command have alone.
    telling = {"search": ("space", SearchConfig), "eval": ("source", EvaluateConfig)}
    for command, (field, other) in telling.items():
        if field in fields and kind is not other:
            advice = f"continue it with: fastnas {command} --resume --out {run.path}"
            raise ValueError(f"{run.path} holds a run of fastnas {command}: {purpose or advice}")
    return dataclasses.replace(kind.from_dict(content, str(saved)), out=str(run.path))


def parse(
    config: C,
    argv: Sequence[str],
    *,
    preset: str,
    presets: Iterable[str],
    prog: str,
    description: str,
) -> C:
    """Parse a command line into a configuration.

    Args:
        config: the defaults; the fields of its type become the options.
        argv: the words to parse.
        preset: where the defaults are from.
        presets: what ``--preset`` may be.
        prog: how the command is called.
        description: what it does.

    Raises:
        SystemExit: help was asked for (code 0), or an option is wrong (code 2); it was printed.
        ValueError: a value is out of its range.
    """
    options = dataclasses.make_dataclass(
        "Options",
        [
            ("preset", Annotated[Literal[tuple(presets)], tyro.conf.arg(help=_PRESET_HELP)]),
            ("processes", Annotated[int, tyro.conf.arg(help=PROCESSES_HELP)]),
            # No name: the fields of the configuration stand beside the preset.
            ("config", Annotated[type(config), tyro.conf.arg(name="")]),
        ],
    )
    parsed: Any = tyro.cli(
        options,
        prog=prog,
        description=description,
        default=options(preset, 1, config),
        args=list(argv),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return parsed.config
