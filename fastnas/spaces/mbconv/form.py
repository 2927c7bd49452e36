# SPDX-License-Identifier: Apache-2.0
"""The JSON form in which the released code of ProxylessNAS writes a network (``net.config``).

There are two variants: with ``mid_channels`` (from a search) and without (the published files).
Fields that only say what every network of this space has are checked, and not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from fastnas.spaces.genotype_file import short

if TYPE_CHECKING:
    from fastnas.spaces.mbconv.genotype import Genotype, MBBlock

__all__ = ["NAME", "read_network", "write_network"]

NAME = "ProxylessNASNets"
"""``name`` of such a file."""

_BLOCK, _CONV, _ZERO, _LINEAR = (
    "MobileInvertedResidualBlock",
    "MBInvertedConvLayer",
    "ZeroLayer",
    "LinearLayer",
)
_MAX_CHANNELS = 1 << 20
_MAX_BLOCKS = 1000

_CONV_LAYER = {
    "name": "ConvLayer",
    "dilation": 1,
    "groups": 1,
    "bias": False,
    "has_shuffle": False,
    "use_bn": True,
    "act_func": "relu6",
    "dropout_rate": 0,
    "ops_order": "weight_bn_act",
}
_IDENTITY = {
    "name": "IdentityLayer",
    "use_bn": False,
    "act_func": None,
    "dropout_rate": 0,
    "ops_order": "weight_bn_act",
}
_CLASSIFIER = {
    "name": _LINEAR,
    "bias": True,
    "use_bn": False,
    "act_func": None,
    "ops_order": "weight_bn_act",
}


# --- writing ---------------------------------------------------------------------------------


def write_network(genotype: Genotype, mid_channels: bool) -> dict[str, Any]:
    """The form of a genotype; ``mid_channels`` chooses the variant."""
    width = genotype.blocks[-1].out_channels if genotype.blocks else genotype.stem_channels
    return {
        "name": NAME,
        "bn": {"momentum": genotype.bn_momentum, "eps": genotype.bn_eps},
        "first_conv": _conv_layer(
            3, genotype.stem_stride, genotype.in_channels, genotype.stem_channels
        ),
        "blocks": [_block(block, mid_channels) for block in genotype.blocks],
        "feature_mix_layer": _conv_layer(1, 1, width, genotype.head_channels),
        "classifier": {
            "name": _LINEAR,
            "in_features": genotype.head_channels,
            "out_features": genotype.num_classes,
            "bias": True,
            "use_bn": False,
            "act_func": None,
            "dropout_rate": genotype.dropout,
            "ops_order": "weight_bn_act",
        },
    }


def _conv_layer(kernel: int, stride: int, C_in: int, C_out: int) -> dict[str, Any]:
    return {
        "name": "ConvLayer",
        "kernel_size": kernel,
        "stride": stride,
        "dilation": 1,
        "groups": 1,
        "bias": False,
        "has_shuffle": False,
        "in_channels": C_in,
        "out_channels": C_out,
        "use_bn": True,
        "act_func": "relu6",
        "dropout_rate": 0,
        "ops_order": "weight_bn_act",
    }


def _block(block: MBBlock, mid_channels: bool) -> dict[str, Any]:
    if block.skipped:
        conv: dict[str, Any] = {"name": _ZERO, "stride": block.stride}
    else:
        conv = {
            "name": _CONV,
            "in_channels": block.in_channels,
            "out_channels": block.out_channels,
            "kernel_size": block.kernel_size,
            "stride": block.stride,
            "expand_ratio": block.expand_ratio,
        }
        if mid_channels or block.mid_channels is not None:
            conv["mid_channels"] = block.mid_channels
    shortcut = None
    if block.residual:
        shortcut = {
            "name": "IdentityLayer",
            "in_channels": block.in_channels,
            "out_channels": block.out_channels,
            "use_bn": False,
            "act_func": None,
            "dropout_rate": 0,
            "ops_order": "weight_bn_act",
        }
    return {"name": _BLOCK, "mobile_inverted_conv": conv, "shortcut": shortcut}


# --- reading ---------------------------------------------------------------------------------


def read_network(data: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The fields of a genotype, and those of its blocks; nothing in ``data`` is changed.

    Raises:
        ValueError: a key is missing or wrong; one sentence that names it.
    """
    net = _Node(data, "")
    net.constant("name", NAME)
    bn = net.child("bn")
    first, mix, classifier = (
        net.child(key) for key in ("first_conv", "feature_mix_layer", "classifier")
    )
    for layer in (first, mix):
        layer.constants(_CONV_LAYER)
    first.constant("kernel_size", 3)
    mix.constant("kernel_size", 1)
    mix.constant("stride", 1)
    stem = first.integer("out_channels")
    blocks = []
    width = stem
    for node in net.children("blocks", _MAX_BLOCKS):
        block = _read_block(node, width)
        width = block["out_channels"]
        blocks.append(block)
    mix.constant("in_channels", width)
    head = mix.integer("out_channels")
    classifier.constants(_CLASSIFIER)
    classifier.constant("in_features", head)
    fields = {
        "in_channels": first.integer("in_channels"),
        "stem_channels": stem,
        "stem_stride": first.integer("stride", 2),
        "head_channels": head,
        "num_classes": classifier.integer("out_features"),
        "dropout": classifier.number("dropout_rate", 0, 1),
        "bn_momentum": bn.number("momentum", 0, 1),
        "bn_eps": bn.number("eps", 0, 1),
    }
    for node in (net, bn, first, mix, classifier):
        node.check_all_read()
    return fields, blocks


def _read_block(node: _Node, width: int) -> dict[str, Any]:
    """One block, into which ``width`` channels go."""
    node.constant("name", _BLOCK)
    conv = node.child("mobile_inverted_conv")
    residual = node.value("shortcut") is not None
    if conv.one_of("name", (_CONV, _ZERO)) == _ZERO:
        conv.constant("stride", 1)
        block = {"in_channels": width, "out_channels": width, "stride": 1}
        block |= {"kernel_size": 0, "expand_ratio": 0}
    else:
        conv.constant("in_channels", width)
        block = {
            "in_channels": width,
            "out_channels": conv.integer("out_channels"),
            "stride": conv.integer("stride", 2),
            "kernel_size": conv.odd("kernel_size"),
            "expand_ratio": conv.number("expand_ratio", 0, _MAX_CHANNELS, above=True),
        }
        between = round(block["expand_ratio"] * width)
        if conv.get("mid_channels") is not None:
            between = block["mid_channels"] = conv.integer("mid_channels")
            if block["expand_ratio"] == 1 and between != width:
                conv.wrong("mid_channels", f"{width} with an expand_ratio of 1")
        if not 1 <= between <= _MAX_CHANNELS:
            conv.wrong("expand_ratio", f"one that gives 1 to {_MAX_CHANNELS} channels between")
    if residual:
        shortcut = node.child("shortcut")
        shortcut.constants(_IDENTITY)
        shortcut.constant("in_channels", width)
        shortcut.constant("out_channels", width)
        if (block["stride"], block["out_channels"]) != (1, width):
            node.wrong("shortcut", "null where a block changes stride or channels")
        shortcut.check_all_read()
    node.check_all_read()
    conv.check_all_read()
    return {**block, "residual": residual}


class _Node:
    """An object of the file, with the way to it for messages."""

    def __init__(self, data: Any, path: str) -> None:
        if not isinstance(data, Mapping):
            what = path or "the file"
            raise ValueError(f"genotype: {what} is {short(data)}, wanted an object")
        self._data, self._path = data, path
        self._read: set[str] = set()

    def get(self, key: str) -> Any:
        self._read.add(key)
        return self._data.get(key)

    def value(self, key: str) -> Any:
        if key not in self._data:
            raise ValueError(f"genotype: {self._at(key)} is missing")
        return self.get(key)

    def check_all_read(self) -> None:
        """Refuse a key that nobody has asked for: it would be of another kind of network."""
        if unknown := sorted(map(str, set(self._data) - self._read)):
            raise ValueError(f"genotype: unknown field {short(self._at(unknown[0]))}")

    def child(self, key: str) -> _Node:
        return _Node(self.value(key), self._at(key))

    def children(self, key: str, most: int) -> list[_Node]:
        found = self.value(key)
        if not isinstance(found, list) or not 1 <= len(found) <= most:
            self.wrong(key, f"a list of 1 to {most} blocks")
        return [_Node(item, f"{self._at(key)}[{i}]") for i, item in enumerate(found)]

    def constant(self, key: str, wanted: Any) -> None:
        found = self.value(key)
        if found != wanted or isinstance(found, bool) != isinstance(wanted, bool):
            self.wrong(key, repr(wanted))

    def constants(self, wanted: Mapping[str, Any]) -> None:
        for key, value in wanted.items():
            self.constant(key, value)

    def one_of(self, key: str, choices: tuple[str, ...]) -> Any:
        return self._checked(key, lambda v: v in choices, " or ".join(map(repr, choices)))

    def integer(self, key: str, most: int = _MAX_CHANNELS) -> int:
        return self._checked(
            key,
            lambda v: isinstance(v, int) and not isinstance(v, bool) and 1 <= v <= most,
            f"an integer from 1 to {most}",
        )

    def odd(self, key: str) -> int:
        value = self.integer(key, 31)
        if value % 2 == 0:
            self.wrong(key, "an odd integer")
        return value

    def number(self, key: str, least: float, most: float, above: bool = False) -> Any:
        return self._checked(
            key,
            lambda v: (
                isinstance(v, (int, float))
                and not isinstance(v, bool)
                and (least < v if above else least <= v)
                and v <= most
            ),
            f"a number from {least} to {most}",
        )

    def wrong(self, key: str, wanted: str) -> None:
        found = short(self.value(key))
        raise ValueError(f"genotype: {self._at(key)} is {found}, wanted {wanted}")

    def _checked(self, key: str, good: Callable[[Any], bool], wanted: str) -> Any:
        value = self.value(key)
        if not good(value):
            self.wrong(key, wanted)
        return value

    def _at(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key
