# SPDX-License-Identifier: Apache-2.0
"""Searches whose schedule trains no architecture: fine for trying things out, and to be told."""

from __future__ import annotations

from fastnas.search.config import SearchConfig, method_class

__all__ = ["frozen_architecture"]


def frozen_architecture(config: SearchConfig, steps_per_epoch: int) -> str | None:
    """What of the architecture a search never trains, and which option changes that.

    Args:
        config: of the search.
        steps_per_epoch: iterations in an epoch.

    Returns:
        A sentence; None where all of the architecture is trained.
    """
    epochs, rest = config.epochs, config.arch_warmup_epochs
    if epochs > rest:
        return method_class(config.method).frozen(config, steps_per_epoch)
    return (
        f"the architecture takes no step: --arch-warmup-epochs {rest} leaves every epoch (--epochs "
        f"{epochs}) to the weights alone, and the genotype is read off the initial logits; try "
        f"--epochs above {rest}, or --arch-warmup-epochs below {epochs}"
    )
