# SPDX-License-Identifier: Apache-2.0
"""setuptools' PEP 517 backend, except that it sees the torch of the environment pip installs into.

pip runs this in a clean environment, but with that environment's interpreter: sysconfig still
names its site-packages. If torch is there, they go to the *end* of sys.path, so that the kernels
are built for the torch they will run with, and nothing is downloaded. Otherwise torch becomes a
requirement of the build. FASTNAS_TORCH_SITE names other folders to look in, for front ends that
build in an environment of their own.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from typing import Any

from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403  (every hook that is not named below)


def _sites() -> Iterator[str]:
    yield from os.environ.get("FASTNAS_TORCH_SITE", "").split(os.pathsep)
    yield from (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))


def _has_torch(path: list[str]) -> bool:
    return PathFinder.find_spec("torch", path) is not None


if not _has_torch(sys.path):
    for _site in _sites():
        if _site and _has_torch([_site]):
            sys.path.append(_site)  # unlike site.addsitedir, this runs no .pth file
            break


def _with_torch(hook: Callable[[Any], list[str]]) -> Callable[[Any], list[str]]:
    def requires(config_settings: Any = None) -> list[str]:
        torch = [] if _has_torch(sys.path) else ["torch>=2.11"]
        return [*hook(config_settings), "ninja", *torch]

    return requires


get_requires_for_build_wheel = _with_torch(_setuptools.get_requires_for_build_wheel)
get_requires_for_build_editable = _with_torch(_setuptools.get_requires_for_build_editable)
