# SPDX-License-Identifier: Apache-2.0
"""How long a search is still going to take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastnas.search.gap import BN_BATCHES

if TYPE_CHECKING:
    from fastnas.search.loop import Search

__all__ = ["seconds_left"]


def seconds_left(search: Search, tested: int = 0) -> float | None:
    """Estimate for the rest of a search; None before its first iteration.

    What comes at the ends of epochs (tests of the supernet, as it is and pruned, and the Hessian)
    counts as soon as something of its kind was measured.

    Args:
        search: between two batches.
        tested: batches that the supernet was tested on at the end of this epoch.
    """
    if search.over:
        return 0.0
    config = search.config
    left = (config.epochs - search.epoch) * search.steps_per_epoch - search.step
    moving = max(config.epochs - config.arch_warmup_epochs, 0) * search.steps_per_epoch
    with_arch = min(left, moving)
    every = config.hessian_interval
    return search.pace.seconds(
        plain=left - with_arch,
        architecture=with_arch,
        test=_test_batches(search) - tested,
        hessian=config.epochs // every - search.epoch // every if every else 0,
    )


def _test_batches(search: Search) -> int:
    """Batches that the supernet is still going to be tested on."""
    config, each = search.config, search.test_steps
    ends = {"every": config.epochs - search.epoch, "last": 1, "never": 0}[config.validate]
    batches = ends * each
    if config.gap and search.space.one_hot is not None:
        # Pruned, with and without new statistics; as it is, where no test has told that.
        batches += (2 if ends else 3) * each + min(BN_BATCHES, search.steps_per_epoch)
    return batches
