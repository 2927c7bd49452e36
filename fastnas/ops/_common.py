# SPDX-License-Identifier: Apache-2.0
"""What the public ops share: their door checks and the differentiable way through the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastnas.ops.reference import accumulate_dtype, result_dtype

MAX_CANDIDATES = 64


def memory_format(x: Tensor) -> torch.memory_format:
    """The format outputs take after ``x``: channels_last if channels are innermost there."""
    if x.dim() in (4, 5) and x.stride(1) == 1 and not x.is_contiguous():
        return torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return torch.contiguous_format


def fake_like(x: Tensor, dtype: torch.dtype, shape: Sequence[int] | None = None) -> Tensor:
    """What a kernel returns for a first operand ``x``: its format, any dtype and shape."""
    size = x.shape if shape is None else shape
    return x.new_empty(size, dtype=dtype).to(memory_format=memory_format(x))


def check_devices(op: str, first: Tensor, *others: Tensor) -> None:
    """Raise unless all are on one device; for fake kernels, which one meta tensor would choose."""
    for t in others:
        if t.device != first.device:
            raise ValueError(
                f"{op}: expected all tensors on one device, but got {first.device} and {t.device}"
            )


def check_candidates(op: str, xs: Sequence[Tensor], name: str = "xs") -> None:
    """Raise unless ``xs`` is a non-empty list of floating-point tensors of one shape and device."""
    if isinstance(xs, Tensor):
        raise TypeError(f"{op}: expected {name} to be a list of tensors, but got one tensor")
    if not isinstance(xs, (list, tuple)) and not hasattr(xs, "__len__"):
        raise TypeError(
            f"{op}: expected {name} to be a list of tensors, but got {type(xs).__name__}"
        )
    if not 1 <= len(xs) <= MAX_CANDIDATES:
        raise ValueError(
            f"{op}: expected 1 to {MAX_CANDIDATES} tensors in {name}, but got {len(xs)}"
        )
    first = xs[0]
    shape, device = (first.shape, first.device) if isinstance(first, Tensor) else ((), None)
    for k, x in enumerate(xs):
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{op}: expected {name}[{k}] to be a tensor, but got {type(x).__name__}"
            )
        if not x.is_floating_point():
            raise TypeError(f"{op}: expected floating-point inputs, but {name}[{k}] is {x.dtype}")
        if x.shape != shape:
            raise ValueError(
                f"{op}: expected all inputs of one shape, but {name}[{k}] is {list(x.shape)} "
                f"and {name}[0] is {list(first.shape)}"
            )
        if x.device != device:
            raise ValueError(
                f"{op}: expected all inputs on one device, but {name}[{k}] is on {x.device} "
                f"and {name}[0] on {first.device}"
            )


def stack_weights(
    weights: Sequence[Tensor | float], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """One ``(K,)`` tensor of K numbers or tensors of one element; gradients reach the tensors."""
    if device.type == "cpu" and not any(isinstance(w, Tensor) for w in weights):
        return torch.tensor(weights, dtype=dtype, device=device)
    # A list of numbers is copied to a GPU from memory of the host, which waits for the GPU and
    # cannot be recorded into a graph; torch.full hands its number to a kernel.
    return torch.stack(
        [
            w.to(device, dtype).reshape(())
            if isinstance(w, Tensor)
            else torch.full((), w, dtype=dtype, device=device)
            for w in weights
        ]
    )


def as_weights(op: str, weights: Tensor | Sequence[Tensor | float], xs: Sequence[Tensor]) -> Tensor:
    """The weights as one ``(K,)`` tensor in the dtype that sums over ``xs`` are taken in."""
    dtype, device = accumulate_dtype(result_dtype(xs)), xs[0].device
    if not isinstance(weights, Tensor):
        if len(weights) != len(xs):
            raise _count_error(op, xs, [len(weights)])
        weights = stack_weights(weights, dtype, device)
    if weights.dim() != 1 or weights.shape[0] != len(xs):
        raise _count_error(op, xs, list(weights.shape))
    if not weights.is_floating_point():
        raise TypeError(f"{op}: expected floating-point weights, but got {weights.dtype}")
    if weights.device != device:
        raise ValueError(
            f"{op}: expected weights on {device} like the inputs, but got {weights.device}"
        )
    return weights if weights.dtype == dtype else weights.to(dtype)


def _count_error(op: str, xs: Sequence[Tensor], shape: list[int]) -> ValueError:
    return ValueError(
        f"{op}: expected one weight per input, but got {len(xs)} inputs and weights of shape "
        f"{shape}"
    )


#: Device types that have it, asked once: torch.compile of PyTorch 2.11 does not know the call.
_AUTOCAST = frozenset(
    device
    for device in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia", "xla", "ipu")
    if torch.amp.is_autocast_available(device)
)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """What torch's convolutions cast ``x`` to where they run now: autocast leaves float64 alone."""
    device = x.device.type
    if x.dtype == torch.float64 or device not in _AUTOCAST:
        return x.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def differentiate(
    function: Callable[..., Tensor | list[Tensor]],
    inputs: tuple[Tensor, ...],
    needs: Sequence[bool],
    grad: Tensor | list[Tensor],
) -> tuple[Tensor | None, ...]:
    """Gradients of ``function(*inputs)`` by autograd, differentiable when grad mode is on.

    A function with several outputs gets a list of gradients.

    A backward that is asked for a second derivative runs with grad mode on and comes here, so the
    second derivative is that of the reference and needs no kernel.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # A fresh view per input: asking for the gradient at a view leaves the caller's graph above
        # it alone, and gives placeholders that stand for unsaved inputs something to hang their
        # gradient on.
        views = tuple(
            (x.view_as(x) if x.requires_grad else x.detach().requires_grad_()) if need else x
            for x, need in zip(inputs, needs, strict=True)
        )
        output = function(*views)
        if isinstance(output, list):  # without those that nothing wanted enters
            pairs = [(y, g) for y, g in zip(output, grad, strict=True) if y.requires_grad]
            output, grad = [y for y, _ in pairs], [g for _, g in pairs]
        wanted = [x for x, need in zip(views, needs, strict=True) if need]
        grads = iter(
            torch.autograd.grad(output, wanted, grad, create_graph=create_graph, allow_unused=True)
        )
    return tuple(next(grads) if need else None for need in needs)
