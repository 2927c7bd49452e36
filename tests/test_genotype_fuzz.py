# SPDX-License-Identifier: Apache-2.0
"""Genotype files with one wrong value anywhere: refused by name, or read as what they say."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator

import pytest

from fastnas.evaluate import find_genotype
from fastnas.spaces import SPACES, mbconv
from fastnas.spaces.darts.genotype import GENOTYPES
from fastnas.spaces.darts.genotype import Genotype as DartsGenotype

CHAIN = mbconv.Genotype.build(
    mbconv.MBConvOptions(stage_channels=(24,), stage_blocks=(3,), stage_strides=(2,)).layout(3, 10),
    ["3x3_MBConv3", "5x5_MBConv6", "Zero"],
)
UNEVEN = DartsGenotype.from_nodes(
    [[("skip_connect", 1)], [("sep_conv_3x3", 0), ("max_pool_3x3", 2), ("skip_connect", 2)]],
    [2, 3],
    [[("skip_connect", 0)], [("max_pool_3x3", 2)]],
    [3],
)
GOOD = {
    "darts": GENOTYPES["DARTS_V1"],
    "darts, version 2": UNEVEN,
    "nasbench201": SPACES["nasbench201"].genotypes["NASBench201_857"],
    "mbconv": CHAIN,
}


def nested(depth: int) -> object:
    value: object = 0
    for _ in range(depth):
        value = [value]
    return value


MISSING = object()
WRONG = [
    *(MISSING, None, True, False, -1, 0, 1, 2, 3, 10**400, 1.0, 0.5, -0.5, 1e308),
    *(float("nan"), float("inf"), "", "1", "none", "\ud800", [], [[]], {}, {"a": 1}, [0], [1, 2]),
    nested(500),
]


def places(value: object, way: tuple = ()) -> Iterator[tuple]:
    """The ways to everything in a file."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*way, key)
        if isinstance(inner, (dict, list)):
            yield from places(inner, (*way, key))


def changed(data: dict, way: tuple, value: object) -> dict:
    data = copy.deepcopy(data)
    at = data
    for key in way[:-1]:
        at = at[key]
    if value is MISSING:
        del at[way[-1]]
    else:
        at[way[-1]] = value
    return data


def check(genotype: type, data: object) -> None:
    try:
        found = genotype.from_dict(data)
    except ValueError as error:
        assert str(error).startswith("genotype: ") and "\n" not in str(error)
        assert len(str(error)) < 500
        return
    assert genotype.from_json(found.to_json()) == found
    SPACES[next(name for name, s in SPACES.items() if s.genotype is genotype)].network(
        found, **({} if genotype is mbconv.Genotype else {"C": 4, "layers": 3, "num_classes": 10})
    )


@pytest.mark.parametrize("name", GOOD)
def test_one_wrong_value(name):
    good = GOOD[name]
    data = json.loads(good.to_json())
    assert type(good).from_dict(data) == good
    for way in places(data):
        for value in WRONG:
            check(type(good), changed(data, way, value))


@pytest.mark.parametrize("name", GOOD)
def test_a_field_that_is_unknown(name):
    data = json.loads(GOOD[name].to_json())
    for way in [(), *places(data)]:
        at = data
        for key in way:
            at = at[key]
        if isinstance(at, dict):
            with pytest.raises(ValueError, match=r"^genotype: unknown field '.*surplus'"):
                type(GOOD[name]).from_dict(changed(data, (*way, "surplus"), 1))


@pytest.mark.parametrize("name", GOOD)
def test_lists_in_lists(tmp_path, name):
    """Reading, or showing what is wrong, comes to the end of the stack somewhere here."""
    data = json.loads(GOOD[name].to_json())
    key = {"nasbench201": "cell", "mbconv": "blocks"}.get(name, "normal")
    path = tmp_path / "genotype.json"
    for depth in range(800, 1000):
        text = json.dumps({**data, key: ["DEPTH"]})
        path.write_text(text.replace('"DEPTH"', "[" * depth + "]" * depth))
        with pytest.raises(ValueError, match=r"genotype\.json: "):
            find_genotype(path)
