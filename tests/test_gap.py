# SPDX-License-Identifier: Apache-2.0
"""The discretization gap: pruning a supernet, new BatchNorm statistics, the command."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import proxyless_tiny as chain
import pytest
import search_tiny as tiny
import torch

import fastnas.search.gap as gap_module
from fastnas.cli import gap as gap_command
from fastnas.cli import main
from fastnas.methods import DA2S, Darts, Moment, PCDarts, Proxyless, ProxylessOptions
from fastnas.nn.gated import frozen_statistics
from fastnas.search import Gap, Progress, RunInterrupted, Search, load_checkpoint, preset_config
from fastnas.search.files import read_jsonl
from fastnas.spaces import SPACES, mbconv
from fastnas.spaces.darts import GENOTYPES, Genotype, Supernet, derive, one_hot

SPECS = Supernet(C=4, layers=3).cell_specs
NOW = Moment(epoch=0, epochs=2, step=0)
SKIP, SEP3 = "skip_connect", "sep_conv_3x3"
UNEVEN = Genotype.from_nodes(
    [[(SKIP, 1)], [(SEP3, 0), (SKIP, 2)], [(SKIP, 0), (SEP3, 0)], [(SEP3, s) for s in (4, 2, 0)]],
    range(2, 6),
    [[(SKIP, 0), (SKIP, 1)]] * 4,
    range(2, 6),
)


@pytest.fixture(autouse=True, scope="module")
def _space() -> Iterator[None]:
    with tiny.registered():
        yield


pytestmark = pytest.mark.usefixtures("one_thread")


def searched(method: str = "darts", **fields: object) -> Search:
    search = Search(tiny.config(method, **fields), data=tiny.images(), progress=Progress())
    search.run()
    return search


# --- pruning -----------------------------------------------------------------------------------


def test_one_hot() -> None:
    weights = one_hot(UNEVEN, SPECS)["normal"]
    assert weights.ops.shape == (14, 8) and weights.edges.shape == (14,)
    # Node 4 (edges 5 to 8) has two candidates on its first edge.
    expected = {(1, 3): 1, (2, 4): 1, (4, 3): 1, (5, 3): 1, (5, 4): 1}
    expected |= {(9, 4): 1, (11, 4): 1, (13, 4): 1}
    found = {tuple(i): weights.ops[tuple(i)].item() for i in weights.ops.nonzero().tolist()}
    assert found == expected
    assert weights.edges.nonzero().flatten().tolist() == [1, 2, 4, 5, 9, 11, 13]


@pytest.mark.parametrize("name", GENOTYPES)
def test_what_was_derived_from_a_pruned_supernet_is_it(name: str) -> None:
    weights = one_hot(GENOTYPES[name], SPECS)
    again = derive({k: w.ops for k, w in weights.items()}, SPECS)
    for cell in ("normal", "reduce"):
        for before, after in zip(GENOTYPES[name].nodes(cell), again.nodes(cell), strict=True):
            assert set(before) == set(after)


def test_one_hot_refuses_other_cells() -> None:
    small = Genotype([(SKIP, 0), (SKIP, 1)], [2], [(SKIP, 0), (SKIP, 1)], [2])
    with pytest.raises(ValueError, match="one_hot: expected a normal cell of 4 nodes, but got 1"):
        one_hot(small, SPECS)
    strange = Genotype([("sep_conv_7x7", 0)] * 8, [2], [(SKIP, 0)] * 8, [2])
    with pytest.raises(ValueError, match=r"one_hot: expected the candidates .*got sep_conv_7x7"):
        one_hot(strange, SPECS)


@pytest.mark.parametrize("k", [1, 2])
def test_nothing_of_what_is_pruned_is_left(k: int) -> None:
    """The output does not depend on the weights of candidates and edges that went."""
    torch.manual_seed(0)
    net = Supernet(C=4, layers=3, num_classes=3, in_channels=1, partial_channels=k).double().eval()
    weights = {
        kind: type(w)(w.ops.double(), w.edges.double())
        for kind, w in one_hot(UNEVEN, SPECS).items()
    }
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    before = net(x, weights)
    with torch.no_grad():
        for cell in net.cells:
            kind = "reduce" if cell.reduction else "normal"
            for edge, row in zip(cell._ops, weights[kind].ops, strict=True):
                for candidate, weight in zip(edge._ops, row, strict=True):
                    for parameter in candidate.parameters():
                        if not weight:
                            parameter.normal_()
    assert torch.equal(net(x, weights), before)


def test_weights_of_the_edges_that_stay() -> None:
    hot = one_hot(UNEVEN, SPECS)
    darts = Darts(SPECS)
    assert darts.pruned_weights(darts.parameters(), hot) == hot
    pc_darts = PCDarts(SPECS)
    arch = pc_darts.parameters()
    with torch.no_grad():
        arch.beta("normal").copy_(torch.arange(14.0))
    edges = pc_darts.pruned_weights(arch, hot)["normal"].edges
    assert (edges > 0).tolist() == (hot["normal"].edges > 0).tolist()
    torch.testing.assert_close(edges[[2, 4]], torch.softmax(torch.tensor([2.0, 4.0]), 0))
    torch.testing.assert_close(edges[[1, 5]], torch.ones(2))


def test_da2s_shares_the_weight_of_a_node() -> None:
    da2s = DA2S(Supernet(C=4, layers=3, none=False).cell_specs)
    arch = da2s.parameters()
    hot = one_hot(da2s.derive(arch, SPACES["darts"]), da2s.specs)
    edges = da2s.pruned_weights(arch, hot)["normal"].edges
    for rows in da2s.specs["normal"].node_slices:
        assert edges[rows].sum().item() == pytest.approx(rows.stop - rows.start)
        assert (edges[rows] > 0).sum() == 2


def test_one_hot_of_a_chain_of_blocks() -> None:
    net = mbconv.Supernet(num_classes=4, in_channels=1, **chain.OPTIONS)
    specs = net.cell_specs
    scores = torch.rand(4, 7, generator=torch.Generator().manual_seed(2))
    genotype = mbconv.derive({"block": scores}, specs)
    hot = mbconv.one_hot(genotype, specs)
    assert hot["block"].ops.shape == (4, 7) and hot["block"].edges is None
    assert hot["block"].ops.sum(1).tolist() == [1, 1, 1, 1]
    assert mbconv.derive({"block": hot["block"].ops}, specs) == genotype
    arch = Darts(specs).parameters()
    path = Proxyless(specs).pruned_weights(arch, hot)["block"]
    assert [gate.active for gate in path.edges] == hot["block"].ops.argmax(1).tolist()
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(net.eval()(x, {"block": path}), net(x, hot))
    wider = mbconv.Supernet(num_classes=4, in_channels=1, **{**chain.OPTIONS, "head_channels": 40})
    with pytest.raises(ValueError, match=r"one_hot: .* head 40, but got stem 8, .* head 32"):
        mbconv.one_hot(genotype, wider.cell_specs)
    with pytest.raises(ValueError, match=r"one_hot: .* but got stem 40/2"):
        mbconv.one_hot(mbconv.GENOTYPES["proxyless_cpu"], specs)
    with pytest.raises(TypeError, match=r"wanted a ChainSpec, got NoneType"):
        mbconv.one_hot(genotype, SPECS)


# --- the measurement ---------------------------------------------------------------------------


def test_a_discrete_supernet_has_no_gap() -> None:
    search = searched("da2s", epochs=1, validate="never", gap=False)
    with torch.no_grad():
        for kind in search.arch.kinds:
            search.arch.alpha(kind).fill_(-20.0)
            search.arch.alpha(kind)[:, 1] = 20.0
            # Node 3 keeps two of its three edges.
            search.arch.beta(kind).copy_(torch.tensor([1.0, -1e9, 1.0]))
    found = search.measure_gap()
    assert found.supernet == found.pruned
    weights = search.method.weights(search.arch, NOW)
    hot = SPACES["tiny"].one_hot(search.genotype(), search.method.specs)
    pruned = search.method.pruned_weights(search.arch, hot)
    for kind, cell in weights.items():
        torch.testing.assert_close(cell.ops * (cell.edges[:, None] > 0), pruned[kind].ops)
        torch.testing.assert_close(cell.edges, pruned[kind].edges)


@pytest.mark.parametrize("method", ["darts", "pc_darts", "da2s"])
def test_the_search_stays_as_it_is(method: str) -> None:
    search = searched(method, gap=False)
    search.supernet.train()
    before = {k: v.clone() for k, v in search.supernet.state_dict().items()}
    draws = search.random.state_dict()["torch"].clone()
    with search.random.use():
        first = search.measure_gap()
    assert search.measure_gap() == first
    after = search.supernet.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(module.training for module in search.supernet.modules())
    assert all(p.requires_grad for p in search.supernet.parameters())
    assert torch.equal(draws, search.random.state_dict()["torch"])


def test_new_statistics_are_the_mean_over_the_batches() -> None:
    search = searched("darts", gap=False)
    learner = search.learner
    batches = list(search.halves.validation.iterate(0))
    weights = search.method.weights(search.arch, NOW)
    seen = []
    search.supernet.eval()
    handle = search.supernet.stem[0].register_forward_hook(lambda m, i, y: seen.append(y.detach()))
    gap_module.with_new_statistics(learner, batches, weights, lambda: None)
    handle.remove()
    norm = search.supernet.stem[1]
    means = torch.stack([y.mean((0, 2, 3)) for y in seen])
    variances = torch.stack([y.var((0, 2, 3)) for y in seen])
    torch.testing.assert_close(norm.running_mean, means.mean(0))
    torch.testing.assert_close(norm.running_var, variances.mean(0))
    assert not any(module.training for module in search.supernet.modules())


def test_accuracies_are_what_they_are_called() -> None:
    """Counted by hand, the third with the statistics of the training images."""
    search = searched("darts", gap=False, epochs=12, batch_size=8, validate="never")
    found = search.measure_gap()
    net, x_y = search.supernet, list(search.halves.validation.iterate(0))
    count = sum(len(y) for _, y in x_y)
    hot = SPACES["tiny"].one_hot(search.genotype(), search.method.specs)

    @torch.no_grad()
    def percent(weights: object) -> float:
        net.eval()
        return 100 * sum((net(x, weights).argmax(1) == y).sum().item() for x, y in x_y) / count

    assert found.supernet == pytest.approx(percent(search.method.weights(search.arch, NOW)))
    assert found.pruned == pytest.approx(percent(hot))
    training = list(search.halves.weights.iterate(0))
    with torch.no_grad():
        gap_module.with_new_statistics(search.learner, training, hot, lambda: None)
    assert found.pruned_bn == pytest.approx(percent(hot))
    assert len({found.supernet, found.pruned, found.pruned_bn}) == 3


def test_the_path_that_is_left() -> None:
    """ProxylessNAS: one path before and after; only the statistics are others."""
    search = Search(
        preset_config(
            "demo",
            method="proxyless",
            space="mbconv",
            network=mbconv.MBConvOptions(**chain.OPTIONS),
            options=ProxylessOptions(arch_every=1),
            epochs=8,
            batch_size=8,
            arch_warmup_epochs=0,
            weight_share=0.5,
            arch_share=0.5,
            validate="never",
            device="cpu",
            out=None,
        ),
        data=tiny.images(),
        progress=Progress(),
    )
    found = search.run().gap
    assert search.history[-1]["skip_connects"] is None
    hot = mbconv.one_hot(search.genotype(), search.method.specs)
    path = search.method.pruned_weights(search.arch, hot)
    assert path == search.method.weights(search.arch, NOW.during("validation"))
    net, x_y = search.supernet, list(search.halves.validation.iterate(0))

    @torch.no_grad()
    def percent() -> float:
        right = sum((net(x, path).argmax(1) == y).sum().item() for x, y in x_y)
        return 100 * right / sum(len(y) for _, y in x_y)

    with frozen_statistics(net.train()):
        assert found.supernet == pytest.approx(percent(), abs=1e-3)
    net.eval()
    assert found.pruned == pytest.approx(percent(), abs=1e-3)
    with torch.no_grad():
        training = search.halves.weights.iterate(0)
        gap_module.with_new_statistics(search.learner, training, path, lambda: None)
    assert found.pruned_bn == pytest.approx(percent(), abs=1e-3)
    assert len({found.supernet, found.pruned, found.pruned_bn}) == 3


def test_a_space_that_cannot_prune(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SPACES, "tiny", dataclasses.replace(SPACES["tiny"], one_hot=None))
    search = searched("darts")
    assert search.history[-1]["gap"] is None and search.history[-1]["skip_connects"] is None
    with pytest.raises(ValueError, match="gap: a supernet of the space 'tiny' cannot be pruned"):
        search.measure_gap()


# --- at the end of a search, and as a command ----------------------------------------------------


@pytest.mark.parametrize("validate", ["last", "never"])
def test_the_end_of_a_search_tells_it(validate: str) -> None:
    search = Search(tiny.config("da2s", validate=validate), data=tiny.images(), progress=Progress())
    result = search.run()
    assert [record["gap"] is None for record in result.history] == [True, False]
    assert result.gap == Gap(**result.history[-1]["gap"])
    assert result.history[-1]["gap"] == search.measure_gap().to_dict()
    assert search.stopped is None


def test_interrupted_while_the_statistics_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(out: str, **fields: object) -> Search:
        config = tiny.config("pc_darts", out=str(tmp_path / out), **fields)
        return Search(config, data=tiny.images(), progress=Progress())

    whole = run("whole")
    whole.run()
    halted = run("halted")
    real = gap_module.with_new_statistics

    def interrupted(*arguments: object) -> None:
        halted._interrupts.note(signal.SIGINT)
        real(*arguments)

    monkeypatch.setattr(gap_module, "with_new_statistics", interrupted)
    with pytest.raises(RunInterrupted):
        halted.run()
    monkeypatch.undo()
    assert len(halted.history) == 1
    again = run("halted", resume=True)
    again.run()
    one, two = (
        load_checkpoint(tmp_path / out / "checkpoint.pt", kind="search")
        for out in ("whole", "halted")
    )
    for key, value in one["supernet"].items():
        assert torch.equal(value, two["supernet"][key]), key
    assert one["history"][-1]["gap"] == two["history"][-1]["gap"]


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(
        gap_command, "Search", lambda config, **k: Search(config, data=tiny.images(), **k)
    )
    folder = tmp_path / "run"
    searched("pc_darts", out=str(folder))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert main(["gap", str(folder), "--json", "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    printed = json.loads(out)
    assert list(printed) == ["supernet", "pruned", "pruned_bn"] and err == ""
    assert printed == read_jsonl(folder / "metrics.jsonl")[-1]["gap"]
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert main(["gap", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "supernet",
        "pruned to the genotype",
        "with new BatchNorm statistics",
    ]
    assert f"{printed['pruned']:.2f} %" in lines[1]


def test_command_on_other_things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(
        gap_command, "Search", lambda config, **k: Search(config, data=tiny.images(), **k)
    )
    assert main(["gap", str(tmp_path / "none")]) == 2
    assert "expected the folder of a search" in capsys.readouterr().err
    searched("darts", out=str(tmp_path / "run"))
    (tmp_path / "run" / "checkpoint.pt").unlink()
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert main(["gap", str(tmp_path / "run")]) == 2
    assert "has not written a checkpoint yet" in capsys.readouterr().err


def test_command_on_a_search_that_is_not_over(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(
        gap_command, "Search", lambda config, **k: Search(config, data=tiny.images(), **k)
    )

    class Stop(Progress):
        def epoch(self, record: object, genotype: object) -> None:
            raise KeyboardInterrupt

    search = Search(
        tiny.config("darts", out=str(tmp_path / "run")), data=tiny.images(), progress=Stop()
    )
    with pytest.raises(KeyboardInterrupt):
        search.run()
    assert main(["gap", str(tmp_path / "run"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert set(json.loads(out)) == {"supernet", "pruned", "pruned_bn"}
    assert "is not over (1 epochs to go)" in " ".join(err.split())
