# SPDX-License-Identifier: Apache-2.0
"""All candidates that read one state, run together: what they share is computed once.

A state of a cell is read by every edge that leaves it, and by every candidate of each. The
convolutions among them, separable or only depthwise, with the ReLU in front, are one fused call,
pools that are set alike are one tensor, a max pool and an average pool one call, and factorized
reduces share the pixels they pick and one product of matrices. Everything else is called as it
stands.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastnas.nn.carriers import Carriers, is_large
from fastnas.nn.fused import (
    NormConvolution,
    NormConvolutions,
    Rectified,
    SharedConvolutions,
    SharedPools,
)
from fastnas.nn.halves import SharedHalves, TwoHalves, picked_pixels
from fastnas.nn.pool import AVERAGE_POOLS
from fastnas.ops._common import MAX_CANDIDATES, memory_format

__all__ = [
    "Recipe",
    "evaluate_source",
    "is_faster",
    "make_recipe",
]

Layer = Callable[[Tensor], Tensor]
#: How a layer is called with its inputs.
Run = Callable[..., Any]


class Recipe(NamedTuple):
    """How a candidate gets from a state to what enters its last BatchNorm."""

    #: Called one after the other, they do it.
    layers: tuple[Layer, ...]
    #: The convolution of a leading ReLU and depthwise convolution, shared with others.
    depthwise: nn.Conv2d | None = None
    #: The one behind it where it is pointwise, which is part of the shared call.
    pointwise: nn.Conv2d | None = None
    #: The convolutions of a factorized reduce behind a leading ReLU.
    halves: TwoHalves | None = None
    #: All layers as one call, where they are a ReLU and a 1x1 convolution.
    rectified: Rectified | None = None
    #: Candidates with equal keys return the same tensor, or one in the same memory.
    key: Hashable = None
    #: What follows the shared call, as few calls as possible.
    after: tuple[Layer, ...] = ()
    #: Modules that are then not called, so that their hooks would not fire.
    bypassed: tuple[nn.Module, ...] = ()


def make_recipe(layers: Sequence[Layer]) -> Recipe:
    """Look for what a candidate shares with others that read the same state."""
    layers = tuple(layers)
    if len(layers) == 1 and (key := _pool_key(layers[0])) is not None:
        return Recipe(layers, key=key, bypassed=_modules(layers))
    if len(layers) < 2 or not _is_relu(layers[0]):
        return Recipe(layers)
    if len(layers) == 2 and isinstance(halves := layers[1], TwoHalves) and halves.is_plain():
        return Recipe(layers, halves=halves, bypassed=(*_modules(layers), *halves.convs))
    if len(layers) == 2 and _mixes_channels(layers[1]):
        return Recipe(layers, rectified=Rectified(layers[1]), bypassed=_modules(layers))  # type: ignore[arg-type]
    if not _is_depthwise(layers[1]):
        return Recipe(layers)
    taken = 3 if _is_pointwise(layers[2:3]) else 2
    bypassed, after, rest = _modules(layers[:taken]), [], layers[taken:]
    while rest:
        if len(rest) >= 3 and _is_norm(rest[0]) and _is_relu(rest[1]) and _is_depthwise(rest[2]):
            size = 4 if _is_pointwise(rest[3:4]) else 3
            after.append(NormConvolution(rest[0], *rest[2:size]))  # type: ignore[arg-type]
            bypassed, rest = bypassed + _modules(rest[:size]), rest[size:]
        else:
            after.append(rest[0])  # type: ignore[arg-type]
            rest = rest[1:]
    pointwise = layers[2] if taken == 3 else None
    return Recipe(layers, layers[1], pointwise, after=tuple(after), bypassed=bypassed)  # type: ignore[arg-type]


def _modules(layers: Sequence[Layer]) -> tuple[nn.Module, ...]:
    return tuple(layer for layer in layers if isinstance(layer, nn.Module))


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)``: what runs layers where nothing is to be noted of them."""
    return function(*arguments)


def evaluate_source(
    x: Tensor,
    edges: Sequence[Sequence[Recipe]],
    run: Run = call,
    carriers: Carriers | None = None,
) -> list[list[Tensor]]:
    """Run the candidates of all edges that leave one state.

    Args:
        x: the state, ``(N, C, H, W)``.
        edges: for each edge the recipes of its candidates.
        run: how a layer is called with its inputs (``fastnas.nn.recompute`` has another way).
        carriers: takes those of the results that have one. None where the caller does not want
            them, or has a ``run`` of its own, or reads a convolution's result more than once.

    Returns:
        For each edge what its candidates return, in their order; some may be the same tensor.
    """
    if carriers is None or not (is_faster("carried", x) and is_large(x)) or _has_repetitions(edges):
        carriers = None
    between = None if carriers is None else Carriers()
    convolved = _convolve(x, edges, run, between) if is_faster("convolutions", x) else {}
    convolved.update(_halve(x, edges, run))
    again = _convolve_again(convolved, edges, run, between, carriers)
    shared = _pool(x, edges, run, carriers) if is_faster("pools", x) else {}
    results = []
    for recipes in edges:
        outputs = []
        for recipe in recipes:
            h, layers = x, recipe.layers
            if id(recipe) in again:
                h, layers = again[id(recipe)], recipe.after[1:]
            elif id(recipe) in convolved:
                h, layers = convolved[id(recipe)], recipe.after
            elif recipe.key is not None:
                if recipe.key not in shared:
                    shared[recipe.key] = repeat(run(layers[0], x))
                h, layers = next(shared[recipe.key]), ()
            elif recipe.rectified is not None and is_faster("rectified", x):
                layers = (recipe.rectified,)
            if carriers is not None and between is not None and not layers:
                carriers.put([h], between.take([h]).values())
            for layer in layers:
                h = run(layer, h)
            outputs.append(h)
        results.append(outputs)
    return results


#: For each fused way the types of devices on which it was measured to be the faster one.
_FASTER = {
    "convolutions": ("cpu", "cuda"),  # of one source, with the ReLU before them
    "pools": ("cpu",),  # a max pool and an average pool of one source
    "rectified": ("cpu",),  # a ReLU and a 1x1 convolution
    "parts": ("cpu",),  # states with partial channels in two tensors
    "carried": ("cpu",),  # statistics and gradients by carriers
}


def is_faster(way: str, x: Tensor) -> bool:
    """Whether to go that way with ``x``."""
    return x.device.type in _FASTER[way]


def _has_repetitions(edges: Sequence[Sequence[Recipe]]) -> bool:
    """Whether a candidate occurs twice, whose one result two sums then read."""
    recipes = [id(recipe) for recipes in edges for recipe in recipes]
    return len(set(recipes)) < len(recipes)


def _convolve(
    x: Tensor,
    edges: Sequence[Sequence[Recipe]],
    run: Run,
    carriers: Carriers | None,
) -> dict[int, Tensor]:
    """What the leading convolutions of the recipes return, by identity of the recipe."""
    groups: dict[tuple[int, bool], list[Recipe]] = {}
    for recipes in edges:
        for recipe in recipes:
            if (conv := recipe.depthwise) is not None:
                key = conv.stride[0], recipe.pointwise is not None
                groups.setdefault(key, []).append(recipe)
    outputs: dict[int, Tensor] = {}
    for group in groups.values():
        for start in range(0, len(group), MAX_CANDIDATES):
            part = group[start : start + MAX_CANDIDATES]
            shared = SharedConvolutions([(r.depthwise, r.pointwise) for r in part if r.depthwise])
            if carriers is not None and shared.mixing and all(map(_reads_what_it_gets, part)):
                ys, found = shared.carry(x)
                carriers.put(ys, found)
            else:
                ys = run(shared, x)
            outputs.update((id(recipe), y) for recipe, y in zip(part, ys, strict=True))
    return outputs


def _convolve_again(
    convolved: dict[int, Tensor],
    edges: Sequence[Sequence[Recipe]],
    run: Run,
    given: Carriers | None,
    carriers: Carriers | None,
) -> dict[int, Tensor]:
    """What the second halves of separable convolutions return, where several are alike."""
    groups: dict[Hashable, list[tuple[Recipe, NormConvolution]]] = {}
    for recipes in edges:
        for recipe in recipes:
            y, layer = convolved.get(id(recipe)), next(iter(recipe.after), None)
            if y is not None and isinstance(layer, NormConvolution) and layer.pointwise is not None:
                assert recipe.depthwise is not None  # or nothing would be behind it
                # No sizes: torch.export may have none but symbols for them.
                key = recipe.depthwise.stride, layer.depthwise.stride, y.dtype
                groups.setdefault(key, []).append((recipe, layer))
    outputs: dict[int, Tensor] = {}
    for group in groups.values():
        for start in range(0, len(group), MAX_CANDIDATES):
            part = group[start : start + MAX_CANDIDATES]
            if len(part) > 1:
                shared = NormConvolutions([layer for _, layer in part])
                xs = [convolved[id(recipe)] for recipe, _ in part]
                last = all(len(recipe.after) == 1 for recipe, _ in part)
                if carriers is not None and given is not None and last:
                    known = given.take(xs)
                    ys, found = shared.carry(xs, [*known.values()] if len(known) == len(xs) else [])
                    carriers.put(ys, found)
                else:
                    ys = run(shared, *xs)
                outputs.update((id(recipe), y) for (recipe, _), y in zip(part, ys, strict=True))
    return outputs


def _reads_what_it_gets(recipe: Recipe) -> bool:
    """Whether nothing but a sum or a convolution of ours reads what a leading convolution returns.

    Any other layer would get a tensor without its carrier, and might write to it, return it as it
    is, or show it to others.
    """
    return not recipe.after or isinstance(recipe.after[0], NormConvolution)


def _halve(
    x: Tensor,
    edges: Sequence[Sequence[Recipe]],
    run: Run,
) -> dict[int, Tensor]:
    """What enters the BatchNorms of the factorized reduces, by identity of the recipe."""
    groups: dict[tuple[int, int], list[tuple[int, TwoHalves]]] = {}
    for recipes in edges:
        for recipe in recipes:
            if (halves := recipe.halves) is not None:
                conv = halves.convs[0]
                key = conv.in_channels, conv.out_channels
                groups.setdefault(key, []).append((id(recipe), halves))
    if not groups:
        return {}
    pixels = run(picked_pixels, x)
    outputs: dict[int, Tensor] = {}
    for group in groups.values():
        ys = run(SharedHalves([halves for _, halves in group], memory_format(x)), pixels)
        outputs.update((number, y) for (number, _), y in zip(group, ys, strict=True))
    return outputs


def _pool(
    x: Tensor,
    edges: Sequence[Sequence[Recipe]],
    run: Run,
    carriers: Carriers | None,
) -> dict[Hashable, Iterator[Tensor]]:
    """What pools return that have one of the other kind beside them, by key of the recipe.

    For every recipe with that key one tensor: the same, or one in the same memory.
    """
    counts = Counter(recipe.key for recipes in edges for recipe in recipes)
    outputs: dict[Hashable, Iterator[Tensor]] = {}
    for stride, pair in _POOL_PAIRS.items():
        if not counts.keys() >= set(pair):
            continue
        shared = SharedPools(stride)
        if carriers is None:
            outputs.update(zip(pair, map(repeat, run(shared, x)), strict=True))
            continue
        for key, ys, found in zip(
            pair, *shared.carry(x, max(counts[key] for key in pair)), strict=True
        ):
            carriers.put(ys, found)
            outputs[key] = iter(ys)
    return outputs


def _is_relu(layer: Layer) -> bool:
    """A ReLU that leaves its input alone."""
    return type(layer) is nn.ReLU and not layer.inplace and "forward" not in vars(layer)


def _is_norm(layer: Layer) -> bool:
    """A BatchNorm2d that computes what BatchNorm2d does."""
    return type(layer) is nn.BatchNorm2d and "forward" not in vars(layer)


def _is_depthwise(layer: Layer) -> bool:
    """A depthwise convolution as DARTS' candidates have them: square, same size, no bias."""
    if type(layer) is not nn.Conv2d or "forward" in vars(layer):
        return False
    (k, kw), (s, sw), (d, dw) = layer.kernel_size, layer.stride, layer.dilation
    channels = {layer.in_channels, layer.out_channels, layer.groups}
    return (
        (k, s, d) == (kw, sw, dw)
        and k in (1, 3, 5, 7)
        and s in (1, 2)
        and layer.padding == (d * (k // 2),) * 2
        and layer.padding_mode == "zeros"
        and layer.bias is None
        and len(channels) == 1
    )


def _is_pointwise(layers: Sequence[Layer]) -> bool:
    """One convolution that only mixes channels, as many as it gets, without a bias."""
    if len(layers) != 1 or not _mixes_channels(layer := layers[0]):
        return False
    return layer.in_channels == layer.out_channels  # type: ignore[attr-defined]  # a convolution


def _mixes_channels(layer: Layer) -> bool:
    """The same for any number of channels."""
    if type(layer) is not nn.Conv2d or "forward" in vars(layer):
        return False
    return (
        layer.kernel_size == layer.stride == (1, 1)
        and layer.padding == (0, 0)
        and layer.bias is None
        and layer.groups == 1
    )


def _pool_key(layer: Layer) -> Hashable:
    """What two pools have in common exactly if they compute the same; None for other layers."""
    if "forward" in getattr(layer, "__dict__", {}):
        return None
    if type(layer) is nn.MaxPool2d and not layer.return_indices:
        shape = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        return ("max", *shape, layer.ceil_mode)
    if isinstance(layer, nn.AvgPool2d) and type(layer) in AVERAGE_POOLS:
        sizes = (layer.kernel_size, layer.stride, layer.padding)
        return ("avg", *sizes, layer.ceil_mode, layer.count_include_pad, layer.divisor_override)
    return None


#: By stride: the keys of the pools that ``ops.pool_pair`` computes.
_POOL_PAIRS = {
    stride: (
        _pool_key(nn.MaxPool2d(3, stride, 1)),
        _pool_key(nn.AvgPool2d(3, stride, 1, count_include_pad=False)),
    )
    for stride in (1, 2)
}
