# SPDX-License-Identifier: Apache-2.0
"""Several processes that make one run: they hold the same state, and it is that of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import parallel_worker
import pytest
import torch
from parallel_worker import PLAIN, PROCESSES, REAL
from search_tiny import assert_equal, config, images

from fastnas.data import Augment, Batches
from fastnas.data.stream import StreamedData
from fastnas.parallel import ALONE, Group, Share, current_group, joined
from fastnas.search import Progress, Search

pytestmark = pytest.mark.usefixtures("one_thread")

TWO = Group(Share(0, 2))
OTHER = Group(Share(1, 2), local_rank=1)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process brought."""
    path = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(parallel_worker.in_processes, (path, PROCESSES), nprocs=PROCESSES)
    # Of our own making, a minute ago: genotypes and tuples among the tensors.
    return [torch.load(path / f"{r}.pt", weights_only=True) for r in range(PROCESSES)]


def assert_close(a: Any, b: Any, where: str = "") -> None:
    """As ``assert_equal``, but for rounding."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in ("seconds", "random"):
                assert_close(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_close(x, y, f"{where}/{index}")
    elif isinstance(a, (torch.Tensor, float)):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5, msg=lambda m: f"{where}: {m}")
    else:
        assert a == b, where


def test_what_a_group_does(found):
    for rank, process in enumerate(found):
        did = process["together"]
        wanted = [
            torch.full((2, 3), 1.5),
            torch.full((4,), 2.0).double(),
            torch.full((1, 2, 3, 3), 1.5),
        ]
        for tensors in (did["mean"], did["equal"]):
            for tensor, value in zip(tensors, wanted, strict=True):
                assert torch.equal(tensor, value) and tensor.dtype == value.dtype
        assert did["strides"][1] == 1  # channels_last
        assert did["counter"] == rank
        assert did["total"] == (pytest.approx((1 * 4 + 2 * 3) / 7), 6, 7)
        assert did["largest"] == 10
        assert did["told"] == ("of 0", None)
        assert did["differs"] == "process 1 has a word other than process 0"


@pytest.mark.parametrize("name", PLAIN)
def test_two_processes_do_what_one_does(found, name):
    """Where no norm and no dropout looks at a part of the batch."""
    states = [process[f"plain/{name}"] for process in found]
    assert_equal(*states)
    assert_close(parallel_worker.alone(name), states[0])
    assert states[0]["history"][-1]["val_accuracy"] is not None
    if name == "darts":
        assert states[0]["history"][-1]["eigenvalue"] is not None


@pytest.mark.parametrize("name", REAL)
def test_a_search_of_two_processes_is_one_search(found, name):
    """The same bits everywhere, and the same after interruptions that reach one process."""
    (whole, parts, said), (other, other_parts, others_said) = (p[f"real/{name}"] for p in found)
    assert_equal(whole, other)
    assert_equal(whole, parts)
    assert_equal(parts, other_parts)
    assert len(said) == len(others_said) == 2
    assert "stopped by Ctrl-C in epoch 1, step 1; go on with: fastnas search --resume" in said[0]
    assert "nothing is saved" in others_said[0]


def test_an_evaluation_of_two_processes_is_one_evaluation(found):
    (whole, parts, said), (other, other_parts, _) = (p["evaluation"] for p in found)
    assert_equal(whole, parts)
    for state in (whole, other, parts, other_parts):
        del state["random"]  # the first process's
    assert_equal(whole, other)
    assert_equal(parts, other_parts)
    assert "go on with: fastnas eval --resume" in said[1]


def test_processes_drop_other_paths(found):
    first, second = (process["masks"] for process in found)
    states = {bytes(state.tolist()) for state in [*first, *second]}
    assert len(states) == len(first) + len(second) == 12


def test_processes_of_other_weights_do_not_begin(found):
    for process in found:
        assert process["other_seed"] == "process 1 has seed other than process 0"
        assert process["other_weights"] == "process 1 has weights at the start other than process 0"
        assert process["other_images"] == ["process 1 has data other than process 0"] * 3


def test_the_curvature_is_that_of_the_whole_batch(found):
    for process in found:
        together, alone = process["eigenvalues"]
        assert together == pytest.approx(alone, rel=1e-3)
        assert abs(alone) > 1e-6


def test_all_return_when_the_files_are_there(found):
    assert [process["files"] for process in found] == [True] * PROCESSES


def test_processes_of_other_genotypes_end(found):
    for process in found:
        assert process["other_genotype"] == "process 1 has a genotype other than process 0"


def test_one_process_chooses_the_memory_format(found):
    first, second = (process["layout"] for process in found)
    assert first == second != "auto"


def test_new_statistics_are_of_all_shares(found):
    first, second = (process["statistics"] for process in found)
    assert any(tensor.abs().sum() > 0 for tensor in first)
    assert_equal(first, second)


# --- without processes -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("streamed", [False, True])
def test_shares_make_up_the_batch(size, streamed):
    generator = torch.Generator().manual_seed(0)
    stored = torch.randint(0, 256, (21, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(21)
    augment = Augment(crop_padding=2, flip=True, cutout=3, color_jitter=(0.4, 0.4, 0.4, 0.1))
    settings: dict[str, Any] = {"augment": augment, "seed": 3}
    mean, std = (0.5,) * 3, (0.2,) * 3
    if streamed:
        items = torch.utils.data.TensorDataset(stored, labels)
        data = StreamedData("noise", items, items, 21, mean, std, (3, 8, 8), workers=0)

        def batches():
            return data.train_batches(6, **settings)
    else:

        def batches():
            return Batches(stored, labels, 6, mean=mean, std=std, **settings)

    whole = list(batches().iterate(1))
    parts = []
    for rank in range(size):
        part = batches()
        part.share = Share(rank, size)
        parts.append(list(part.iterate(1, 1)))
    assert len(whole) == 1 + len(parts[0]) == 4
    for number, (x, y) in enumerate(whole[1:]):
        shares = [part[number] for part in parts]
        assert torch.equal(torch.cat([share[1] for share in shares]), y)
        torch.testing.assert_close(torch.cat([share[0] for share in shares]), x)
        if len(y) == 6:
            assert {len(share[1]) for share in shares} == {6 // size}


@pytest.mark.parametrize(
    ("asked", "count", "tested", "size"),
    [
        (16, 96, False, 16),
        (16, 11, False, 10),  # no more images, in equal shares
        (16, 11, True, 8),  # ten and one would leave a process without an image
        (4, 9, True, 3),  # four and four and one as well
        (4, 10, True, 4),
    ],
)
def test_sizes_of_batches(asked, count, tested, size):
    assert TWO.batch_size(asked, count, tested=tested) == size
    assert ALONE.batch_size(asked, count, tested=tested) == min(asked, count)


def test_what_cannot_be_shared_is_refused():
    message = r"batch_size: expected a multiple of 2, .* but got 15"
    with pytest.raises(ValueError, match=message), parallel_worker.registered():
        Search(config(batch_size=15), data=images(), progress=Progress(), group=TWO)
    with pytest.raises(ValueError, match="batch_size: 2 processes cannot share 1 images"):
        TWO.batch_size(16, 1)
    with pytest.raises(ValueError, match="batch_size: 2 processes cannot share 3 images in"):
        TWO.batch_size(2, 3, tested=True)


def test_each_process_takes_its_own_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert OTHER.place(torch.device("cuda")) == torch.device("cuda:1")
    assert chosen == [1]
    assert OTHER.place(torch.device("cpu")) == torch.device("cpu")
    assert ALONE.place(torch.device("cuda")) == torch.device("cuda")
    with pytest.raises(ValueError, match=r"expected 'cuda' for 2 processes.* but got 'cuda:1'"):
        OTHER.place(torch.device("cuda:1"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"it has GPUs \(1\).* process 2 here; start 1, or"):
        OTHER.place(torch.device("cuda"))


def test_no_processes_without_torchrun(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")  # of another program
    with joined() as group:
        assert group is ALONE
    assert current_group() is ALONE


def test_the_others_write_nothing_and_say_nothing(tmp_path, capsys):
    with parallel_worker.registered():
        run = Search(config(out=str(tmp_path / "run")), data=images(), group=OTHER)
    assert run.path is None
    assert run.halves.weights.share == Share(1, 2)
    run.progress.note("aloud")
    assert capsys.readouterr().out == ""


def test_steps_of_several_processes_are_not_recorded():
    from fastnas.methods.graphs import obstacle

    with parallel_worker.registered():
        run = Search(config(), data=images(), progress=Progress(), group=TWO)
    assert obstacle(run.learner) == "the processes of a run wait for each other in every step"


def test_a_run_goes_on_with_another_number_of_processes(found, tmp_path_factory):
    """One process continues what two began."""
    path = Path(next(tmp_path_factory.getbasetemp().glob("processes*"))) / "tiny" / "parts"
    with parallel_worker.registered():
        run = parallel_worker.search(ALONE, REAL["tiny"], out=path, resume=True)
        assert run.resumed and run.over
        assert run.run().history[-1]["epoch"] == 2
