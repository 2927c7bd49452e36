"""The IDX format of the MNIST family: reading with every size checked, and writing.

An IDX file is a big-endian header (two zero bytes, a type code, the number of dimensions, one
32-bit size each) followed by the values. Only unsigned bytes (type code 8) occur in image sets and
only they are read.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

UNSIGNED_BYTE = 0x08
GZIP_MAGIC = b"\x1f\x8b"

#: Largest payload a header may announce, in bytes. The largest set of the family takes two thirds
#: of it, and a small file must not be able to fill the memory: gzip packs zeros 1000 to 1.
MAX_BYTES = 1 << 30

#: Bytes decompressed at a time, so that a header that lies never makes us reserve what it claims.
CHUNK = 1 << 20


def read_idx(path: str | Path, dims: int) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes, compressed with gzip or not (told by its content).

    Args:
        path: the file.
        dims: the number of dimensions wanted: 1 for labels, 3 for grey images.

    Returns:
        A uint8 array with the sizes of the header.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not such an IDX file, or is shorter or longer than its header says.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; expected an IDX file with {dims} dimension(s)"
        )
    with path.open("rb") as raw:
        compressed = raw.read(2) == GZIP_MAGIC
        raw.seek(0)
        try:
            if not compressed:
                return _parse(raw, path, dims)
            with gzip.GzipFile(fileobj=raw) as stream:
                return _parse(stream, path, dims)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: broken or truncated gzip data ({error})") from error


def _parse(stream: IO[bytes] | gzip.GzipFile, path: Path, dims: int) -> NDArray[np.uint8]:
    header = stream.read(4 + 4 * dims)
    magic = bytes((0, 0, UNSIGNED_BYTE, dims))
    if header[:4] != magic:
        raise ValueError(
            f"{path}: starts with {header[:4].hex() or 'nothing'}, expected the magic number "
            f"{magic.hex()} of an IDX file of unsigned bytes with {dims} dimension(s)"
        )
    if len(header) < 4 + 4 * dims:
        raise ValueError(f"{path}: ends inside its header of {4 + 4 * dims} bytes")
    sizes: tuple[int, ...] = struct.unpack(f">{dims}I", header[4:])
    expected = math.prod(sizes)
    if not 0 < expected <= MAX_BYTES:
        raise ValueError(
            f"{path}: the header announces sizes {sizes}, expected 1 to {MAX_BYTES} bytes in all"
        )
    # One byte more than announced is asked for: what follows the values means that the header is
    # wrong.
    values = bytearray()
    while len(values) <= expected:
        chunk = stream.read(min(CHUNK, expected + 1 - len(values)))
        if not chunk:
            break
        values += chunk
    if len(values) != expected:
        found = f"only {len(values)}" if len(values) < expected else "more"
        raise ValueError(f"{path}: the header {sizes} announces {expected} bytes, found {found}")
    return np.frombuffer(values, dtype=np.uint8).reshape(sizes)


def write_idx(path: str | Path, values: NDArray[np.uint8]) -> None:
    """Write a uint8 array as an IDX file, compressed if the name ends in ``.gz``.

    Nothing of the moment (time, file name) goes into the compressed file: the same array gives the
    same bytes with the same zlib.

    Raises:
        TypeError: `values` is not uint8.
    """
    if values.dtype != np.uint8:
        raise TypeError(f"values: expected dtype uint8, got {values.dtype}")
    path = Path(path)
    header = bytes((0, 0, UNSIGNED_BYTE, values.ndim)) + struct.pack(
        f">{values.ndim}I", *values.shape
    )
    content = header + values.tobytes()
    if path.suffix == ".gz":
        content = gzip.compress(content, compresslevel=9, mtime=0)
    path.write_bytes(content)
