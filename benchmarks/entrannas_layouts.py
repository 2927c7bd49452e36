# SPDX-License-Identifier: Apache-2.0
"""What Engine-cells, Transit-cells and shared features save, for six layouts of one supernet.

``python benchmarks/entrannas_layouts.py`` prints operations evaluated, multiply-accumulates, bytes
kept for the backward and parameters. Nothing is timed, so any machine gives the same figures, but
for the bytes: these are of this machine's kernels. The supernet is that of DARTS without ``none``
on CIFAR images, 8 cells, 16 channels; Transit-cells host the normal cell of DARTS_V2, whatever
their kind. Bytes are those of a forward in which weights and alphas want a gradient, in float32, at
a batch of 2, of each storage once and whole, without parameters.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastnas.bench.measure import saved_bytes
from fastnas.spaces import CellRoles, CellSelection, CellWeights, count_macs, count_parameters
from fastnas.spaces.darts import GENOTYPES, Supernet, one_hot

BATCH, IMAGE = 2, (3, 32, 32)
LAYOUTS = ("all", (0, 2), (7, 5))


class Layout(NamedTuple):
    """The figures of one supernet.

    Attributes:
        evaluations: candidates evaluated in one forward.
        macs: multiply-accumulates of one image.
        saved: bytes kept for the backward, of one image.
        parameters: of the whole supernet.
    """

    evaluations: int
    macs: int
    saved: int
    parameters: int


def build(engine_cells: str | Sequence[int], share: bool, memory: str = "default") -> Supernet:
    """The supernet of a layout."""
    torch.manual_seed(0)
    return Supernet(16, 8, none=False, engine_cells=engine_cells, share=share, memory=memory)


def measure(net: Supernet) -> Layout:
    """All figures of a supernet."""
    weights = roles(net)
    return Layout(
        evaluations(net, torch.randn(BATCH, *IMAGE), weights),
        count_macs(net, (1, *IMAGE), weights),
        saved(net),
        count_parameters(net),
    )


def saved(net: Supernet) -> int:
    """Bytes kept for the backward, of one image."""
    x, weights = torch.randn(BATCH, *IMAGE), roles(net)
    return saved_bytes(lambda: [net(x, weights)], tuple(net.parameters())) // BATCH


def roles(net: Supernet) -> dict[str, CellRoles]:
    """Softmax weights for the Engine-cells; for the Transit-cells DARTS_V2, in both kinds."""
    hosted = one_hot(GENOTYPES["DARTS_V2"], net.cell_specs)["normal"].ops
    connections = tuple(tuple(row.nonzero().flatten().tolist()) for row in hosted)
    alpha = (1e-3 * torch.randn(hosted.shape)).requires_grad_()
    given = CellRoles(CellWeights(torch.softmax(alpha, -1)), CellSelection(connections))
    return dict.fromkeys(net.cell_specs, given)


def evaluations(net: Supernet, x: torch.Tensor, weights: dict[str, CellRoles]) -> int:
    """Calls of candidates in one forward, which hooks make visible."""
    calls: Counter[str] = Counter()
    candidates = [c for cell in net.cells for op in cell._ops for c in op._ops]
    handles = [c.register_forward_hook(lambda *_: calls.update(["all"])) for c in candidates]
    with torch.no_grad():
        net(x, weights)
    for handle in handles:
        handle.remove()
    return calls["all"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", choices=("default", "low"), default="default")
    memory = parser.parse_args().memory
    print("| Engine-cells | features | evaluations | MMACs | saved MiB | parameters, M |")
    print("| --- | --- | --- | --- | --- | --- |")
    for cells in LAYOUTS:
        for share in (False, True):
            found = measure(build(cells, share, memory))
            names = "all 8" if cells == "all" else " and ".join(map(str, cells))
            print(
                f"| {names} | {'shared' if share else 'apart'} | {found.evaluations} | "
                f"{found.macs / 1e6:.1f} | {found.saved / 2**20:.1f} | "
                f"{found.parameters / 1e6:.3f} |"
            )


if __name__ == "__main__":
    main()
