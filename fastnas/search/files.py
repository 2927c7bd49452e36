# SPDX-License-Identifier: Apache-2.0
"""Files of a run that a kill at any moment cannot spoil.

Whole files are written under a temporary name, flushed to disk and renamed, so a reader sees the
old or the new content and never a part. ``metrics.jsonl`` grows by one line at a time; what a kill
may leave half written is put right from the checkpoint when the run goes on
(:meth:`RunDirectory.rewrite_metrics`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

CONFIG = "config.json"
METRICS = "metrics.jsonl"
CHECKPOINT = "checkpoint.pt"
GENOTYPE = "genotype.json"

# No JSON file of a run comes near this; a foreign one is refused before it is read.
_MAX_JSON_BYTES = 64 * 2**20


# Folders that are open for their lock. Processes that read images would hold it too, for seconds
# after a kill of their parent.
_LOCKS: set[int] = set()


def _let_go() -> None:
    while _LOCKS:
        os.close(_LOCKS.pop())


os.register_at_fork(after_in_child=_let_go)


def write_atomic(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that it is replaced whole or not at all.

    Args:
        path: file to write; its folder must exist.
        write: receives the open binary temporary file (``<path>.tmp``) and fills it.

    Raises:
        OSError: the folder is missing, not writable or full; ``path`` is then as it was before.
    """
    target = Path(path)
    temporary = target.with_name(target.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a full disk tells no file, others the temporary one
            error.filename, error.filename2 = str(target), None
        raise


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented JSON, atomically.

    Raises:
        TypeError, ValueError: ``value`` holds something JSON has no form for (a NaN is such).
        OSError: as :func:`write_atomic`.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8, atomically.

    Raises:
        OSError: as :func:`write_atomic`.
    """
    write_atomic(path, lambda file: _write_all(file, text.encode()))


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file that may come from anywhere.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or larger than 64 MiB.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file")
    size = source.stat().st_size
    if size > _MAX_JSON_BYTES:
        raise ValueError(f"{source}: expected JSON of at most 64 MiB, but it has {size} bytes")
    try:
        return json.loads(source.read_bytes())
    # A number of too many digits is a plain ValueError.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: not a JSON file ({error})") from None


def append_jsonl(path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Append one record as one line of JSON.

    Raises:
        TypeError, ValueError: the record holds something JSON has no form for (a NaN is such);
            nothing is written.
        OSError: the file cannot be written.
    """
    line = _line(record)
    # One write of one line: only a kill inside the system call can leave a part of it.
    with open(path, "ab", buffering=0) as file:
        try:
            _write_all(file, line.encode())
        except OSError as error:
            error.filename = str(path)
            raise


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the records of a JSON-lines file; a half-written last line is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line other than an unfinished last one is not a JSON object.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file")
    *lines, _unfinished = source.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise ValueError(f"{source}: line {number} is not a JSON object")
        records.append(record)
    return records


class RunDirectory:
    """The folder of one run and the names of the files in it.

    Build it with :meth:`create` or :meth:`resume`. ``path`` is the folder; ``config``, ``metrics``,
    ``checkpoint`` and ``genotype`` are the paths of its files.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Name the files of the folder ``path``; nothing is read or written.

        Raises:
            ValueError: ``path`` is empty, which would be the current folder.
        """
        if not os.fspath(path):
            raise ValueError("out: expected a folder, but got an empty name")
        # A shell leaves the ~ of --out=~/run alone.
        self.path = Path(os.path.expanduser(path))
        self.config = self.path / CONFIG
        self.metrics = self.path / METRICS
        self.checkpoint = self.path / CHECKPOINT
        self.genotype = self.path / GENOTYPE

    @property
    def holds_run(self) -> bool:
        """Whether a run was begun here (one of its files exists)."""
        return any(p.exists() for p in (self.config, self.metrics, self.checkpoint, self.genotype))

    @classmethod
    def free(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """Name a folder for a new run; nothing is written.

        Raises:
            FileExistsError: the folder holds a run already, or ``path`` is a file.
        """
        run = cls(path)
        if run.holds_run:
            how = "continue it with --resume, or " if run.config.exists() else ""
            raise FileExistsError(
                f"{run.path} already holds a run: {how}choose another folder with --out"
            )
        if run.path.exists() and not run.path.is_dir():
            raise FileExistsError(f"{run.path} is a file: choose another folder with --out")
        return run

    @classmethod
    def create(cls, path: str | os.PathLike[str], config: Mapping[str, Any]) -> RunDirectory:
        """Begin a run: make the folder and write its ``config.json``.

        Raises:
            FileExistsError: as :meth:`free`.
        """
        run = cls.free(path)
        run.path.mkdir(parents=True, exist_ok=True)
        write_json(run.config, dict(config))
        return run

    @classmethod
    def resume(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """Open the folder of a run that was begun before.

        The run may have been killed before its first checkpoint: ``run.checkpoint`` need not exist,
        and the run then starts again from its configuration.

        Raises:
            FileNotFoundError: no run was begun there.
        """
        run = cls(path)
        if not run.config.is_file():
            raise FileNotFoundError(
                f"{run.path} holds no run to continue ({CONFIG} is missing): "
                "start one without --resume"
            )
        return run

    @contextlib.contextmanager
    def begun(
        self, config: Mapping[str, Any], undo: Callable[[Exception], bool] = lambda error: False
    ) -> Iterator[None]:
        """Begin a run, locked within the block.

        Args:
            config: content of its ``config.json``.
            undo: whether an error that ends the block before there is a checkpoint leaves nothing
                behind, so that another run may be begun here.

        Raises:
            FileExistsError: as :meth:`free`.
            BlockingIOError: as :meth:`lock`.
        """
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with self.lock():
                self.create(self.path, config)
                try:
                    yield
                except Exception as error:
                    if undo(error) and not self.checkpoint.exists():
                        for file in (self.config, self.genotype):
                            file.unlink(missing_ok=True)
                    raise
        except Exception:
            with contextlib.suppress(OSError):  # not empty, or not there
                for folder in made:
                    folder.rmdir()
            raise

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from running here within the block; a kill ends it too.

        Raises:
            BlockingIOError: another process runs here.
        """
        # The folder itself: a file to lock would stay behind.
        folder = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(folder)
            raise BlockingIOError(
                f"{self.path}: another process is running there; wait until it is over, "
                "or choose another folder with --out"
            ) from None
        except OSError:
            pass  # a file system without locks, where nothing can be known
        _LOCKS.add(folder)
        try:
            yield
        finally:
            if folder in _LOCKS:  # not so in a forked process
                _LOCKS.remove(folder)
                os.close(folder)

    def stamp(self) -> tuple[int, int] | None:
        """What changes when another checkpoint is written; None without one."""
        try:
            found = self.checkpoint.stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns

    def amend_config(self, **fields: Any) -> None:
        """Put fields that the run has decided by itself into its ``config.json``."""
        write_json(self.config, {**read_json(self.config), **fields})

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Append the record of one epoch to ``metrics.jsonl``."""
        append_jsonl(self.metrics, record)

    def rewrite_metrics(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Make ``metrics.jsonl`` hold exactly ``records`` (the history kept in the checkpoint).

        Called when a run goes on: drops a half-written line and the lines of epochs that the
        checkpoint does not know, and brings back one that was lost.
        """
        write_text(self.metrics, "".join(map(_line, records)))


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(dict(record), allow_nan=False) + "\n"


def _write_all(file: BinaryIO, data: bytes) -> None:
    """Write all bytes; an unbuffered file may take only a part of them at once."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
