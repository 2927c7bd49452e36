# SPDX-License-Identifier: Apache-2.0
"""Layers that are one fused call in place of several modules of candidates."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastnas import ops
from fastnas.ops.pool_pair import run_pool_pair
from fastnas.ops.separable_each import run_separable_each
from fastnas.ops.separable_group import run_separable_group


class SharedPools:
    """A max pool and an average pool, of DARTS, as one fused call."""

    def __init__(self, stride: int) -> None:
        """Take the stride of both."""
        self.stride = stride

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``(N, C, H, W)`` to what each of them returns."""
        return ops.pool_pair(x, self.stride)

    def carry(self, x: Tensor, readers: int) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """The same for every reader, with the carriers of what is returned, if any."""
        return run_pool_pair(x, self.stride, readers)


class SharedConvolutions:
    """A ReLU and the convolutions behind it, all depthwise or all separable, as one fused call."""

    def __init__(self, pairs: Sequence[tuple[nn.Conv2d, nn.Conv2d | None]]) -> None:
        """Take what depthwise and pointwise convolutions of one stride hold now."""
        convs = [conv for conv, _ in pairs]
        self.weights = [_weight(conv) for conv in convs]
        #: Empty without pointwise convolutions.
        self.mixing = [_weight(conv) for _, conv in pairs if conv is not None]
        self.dilations = [conv.dilation[0] for conv in convs]
        self.stride = convs[0].stride[0]

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Map ``(N, C, H, W)`` to what each convolution, or pair of them, returns."""
        if self.mixing:
            return run_separable_group(x, self.weights, self.mixing, self.dilations, self.stride)[0]
        return ops.depthwise_group(x, self.weights, self.dilations, self.stride)

    def carry(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The same of separable convolutions, with the carriers of what is returned, if any."""
        arguments = self.weights, self.mixing, self.dilations, self.stride
        return run_separable_group(x, *arguments, carry=True)


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
            ((y,), _) = run_separable_group(x, weights, mixing, dilations, stride, norm)  # type: ignore[arg-type]
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
        return run_separable_each(xs, *arguments)[0]  # type: ignore[arg-type]  # as above

    def carry(
        self, xs: Sequence[Tensor], given: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The same with the carriers of ``xs``, or none, and those of what is returned, if any."""
        arguments = self.weights, self.mixing, self.dilations, self.norms, self.stride
        return run_separable_each(xs, *arguments, given=given, carry=True)  # type: ignore[arg-type]


def _weight(conv: nn.Conv2d) -> Tensor:
    """``conv.weight``, read where a plain convolution keeps it: attributes of modules are slow."""
    # A parametrization that was registered since the recipe was made takes it from there.
    weight = conv._parameters.get("weight")
    return conv.weight if weight is None else weight
