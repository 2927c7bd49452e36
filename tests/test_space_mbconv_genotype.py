# SPDX-License-Identifier: Apache-2.0
"""Architectures of the MBConv space as files: both variants of the published form, and mistakes."""

from __future__ import annotations

import copy
import json

import pytest

from fastnas.spaces import mbconv
from fastnas.spaces.mbconv import Genotype

MOBILE = mbconv.GENOTYPES["proxyless_mobile"]


@pytest.mark.parametrize("mid_channels", [False, True])
@pytest.mark.parametrize("name", sorted(mbconv.GENOTYPES))
def test_both_variants_are_read_and_written(name, mid_channels):
    genotype = mbconv.GENOTYPES[name]
    data = genotype.to_dict(mid_channels)
    before = copy.deepcopy(data)
    assert Genotype.from_dict(data) == genotype
    assert data == before, "reading changed its input"
    conv = data["blocks"][0]["mobile_inverted_conv"]
    assert ("mid_channels" in conv) == mid_channels
    assert Genotype.from_dict(json.loads(json.dumps(data))).to_dict(mid_channels) == data


def test_the_form_is_that_of_the_released_code():
    data = MOBILE.to_dict()
    assert list(data) == [
        "name",
        "bn",
        "first_conv",
        "blocks",
        "feature_mix_layer",
        "classifier",
    ]
    assert data["name"] == "ProxylessNASNets"
    assert data["bn"] == {"momentum": 0.1, "eps": 0.001}
    assert len(data["blocks"]) == 22
    assert data["first_conv"] == {
        "name": "ConvLayer",
        "kernel_size": 3,
        "stride": 2,
        "dilation": 1,
        "groups": 1,
        "bias": False,
        "has_shuffle": False,
        "in_channels": 3,
        "out_channels": 32,
        "use_bn": True,
        "act_func": "relu6",
        "dropout_rate": 0,
        "ops_order": "weight_bn_act",
    }
    assert data["blocks"][1] == {
        "name": "MobileInvertedResidualBlock",
        "mobile_inverted_conv": {
            "name": "MBInvertedConvLayer",
            "in_channels": 16,
            "out_channels": 32,
            "kernel_size": 5,
            "stride": 2,
            "expand_ratio": 3,
        },
        "shortcut": None,
    }
    assert data["blocks"][3]["mobile_inverted_conv"] == {"name": "ZeroLayer", "stride": 1}
    assert data["blocks"][3]["shortcut"]["name"] == "IdentityLayer"
    assert data["classifier"]["out_features"] == 1000


def test_a_given_number_of_channels_between_is_kept():
    data = MOBILE.to_dict()
    data["blocks"][2]["mobile_inverted_conv"]["mid_channels"] = 100
    genotype = Genotype.from_dict(data)
    assert genotype.blocks[2].mid_channels == 100
    assert genotype.to_dict() == data
    net = mbconv.Network(genotype)
    assert net.blocks[2].mobile_inverted_conv.depth_conv.conv.out_channels == 100


def test_a_skipped_block_needs_no_shortcut_in_the_file():
    data = MOBILE.to_dict()
    data["blocks"][3]["shortcut"] = None
    genotype = Genotype.from_dict(data)
    assert genotype.blocks[3].skipped and genotype.to_dict() == data


def change(path, value):
    """A copy of a good file with one value changed, or taken out."""
    data = MOBILE.to_dict()
    at = data
    *way, last = path
    for key in way:
        at = at[key]
    if value is KeyError:
        del at[last]
    else:
        at[last] = value
    return data


CONV = ("blocks", 1, "mobile_inverted_conv")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("name",), "OFA", "name is 'OFA', wanted 'ProxylessNASNets'"),
        (("bn",), KeyError, "bn is missing"),
        (("bn", "eps"), "small", "bn.eps is 'small', wanted a number from 0 to 1"),
        (("first_conv", "act_func"), "swish", "first_conv.act_func is 'swish', wanted 'relu6'"),
        (("first_conv", "stride"), 3, "first_conv.stride is 3, wanted an integer from 1 to 2"),
        (("first_conv", "groups"), True, "first_conv.groups is True, wanted 1"),
        (("blocks",), {}, "blocks is {}, wanted a list of 1 to 1000 blocks"),
        (("blocks", 4), None, r"blocks\[4\] is None, wanted an object"),
        ((*CONV, "kernel_size"), 4, r"blocks\[1\].mobile_inverted_conv.kernel_size is 4, wanted"),
        ((*CONV, "kernel_size"), True, "kernel_size is True, wanted an integer"),
        ((*CONV, "expand_ratio"), 0, "expand_ratio is 0, wanted a number"),
        ((*CONV, "in_channels"), 24, r"mobile_inverted_conv.in_channels is 24, wanted 16"),
        ((*CONV, "mid_channels"), -1, "mid_channels is -1, wanted an integer from 1"),
        ((*CONV, "name"), "SEConv", "name is 'SEConv', wanted 'MBInvertedConvLayer' or"),
        (("blocks", 1, "shortcut"), KeyError, r"blocks\[1\].shortcut is missing"),
        (
            ("blocks", 1, "shortcut"),
            MOBILE.to_dict()["blocks"][2]["shortcut"],
            r"blocks\[1\].shortcut.in_channels is 32, wanted 16",
        ),
        (("blocks", 2, "shortcut", "name"), "ConvLayer", "shortcut.name is 'ConvLayer', wanted"),
        (("feature_mix_layer", "in_channels"), 3, "feature_mix_layer.in_channels is 3, wanted 320"),
        (("classifier", "in_features"), 7, "classifier.in_features is 7, wanted 1280"),
        (("classifier", "dropout_rate"), float("nan"), "classifier.dropout_rate is nan, wanted"),
        (("use_se",), True, "unknown field 'use_se'"),
        ((*CONV, "use_se"), False, r"unknown field 'blocks\[1\].mobile_inverted_conv.use_se'"),
        (
            ("blocks", 3, "mobile_inverted_conv", "mid_channels"),
            None,
            "unknown field .*mid_channels",
        ),
        ((*CONV, "expand_ratio"), 0.01, "expand_ratio is 0.01, wanted one that gives 1 to 1048576"),
        ((*CONV, "expand_ratio"), 1 << 20, "is 1048576, wanted one that gives 1 to 1048576 chan"),
        (
            ("blocks", 0, "mobile_inverted_conv", "mid_channels"),
            33,
            "mid_channels is 33, wanted 32 with an expand_ratio of 1",
        ),
    ],
)
def test_a_malformed_file_gets_a_sentence_that_names_the_key(path, value, message):
    with pytest.raises(ValueError, match=message) as caught:
        Genotype.from_dict(change(path, value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", '{"name": 1}', "[" * 100_000])
def test_what_is_no_such_file(text, tmp_path):
    with pytest.raises(ValueError, match=r"^genotype: "):
        Genotype.from_json(text)
    path = tmp_path / "net.config"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"net\.config: genotype: "):
        Genotype.load(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Genotype.load(tmp_path / "nothing")


def test_blocks_that_do_not_fit():
    block = mbconv.MBBlock(32, 16, 1, 3, 1, False)
    with pytest.raises(ValueError, match=r"blocks\[1\] takes 32 channels, but gets 16"):
        Genotype(3, 32, 2, (block, block), 64, 10)
    with pytest.raises(ValueError, match=r"blocks\[0\] has a shortcut, but maps 32 to 16"):
        Genotype(3, 32, 2, (mbconv.MBBlock(32, 16, 1, 3, 1, True),), 64, 10)
    with pytest.raises(ValueError, match=r"ops\[0\]: expected one of .* but got 'Zero'"):
        Genotype.build(mbconv.MBConvOptions().layout(3, 10), ["Zero"] * 21)
    with pytest.raises(ValueError, match="expected 21 candidates, but got 1"):
        Genotype.build(mbconv.MBConvOptions().layout(3, 10), ["Zero"])


def test_as_a_line_of_text():
    assert str(MOBILE).startswith(
        "stem 32/2, 3x3_MBConv1 16, 5x5_MBConv3 32/2, 3x3_MBConv3 32, Zero, Zero, 7x7_MBConv3 40/2"
    )
