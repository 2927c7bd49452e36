# SPDX-License-Identifier: Apache-2.0
"""``fastnas eval``."""

from __future__ import annotations

from collections.abc import Sequence

from fastnas.cli.options import begun_with, choices, parse, refuse_idle_options
from fastnas.cli.processes import in_processes, run_in_processes
from fastnas.cli.progress import evaluation_progress
from fastnas.cli.terminal import error_console
from fastnas.evaluate import PRESETS, EvaluateConfig, Evaluation, find_genotype, preset_config
from fastnas.parallel import joined
from fastnas.search import RunDirectory

__all__ = ["main"]

_DESCRIPTION = "\n\n".join(
    (  # paragraphs of one line: the parser does not wrap them
        "Train the network of a genotype from scratch and test it after every epoch.",
        "Without options: what the last `fastnas search` found, on the same images.",
        "Writes metrics.jsonl, checkpoint.pt, best.pt and result.json into --out.",
    )
)


def main(argv: Sequence[str]) -> int:
    """Run the command with the words after ``fastnas eval``."""
    config = _config(argv)
    source = config.find_source()
    refuse_idle_options(argv, config.idle(source.space))
    number, words = in_processes(argv)
    if number > 1:
        return run_in_processes(number, ["eval", *words], config.batch_size)
    with joined() as group:
        evaluation = Evaluation(
            config, genotype=source, progress=evaluation_progress(), group=group
        )
        if group.leads and (left := source.epochs_left):
            error_console().print(
                f"The search in {source.search} is not over ({left} epochs to go): "
                "this trains what it would find now.",
                style="yellow",
                markup=False,
            )
        evaluation.run()
    return 0


def _config(argv: Sequence[str]) -> EvaluateConfig:
    preset = choices(argv, preset="demo")["preset"]
    words = {"prog": "fastnas eval", "description": _DESCRIPTION}
    config = parse(preset_config(preset), argv, preset=preset, presets=PRESETS, **words)
    if not config.resume:
        return config
    out = config.out
    if out == "auto":
        out = config.resolve(find_genotype(config.source)).out
    if out is None:
        return config
    begun = begun_with(EvaluateConfig, RunDirectory(out))
    return parse(begun, argv, preset=preset, presets=PRESETS, **words)
