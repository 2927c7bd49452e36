# SPDX-License-Identifier: Apache-2.0
"""Signs of a collapse: the Hessian's eigenvalue, early stopping by it, warnings."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import search_tiny as tiny
import torch
from torch import Tensor

import fastnas.search.collapse as collapse
from fastnas.evaluate import find_genotype
from fastnas.methods import METHODS, Moment
from fastnas.search import Progress, Search, TextProgress, preset_config
from fastnas.search.collapse import skip_connects, warnings
from fastnas.search.early_stop import find_rise
from fastnas.search.files import read_json, read_jsonl
from fastnas.search.hessian import alpha_eigenvalue, largest_eigenvalue
from fastnas.spaces import SPACES
from fastnas.spaces.darts import GENOTYPES, Supernet, one_hot

NOW = Moment(epoch=0, epochs=2, step=0, phase="architecture")
METHODS_WITH_ALPHAS = ["darts", "pc_darts", "da2s"]


@pytest.fixture(autouse=True, scope="module")
def _space() -> Iterator[None]:
    with tiny.registered():
        yield


pytestmark = pytest.mark.usefixtures("one_thread")


# --- the eigenvalue ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7, 40, 200])
@pytest.mark.parametrize("shift", [-3.0, 0.0, 5.0])
def test_largest_eigenvalue(size: int, shift: float) -> None:
    generator = torch.Generator().manual_seed(size)
    a = torch.randn(size, size, generator=generator, dtype=torch.float64)
    a = (a + a.T) / size**0.5 + shift * torch.eye(size, dtype=torch.float64)
    expected = torch.linalg.eigvalsh(a)
    found = largest_eigenvalue(lambda v: a @ v, size)
    assert found == pytest.approx(expected[-1].item(), abs=2e-3 * expected.abs().max().item())


def test_matrices_of_few_eigenvalues() -> None:
    assert largest_eigenvalue(lambda v: 0 * v, 5) == 0
    assert largest_eigenvalue(lambda v: 2.5 * v, 5) == pytest.approx(2.5)
    assert largest_eigenvalue(lambda v: -2.5 * v, 5) == pytest.approx(-2.5)
    one = torch.ones(30, dtype=torch.float64)
    assert largest_eigenvalue(lambda v: one * (one @ v), 30) == pytest.approx(30)


def test_few_products_are_enough() -> None:
    calls = []
    diagonal = torch.cat([torch.linspace(-1, 1, 250), torch.tensor([9.0, 10.0])]).double()

    def product(v: Tensor) -> Tensor:
        calls.append(v)
        return diagonal * v

    assert largest_eigenvalue(product, 252) == pytest.approx(10, abs=1e-2)
    assert len(calls) < 15


def by_differences(search: Search, batch: tuple[Tensor, Tensor], step: float = 1e-5) -> float:
    """The same from first derivatives only, without a Lanczos iteration: the whole Hessian."""
    learner = search.learner
    learner.supernet.train().requires_grad_(False)
    alphas = [learner.arch.alpha(kind) for kind in learner.arch.kinds]

    def gradient() -> Tensor:
        logits = learner.supernet(batch[0], search.method.weights(learner.arch, NOW))
        loss = learner.criterion(logits, batch[1])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, alphas)])

    rows = []
    for alpha in alphas:
        values = alpha.data.view(-1)
        for index in range(alpha.numel()):
            original = values[index].item()
            values[index] = original + step
            above = gradient()
            values[index] = original - step
            rows.append((above - gradient()) / (2 * step))
            values[index] = original
    hessian = torch.stack(rows)
    return torch.linalg.eigvalsh((hessian + hessian.T) / 2)[-1].item()


@pytest.mark.parametrize("method", METHODS_WITH_ALPHAS)
def test_eigenvalue_of_a_supernet(method: str) -> None:
    search = Search(tiny.config(method), data=tiny.images(), progress=Progress())
    search.supernet.double()
    search.supernet.stem[2].p = 0.0
    with torch.no_grad():
        search.arch.double()
        for parameter in search.arch.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    x, y = next(search.halves.validation.iterate(0))
    batch = (x.double(), y)
    found = alpha_eigenvalue(search.learner, batch, NOW)
    assert found == pytest.approx(by_differences(search, batch), rel=2e-3)


@pytest.mark.parametrize("method", METHODS_WITH_ALPHAS)
def test_eigenvalue_of_the_supernet_of_darts(method: str) -> None:
    """Through the fused ops: products by differences of gradients give the same."""
    config = tiny.config(method, space="darts", batch_size=4)
    search = Search(config, data=tiny.images(16), progress=Progress())
    search.supernet.double()
    search.arch.double()
    x, y = next(search.halves.validation.iterate(0))
    batch = (x.double(), y)
    found = alpha_eigenvalue(search.learner, batch, NOW)
    alphas = [search.arch.alpha(kind) for kind in search.arch.kinds]
    start = torch.cat([a.detach().flatten() for a in alphas])
    search.supernet.train().requires_grad_(False)

    def gradient(at: Tensor) -> Tensor:
        parts = at.split([a.numel() for a in alphas])
        for alpha, values in zip(alphas, parts, strict=True):
            alpha.data.copy_(values.view_as(alpha))
        logits = search.supernet(batch[0], search.method.weights(search.arch, NOW))
        loss = search.learner.criterion(logits, batch[1])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, alphas)])

    def product(v: Tensor) -> Tensor:
        return (gradient(start + 1e-5 * v) - gradient(start - 1e-5 * v)) / 2e-5

    assert found == pytest.approx(largest_eigenvalue(product, len(start)), rel=5e-3)


def test_measuring_changes_nothing() -> None:
    search = Search(tiny.config("pc_darts"), data=tiny.images(), progress=Progress())
    search.supernet.eval()
    before = {k: v.clone() for k, v in search.supernet.state_dict().items()}
    batch = next(search.halves.validation.iterate(0))
    draws = torch.get_rng_state()
    alpha_eigenvalue(search.learner, batch, NOW)
    assert torch.equal(draws, torch.get_rng_state())
    after = search.supernet.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(p.requires_grad and p.grad is None for p in search.supernet.parameters())
    assert all(p.grad is None for p in search.arch.parameters())
    assert not search.supernet.training


def test_searches_log_it_and_go_on_as_without() -> None:
    def run(**fields: object) -> Search:
        search = Search(tiny.config("da2s", epochs=3, **fields), data=tiny.images())
        search.run()
        return search

    plain, measured = run(), run(hessian_every=2)
    assert [r["eigenvalue"] is None for r in measured.history] == [True, False, True]
    assert {r["eigenvalue"] for r in plain.history} == {None}
    for name, value in plain.arch.state_dict().items():
        assert torch.equal(value, measured.arch.state_dict()[name])


# --- the rule ----------------------------------------------------------------------------------


def records(*values: float | None) -> list[dict[str, object]]:
    return [{"epoch": e, "eigenvalue": v} for e, v in enumerate(values, 1)]


def test_a_rise() -> None:
    # Means of five that end at epochs 6 and 10: 1.0 and 1.32.
    values = [9.0, *[1.0] * 6, 1.2, 1.4, 2.0]
    rise = find_rise(records(*values))
    assert rise is not None
    assert (rise.epoch, rise.before) == (4, 1.0)
    assert rise.after == pytest.approx(1.32)
    assert find_rise(records(*values[:-1], 1.85)) is None  # 1.29


def test_no_rise_before_the_tenth_epoch() -> None:
    assert find_rise(records(*[1.0] * 5, *[9.0] * 4)) is None
    assert find_rise(records(*[1.0] * 6, *[9.0] * 4)) is not None


def test_only_epochs_with_a_measurement_count() -> None:
    measured = [v for value in (*[1.0] * 5, *[9.0] * 4) for v in (None, value)]
    rise = find_rise(records(*measured))
    assert rise is not None and rise.epoch == 6
    assert find_rise(records(*measured, None)) is None


def test_the_decay_of_the_alphas_counts() -> None:
    values = [1.0] * 6 + [1.4] * 4
    assert find_rise(records(*values)) is not None
    assert find_rise(records(*values), weight_decay=1.0) is None


def test_epochs_in_which_the_alphas_rest_do_not_count() -> None:
    values = [1.0] * 6 + [9.0] * 4
    assert find_rise(records(*values), rested=1) is not None
    assert find_rise(records(*values), rested=2) is None


def test_without_curvature_nothing_rises() -> None:
    assert find_rise(records(*[-1.0] * 6, *[3.0] * 4)) is None
    assert find_rise([]) is None


# --- early stopping ----------------------------------------------------------------------------


@pytest.fixture
def rising(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eigenvalues that begin to rise with epoch 8."""
    values = [1.0] * 7 + [2.0, 4.0, 6.0, 8.0]
    monkeypatch.setattr(
        collapse, "alpha_eigenvalue", lambda learner, batch, moment: values[moment.epoch]
    )


STOPS = {"epochs": 12, "early_stop": "hessian", "batch_size": 24, "arch_lr": 0.3}


def test_early_stop(rising: None, tmp_path: Path) -> None:
    stream = io.StringIO()
    config = tiny.config("darts", out=str(tmp_path / "run"), validate="never", **STOPS)
    search = Search(config, data=tiny.images(), progress=TextProgress(stream))
    pruned = []
    measure = search.measure_gap
    search.measure_gap = lambda genotype, *rest: pruned.append(genotype) or measure(genotype, *rest)
    result = search.run()
    search.measure_gap = measure
    # The mean of epochs 6 to 10 is 2.8; that of 2 to 6, which is centred on 4, was 1.
    assert len(result.history) == 10 and result.stopped == 4
    earlier = SPACES["darts"].genotype.from_dict(result.history[3]["genotype"])
    assert result.genotype == search.genotype() == earlier
    assert earlier != search.method.derive(search.arch, search.space)
    assert SPACES["darts"].genotype.load(tmp_path / "run" / "genotype.json") == earlier
    # The gap is that of what is returned.
    assert pruned == [earlier] and result.gap is not None
    assert result.gap.to_dict() == search.measure_gap(earlier).to_dict()
    found = find_genotype(tmp_path / "run")
    assert found.genotype == earlier and found.epochs_left == 0
    assert "stopped after epoch 10" in stream.getvalue()
    assert "the genotype is of epoch 4" in stream.getvalue()
    # What is over stays over.
    again = Search(
        dataclasses.replace(config, resume=True), data=tiny.images(), progress=Progress()
    )
    assert again.run().genotype == earlier and len(again.history) == 10


def test_a_resumed_search_stops_alike(rising: None, tmp_path: Path) -> None:
    class Stop(Progress):
        def epoch(self, record: dict[str, object], genotype: object) -> None:
            if record["epoch"] == 6:
                raise KeyboardInterrupt

    config = tiny.config("pc_darts", out=str(tmp_path / "run"), validate="never", **STOPS)
    with pytest.raises(KeyboardInterrupt):
        Search(config, data=tiny.images(), progress=Stop()).run()
    resumed = Search(
        dataclasses.replace(config, resume=True), data=tiny.images(), progress=Progress()
    )
    result = resumed.run()
    whole = Search(dataclasses.replace(config, out=None), data=tiny.images(), progress=Progress())
    expected = whole.run()
    assert (result.stopped, result.genotype) == (expected.stopped, expected.genotype)
    for record in (*result.history, *expected.history):
        del record["seconds"]
    assert result.history == expected.history
    assert read_json(tmp_path / "run" / "genotype.json") == expected.genotype.to_dict()
    for name, value in whole.supernet.state_dict().items():
        assert torch.equal(value, resumed.supernet.state_dict()[name])


@pytest.mark.parametrize(("every", "least"), [(0, 10), (1, 10), (2, 18)])
def test_a_search_too_short_for_early_stopping(every: int, least: int) -> None:
    fields = {"early_stop": "hessian", "hessian_every": every}
    assert tiny.config(epochs=least, **fields).hessian_interval == max(every, 1)
    with pytest.raises(ValueError, match=f"early_stop: expected at least {least} epochs, .*got"):
        tiny.config(epochs=least - 1, **fields)


# --- signs and warnings ------------------------------------------------------------------------


def test_skip_connections_are_counted() -> None:
    specs = Supernet(C=4, layers=3).cell_specs
    hot = one_hot(GENOTYPES["DARTS_V1"], specs)
    assert skip_connects(hot, specs) == {"normal": [3, 8], "reduce": [3, 8]}


def told(record: dict[str, object], history: list[dict[str, object]] = (), **fields) -> dict:
    specs = {"normal": tiny.SPEC, "reduce": tiny.SPEC}
    base = {"epoch": 2, "entropy": {"normal": 0.5}, "skip_connects": None, "eigenvalue": None}
    return warnings({**base, **record}, list(history), tiny.config(**fields), specs)


def test_skip_connections_are_warned_of() -> None:
    many = {"skip_connects": {"normal": [4, 8], "reduce": [8, 8]}}
    assert told({"skip_connects": {"normal": [3, 8], "reduce": [8, 8]}}) == {}
    text = told(many)["skip_connects"]
    assert "4 of the 8 edges of the normal cell are skip connections after epoch 2" in text
    assert "--early-stop hessian" in text and "--weight-decay 0.0009" in text
    assert told({"skip_connects": {"normal": [1, 2], "reduce": [0, 2]}}) == {}  # one_skip
    assert told(many, arch_warmup_epochs=2) == {}
    assert told(many, [{"epoch": 1, "warnings": {"skip_connects": "said"}}]) == {}
    fields = {"early_stop": "hessian", "epochs": 10}
    assert "--early-stop" not in told(many, **fields)["skip_connects"]


def test_a_rise_is_warned_of() -> None:
    *history, last = records(*[1.0] * 6, *[9.0] * 4)
    text = told(last, history, epochs=12)["eigenvalue"]
    assert "risen from 1 to 7.4" in text and "the genotype of epoch 4" in text
    assert told(last, history, epochs=12, early_stop="hessian") == {}


def test_undecided_alphas_are_warned_of_at_the_end() -> None:
    flat = {"entropy": {"normal": 1.38, "reduce": 1.37}}
    text = told(flat)["entropy"]
    assert "their entropy is 98.8% of what it can be" in text and "--method da2s" in text
    assert told({**flat, "epoch": 1}) == {}
    assert told({"entropy": {"normal": 1.38, "reduce": 1.0}}) == {}
    # A threshold tells nearly equal weights apart.
    specs = {"normal": tiny.SPEC, "reduce": tiny.SPEC}
    config = preset_config("demo", method="entrannas_dst", epochs=2, out=None)
    record = {"epoch": 2, "skip_connects": None, "eigenvalue": None, **flat}
    assert warnings(record, [], config, specs) == {}


def test_a_method_without_a_hessian() -> None:
    for fields in ({"hessian_every": 1}, {"early_stop": "hessian", "epochs": 20}):
        with pytest.raises(ValueError, match=r"hessian_every: the method 'proxyless' runs"):
            preset_config("demo", method="proxyless", space="mbconv", out=None, **fields)


@pytest.mark.parametrize("method", METHODS_WITH_ALPHAS)
def test_every_epoch_has_the_signs(method: str, tmp_path: Path) -> None:
    stream = io.StringIO()
    config = tiny.config(method, out=str(tmp_path / "run"), hessian_every=1)
    search = Search(config, data=tiny.images(), progress=TextProgress(stream))
    search.run()
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    lines = [line for line in stream.getvalue().splitlines() if line.startswith("epoch ")]
    for row, line in zip(rows, lines, strict=True):
        assert set(row["skip_connects"]) == set(row["entropy"]) == {"normal", "reduce"}
        assert isinstance(row["eigenvalue"], float)
        skips, kept = row["skip_connects"]["normal"]
        assert f"skip connections {skips} of {kept} + " in line
        assert f"Hessian {row['eigenvalue']:.4g}" in line and "entropy 1." in line
    # Two epochs at this pace decide nothing.
    assert list(rows[-1]["warnings"]) == ["entropy"] and rows[0]["warnings"] == {}
    assert "warning: the candidates' weights are still nearly equal" in stream.getvalue()
    assert method in METHODS
