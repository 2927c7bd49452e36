# SPDX-License-Identifier: Apache-2.0
"""setuptools' PEP 517 backend, except that it sees the torch of the environment pip installs into.

pip runs this in a clean environment, but with that environment's interpreter, which still knows
where its packages are. If torch is there, these folders go to the *end* of sys.path, so that the
kernels are built for the torch they will run with, and nothing is downloaded. Otherwise torch
becomes a requirement of the build. FASTNAS_TORCH_SITE names folders to look in first, for front
ends that build in an environment of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from typing import Any

from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403  (every hook that is not named below)


def _named_path() -> list[str]:
    return [site for site in os.environ.get("FASTNAS_TORCH_SITE", "").split(os.pathsep) if site]


def _installed_path() -> list[str]:
    """sys.path as it is outside of the build: with user and system packages and .pth files."""
    isolation = ("PYTHONPATH", "PYTHONNOUSERSITE")
    environment = {name: value for name, value in os.environ.items() if name not in isolation}
    command = [sys.executable, "-c", "import sys; print(*sys.path[1:], sep='\\n')"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def _has_torch(path: list[str]) -> bool:
    return PathFinder.find_spec("torch", path) is not None


if not _has_torch(sys.path):
    for _path in (_named_path(), _installed_path()):
        if _has_torch(_path):
            sys.path.extend(site for site in _path if site not in sys.path)
            break


def _with_torch(hook: Callable[[Any], list[str]]) -> Callable[[Any], list[str]]:
    def requires(config_settings: Any = None) -> list[str]:
        torch = [] if _has_torch(sys.path) else ["torch>=2.11"]
        return [*hook(config_settings), "ninja", *torch]

    return requires


get_requires_for_build_wheel = _with_torch(_setuptools.get_requires_for_build_wheel)
get_requires_for_build_editable = _with_torch(_setuptools.get_requires_for_build_editable)
