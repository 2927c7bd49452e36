# SPDX-License-Identifier: Apache-2.0
"""Checks: the figures by hand, networks that take turns, calibration, plot, and the command."""

from __future__ import annotations

import builtins
import dataclasses
import json
import statistics
from types import SimpleNamespace

import pytest
import torch
from latency_tiny import RULES, SHAPE, table
from torch import nn

from fastnas.cli import main
from fastnas.latency import BlockTime, Calibration, LatencyTable, check, here
from fastnas.latency.check import Agreement, Check, CheckConfig, spearman, time_networks
from fastnas.latency.pace import Pace, without_pace
from fastnas.latency.timing import measuring
from fastnas.search.runtime import resolve_device


def test_spearman():
    assert spearman([1, 2, 3, 4], [10, 20, 25, 90]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # 1 - 6 sum d^2 / (n (n^2 - 1)) without ties.
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(1 - 6 * 4 / 120)
    # Ties share their mean rank: (1, 2.5, 2.5, 4) against (1, 2, 3, 4).
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert spearman([1, 1], [1, 2]) == 0


def test_figures():
    agreement = Agreement(predicted=(11.0, 18.0, 30.0), measured=(10.0, 20.0, 30.0))
    assert agreement.bias_percent == pytest.approx(0, abs=1e-12)
    assert agreement.rmse_percent == pytest.approx(100 * (0.02 / 3) ** 0.5)
    slow = agreement.scaled(2)
    assert slow.bias_percent == pytest.approx(100)
    assert slow.figures()["spearman"] == 1


def test_best_factor_makes_the_error_least():
    agreement = Agreement((11.0, 18.0, 33.0), (20.0, 41.0, 60.0))
    factor = check.best_factor(agreement)
    best = agreement.scaled(factor).rmse_percent
    for other in (0.999, 1.001):
        assert agreement.scaled(other * factor).rmse_percent > best
    assert check.best_factor(Agreement((1.0, 2.0), (1.5, 3.0))) == pytest.approx(1.5)


class Sleepy(nn.Module):
    """A network that notes when it runs."""

    log: list[tuple[int, bool]]

    def __init__(self, number, log, size=1):
        super().__init__()
        self.number, self.log = number, log
        self.weight = nn.Parameter(torch.zeros(size))
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x):
        self.log.append((self.number, self.training))
        return self.norm(x)


def test_networks_take_turns(monkeypatch):
    log = []
    builds = [lambda n=n: Sleepy(n, log) for n in range(4)]
    conditions = here("cpu", 1, 1, "float32", "auto")
    told = []
    found = time_networks(
        builds,
        (1, 4, 4),
        conditions,
        resolve_device("cpu"),
        repeats=5,
        tell=lambda *numbers: told.append(numbers),
    )
    assert len(found) == 4 and all(ms > 0 for ms in found)
    statistics, runs = log[:4], log[4:]
    assert statistics == [(n, True) for n in range(4)]
    # Turns of one pass that is not timed and two that are; the last has one left.
    turns = [runs[start : start + 3] for start in range(0, 24, 3)]
    turns += [runs[start : start + 2] for start in range(24, len(runs), 2)]
    assert all(len(set(turn)) == 1 and not turn[0][1] for turn in turns)
    order = [turn[0][0] for turn in turns]
    assert sorted(order[:4]) == sorted(order[4:8]) == sorted(order[8:]) == [0, 1, 2, 3]
    assert told[-1] == (20, 20)


def test_the_pace_of_the_machine_is_taken_out():
    own = torch.tensor([4.0, 5.0, 6.0, 7.0])
    steady = [own.tolist()] * 5
    assert without_pace(steady) == pytest.approx(own.tolist())
    # Half of the turns a third slower, where medians may fall on either side.
    pace = (1.0, 1.33, 1.0, 1.33, 1.33, 1.0)
    torch.manual_seed(0)
    turns = [(own * factor * (1 + 0.01 * torch.randn(4))).tolist() for factor in pace]
    found = torch.tensor(without_pace(turns))
    torch.testing.assert_close(found / found[0], own / own[0], rtol=0.02, atol=0)
    assert 1 < found[0] / own[0] < 1.35
    assert without_pace([[3.0], [1.0], [2.0]]) == pytest.approx([2.0])
    # One network disturbed in one of the fast turns: its median is a slow one, the others' not.
    turns = [(own * factor).tolist() for factor in (1.0, 1.0, 1.33, 1.33)]
    turns[0][0] *= 3
    found = torch.tensor(without_pace(turns))
    torch.testing.assert_close(found / found[1], own / own[1], rtol=1e-3, atol=0)
    # A disturbance of one network in one turn.
    steady = [own.tolist() for _ in range(5)]
    steady[2][1] = 500.0
    assert without_pace(steady) == pytest.approx(own.tolist())


def test_networks_too_large_for_memory_come_in_groups(monkeypatch):
    monkeypatch.setattr(check, "_GROUP_BYTES", 4000)
    log = []
    builds = [lambda n=n: Sleepy(n, log, size=600) for n in range(5)]
    conditions = here("cpu", 1, 1, "float32", "auto")
    told = []
    time_networks(
        builds,
        (1, 4, 4),
        conditions,
        resolve_device("cpu"),
        repeats=1,
        tell=lambda *numbers: told.append(numbers),
    )
    built = [position for position, (_, training) in enumerate(log) if training]
    assert built == [0, 1, 6, 7, 12]
    assert told == [(n, 5) for n in range(1, 6)]


def test_activations_do_not_fade():
    conditions = here("cpu", 1, 1, "float32", "auto")
    convolutions = [nn.Conv2d(4, 4, 1, bias=False) for _ in range(60)]
    layers = [nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU()) for conv in convolutions]
    network, x = nn.Sequential(*layers), torch.randn(4, 4, 8, 8)
    with torch.no_grad():
        assert network.eval()(x).std() < 1e-6
    check._settled(network, (4, 8, 8), conditions, torch.device("cpu"))
    assert network[1][1].momentum == 0.1
    with measuring(conditions, torch.device("cpu")):
        assert 0.1 < network(x).std() < 10


def test_random_numbers_are_left_alone():
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    conditions = here("cpu", 1, 1, "float32", "auto")
    time_networks([lambda: nn.Conv2d(1, 1, 1)], (1, 4, 4), conditions, torch.device("cpu"))
    assert torch.equal(torch.rand(3), wanted)


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table().save("latency.json")
    return tmp_path


@pytest.fixture
def truth(monkeypatch):
    """Networks take 1.25 times what the table says, give or take a percent."""

    def measured(builds, image_shape, conditions, device, *, repeats, seed, between, tell):
        assert image_shape == (1, 8, 8)
        tell(0, repeats * len(builds))
        between()
        found = LatencyTable.load("latency.json")
        plain = dataclasses.replace(found, calibration=None)
        latencies = [plain.latency(RULES.keys(build.args[0], SHAPE)) for build in builds]
        return [
            truth.pace * 1.25 * ms * (1.01 if number % 2 else 0.99)
            for number, ms in enumerate(latencies)
        ]

    monkeypatch.setattr(check, "time_networks", measured)
    truth = SimpleNamespace(pace=1.0)
    monkeypatch.setattr(check.Pace, "now", lambda self: truth.pace)
    return truth


def test_json_is_one_object_and_nothing_else(folder, truth, capsys):
    assert main(["latency", "check", "--nets", "6", "--json"]) == 0
    out = capsys.readouterr().out
    figures = json.loads(out)
    assert set(figures) == {"spearman", "rmse_percent", "bias_percent"}
    assert figures["bias_percent"] == pytest.approx(-20, abs=0.1)
    assert figures["rmse_percent"] == pytest.approx(20, abs=0.1)
    assert figures["spearman"] > 0.7
    assert out.count("\n") == 1


def test_calibration_is_written_and_used(folder, truth, capsys):
    assert main(["latency", "check", "--nets", "6", "--calibrate", "--seed", "7"]) == 0
    found = LatencyTable.load("latency.json")
    assert found.calibration.factor == pytest.approx(1.25, rel=1e-3)
    assert (found.calibration.nets, found.calibration.seed) == (6, 7)
    assert found.blocks == table().blocks
    out = capsys.readouterr().out
    assert "calibrated by 1.25" in out and "bias" in out
    for _ in range(2):  # a second calibration starts from the plain sums
        assert main(["latency", "check", "--nets", "8", "--json", "--calibrate"]) == 0
        figures = json.loads(capsys.readouterr().out)
        assert figures["rmse_percent"] == pytest.approx(1, abs=0.1)
        factor = LatencyTable.load("latency.json").calibration.factor
        assert factor == pytest.approx(1.25, rel=1e-3)
    before = (folder / "latency.json").read_bytes()
    assert main(["latency", "check", "--nets", "6", "--seed", "9", "--json"]) == 0
    assert abs(json.loads(capsys.readouterr().out)["bias_percent"]) < 0.5
    assert (folder / "latency.json").read_bytes() == before


def test_a_machine_that_changed_its_pace_is_told_and_allowed_for(folder, truth, capsys):
    words = ["latency", "check", "--nets", "6", "--json", "--calibrate"]
    for pace in (1.0, 1.3, 0.7):
        truth.pace = pace
        assert main(words) == 0
        out, err = capsys.readouterr()
        told = f"Single blocks take {pace:.2f} times as long now as when the table was measured"
        assert (told in err) == (pace != 1)
        assert json.loads(out)["rmse_percent"] == pytest.approx(1, abs=0.1)
        factor = LatencyTable.load("latency.json").calibration.factor
        assert factor == pytest.approx(1.25, rel=1e-3)
    assert main(["latency", "check", "--nets", "4"]) == 0
    assert "0.700 of the table's times" in capsys.readouterr().out


def test_pace_is_the_median_factor_of_the_blocks(monkeypatch):
    class Watch:
        """Calls take 90 ms in the first round, which does not count, and 3 ms in the next."""

        def __init__(self, device):
            self.calls, self.ms = 0, 90.0

        def time(self, call):
            call()
            self.calls += 1

        def read(self):
            calls, ms, self.calls, self.ms = self.calls, self.ms, 0, 3.0
            return [ms] * calls

    monkeypatch.setattr("fastnas.latency.pace.stopwatch", Watch)
    ratios = [3.0 / time.ms for time in table().blocks.values()]
    found = Pace(table(), torch.device("cpu")).now()
    assert found == pytest.approx(statistics.median(ratios))
    assert found < 0.5 * statistics.mean(ratios)


def test_pace_of_this_machine_but_not_of_another(folder):
    run = Check(CheckConfig(nets=2, repeats=1))
    run.run()
    assert run.pace > 0 and run.pace != 1
    foreign = dataclasses.replace(here("cpu", 1, 1, "float32", "auto"), machine="a phone")
    table(foreign).save("latency.json")
    run = Check(CheckConfig(nets=2, repeats=1, allow_foreign=True))
    run.run()
    assert run.pace == 1


def test_real_networks(folder, capsys):
    assert main(["latency", "check", "--nets", "3", "--repeats", "2"]) == 0
    out, err = capsys.readouterr()
    for word in ("networks", "3, ", "not calibrated", "Spearman", "RMSE", "bias"):
        assert word in out
    assert "timing: 6 of 6 passes" in err


def test_a_foreign_table_is_refused_unless_asked_for(folder, truth, capsys):
    foreign = dataclasses.replace(here("cpu", 1, 1, "float32", "auto"), torch="1.0.0")
    table(foreign).save("latency.json")
    assert main(["latency", "check", "--nets", "4"]) == 2
    err = capsys.readouterr().err
    assert "latency.json: the table is for something else (torch 1.0.0, not" in err
    assert main(["latency", "check", "--nets", "4", "--allow-foreign", "--json"]) == 0


def test_an_unfinished_table_is_refused(folder, truth, capsys):
    found = table()
    found.blocks.popitem()
    found.save("latency.json")
    assert main(["latency", "check"]) == 2
    assert "continue with: fastnas latency measure --resume" in capsys.readouterr().err
    times = {key: BlockTime(1.0) for key in found.blocks}
    table(blocks=times).save("latency.json")
    assert main(["latency", "check"]) == 2
    assert "is missing" in capsys.readouterr().err


def test_plot(folder, truth, capsys):
    pytest.importorskip("matplotlib")
    table(calibration=Calibration(1.2, 2, 0, "")).save("latency.json")
    assert main(["latency", "check", "--nets", "4", "--plot", "fit.png"]) == 0
    assert (folder / "fit.png").read_bytes().startswith(b"\x89PNG")
    assert "Plot written to fit.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [("fit.xyz", "plot: expected a name that ends in .png"), ("no/fit.png", "there is no folder")],
)
def test_a_plot_that_cannot_be_written_is_refused_before_the_timing(name, message, folder, capsys):
    pytest.importorskip("matplotlib")
    with pytest.raises((ValueError, OSError), match=message):
        Check(CheckConfig(plot=name))


def test_a_plot_without_matplotlib(folder, monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["latency", "check", "--plot", "fit.png"]) == 2
    assert "plot: matplotlib is needed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nets": 1}, "nets: expected at least 2"),
        ({"repeats": 0}, "repeats: expected at least 1"),
        ({"seed": -1}, "seed: expected at least 0"),
    ],
)
def test_wrong_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        CheckConfig(**fields)


def test_a_table_of_a_device_that_is_not_here(folder, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    cuda = dataclasses.replace(here("cpu", 1, 1, "float32", "auto"), device="cuda")
    table(cuda).save("latency.json")
    assert main(["latency", "check"]) == 2
    assert "but got 'cuda'" in capsys.readouterr().err
