# SPDX-License-Identifier: Apache-2.0
"""What `import fastnas` gives, and what it keeps its hands off."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fastnas


def test_public_names():
    for name in fastnas.__all__:
        assert getattr(fastnas, name) is not None
    assert {"MixedOp", "PartialMixedOp", "accelerate", "restore", "ops", "nn"} <= set(dir(fastnas))
    assert set(fastnas._LAZY) <= set(dir(fastnas))
    with pytest.raises(AttributeError, match=r"module 'fastnas' has no attribute 'mixed'"):
        _ = fastnas.mixed


def test_import_is_light():
    # Importing torch itself may do what it likes: the watch begins after it.
    code = """
import sys, torch
import torch.cuda

watched = ("triton", "torch._dynamo", "torch._inductor", "rich", "tyro", "torchvision",
           "fastnas.spaces", "fastnas.search", "fastnas.methods", "fastnas.data",
           "fastnas.evaluate", "fastnas.cli")
attempts = []

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(watched):
            attempts.append(name)

def no_cuda(*args, **kwargs):
    attempts.append("cuda")
    return False

sys.meta_path.insert(0, Watch())
torch._C._cuda_init = no_cuda
torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = no_cuda
import fastnas
assert not attempts, attempts
import fastnas.nn.candidates
assert fastnas.spaces.__name__ == "fastnas.spaces"
assert "fastnas.spaces" in attempts
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
