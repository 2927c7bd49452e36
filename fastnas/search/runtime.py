# SPDX-License-Identifier: Apache-2.0
"""Process-wide switches of PyTorch for the time of a run, put back afterwards."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

# cuBLAS is deterministic only with a fixed workspace, chosen by this variable.
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextlib.contextmanager
def runtime(threads: int = 0, deterministic: bool = False) -> Iterator[None]:
    """Set number of threads and determinism within a block.

    Args:
        threads: CPU threads, 0 to leave them.
        deterministic: allow only deterministic algorithms; otherwise cuDNN picks the fastest by
            trying them.
    """
    before = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        os.environ.get(_CUBLAS),
    )
    try:
        if threads:
            torch.set_num_threads(threads)
        if deterministic:
            os.environ.setdefault(_CUBLAS, ":4096:8")
            torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = not deterministic
        yield
    finally:
        count, enabled, warn_only, benchmark, workspace = before
        if threads:
            torch.set_num_threads(count)
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        if workspace is None:
            os.environ.pop(_CUBLAS, None)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that the memory of a device or of the CPU was not enough."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # PyTorch has no class of its own for the memory of the CPU.
    signs = ("DefaultCPUAllocator", "bad_alloc")
    return type(error) is RuntimeError and any(sign in str(error) for sign in signs)


def check_threads(threads: int) -> None:
    """Raise a ValueError for more threads than cores: they would wait for each other for ever."""
    cores = os.cpu_count() or 1
    if threads > cores:
        raise ValueError(
            f"threads: expected at most {cores}, the number of cores here, but got {threads}"
        )


def resolve_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is CUDA where there is a device, else the CPU.

    Raises:
        ValueError: it is no device of this machine, or one without memory (``meta``), which cannot
            train; the message lists those there are.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    counts = _devices()
    try:
        device = torch.device(name)
        there = (device.index or 0) < counts.get(device.type, 0)
    except RuntimeError:  # what PyTorch says to a name it does not know
        there = False
    if not there:
        names = [kind if n == 1 else f"{kind}:0 to {kind}:{n - 1}" for kind, n in counts.items()]
        raise ValueError(
            f"device: expected {' or '.join(['auto', *names])} (PyTorch sees no other device that "
            f"can train here), but got {name!r}"
        )
    return device


def _devices() -> dict[str, int]:
    """Kinds of devices that can train here, and how many there are of each."""
    counts = {"cpu": 1}
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        counts[accelerator.type] = torch.accelerator.device_count()
    return counts


def amp_dtype(name: str) -> torch.dtype | None:
    """The type autocast computes in: of ``off``, ``bf16`` or ``fp16``; None for full precision."""
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def memory_layout(name: str, device: torch.device) -> torch.memory_format:
    """The layout called ``contiguous`` or ``channels_last``; of ``auto`` the usual one.

    What is the faster one in a given run, ``fastnas.search.layout`` finds out.
    """
    if name == "auto":
        # Depthwise convolutions, half of a search on a CPU, are several times faster there in
        # channels_last; PyTorch's CUDA kernels for them want contiguous images.
        name = "channels_last" if device.type == "cpu" else "contiguous"
    return torch.channels_last if name == "channels_last" else torch.contiguous_format
