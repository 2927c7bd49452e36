# SPDX-License-Identifier: Apache-2.0
"""Searches of the MBConv space: resume bit for bit, targets, and what comes after them."""

from __future__ import annotations

import json

import pytest
import search_tiny
import torch

from fastnas.cli import main
from fastnas.costs import Cost
from fastnas.evaluate import Evaluation, find_genotype, load_network
from fastnas.evaluate import preset_config as evaluate_config
from fastnas.methods import ProxylessOptions
from fastnas.search import Progress, RunInterrupted, Search, preset_config
from fastnas.search.progress import against_target
from fastnas.spaces import SPACES, count_macs, count_parameters, mbconv

NETWORK = mbconv.MBConvOptions(
    stem_channels=8,
    stem_stride=1,
    first_channels=8,
    stage_channels=(8, 16),
    stage_blocks=(2, 2),
    stage_strides=(2, 2),
    head_channels=32,
)
SHAPE = mbconv.MBConvShape(image_size=8, in_channels=1, num_classes=4, **vars(NETWORK))


def config(estimator="full", **fields):
    of_reinforce = {"rl_samples": 2, "rl_updates": 2}
    own = of_reinforce if estimator == "reinforce" else {"arch_every": 2}
    options = ProxylessOptions(estimator=estimator, **own)
    values = {
        "network": NETWORK,
        "options": options,
        "epochs": 2,
        "batch_size": 16,
        "weight_share": 0.5,
        "arch_share": 0.5,
        "arch_warmup_epochs": 0,
        "validate": "every",
        "device": "cpu",
        "log_every": 1,
        "out": None,
    }
    return preset_config("demo", method="proxyless", space="mbconv", **{**values, **fields})


class StopAfter(Progress):
    """Sends the signal of a Ctrl-C after so many steps."""

    def __init__(self, steps):
        self.left = steps

    def step(self, report):
        self.left -= 1
        if self.left == 0:
            import signal

            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("estimator", ["full", "two", "reinforce"])
@pytest.mark.parametrize("steps", [2, 5])
def test_a_resumed_search_is_the_uninterrupted_one(tmp_path, estimator, steps):
    images = search_tiny.images()
    fields = {"target": "macs=60k"}
    whole = Search(config(estimator, **fields), data=images, progress=Progress())
    whole.run()
    out = str(tmp_path / "run")
    part = Search(config(estimator, out=out, **fields), data=images, progress=StopAfter(steps))
    with pytest.raises(RunInterrupted):
        part.run()
    rest = Search(
        config(estimator, out=out, resume=True, **fields), data=images, progress=Progress()
    )
    result = rest.run()
    assert rest.resumed
    search_tiny.assert_equal(rest.state_dict(), whole.state_dict())
    assert result.genotype == whole.genotype()


def test_a_target_is_met_and_recorded():
    plan = mbconv.SPACE.blocks.plan(SHAPE)
    cost = Cost.counted("macs", plan)
    most = cost.fixed + cost.values["block"].amax(1).sum().item()
    found = []
    for share in (0.4, 0.6, 0.9):
        limit = cost.fixed + share * (most - cost.fixed)
        search = Search(config(target=f"macs={limit:.0f}"), data=search_tiny.images())
        result = search.run()
        net = mbconv.Network(result.genotype)
        macs = count_macs(net, (1, 1, 8, 8))
        record = result.history[-1]["macs"]
        assert macs == record["derived"] <= limit
        assert record["target"] == pytest.approx(limit, rel=1e-4)
        assert record["expected"] > 0 and record["multiplier"] >= 0
        found.append(macs)
    assert found == sorted(found)


def test_the_target_in_words():
    record = {"macs": {"expected": 3e6, "derived": 2.5e6, "target": 3.2e6}}
    assert against_target(record) == ["macs 2.5M of 3.2M"]
    record = {"params": {"expected": 90_000.0, "target": 2e9}, "latency": {"expected": 0.5}}
    record["latency"] |= {"derived": 1.2345678, "target": 12}
    words = ["expected params 90k of 2G", "latency 1.235 ms of 12 ms"]
    assert against_target(record) == words and against_target({}) == []


def test_a_target_that_no_network_meets():
    with pytest.raises(ValueError, match="target: no network of this space is so cheap"):
        Search(config(target="macs=1k"), data=search_tiny.images())


def test_without_a_target_records_say_nothing_of_one():
    result = Search(config(epochs=1), data=search_tiny.images()).run()
    assert not {"macs", "params", "latency"} & set(result.history[0])


@pytest.mark.parametrize("method", ["darts", "pc_darts"])
def test_methods_of_cells_take_targets_too(method):
    fields = {"space": "darts", "target": "params=20k", "epochs": 1, "batch_size": 48}
    fields["validate"] = "never"
    search = Search(search_tiny.config(method, **fields), data=search_tiny.images())
    record = search.run().history[0]["params"]
    assert set(record) == {"expected", "target", "unit", "multiplier"}
    assert 0 < record["expected"] < 1e6


def test_darts_searches_the_chain_as_well():
    fields = {"space": "mbconv", "network": NETWORK, "epochs": 1, "target": "macs=60k"}
    values = {"method": "darts", "batch_size": 16, "weight_share": 0.5, "arch_share": 0.5}
    c = preset_config("demo", out=None, device="cpu", arch_warmup_epochs=0, **values, **fields)
    result = Search(c, data=search_tiny.images()).run()
    assert isinstance(result.genotype, mbconv.Genotype)
    assert result.history[0]["macs"]["derived"] <= 60_000


def test_evaluation_of_what_was_found(tmp_path):
    out = str(tmp_path / "run")
    images = search_tiny.images()
    genotype = Search(config(out=out, epochs=1), data=images).run().genotype
    source = find_genotype(out)
    assert (source.space, source.genotype) == ("mbconv", genotype)
    c = evaluate_config("demo", source=out, epochs=1, device="cpu", batch_size=16)
    evaluation = Evaluation(c, data=images)
    result = evaluation.run()
    assert result.parameters == count_parameters(mbconv.Network(genotype))
    net = load_network(result.path)
    assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 4)
    assert isinstance(net, mbconv.Network)
    with pytest.raises(ValueError, match="layers: networks of the space 'mbconv' have no such"):
        Evaluation(evaluate_config("demo", source=out, layers=6, out=None), data=images)


def test_presets_for_cells_do_not_reach_a_chain():
    c = evaluate_config("cifar10", source="proxyless_gpu", data="fashion-mnist-mini", out=None)
    kept = c.resolve(find_genotype("proxyless_gpu"))
    assert (kept.C, kept.layers, kept.auxiliary, kept.drop_path) == (8, 5, False, 0.0)
    assert c.resolve(find_genotype("DARTS_V2")).layers == 20


def test_published_networks_are_found_by_name_and_by_file(tmp_path):
    for name, genotype in SPACES["mbconv"].genotypes.items():
        assert find_genotype(name).genotype == genotype
        path = tmp_path / "net.config"
        path.write_text(json.dumps(genotype.to_dict(mid_channels=True)))
        assert find_genotype(path).genotype == genotype
        assert find_genotype(path).space == "mbconv"
    path.write_text(json.dumps({"name": "ProxylessNASNets"}))
    with pytest.raises(ValueError, match=r"net\.config: genotype: bn is missing"):
        find_genotype(path)
    evaluation = Evaluation(
        evaluate_config("demo", source="proxyless_mobile", out=None, device="cpu"),
        data=search_tiny.images(),
    )
    assert evaluation.network.classifier.linear.out_features == 4
    assert evaluation.network.first_conv.conv.in_channels == 1


def test_commands_show_them(capsys):
    assert main(["genotypes"]) == 0
    assert "proxyless_mobile_14" in capsys.readouterr().out.split()
    assert main(["genotypes", "proxyless_cpu"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert mbconv.Genotype.from_dict(data) == mbconv.GENOTYPES["proxyless_cpu"]
    assert main(["genotypes", "proxyless_cpu", "--format", "text"]) == 0
    assert capsys.readouterr().out.startswith("stem 40/2, 3x3_MBConv1 24, 3x3_MBConv6 32/2")
    assert main(["genotypes", "proxyless_cpu", "--format", "table"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split() == ["channels", "stride", "blocks"]
    assert rows[4].split()[:3] == ["88", "2", "3x3_MBConv6"] and "Zero" in rows[4]


def test_a_table_for_the_networks_of_a_preset(capsys, tmp_path):
    """Its sizes are those of the search: the table is taken, and the target is met."""
    table, run = str(tmp_path / "table.json"), str(tmp_path / "run")
    words = ["latency", "measure", "--space", "mbconv", "--preset", "demo", "--device", "cpu"]
    assert main([*words, "--repeats", "1", "--warmup", "0", "--out", table]) == 0
    words = ["search", "--space", "mbconv", "--method", "proxyless", "--device", "cpu"]
    words += ["--epochs", "1", "--arch-warmup-epochs", "0", "--validate", "never"]
    words += ["--weight-share", "0.02", "--arch-share", "0.02", "--latency-table", table]
    assert main([*words, "--target", "latency=1s", "--out", run]) == 0
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["latency"]
    assert 0 < record["derived"] <= record["target"] == 1000.0
    capsys.readouterr()
    assert main([*words, "--target", "latency=1us", "--out", run + "2"]) == 2
    assert "no network of this space is so cheap" in capsys.readouterr().err
    assert main([*words, "--target", "latency=1s", "--stem-stride", "2", "--out", run + "2"]) == 2
    assert "table.json" in capsys.readouterr().err
    assert main(["latency", "measure", "--preset", "big", "--out", table + "2"]) == 2
    assert "preset: expected one of demo, cifar10, imagenet" in capsys.readouterr().err
    assert main(["latency", "measure", "--preset", "cifar10", "--out", table + "2"]) == 2
    assert "data: expected the images of the preset 'cifar10'" in capsys.readouterr().err
    again = ["latency", "measure", "--resume", "--out", table]
    for more in (["--preset", "demo"], ["--data", "fashion-mnist-mini"], ["--space", "darts"]):
        assert main([*again, *more]) == 2
        assert f"{more[0][2:]}: expected" in capsys.readouterr().err


def test_the_command_searches(capsys, tmp_path):
    words = ["search", "--space", "mbconv", "--method", "proxyless", "--preset", "demo"]
    words += ["--out", str(tmp_path / "run"), "--epochs", "1", "--weight-share", "0.02"]
    words += ["--arch-share", "0.02", "--arch-warmup-epochs", "0", "--target", "macs=2M"]
    words += ["--stage-blocks", "1", "1", "1", "--estimator", "two", "--device", "cpu"]
    assert main(words) == 0
    assert "macs " in capsys.readouterr().out.splitlines()[-2]
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["network"]["stage_blocks"] == [1, 1, 1]
    assert saved["options"]["estimator"] == "two"
    genotype = mbconv.Genotype.load(tmp_path / "run" / "genotype.json")
    assert len(genotype.blocks) == 4
    assert main([*words[:-2], "--C", "12"]) == 2
    assert "C: the space 'mbconv' has no such option" in capsys.readouterr().err
