# SPDX-License-Identifier: Apache-2.0
"""Builds the package by pip into a folder of its own: ``build_package.py FOLDER``."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main(folder: Path) -> int:
    if folder.exists():
        shutil.rmtree(folder)
    options = ["--no-build-isolation", "--no-deps", "--no-compile", "--target", str(folder)]
    command = [sys.executable, "-m", "pip", "install", "-v", *options, str(ROOT)]
    return subprocess.run(command, cwd=folder.parent).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
