# SPDX-License-Identifier: Apache-2.0
"""Signs that a search collapses: read off the records of its epochs and told in words."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastnas.methods import METHODS
from fastnas.search.config import SearchConfig
from fastnas.search.early_stop import Record, find_rise
from fastnas.search.hessian import alpha_eigenvalue
from fastnas.spaces import get_space
from fastnas.spaces.base import CellSpec, CellWeights

if TYPE_CHECKING:
    from fastnas.search.loop import Search

__all__ = ["observe", "skip_connects", "warnings"]


def observe(search: Search, accuracy: float | None) -> dict[str, Any]:
    """What says how a search does beside its losses: fields of the record of the current epoch.

    Args:
        search: all iterations of an epoch are done, and its test.
        accuracy: of that test, 0 to 1; None without one.
    """
    config, space, specs, number = (
        search.config,
        search.space,
        search.method.specs,
        search.epoch + 1,
    )
    genotype = search.genotype()
    record: dict[str, Any] = {
        "epoch": number,
        "entropy": search.method.entropy(search.arch),
        "genotype": genotype.to_dict(),
        "skip_connects": None,
        "eigenvalue": None,
        "stopped": None,
        "gap": None,
    }
    if space.one_hot is not None:
        record["skip_connects"] = skip_connects(space.one_hot(genotype, specs), specs) or None
    if config.hessian_interval and number % config.hessian_interval == 0:
        # The same batch in every epoch: this is a measurement.
        batch = next(iter(search.halves.validation.iterate(0)))
        moment = search.moment("architecture")
        began = time.perf_counter()
        record["eigenvalue"] = alpha_eigenvalue(search.learner, batch, moment)
        search.pace.add("hessian", time.perf_counter() - began)
    record["warnings"] = warnings(record, search.history, config, specs)
    if config.early_stop == "hessian":
        rise = find_rise(
            [*search.history, record], config.arch_weight_decay, config.arch_warmup_epochs
        )
        record["stopped"] = None if rise is None else rise.epoch
    ends = number == config.epochs or record["stopped"] is not None
    if config.gap and ends and space.one_hot is not None:
        found = search.genotype_of(record["stopped"])
        record["gap"] = search.measure_gap(found, accuracy).to_dict()
    return record


def skip_connects(
    one_hot: Mapping[str, CellWeights], specs: Mapping[str, CellSpec]
) -> dict[str, list[int]]:
    """By cell kind, how many of the kept candidates are ``skip_connect``, and how many are kept.

    Kinds without this candidate are left out.
    """
    counts = {}
    for kind, weights in one_hot.items():
        names = specs[kind].primitives
        if "skip_connect" in names:
            kept = weights.ops.sum(0)
            skips = kept[names.index("skip_connect")]
            counts[kind] = [round(skips.item()), round(kept.sum().item())]
    return counts


# An epoch's warning -> where it is kept in the records; each is given once in a search.
Warnings = dict[str, str]


def warnings(
    record: Record,
    history: Sequence[Record],
    config: SearchConfig,
    specs: Mapping[str, CellSpec],
) -> Warnings:
    """What the record of an epoch gives to worry about, and which option may help.

    Args:
        record: of the epoch that is over.
        history: those of the epochs before.
        config: of the search.
        specs: cell kind -> choices.

    Returns:
        Name of the sign -> a sentence; none that ``history`` has already.
    """
    found: Warnings = {}
    if record["epoch"] > config.arch_warmup_epochs:
        found.update(_skips(record, config))
        found.update(_rise(record, history, config))
        if record["epoch"] == config.epochs:
            found.update(_undecided(record, config, specs))
    told = {name for earlier in history for name in earlier.get("warnings") or ()}
    return {name: text for name, text in found.items() if name not in told}


def _skips(record: Record, config: SearchConfig) -> Warnings:
    for kind, (skips, kept) in (record.get("skip_connects") or {}).items():
        # Half of the edges: cells like this one hardly compute anything.
        if kind != "normal" or 2 * skips < kept or skips < 2:
            continue
        stop = "" if config.early_stop != "off" else "--early-stop hessian, or "
        return {
            "skip_connects": f"{skips} of the {kept} edges of the normal cell are skip connections "
            f"after epoch {record['epoch']}: the search may be collapsing; try {stop}"
            f"more regularisation of the weights (--weight-decay {3 * config.weight_decay:g})"
        }
    return {}


def _rise(record: Record, history: Sequence[Record], config: SearchConfig) -> Warnings:
    rise = find_rise([*history, record], config.arch_weight_decay, config.arch_warmup_epochs)
    if rise is None or config.early_stop != "off":
        return {}
    return {
        "eigenvalue": f"the largest eigenvalue of the alphas' Hessian has risen from "
        f"{rise.before:.3g} to {rise.after:.3g}, a sign of overfitted alphas: --early-stop hessian "
        f"would stop here and return the genotype of epoch {rise.epoch}"
    }


def _undecided(record: Record, config: SearchConfig, specs: Mapping[str, CellSpec]) -> Warnings:
    if not METHODS[config.method].decides_by_entropy:
        return {}
    shares = {
        kind: value / most
        for kind, value in record["entropy"].items()
        if (most := _most_entropy(specs[kind])) > 0
    }
    if not shares or min(shares.values()) < 0.98:
        return {}
    helps = "more --epochs or a higher --arch-lr"
    # It needs a space of cells, and would not be told to try itself.
    if config.method != "da2s" and METHODS["da2s"].needs <= get_space(config.space).features:
        helps = "more --epochs, a higher --arch-lr or --method da2s"
    return {
        "entropy": "the candidates' weights are still nearly equal (their entropy is "
        f"{min(shares.values()):.1%} of what it can be), so that the genotype says little: try "
        f"{helps}"
    }


def _most_entropy(spec: CellSpec) -> float:
    """Mean over the edges of the entropy of equal weights, in nats."""
    return sum(map(math.log, spec.candidates)) / max(spec.edges, 1)
