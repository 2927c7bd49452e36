"""Cut the embedded data set fashion-mnist-mini from Debian's package dataset-fashion-mnist.

The first 500 training images and the first 100 test images of each of the ten classes are kept, in
their original order. Running it again gives the same files, byte for byte (with another zlib: the
same images).

    apt-get install dataset-fashion-mnist
    python tools/make_fashion_mnist_mini.py

Needs fastnas to be importable (installed, or run from the repository root once it is built).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import fastnas.data
from fastnas.data.idx import read_idx, write_idx

SOURCE = Path("/usr/share/datasets/fashion-mnist")
COPYRIGHT = Path("/usr/share/doc/dataset-fashion-mnist/copyright")
TARGET = Path(fastnas.data.__file__).parent / "assets" / "fashion-mnist-mini"
CLASSES = 10
PER_CLASS = {"train": 500, "t10k": 100}

NOTICE = """\
fashion-mnist-mini: 5,000 training and 1,000 test images of Fashion-MNIST
(https://github.com/zalandoresearch/fashion-mnist), the first 500 and the first 100 of each class,
cut from Debian's package dataset-fashion-mnist by tools/make_fashion_mnist_mini.py.
The images themselves are unchanged. The statement of that package's copyright file:

"""


def first_of_each_class(labels: NDArray[np.uint8], count: int) -> NDArray[np.int64]:
    """Return the positions of the first `count` items of every class, in ascending order."""
    positions = [np.flatnonzero(labels == label)[:count] for label in range(CLASSES)]
    short = [label for label, found in enumerate(positions) if len(found) < count]
    if short:
        raise ValueError(f"classes {short} have fewer than {count} images")
    return np.sort(np.concatenate(positions))


def cut(source: Path, copyright_file: Path, target: Path) -> None:
    """Write the four IDX files and the notice into `target`."""
    target.mkdir(parents=True, exist_ok=True)
    for part, count in PER_CLASS.items():
        images_name, labels_name = f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz"
        labels = read_idx(source / labels_name, dims=1)
        keep = first_of_each_class(labels, count)
        write_idx(target / images_name, read_idx(source / images_name, dims=3)[keep])
        write_idx(target / labels_name, labels[keep])
    lines = copyright_file.read_text(encoding="utf-8").splitlines()
    text = "\n".join(line.rstrip() for line in lines) + "\n"
    (target / "LICENSE").write_text(NOTICE + text, encoding="utf-8")


def main() -> None:
    """Parse the command line and cut the set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--source", type=Path, default=SOURCE, help="directory of the full IDX files"
    )
    parser.add_argument("--copyright", type=Path, default=COPYRIGHT, help="copyright file to quote")
    parser.add_argument("--target", type=Path, default=TARGET, help="directory to write")
    args = parser.parse_args()
    cut(args.source, args.copyright, args.target)
    total = sum(file.stat().st_size for file in args.target.iterdir())
    print(f"{args.target}: {total / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
