# SPDX-License-Identifier: Apache-2.0
"""The file of a latency table: read back, refused with a sentence, believed only where it holds."""

from __future__ import annotations

import copy
import dataclasses
import json
import re

import pytest
import torch
from latency_tiny import KEYS, RULES, SHAPE, table

from fastnas.latency import BlockTime, Calibration, LatencyTable, here
from fastnas.latency.cost import latency_cost, load_latency_cost
from fastnas.latency.table import Procedure, quartiles
from fastnas.nn.candidates import DARTS_PRIMITIVES
from fastnas.spaces import CellWeights
from fastnas.spaces.darts import GENOTYPES, DartsShape


def test_a_table_is_read_back_as_it_was_written(tmp_path):
    written = table(calibration=Calibration(1.07, 50, 1, "2026-01-02"))
    written.save(tmp_path / "t.json")
    assert LatencyTable.load(tmp_path / "t.json") == written
    lines = (tmp_path / "t.json").read_text().splitlines()
    assert sum(line.startswith('  "') and '"ms"' in line for line in lines) == len(KEYS)


def test_an_empty_table_is_read_back(tmp_path):
    written = table(blocks={})
    written.save(tmp_path / "t.json")
    assert LatencyTable.load(tmp_path / "t.json") == written


def test_median_and_quartiles():
    assert quartiles([3.0]) == (3, 3, 3)
    assert quartiles([4.0, 1.0, 3.0, 2.0, 100.0]) == (2, 3, 4)
    time = BlockTime.of([0.4, 0.1, 0.3, 0.2, 100.0])
    assert time == BlockTime(0.3, 0.2, (0.4, 0.1, 0.3, 0.2, 100.0))


def test_a_network_is_the_sum_of_its_blocks_times_the_factor():
    plain = table()
    keys = RULES.keys(GENOTYPES["DARTS_V2"], SHAPE)
    total = sum((KEYS.index(key) + 1) / 100 for key in keys)
    assert plain.latency(keys) == pytest.approx(total, rel=1e-12)
    calibrated = table(calibration=Calibration(1.5, 2, 0, ""))
    assert calibrated.latency(keys) == pytest.approx(1.5 * total, rel=1e-12)
    with pytest.raises(ValueError, match="latency table: it has no block 'nothing'"):
        plain.latency(["nothing"])


def test_the_cost_of_a_table_is_its_latency():
    found = table(calibration=Calibration(1.5, 2, 0, ""))
    cost = latency_cost(found)
    assert (cost.name, cost.unit) == ("latency", "ms")
    generator = torch.Generator().manual_seed(0)
    genotype = RULES.sample(SHAPE, generator)
    weights = {}
    for kind in ("normal", "reduce"):
        ops = torch.zeros(14, 8, dtype=torch.float64)
        edges = torch.zeros(14, dtype=torch.float64)
        for number, (op, source) in enumerate(getattr(genotype, kind)):
            row = (0, 2, 5, 9)[number // 2] + source
            ops[row, DARTS_PRIMITIVES.index(op)] = 1
            edges[row] = 0.5
        weights[kind] = CellWeights(ops, edges)
    expected = cost.expected(weights).item()
    assert expected == pytest.approx(found.latency(RULES.keys(genotype, SHAPE)), rel=1e-12)


def _set(data, path, value):
    *folders, last = path
    for name in folders:
        data = data[name]
    if value is KeyError:
        del data[last]
    else:
        data[last] = value


WRONG = {
    "not a table": ((), [], "t.json: expected an object, but got list"),
    "format": (("format",), "x", "t.json: format: expected 'fastnas.latency', but got 'x'"),
    "version": (("version",), 2, "t.json: version: expected 1, but got 2; it was written by"),
    "version true": (("version",), True, "version: expected 1, but got True"),
    "version float": (("version",), 1.0, "version: expected 1, but got 1.0"),
    "missing": (("conditions",), KeyError, "t.json: conditions is missing"),
    "unknown": (("extra",), 1, "t.json: unknown key 'extra'"),
    "space": (("space",), "nowhere", "t.json: space: unknown name 'nowhere'"),
    "space type": (("space",), 3, "t.json: space: expected str, but got int"),
    "shape": (("shape", "C"), "8", "t.json: shape: C: expected int, but got '8'"),
    "shape value": (("shape", "C"), -8, "t.json: shape: C must be a positive integer, got -8"),
    "shape huge": (("shape", "layers"), 10**400, "shape: layers must be at most 1048576, got 1000"),
    "shape missing": (("shape", "C"), KeyError, "t.json: shape: C is missing"),
    "threads": (("conditions", "threads"), 1.5, "conditions: threads: expected int, but got 1.5"),
    "no threads": (("conditions", "threads"), 0, "conditions: threads: expected at least 1"),
    "dtype": (("conditions", "dtype"), "int8", "dtype: expected one of 'float32', 'bfloat16'"),
    "machine": (("conditions", "machine"), "x" * 201, "machine: expected at most 200 characters"),
    "lacking": (("conditions", "torch"), KeyError, "t.json: conditions: torch is missing"),
    "repeats": (("procedure", "repeats"), -1, "procedure: repeats: expected at least 0"),
    "many": (("procedure", "repeats"), 10**7, "procedure: repeats: expected at least 0 and below"),
    "date": (("date",), 5, "t.json: date: expected a short text"),
    "factor": (("calibration",), {"factor": 0.0, "nets": 1, "seed": 0, "date": ""},
               "calibration: factor: expected a positive number, but got 0.0"),
    "calibration": (("calibration",), 5, "t.json: calibration: expected an object"),
    "blocks": (("blocks",), [1], "t.json: blocks: expected an object, but got list"),
    "block": (("blocks", KEYS[3]), 5, f"t.json: blocks: '{KEYS[3]}': expected an object"),
    "no ms": (("blocks", KEYS[3], "ms"), KeyError, f"blocks: '{KEYS[3]}': ms is missing"),
    "ms": (("blocks", KEYS[3], "ms"), -1.0, f"'{KEYS[3]}': ms: expected at least 0, but got -1.0"),
    "nan": (("blocks", KEYS[3], "ms"), float("nan"), "ms: expected at least 0, but got nan"),
    "infinite": (("blocks", KEYS[3], "ms"), float("inf"), "ms: expected at least 0 and below inf"),
    "text": (("blocks", KEYS[3], "ms"), "fast", "ms: expected float, but got 'fast'"),
    "sample": (("blocks", KEYS[3], "samples"), [1.0, -2.0], r"samples[1]: expected at least 0"),
    "long key": (("blocks", "k" * 501), {"ms": 1.0}, "blocks: expected short keys, but got 'kkk"),
}  # fmt: skip


@pytest.mark.parametrize(("path", "value", "message"), WRONG.values(), ids=WRONG)
def test_a_malformed_file_gets_a_sentence_with_the_key(path, value, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = copy.deepcopy(table().to_dict())
    if path:
        _set(data, path, value)
    else:
        data = value
    (tmp_path / "t.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=re.escape(message)) as found:
        LatencyTable.load("t.json")
    assert str(found.value).startswith("t.json: ")
    assert "\n" not in str(found.value)


def test_what_is_no_json_is_refused(tmp_path):
    (tmp_path / "t.json").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(ValueError, match="not a JSON file"):
        LatencyTable.load(tmp_path / "t.json")
    with pytest.raises(FileNotFoundError, match="no such file"):
        LatencyTable.load(tmp_path / "other.json")


def test_a_table_without_samples_is_complete(tmp_path):
    times = {key: BlockTime(1.0) for key in KEYS}
    table(blocks=times).check_complete("phone.json")
    del times[KEYS[5]]
    with pytest.raises(ValueError, match=f"^phone.json: blocks: '{re.escape(KEYS[5])}' is missing"):
        table(blocks=times).check_complete("phone.json")


def test_an_unfinished_table_is_refused():
    whole = table()
    whole.check_complete("t.json")
    message = "t.json: 3 of 4 rounds are measured; continue with: fastnas latency measure --resume"
    with pytest.raises(ValueError, match=message):
        table(procedure=Procedure(1, 4, 0)).check_complete("t.json")
    with pytest.raises(ValueError, match=r"t\.json: 0 of 3 rounds"):
        table(blocks={}).check_complete("t.json")
    whole.blocks[KEYS[0]] = BlockTime.of([1.0, 2.0])
    with pytest.raises(ValueError, match=r"t\.json: 2 of 3 rounds"):
        whole.check_complete("t.json")


OTHERWISE = {
    "machine": "another one",
    "device": "cuda",
    "instruction_set": "SSE1",
    "threads": 64,
    "batch": 3,
    "dtype": "bfloat16",
    "memory_format": "contiguous",
    "torch": "1.0.0",
}


@pytest.mark.parametrize("field", OTHERWISE)
def test_a_table_of_other_conditions_is_refused(field):
    now = here("cpu", 1, 1, "float32", "auto")
    assert set(OTHERWISE) == {f.name for f in dataclasses.fields(now)}
    foreign = dataclasses.replace(now, **{field: OTHERWISE[field]})
    table(now).check_here("t.json", conditions=now)
    with pytest.raises(
        ValueError, match=rf"\({field} .*, not .*\); measure one.* or allow a foreign one$"
    ):
        table(foreign).check_here("t.json", conditions=now)


def test_a_table_of_another_space_or_shape_is_refused(tmp_path):
    found = table()
    found.check_here("t.json", space="darts", shape=DartsShape(image_size=8, C=2, layers=3))
    with pytest.raises(ValueError, match=r"\(C 2, not 4; layers 3, not 6\)"):
        found.check_here("t.json", space="darts", shape=DartsShape(image_size=8, C=4, layers=6))
    with pytest.raises(ValueError, match=r"\(space darts, not mbconv\); measure .*measure`$"):
        found.check_here("t.json", space="mbconv")


def test_a_foreign_table_is_a_cost_only_where_asked_for(tmp_path):
    path = tmp_path / "t.json"
    foreign = dataclasses.replace(here("cpu", 1, 1, "float32", "auto"), machine="a phone")
    table(foreign).save(path)
    with pytest.raises(ValueError, match="machine a phone, not"):
        load_latency_cost(path, space="darts")
    assert load_latency_cost(path, space="darts", allow_foreign=True).fixed > 0
    with pytest.raises(ValueError, match="space darts, not other"):
        load_latency_cost(path, space="other", allow_foreign=True)
    table(foreign, procedure=Procedure(1, 9, 0)).save(path)
    with pytest.raises(ValueError, match="3 of 9 rounds"):
        load_latency_cost(path, space="darts", allow_foreign=True)


def test_here_names_the_machine():
    found = here("cpu", 0, 4, "bfloat16", "auto")
    assert found.machine and found.threads == torch.get_num_threads()
    assert found.torch == torch.__version__
    assert found.memory_format == "channels_last"
    assert here("cpu", 1, 1, "float32", "contiguous").memory_format == "contiguous"
