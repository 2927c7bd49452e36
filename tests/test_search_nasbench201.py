# SPDX-License-Identifier: Apache-2.0
"""Searches in the space nasbench201: every method, the gap, the commands."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import search_tiny
import torch

from fastnas.cli import main
from fastnas.evaluate import Evaluation, find_genotype, preset_config
from fastnas.evaluate.progress import Progress
from fastnas.methods import METHODS, DA2SOptions, EnTranNASDSTOptions, EnTranNASOptions
from fastnas.search import SearchConfig
from fastnas.spaces.nasbench201 import GENOTYPES, Genotype, NASBench201Options

CELL = "|nor_conv_3x3~0|+|skip_connect~0|nor_conv_1x1~1|"


def config(method: str, nodes: int = 3, **fields: object) -> SearchConfig:
    return search_tiny.config(
        method, "nasbench201", network=NASBench201Options(nodes=nodes), epochs=1, **fields
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_method_searches_and_prunes(method: str) -> None:
    search = search_tiny.run(config(method))
    genotype = search.genotype()
    assert isinstance(genotype, Genotype) and len(genotype.nodes) == 2
    (record,) = search.history
    assert set(record["gap"]) == {"supernet", "pruned", "pruned_bn"}
    assert sum(record["skip_connects"]["normal"]) > 0
    assert Genotype.from_dict(record["genotype"]) == genotype
    alpha = search.arch.alpha("normal")
    assert alpha.shape == (3, 5 - (method in ("da2s", "entrannas", "entrannas_dst")))


@pytest.mark.parametrize(
    "options", [DA2SOptions(keep="total:4"), EnTranNASOptions(), EnTranNASDSTOptions(share=False)]
)
def test_edges_that_are_left_out_have_none(options: object) -> None:
    method = type(options).__name__.removesuffix("Options")
    name = next(name for name, cls in METHODS.items() if cls.__name__ == method)
    genotype = search_tiny.run(config(name, nodes=4, options=options)).genotype()
    missing = genotype.ops.count("none")
    assert all(set(node) != {"none"} for node in genotype.nodes)
    if name == "da2s":
        assert missing == 2
    if name == "entrannas":  # two of three edges at the last node
        assert missing == 1


def test_memory_low_has_the_same_numbers() -> None:
    records = [search_tiny.run(config("darts", memory=m)).history[0] for m in ("default", "low")]
    assert records[0]["train_loss"] == pytest.approx(records[1]["train_loss"], rel=1e-5)


def test_without_none_in_the_cell() -> None:
    network = NASBench201Options(nodes=3, derive_none=False)
    for method in ("darts", "proxyless"):
        search = search_tiny.Search(
            dataclasses.replace(config(method), network=network),
            data=search_tiny.images(),
            progress=search_tiny.QUIET,
        )
        with torch.no_grad():
            for row in search.arch.parameters():
                row[..., 0] += 9
        assert "none" not in search.genotype().ops
        assert search.method.specs["normal"].primitives[0] == "none"


def test_a_target_of_cost() -> None:
    (record,) = search_tiny.run(config("darts", target="macs=50k")).history
    assert record["macs"]["target"] == 50_000 and record["macs"]["expected"] > 0


def test_refusals() -> None:
    with pytest.raises(ValueError, match="stem: the space 'nasbench201' has no such option"):
        config("darts", stem="imagenet")
    with pytest.raises(ValueError, match="expected at most 1 at node 1"):
        search_tiny.run(config("da2s", options=DA2SOptions(keep="2,2")))
    with pytest.raises(ValueError, match="nodes must be from 2"):
        NASBench201Options(nodes=1)


def test_sources_of_a_cell(tmp_path: Path) -> None:
    genotype = Genotype.parse(CELL)
    (tmp_path / "cell.txt").write_text(CELL + "\n")
    (tmp_path / "cell.json").write_text(genotype.to_json())
    for source in (CELL, tmp_path / "cell.txt", tmp_path / "cell.json"):
        found = find_genotype(source)
        assert (found.genotype, found.space) == (genotype, "nasbench201")
    assert find_genotype("NASBench201_9930").genotype == GENOTYPES["NASBench201_9930"]
    with pytest.raises(ValueError, match="node 1 is"):
        find_genotype("|skip~0")


def test_a_cell_is_trained() -> None:
    settings = preset_config(
        "demo", source=CELL, C=4, layers=3, epochs=1, batch_size=32, out=None, device="cpu"
    )
    data = search_tiny.images()
    result = Evaluation(settings, data=data, progress=Progress()).run()
    assert (result.space, str(result.genotype)) == ("nasbench201", CELL)
    with pytest.raises(ValueError, match="drop_path: networks of the space 'nasbench201'"):
        Evaluation(dataclasses.replace(settings, drop_path=0.3), data=data)


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["genotypes", CELL, "--format", "text"]) == 0
    assert capsys.readouterr().out == CELL + "\n"
    assert main(["genotypes", CELL]) == 0
    assert Genotype.from_dict(json.loads(capsys.readouterr().out)) == Genotype.parse(CELL)
    assert main(["genotypes", CELL, "--format", "table"]) == 0
    assert "skip_connect(0) + nor_conv_1x1(1)" in capsys.readouterr().out
