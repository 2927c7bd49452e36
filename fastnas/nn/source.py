# SPDX-License-Identifier: Apache-2.0
"""All candidates that read one state, run together: what they share is computed once.

A state of a cell is read by every edge that leaves it, and by every candidate of each. The
convolutions among them, separable or only depthwise, with the ReLU in front, are one fused call,
pools that are set alike are one tensor, a max pool and an average pool one call, and factorized
reduces share the pixels they pick and one product of matrices. Everything else is called as it
stands.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastnas import ops
from fastnas.nn.halves import SharedHalves, TwoHalves, picked_pixels
from fastnas.nn.pool import AVERAGE_POOLS
from fastnas.ops._common import MAX_CANDIDATES, memory_format
from fastnas.ops.separable_each import run_separable_each
from fastnas.ops.separable_group import run_separable_group

__all__ = ["Recipe", "evaluate_source", "is_faster", "make_recipe"]

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
    #: Candidates with equal keys return the same tensor.
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
) -> list[list[Tensor]]:
    """Run the candidates of all edges that leave one state.

    Args:
        x: the state, ``(N, C, H, W)``.
        edges: for each edge the recipes of its candidates.
        run: how a layer is called with its inputs (``fastnas.nn.recompute`` has another way).

    Returns:
        For each edge what its candidates return, in their order; some may be the same tensor.
    """
    convolved = _convolve(x, edges, run) if is_faster("convolutions", x) else {}
    convolved.update(_halve(x, edges, run))
    again = _convolve_again(convolved, edges, run)
    shared = _pool(x, edges, run) if is_faster("pools", x) else {}
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
                    shared[recipe.key] = run(layers[0], x)
                h, layers = shared[recipe.key], ()
            elif recipe.rectified is not None and is_faster("rectified", x):
                layers = (recipe.rectified,)
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
}


def is_faster(way: str, x: Tensor) -> bool:
    """Whether to go that way with ``x``."""
    return x.device.type in _FASTER[way]


def _convolve(
    x: Tensor,
    edges: Sequence[Sequence[Recipe]],
    run: Run,
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
            ys = run(SharedConvolutions(part), x)
            outputs.update((id(recipe), y) for recipe, y in zip(part, ys, strict=True))
    return outputs


def _convolve_again(
    convolved: dict[int, Tensor], edges: Sequence[Sequence[Recipe]], run: Run
) -> dict[int, Tensor]:
    """What the second halves of separable convolutions return, where several are alike."""
    groups: dict[Hashable, list[tuple[int, NormConvolution]]] = {}
    for recipes in edges:
        for recipe in recipes:
            y, layer = convolved.get(id(recipe)), next(iter(recipe.after), None)
            if y is not None and isinstance(layer, NormConvolution) and layer.pointwise is not None:
                key = layer.depthwise.stride, y.shape, y.dtype
                groups.setdefault(key, []).append((id(recipe), layer))
    outputs: dict[int, Tensor] = {}
    for group in groups.values():
        for start in range(0, len(group), MAX_CANDIDATES):
            part = group[start : start + MAX_CANDIDATES]
            if len(part) > 1:
                layers = [layer for _, layer in part]
                ys = run(NormConvolutions(layers), *(convolved[number] for number, _ in part))
                outputs.update((number, y) for (number, _), y in zip(part, ys, strict=True))
    return outputs


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
) -> dict[Hashable, Tensor]:
    """What pools return that have one of the other kind beside them, by key of the recipe."""
    keys = {recipe.key for recipes in edges for recipe in recipes}
    outputs: dict[Hashable, Tensor] = {}
    for stride, pair in _POOL_PAIRS.items():
        if keys.issuperset(pair):
            outputs.update(zip(pair, run(SharedPools(stride), x), strict=True))
    return outputs


class SharedPools:
    """A max pool and an average pool, of DARTS, as one fused call."""

    def __init__(self, stride: int) -> None:
        """Take the stride of both."""
        self.stride = stride

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``(N, C, H, W)`` to what each of them returns."""
        return ops.pool_pair(x, self.stride)


class SharedConvolutions:
    """A ReLU and the convolutions behind it, all depthwise or all separable, as one fused call."""

    def __init__(self, recipes: Sequence[Recipe]) -> None:
        """Take what the modules hold now; the strides of all recipes are the same."""
        convs = [recipe.depthwise for recipe in recipes if recipe.depthwise is not None]
        self.weights = [_weight(conv) for conv in convs]
        #: Empty without pointwise convolutions.
        self.mixing = [_weight(r.pointwise) for r in recipes if r.pointwise is not None]
        self.dilations = [conv.dilation[0] for conv in convs]
        self.stride = convs[0].stride[0]

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Map ``(N, C, H, W)`` to what each recipe's convolutions return."""
        if self.mixing:
            return run_separable_group(x, self.weights, self.mixing, self.dilations, self.stride)
        return ops.depthwise_group(x, self.weights, self.dilations, self.stride)


class Rectified:
    """A ReLU and a convolution that only mixes channels, as one fused call."""

    def __init__(self, conv: nn.Conv2d) -> None:
        """Take the convolution; its weight is read at every call."""
        self.conv = conv

    def __call__(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to what the convolution returns."""
        return ops.relu_pointwise(x, self.conv.weight)


class NormConvolution:
    """BatchNorm, ReLU and a depthwise or separable convolution as one fused call."""

    def __init__(
        self, norm: nn.BatchNorm2d, depthwise: nn.Conv2d, pointwise: nn.Conv2d | None = None
    ) -> None:
        """Take the modules; what they hold is read at every call."""
        self.norm, self.depthwise, self.pointwise = norm, depthwise, pointwise

    def __call__(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to what the last convolution returns."""
        conv, norm = self.depthwise, self.norm
        weights, dilations, stride = [conv.weight], [conv.dilation[0]], conv.stride[0]
        if self.pointwise is None:
            (y,) = ops.batch_norm_depthwise(x, norm, weights, dilations, stride)  # type: ignore[arg-type]  # torch declares its Parameters as always there
        else:
            mixing = [self.pointwise.weight]
            (y,) = run_separable_group(x, weights, mixing, dilations, stride, norm)  # type: ignore[arg-type]
        return y


class NormConvolutions:
    """Several of them with a pointwise convolution, each of its own input, as one fused call."""

    def __init__(self, layers: Sequence[NormConvolution]) -> None:
        """Take what is alike but for its weights, norms and dilations."""
        self.layers = layers
        self.norms = [layer.norm for layer in layers]
        self.weights = [_weight(layer.depthwise) for layer in layers]
        self.mixing = [_weight(layer.pointwise) for layer in layers if layer.pointwise is not None]
        self.dilations = [layer.depthwise.dilation[0] for layer in layers]
        self.stride = layers[0].depthwise.stride[0]

    def __call__(self, *xs: Tensor) -> list[Tensor]:
        """Map each ``(N, C, H, W)`` to what its convolutions return."""
        arguments = self.weights, self.mixing, self.dilations, self.norms, self.stride
        return run_separable_each(xs, *arguments)  # type: ignore[arg-type]  # as above


def _weight(conv: nn.Conv2d) -> Tensor:
    """``conv.weight``, read where a plain convolution keeps it: attributes of modules are slow."""
    # A parametrization that was registered since the recipe was made changes the class.
    weight = conv._parameters.get("weight") if type(conv) is nn.Conv2d else None
    return conv.weight if weight is None else weight


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
