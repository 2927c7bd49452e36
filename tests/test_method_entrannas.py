# SPDX-License-Identifier: Apache-2.0
"""EnTranNAS: what is hosted and when, derivation, options, whole searches."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import search_tiny as tiny
import torch
from torch.overrides import TorchFunctionMode

from fastnas.methods import (
    METHODS,
    ArchParameters,
    DartsOptions,
    EnTranNAS,
    EnTranNASOptions,
    Moment,
)
from fastnas.nn.candidates import DARTS_PRIMITIVES
from fastnas.search import Progress, RunInterrupted, Search, load_checkpoint, preset_config
from fastnas.spaces import SPACES, CellRoles, CellSelection, CellSpec, CellWeights
from fastnas.spaces.darts import Network

SPEC = CellSpec((2, 3, 4, 5), DARTS_PRIMITIVES[1:])
SPECS = {"normal": SPEC, "reduce": SPEC}
NOW = Moment(epoch=0, epochs=2, step=0)
BOTH = ["entrannas", "entrannas_dst"]


pytestmark = pytest.mark.usefixtures("one_thread")


def config(method: str = "entrannas", **fields: object):
    values = {"space": "darts", "batch_size": 8, "epochs": 1, "arch_lr": 0.1, **fields}
    return tiny.config(method, **values)


def search(method: str = "entrannas", **fields: object) -> Search:
    return Search(config(method, **fields), data=tiny.images(32), progress=Progress())


def scatter(arch: ArchParameters) -> ArchParameters:
    with torch.no_grad():
        for parameter in arch.parameters():
            parameter.normal_()
    return arch


def random(method) -> ArchParameters:
    return scatter(method.parameters())


def test_weights() -> None:
    method = EnTranNAS(SPECS, EnTranNASOptions(tau=0.5))
    arch = random(method)
    for kind, roles in method.weights(arch, NOW).items():
        assert isinstance(roles, CellRoles) and isinstance(roles.engine, CellWeights)
        expected = torch.softmax(2 * arch.alpha(kind), -1)
        torch.testing.assert_close(roles.engine.ops, expected)
        assert roles.engine.edges is None and roles.engine.ops.requires_grad
        assert roles.transit == CellSelection(method.connections(arch)[kind], None)
        per_node = [sum(map(len, roles.transit.connections[r])) for r in SPEC.node_slices]
        assert per_node == [2] * 4


def test_supernet_options() -> None:
    def options(**given: object) -> dict[str, object]:
        return EnTranNAS.supernet_options(EnTranNASOptions(**given))

    assert options() == {"none": False, "engine_cells": "last", "share": True}
    assert options(engine_cells=" 0, 2,5", share=False) == {
        "none": False,
        "engine_cells": (0, 2, 5),
        "share": False,
    }
    assert options(engine_cells="all")["engine_cells"] == "all"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"engine_cells": "first"}, "engine_cells: expected last, all or numbers .*'first'"),
        ({"engine_cells": ""}, "engine_cells: expected last"),
        ({"engine_cells": "1,-2"}, "engine_cells: expected last"),
        ({"engine_cells": "1,,2"}, "engine_cells: expected last"),
        ({"tau": 0.0}, "tau: expected a number from 1e-06 to 1000000, but got 0"),
        ({"tau": float("nan")}, "tau: expected a number from 1e-06 to 1000000"),
        ({"tau": float("inf")}, "tau: expected a number from 1e-06 to 1000000"),
    ],
)
def test_options_that_are_refused(given: dict, message: str) -> None:
    for method in BOTH:
        with pytest.raises(ValueError, match=message):
            METHODS[method].Options(**given)


@pytest.mark.parametrize("method", BOTH)
def test_steps_are_not_recorded(method: str) -> None:
    assert "connections that the host read" in METHODS[method](SPECS).graph_obstacle()


@pytest.mark.parametrize("method", BOTH)
def test_configurations_that_are_refused(method: str, tmp_path: Path) -> None:
    options = METHODS[method].Options
    with pytest.raises(ValueError, match=f"target: expected none with the method '{method}'"):
        preset_config("demo", method=method, target="macs=1M", out=None)
    with pytest.raises(ValueError, match="needs a space with engine_cells"):
        preset_config("demo", method=method, space="mbconv", out=None)
    for cells, message in (("0,5", "different numbers from 0 to 2"), ("1,2", "a normal cell")):
        with pytest.raises(ValueError, match=f"engine_cells: wanted {message}"):
            search(method, options=options(engine_cells=cells), out=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(TypeError, match="options: expected EnTranNAS"):
        METHODS[method](SPECS, DartsOptions())


# --- derivation ---------------------------------------------------------------------------------


def test_edges_is_the_rule_of_darts() -> None:
    method = EnTranNAS(SPECS)
    for _ in range(10):
        arch = random(method)
        assert method.derive(arch, SPACES["darts"]) == METHODS["darts"](SPECS).derive(
            arch, SPACES["darts"]
        )


def test_pairs_may_stand_on_one_edge() -> None:
    method = EnTranNAS(SPECS, EnTranNASOptions(derive="pairs"))
    arch = method.parameters()
    with torch.no_grad():
        for kind in SPECS:
            arch.alpha(kind).zero_()
            arch.alpha(kind)[:, 2] = 1.0
            arch.alpha(kind)[3, 3] = 3.0
            arch.alpha(kind)[3, 4] = 2.5
    genotype = method.derive(arch, SPACES["darts"])
    assert genotype.nodes("normal")[1] == (("sep_conv_3x3", 1), ("sep_conv_5x5", 1))
    assert genotype.nodes("normal")[0] == (("skip_connect", 0), ("skip_connect", 1))
    assert genotype.normal_inputs == (2, 2, 2, 2) and genotype.to_dict()["version"] == 1
    y = Network(genotype, C=4, layers=3, num_classes=4)(torch.randn(2, 3, 8, 8))
    assert y.shape == (2, 4)
    # By edges the node keeps two of them.
    edges = EnTranNAS(SPECS).derive(arch, SPACES["darts"]).nodes("normal")[1]
    assert {source for _, source in edges} == {0, 1}


# --- what is hosted, and when -------------------------------------------------------------------


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("cells", ["last", "0,1", "all"])
def test_transit_cells_host_what_was_derived_after_the_iteration_before(method, cells) -> None:
    s = search(method, options=METHODS[method].Options(engine_cells=cells), arch_lr=0.5)
    scatter(s.arch)
    engines = s.supernet.engine_cells
    seen: list[tuple[bool, object]] = []
    for index, cell in enumerate(s.supernet.cells):
        role = index in engines
        cell.register_forward_pre_hook(
            lambda m, a, role=role: seen.append((role, m.reduction, a[2]))
        )
    before = s.method.connections(s.arch)
    moved = 0
    with s._running(1, False):
        for batch in s.halves.weights.iterate(0):
            seen.clear()
            s.method.iteration(s.learner, batch, lambda batch=batch: batch, NOW)
            after = s.method.connections(s.arch)
            moved += after != before
            for engine, reduction, given in seen:
                if not engine:
                    assert given == CellSelection(before["reduce" if reduction else "normal"])
            assert len(seen) == 2 * len(s.supernet.cells)
            before = after
    assert moved > 0
    assert s.method.weights(s.arch, NOW)["normal"].transit.connections == before["normal"]


class _Reads(TorchFunctionMode):
    """Counts what would wait for a GPU: values that come to the host."""

    NAMES = ("tolist", "item", "__bool__", "__float__", "__int__", "numpy", "cpu", "nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.count: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.NAMES:
            self.count.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", BOTH)
def test_one_read_an_iteration(method: str) -> None:
    s = search(method)
    batch = next(iter(s.halves.weights.iterate(0)))
    s.method.iteration(s.learner, batch, lambda: batch, NOW)
    for _ in range(2):
        with _Reads() as reads:
            s.method.iteration(s.learner, batch, lambda: batch, NOW)
        # Of the connections once. Adam's step counters live on the host.
        assert [name for name in reads.count if name != "item"] == ["tolist"]
    with _Reads() as reads:
        s.method.weights(s.arch, NOW)
        s.method.weights(s.arch, NOW)
        s.method.iteration(s.learner, batch, None, NOW)
    # Where the alphas rest there is nothing to read.
    assert reads.count == []


@pytest.mark.parametrize("method", BOTH)
def test_every_change_of_the_parameters_is_noticed(method: str) -> None:
    s = search(method)
    scatter(s.arch)
    start, state = s.method.connections(s.arch), copy.deepcopy(s.arch.state_dict())
    with torch.no_grad():
        s.arch.alpha("normal").mul_(-1)
    turned = s.method.connections(s.arch)
    assert turned != start
    s.arch.load_state_dict(state)
    assert s.method.connections(s.arch) == start
    other = random(s.method)
    assert s.method.connections(other) != start
    assert s.method.connections(s.arch) == start


@pytest.mark.parametrize("method", BOTH)
def test_a_fused_step_is_noticed(method: str) -> None:
    """It changes the parameters behind autograd's back."""
    s = search(method)
    scatter(s.arch)
    s.learner.arch_optimizer = torch.optim.Adam(s.arch.parameters(), 2.0, fused=True)
    batch = next(iter(s.halves.weights.iterate(0)))
    for _ in range(2):
        s.method.iteration(s.learner, batch, lambda: batch, NOW)
        fresh = METHODS[method](s.method.specs, s.method.options)
        assert s.method.connections(s.arch) == fresh.connections(s.arch)


@pytest.mark.parametrize("method", BOTH)
def test_an_error_leaves_nothing_hosted(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s = search(method)
    batch = next(iter(s.halves.weights.iterate(0)))

    def fails(*_: object) -> None:
        raise RuntimeError("stop")

    monkeypatch.setattr(s.learner, "weight_step", fails)
    with pytest.raises(RuntimeError, match="stop"):
        s.method.iteration(s.learner, batch, lambda: batch, NOW)
    now = s.method.connections(s.arch)
    assert s.method.weights(s.arch, NOW)["normal"].transit.connections == now["normal"]


# --- whole searches -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize(
    "options", [{}, {"share": False}, {"engine_cells": "all"}, {"order": "second"}]
)
def test_search(method: str, options: dict) -> None:
    s = search(method, options=METHODS[method].Options(**options), hessian_every=int(not options))
    result = s.run()
    assert result.genotype == s.method.derive(s.arch, s.space)
    assert result.gap is not None
    assert (result.history[0]["eigenvalue"] is None) == bool(options)
    kept = {kind: sum(map(len, edges)) for kind, edges in s.method.connections(s.arch).items()}
    counts = result.history[0]["skip_connects"]
    assert {kind: kept for kind, (_, kept) in counts.items()} == kept


@pytest.mark.parametrize("method", BOTH)
def test_interrupted_and_continued(method: str, tmp_path: Path) -> None:
    class Stop(Progress):
        def step(self, report: object) -> None:
            if report.step == 2:
                raise BrokenPipeError

    def run(name: str, progress: Progress, **fields: object) -> Search:
        settings = config(method, out=str(tmp_path / name), **fields)
        return Search(settings, data=tiny.images(48), progress=progress)

    run("whole", Progress()).run()
    with pytest.raises(RunInterrupted):
        run("halted", Stop()).run()
    again = run("halted", Progress(), resume=True)
    assert again.step == 2
    again.run()
    states = [
        load_checkpoint(tmp_path / name / "checkpoint.pt", kind="search")
        for name in ("whole", "halted")
    ]
    tiny.assert_equal(*states)


def test_what_is_learnt_is_hosted() -> None:
    """With one useful candidate, the search finds it, and the Transit-cells compute with it."""
    s = search(epochs=6, arch_lr=0.2, batch_size=16, validate="never")
    for cell in s.supernet.cells:
        for op in cell._ops:
            for k, candidate in enumerate(op._ops):
                if k != 3:
                    candidate.register_forward_hook(lambda m, i, y: torch.zeros_like(y))
    genotype = s.run().genotype
    names = [op for op, _ in genotype.normal + genotype.reduce]
    assert names.count("sep_conv_3x3") >= 10  # by chance 2
