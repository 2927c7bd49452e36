# SPDX-License-Identifier: Apache-2.0
"""Files of a run: whole or not at all, never another run's, and read with suspicion."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from fastnas.search import (
    CheckpointError,
    RandomState,
    RunDirectory,
    load_checkpoint,
    save_checkpoint,
)
from fastnas.search.files import append_jsonl, read_json, read_jsonl, write_atomic, write_json


def test_json_round_trip(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": [1, None, "é"]})
    assert read_json(tmp_path / "a.json") == {"x": [1, None, "é"]}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def write(file: object) -> None:
        file.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, write)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_numbers_json_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_jsonl(tmp_path / "a.jsonl", {"loss": float("nan")})
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"9" * 5000])
def test_broken_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json: not a JSON file"):
        read_json(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_json(tmp_path / "b.json")


def test_jsonl_with_a_half_written_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    for epoch in (1, 2):
        append_jsonl(path, {"epoch": epoch})
    with open(path, "ab") as file:
        file.write(b'{"epoch": 3, "lo')
    assert read_jsonl(path) == [{"epoch": 1}, {"epoch": 2}]
    with open(path, "ab") as file:
        file.write(b'\n{"epoch": 4}\n')
    with pytest.raises(ValueError, match="line 3 is not a JSON object"):
        read_jsonl(path)


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "runs" / "a", {"seed": 1})
    assert read_json(run.config) == {"seed": 1}
    with pytest.raises(FileExistsError, match=r"already holds a run.*--resume.*--out"):
        RunDirectory.create(tmp_path / "runs" / "a", {"seed": 2})
    assert read_json(run.config) == {"seed": 1}
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file"):
        RunDirectory.create(tmp_path / "file", {})


@pytest.mark.parametrize("name", ["checkpoint.pt", "metrics.jsonl", "genotype.json"])
def test_any_file_of_a_run_protects_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    # Not "continue it", which cannot be done without its config.json.
    with pytest.raises(FileExistsError, match="already holds a run: choose another folder"):
        RunDirectory.create(tmp_path, {})


def test_a_folder_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="out: expected a folder, but got an empty name"):
        RunDirectory("")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunDirectory("~/runs").path == tmp_path / "runs"


def test_a_full_disk_is_told_with_the_file(tmp_path: Path) -> None:
    def write(file: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left") as info:
        write_atomic(tmp_path / "a.json", write)
    assert info.value.filename == str(tmp_path / "a.json")
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="No space left") as info:
        append_jsonl("/dev/full", {"epoch": 1})
    assert info.value.filename == "/dev/full"


def test_a_file_that_cannot_be_is_told_by_its_name(tmp_path: Path) -> None:
    """And not by that of the temporary one, which nobody has heard of."""
    for path in (tmp_path, tmp_path / "nowhere" / "a.json"):
        with pytest.raises(OSError, match="directory") as info:
            write_atomic(path, lambda file: None)
        assert str(info.value).count(str(path)) == 1
        assert ".tmp" not in str(info.value)


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no run to continue.*without --resume"):
        RunDirectory.resume(tmp_path)


def test_metrics_are_put_right(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, {})
    run.append_metrics({"epoch": 1})
    with open(run.metrics, "ab") as file:
        file.write(b'{"epo')
    run.rewrite_metrics([{"epoch": 1}, {"epoch": 2}])
    run.append_metrics({"epoch": 3})
    assert [r["epoch"] for r in read_jsonl(run.metrics)] == [1, 2, 3]


# --- checkpoints -----------------------------------------------------------------------------


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    state = {"w": torch.arange(3.0), "n": 2, "l": [{"a": None}, (1, "x")]}
    save_checkpoint(tmp_path / "c.pt", state, kind="search")
    loaded = load_checkpoint(tmp_path / "c.pt", kind="search")
    assert torch.equal(loaded.pop("w"), state.pop("w"))
    assert loaded == state


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("exploded"),))


def test_checkpoint_from_elsewhere_is_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"fastnas": 1, "kind": "search", "state": {"x": Bomb()}}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="expected a checkpoint of fastnas"):
        load_checkpoint(tmp_path / "c.pt", kind="search")
    assert not Path("exploded").exists()


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, -1])
def test_truncated_checkpoint(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"w": torch.zeros(1000)}, kind="search")
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep == 0.5 else int(keep)])
    with pytest.raises(CheckpointError, match=r"c\.pt: expected a checkpoint of fastnas") as info:
        load_checkpoint(path, kind="search")
    assert "\n" not in str(info.value)


def test_spoilt_checkpoint(tmp_path: Path) -> None:
    """A byte that a disk has changed among the weights, which nothing else would notice."""
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"w": torch.full((1000,), 7.0)}, kind="search")
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((9,), 7.0).numpy().tobytes()) + 4] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged or something else \(BadZipFile\)"):
        load_checkpoint(path, kind="search")


def test_whatever_torch_raises_for_a_file_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: object, **kwargs: object) -> object:
        raise AttributeError("'collections.OrderedDict' object has no attribute 'dtype'")

    save_checkpoint(tmp_path / "c.pt", {}, kind="search")
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(CheckpointError, match=r"something else \(AttributeError\)"):
        load_checkpoint(tmp_path / "c.pt", kind="search")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "it is something else"),
        ({"state_dict": {}}, "it is something else"),
        (
            {"fastnas": 99, "kind": "search", "state": {}},
            "checkpoint format 1, but got 99",
        ),
        ({"fastnas": 1, "kind": "evaluation", "state": {}}, "kind 'search', but got 'evaluation'"),
    ],
)
def test_foreign_checkpoint(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "c.pt", kind="search")


def test_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "c.pt", kind="search")


# --- random generators -----------------------------------------------------------------------


def draw() -> list[float]:
    return [random.random(), float(np.random.rand()), torch.rand(()).item()]


def test_generators_are_the_runs_own() -> None:
    state = RandomState(5)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    with state.use():
        first = draw()
    outside = draw()
    with state.use():
        second = draw()
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    assert draw() == outside
    again = RandomState(5)
    with again.use():
        assert draw() == first
        assert draw() == second
    assert first != second


def test_generators_survive_a_checkpoint(tmp_path: Path) -> None:
    state = RandomState(5)
    with state.use():
        draw()
        np.random.randn()  # leaves a second normal deviate in numpy's cache
        random.gauss(0, 1)
        torch.randn(3)
        save_checkpoint(tmp_path / "c.pt", {"random": state.state_dict()}, kind="search")
        wanted = [*draw(), np.random.randn(), random.gauss(0, 1)]
    other = RandomState(9)
    other.load_state_dict(load_checkpoint(tmp_path / "c.pt", kind="search")["random"])
    with other.use():
        assert [*draw(), np.random.randn(), random.gauss(0, 1)] == wanted


def test_generators_are_given_back_after_an_error() -> None:
    torch.manual_seed(0)
    wanted = torch.rand(())
    torch.manual_seed(0)
    with pytest.raises(KeyError), RandomState(5).use():
        torch.rand(7)
        raise KeyError
    assert torch.equal(torch.rand(()), wanted)
