# SPDX-License-Identifier: Apache-2.0
"""Genotypes: published ones, text and JSON both ways, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fastnas.spaces.darts.genotype import GENOTYPES, Genotype

# As the papers' code prints it.
DARTS_V2_TEXT = (
    "Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), "
    "('sep_conv_3x3', 1), ('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), "
    "('dil_conv_3x3', 2)], normal_concat=range(2, 6), reduce=[('max_pool_3x3', 0), "
    "('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1), ('max_pool_3x3', 0), "
    "('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)], reduce_concat=range(2, 6))"
)

# "op(source)" for nodes 2 to 5 of the normal, then of the reduction cell.
PUBLISHED = {
    "DARTS_V1": (
        "sep3(1), sep3(0), skip(0), sep3(1), skip(0), sep3(1), sep3(0), skip(2)",
        "max(0), max(1), skip(2), max(0), max(0), skip(2), skip(2), avg(0)",
    ),
    "DARTS_V2": (
        "sep3(0), sep3(1), sep3(0), sep3(1), sep3(1), skip(0), skip(0), dil3(2)",
        "max(0), max(1), skip(2), max(1), max(0), skip(2), skip(2), max(1)",
    ),
    "PC_DARTS_cifar": (
        "sep3(1), skip(0), sep3(0), dil3(1), sep5(0), sep3(1), avg(0), dil3(1)",
        "sep5(1), max(0), sep5(1), sep5(2), sep3(0), sep3(3), sep3(1), sep3(2)",
    ),
    "PC_DARTS_image": (
        "skip(1), sep3(0), sep3(0), skip(1), sep3(1), sep3(3), sep3(1), dil5(4)",
        "sep3(0), skip(1), dil5(2), max(1), sep3(2), sep3(1), sep5(0), sep3(3)",
    ),
}
SHORT = {
    "sep_conv_3x3": "sep3",
    "sep_conv_5x5": "sep5",
    "dil_conv_3x3": "dil3",
    "dil_conv_5x5": "dil5",
    "max_pool_3x3": "max",
    "avg_pool_3x3": "avg",
    "skip_connect": "skip",
}

CELLS = ("normal", "reduce")

# A cell of five nodes, other operations and other outputs, as AmoebaNet's and NASNet's are.
FIVE_NODES = Genotype(
    normal=[("sep_conv_7x7", 0), ("conv_7x1_1x7", 1)] + [("avg_pool_3x3", 0)] * 8,
    normal_concat=[4, 6, 5],
    reduce=[("max_pool_3x3", 1)] * 10,
    reduce_concat=[3],
)

# One to four inputs a node; twice the same source.
UNEVEN = Genotype.from_nodes(
    [
        [("skip_connect", 1)],
        [("sep_conv_3x3", 0), ("max_pool_3x3", 0)],
        [("dil_conv_3x3", 3), ("dil_conv_5x5", 3)],
        [("sep_conv_5x5", 4), ("skip_connect", 0), ("avg_pool_3x3", 2), ("skip_connect", 1)],
    ],
    range(2, 6),
    [[("skip_connect", 0)], [("max_pool_3x3", 2)]],
    [3],
)

GOOD = GENOTYPES["DARTS_V1"]


def good_dict(**changes: object) -> dict[str, object]:
    return {**GOOD.to_dict(), **changes}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name: str) -> None:
    genotype = GENOTYPES[name]
    for pairs, expected in zip((genotype.normal, genotype.reduce), PUBLISHED[name], strict=True):
        assert ", ".join(f"{SHORT[op]}({source})" for op, source in pairs) == expected
    assert genotype.normal_concat == genotype.reduce_concat == (2, 3, 4, 5)
    assert set(GENOTYPES) == set(PUBLISHED)


@pytest.mark.parametrize("genotype", [*GENOTYPES.values(), FIVE_NODES, UNEVEN])
def test_round_trips(genotype: Genotype, tmp_path: Path) -> None:
    assert Genotype.parse(str(genotype)) == genotype
    assert Genotype.from_dict(genotype.to_dict()) == genotype
    assert Genotype.from_json(genotype.to_json()) == genotype
    genotype.save(tmp_path / "genotype.json")
    assert Genotype.load(tmp_path / "genotype.json") == genotype
    assert os.listdir(tmp_path) == ["genotype.json"]
    assert hash(Genotype.parse(str(genotype))) == hash(genotype)


def test_text_of_the_published_code() -> None:
    assert str(GENOTYPES["DARTS_V2"]) == DARTS_V2_TEXT
    assert Genotype.parse(DARTS_V2_TEXT) == GENOTYPES["DARTS_V2"]
    as_lists = DARTS_V2_TEXT.replace("range(2, 6)", "[2, 3, 4, 5]").replace("), (", "),\n  (")
    assert Genotype.parse(f"  {as_lists}\n") == GENOTYPES["DARTS_V2"]


def test_text_of_an_unordered_concat() -> None:
    assert "normal_concat=[4, 6, 5]" in str(FIVE_NODES)
    assert "reduce_concat=range(3, 4)" in str(FIVE_NODES)


def test_json_layout() -> None:
    data = json.loads(GOOD.to_json())
    assert (data["format"], data["version"], data["space"]) == ("fastnas.genotype", 1, "darts")
    assert data["normal"][0] == ["sep_conv_3x3", 1]
    assert data["reduce_concat"] == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Genotype(", "print(", "not of the form"),
        ("Genotype(", "os.Genotype(", "not of the form"),
        ("Genotype(", "x = Genotype(", "not of the form"),
        ("Genotype(", "__import__('os').system('true') or Genotype(", "not of the form"),
        ("Genotype(", "(lambda: Genotype)()(", "not of the form"),
        ("))", ")", "not of the form"),
        ("))", ")).normal", "not of the form"),
        ("))", "), *[])", "not of the form"),
        ("))", "), **{})", "by name"),
        ("))", "), extra=1)", "unknown field 'extra'"),
        ("))", "), normal=[])", "not of the form|by name"),
        ("range(2, 6), ", "__import__('os').listdir(), ", "found Call"),
        ("range(2, 6), ", "range(2, 10**9), ", "found BinOp"),
        ("range(2, 6), ", "range(2, 1000000000), ", "too large"),
        ("range(2, 6), ", "range(2, 90000), ", "up to 66"),
        ("range(2, 6), ", "range(0, 66), ", "normal_concat has 0"),
        ("range(2, 6), ", "range(6), ", "found Call"),
        ("range(2, 6), ", "[i for i in (2, 3)], ", "found ListComp"),
        ("range(2, 6), ", "[2, 3, x], ", "found Name"),
        ("range(2, 6), ", "[True], ", "found Constant"),
        ("range(2, 6), ", "f'2', ", "found JoinedStr"),
        ("('dil_conv_3x3', 2)", "('dil_conv_3x3', 2.0)", "found Constant"),
        ("('dil_conv_3x3', 2)", "('dil_conv_3x3', -1)", "found UnaryOp"),
        ("('dil_conv_3x3', 2)", f"('dil_conv_3x3', 0x{'f' * 9000})", "too large"),
        ("('dil_conv_3x3', 2)", f"{'[' * 5000}", "not of the form"),
        ("normal_concat=range(2, 6), ", "", "normal_concat is missing"),
    ],
)
def test_text_that_is_refused(old: str, new: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"genotype: .*({message})"):
        Genotype.parse(DARTS_V2_TEXT.replace(old, new, 1))


def test_refused_text_is_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    for text in (f"open({str(trap)!r}, 'w')", f"Genotype(normal=open({str(trap)!r}, 'w'))"):
        with pytest.raises(ValueError, match="genotype: "):
            Genotype.parse(text)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "format is 'other', wanted 'fastnas.genotype'"),
        ({"version": 3}, "version is 3, wanted 1 or 2"),
        ({"version": 2}, r"normal\[0\] is 'sep_conv_3x3', wanted \(op, source\)"),
        ({"version": True}, "version is True"),
        ({"version": 1.0}, "version is 1.0, wanted 1 or 2"),
        ({"version": [1]}, r"version is \[1\], wanted 1 or 2"),
        ({"space": "mbconv"}, "space is 'mbconv', wanted 'darts'"),
        ({"surplus": 1}, "unknown field 'surplus'"),
        ({"normal": "sep_conv_3x3"}, "normal must be a list"),
        ({"normal": []}, "normal has 0 pairs, wanted two per node"),
        ({"normal": [["skip_connect", 0]] * 7}, "normal has 7 pairs, wanted two per node"),
        ({"reduce": [["skip_connect", 0]] * 130}, "reduce has 130 pairs"),
        ({"reduce": [["skip_connect", 0], "max_pool_3x3"]}, r"reduce\[1\] is 'max_pool_3x3'"),
        ({"reduce": [["skip_connect", 0], ["skip_connect"]]}, r"reduce\[1\] is \['skip_connect'\]"),
        (
            {"normal": [["sep_conv_9x9", 0], ["skip_connect", 0]]},
            r"normal\[0\] has the unknown operation 'sep_conv_9x9', known are max_pool_3x3",
        ),
        ({"normal": [["none", 0], ["skip_connect", 0]]}, "unknown operation 'none'"),
        ({"normal": [[["a"], 0], ["skip_connect", 0]]}, r"unknown operation \['a'\]"),
        (
            {"normal": [["skip_connect", 0], ["skip_connect", 2]]},
            r"normal\[1\] has source 2, wanted an integer from 0 to 1",
        ),
        ({"normal": [["skip_connect", -1], ["skip_connect", 0]]}, "has source -1"),
        ({"normal": [["skip_connect", True], ["skip_connect", 0]]}, "has source True"),
        ({"normal": [["skip_connect", "0"], ["skip_connect", 0]]}, "has source '0'"),
        ({"normal_concat": []}, "normal_concat must be a non-empty list"),
        ({"normal_concat": 2}, "normal_concat must be a non-empty list"),
        ({"normal_concat": [2, 2]}, "at most once"),
        ({"normal_concat": [2, 6]}, "normal_concat has 6, wanted states from 2 to 5"),
        ({"reduce_concat": [1]}, "reduce_concat has 1"),
        ({"reduce_concat": [2.0]}, "reduce_concat has 2.0"),
    ],
)
def test_wrong_genotypes_are_named(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"^genotype: .*{message}"):
        Genotype.from_dict(good_dict(**changes))
    file = tmp_path / "g.json"
    file.write_text(json.dumps(good_dict(**changes)))
    with pytest.raises(ValueError, match=f"^{file}: genotype: .*{message}"):
        Genotype.load(file)


def test_nodes_of_other_than_two_pairs() -> None:
    assert UNEVEN.normal_inputs == (1, 2, 2, 4) and UNEVEN.reduce_inputs == (1, 1)
    assert UNEVEN.normal[1] == ("sep_conv_3x3", 0) and len(UNEVEN.normal) == 9
    assert UNEVEN.nodes("normal")[2] == (("dil_conv_3x3", 3), ("dil_conv_5x5", 3))
    data = json.loads(UNEVEN.to_json())
    assert data["version"] == 2
    assert data["normal"][:2] == [
        [["skip_connect", 1]],
        [["sep_conv_3x3", 0], ["max_pool_3x3", 0]],
    ]
    assert str(UNEVEN).startswith("Genotype(normal=[[('skip_connect', 1)], [('sep_conv_3x3', 0), ")
    assert UNEVEN != GOOD and hash(UNEVEN) != hash(GOOD)
    # The same pairs, otherwise shared among the nodes, are another architecture.
    pairs = [(op, source) for op in ("skip_connect", "max_pool_3x3") for source in (0, 1)]
    one, other = (Genotype(pairs, [2], pairs, [2], n, n) for n in ((2, 2), (1, 3)))
    assert one != other and one == Genotype(pairs, [2], pairs, [2])


def test_two_pairs_a_node_are_version_1_and_read_in_both() -> None:
    again = Genotype.from_nodes(
        GOOD.nodes("normal"), GOOD.normal_concat, GOOD.nodes("reduce"), GOOD.reduce_concat
    )
    assert again == GOOD and again.to_dict()["version"] == 1
    nested = {cell: [[list(p) for p in node] for node in GOOD.nodes(cell)] for cell in CELLS}
    assert Genotype.from_dict(good_dict(version=2, **nested)) == GOOD
    text = str(GOOD)
    for cell in CELLS:
        text = text.replace(f"{cell}={list(getattr(GOOD, cell))}", f"{cell}={nested[cell]}")
    assert text != str(GOOD) and Genotype.parse(text) == GOOD


@pytest.mark.parametrize(
    ("normal", "message"),
    [
        ([], "normal must be a list of nodes"),
        ([[]], "node 2 of normal has 0 pairs, wanted 1 to 64"),
        ([[["skip_connect", 0]], []], "node 3 of normal has 0 pairs"),
        ([[["skip_connect", 0]] * 65], "node 2 of normal has 65 pairs"),
        ([[["skip_connect", 0]]] * 65, "normal has 65 nodes, wanted up to 64"),
        ([[["skip_connect", 0]], 3], r"normal\[1\] is 3, wanted the list of a node's pairs"),
        ([[["skip_connect", 2]]], r"normal\[0\] has source 2, wanted an integer from 0 to 1"),
        ([[["skip_connect", 0]], [["skip_connect", 2], ["x", 0]]], r"normal\[2\] has the unknown"),
        ([[["skip_connect", 0]], [["skip_connect", 3]]], r"normal\[1\] has source 3, .* node 3"),
        ([["skip_connect", 0]], r"normal\[0\] is 'skip_connect', wanted \(op, source\)"),
    ],
)
def test_wrong_nodes_are_named(normal: list[object], message: str) -> None:
    reduce = [[["skip_connect", 0]]]
    data = good_dict(version=2, normal=normal, normal_concat=[2], reduce=reduce, reduce_concat=[2])
    with pytest.raises(ValueError, match=f"^genotype: .*{message}"):
        Genotype.from_dict(data)


def test_a_pair_that_a_node_has_twice() -> None:
    skip, pool = ["skip_connect", 0], ["max_pool_3x3", 0]
    # In version 1 as it was: published cells have it.
    twice = Genotype.from_dict(good_dict(normal=[skip, skip] * 4))
    assert Genotype.parse(str(twice)) == twice and twice.to_dict()["version"] == 1
    for nodes, node in (([[skip], [pool, skip, pool]], 3), ([[skip, skip], [skip, pool]], 2)):
        data = good_dict(version=2, normal=nodes, normal_concat=[2, 3], reduce=[[pool]])
        data["reduce_concat"] = [2]
        message = rf"^genotype: node {node} of normal has \('.*', 0\) twice, wanted each pair once$"
        with pytest.raises(ValueError, match=message):
            Genotype.from_dict(data)
        with pytest.raises(ValueError, match=message):
            Genotype.from_nodes(
                *(data[key] for key in ("normal", "normal_concat", "reduce", "reduce_concat"))
            )
        data["normal"] = [[skip], [skip]]
        assert Genotype.from_dict(data).normal_inputs == (1, 1)
    text = str(GOOD).replace(f"normal={list(GOOD.normal)}", f"normal={[[skip, skip]] * 4}")
    text = text.replace(f"reduce={list(GOOD.reduce)}", f"reduce={[[skip, pool]] * 4}")
    with pytest.raises(ValueError, match=r"node 2 of normal has .* twice"):
        Genotype.parse(text)


def test_numbers_of_pairs_are_checked() -> None:
    pairs = [("skip_connect", 0)] * 4
    for inputs, message in (
        ((1, 2), "normal has 4 pairs, but its nodes have 3"),
        ((4, True), "node 3 of normal has True pairs"),
        (3, "normal_inputs must be a list of integers"),
    ):
        with pytest.raises(ValueError, match=f"^genotype: {message}"):
            Genotype(pairs, [2], pairs, [2], inputs)


def test_missing_keys() -> None:
    for key in GOOD.to_dict():
        data = GOOD.to_dict()
        del data[key]
        with pytest.raises(ValueError, match=key):
            Genotype.from_dict(data)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 50_000, b"9" * 9000, b"null"]
)
def test_broken_files(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "g.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"g\.json: genotype: (not JSON|wanted a JSON object)"):
        Genotype.load(file)


def test_oversized_and_missing_files(tmp_path: Path) -> None:
    file = tmp_path / "g.json"
    file.write_text(GOOD.to_json() + " " * 100_000)
    with pytest.raises(ValueError, match="more than 100000 characters"):
        Genotype.load(file)
    with pytest.raises(ValueError, match="more than 100000 characters"):
        Genotype.parse(" " * 100_001)
    with pytest.raises(ValueError, match="wanted text, got int"):
        Genotype.parse(3)
    with pytest.raises(FileNotFoundError, match=r"nothing\.json' does not exist"):
        Genotype.load(tmp_path / "nothing.json")


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "genotype.json"
    GOOD.save(file)

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        FIVE_NODES.save(file)
    assert Genotype.load(file) == GOOD
    assert os.listdir(tmp_path) == ["genotype.json"]


def test_save_never_writes_into_the_old_file(tmp_path: Path) -> None:
    file, other = tmp_path / "genotype.json", tmp_path / "other.json"
    GOOD.save(file)
    os.link(file, other)
    FIVE_NODES.save(file)
    assert (Genotype.load(file), Genotype.load(other)) == (FIVE_NODES, GOOD)
