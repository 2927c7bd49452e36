# SPDX-License-Identifier: Apache-2.0
"""Searches too short to train their architecture: legitimate, and told at the start."""

from __future__ import annotations

import pytest
from proxyless_tiny import OPTIONS
from search_tiny import Recorder, config, images, registered

from fastnas.methods import METHODS, DA2SOptions, ProxylessOptions
from fastnas.search import PRESETS, Search, SearchConfig, preset_config
from fastnas.search.frozen import frozen_architecture
from fastnas.spaces import mbconv


@pytest.fixture(autouse=True, scope="module")
def _space():
    with registered():
        yield


pytestmark = pytest.mark.usefixtures("one_thread")

ALL_REST = (
    "the architecture takes no step: --arch-warmup-epochs {0} leaves every epoch (--epochs {1}) to "
    "the weights alone, and the genotype is read off the initial logits; try --epochs above {0}, "
    "or --arch-warmup-epochs below {1}"
)


class Listener(Recorder):
    """Keeps warnings too."""

    def warning(self, text: str) -> None:
        self.events.append(text)


def ran(settings: SearchConfig) -> tuple[list[str], set[str]]:
    """What a search said beside its steps, and the architecture parameters that it moved."""
    listener = Listener()
    search = Search(settings, data=images(), progress=listener)
    before = {name: value.clone() for name, value in search.arch.state_dict().items()}
    search.run()
    moved = {n for n, v in search.arch.state_dict().items() if not v.equal(before[n])}
    return [event for event in listener.events if not event.startswith("train ")], moved


def quick(method: str = "darts", **fields) -> SearchConfig:
    """Two epochs of three iterations, without tests."""
    return config(method, validate="never", gap=False, **fields)


@pytest.mark.parametrize("method", ["darts", "pc_darts", "da2s"])
@pytest.mark.parametrize(("warmup", "epochs"), [(1, 1), (2, 2), (5, 2)])
def test_warm_up_from_begin_to_end(method, warmup, epochs):
    options = {"options": DA2SOptions(keep="1,2")} if method == "da2s" else {}
    events, moved = ran(quick(method, epochs=epochs, arch_warmup_epochs=warmup, **options))
    ends = [f"epoch {number + 1}" for number in range(epochs)]
    assert events == ["start 0.0", ALL_REST.format(warmup, epochs), *ends, "end"]
    assert moved == set()


def test_with_steps_there_is_nothing_to_say():
    events, moved = ran(quick(arch_warmup_epochs=1))
    assert events[:2] == ["start 0.0", "epoch 1"]
    assert moved


@pytest.mark.parametrize(("warmup", "moves"), [(1, True), (2, False), (3, False)])
def test_alphas_of_da2s(warmup, moves):
    options = DA2SOptions(keep="1,2", alpha_warmup_epochs=warmup)
    events, moved = ran(quick("da2s", options=options))
    text = (
        f"the alphas take no step: --alpha-warmup-epochs {warmup} leaves every epoch (--epochs 2) "
        "to the weights and the betas, and the candidates of the genotype are read off the "
        f"initial alphas; try --epochs above {warmup}, or --alpha-warmup-epochs below 2"
    )
    assert (events[1] == text) is not moves
    assert any(name.startswith("alpha") for name in moved) is moves
    assert any(name.startswith("beta") for name in moved)


def proxyless(**options) -> SearchConfig:
    """A small search of blocks, three iterations an epoch."""
    fields = {name: getattr(quick(), name) for name in ("weight_share", "arch_share", "device")}
    return preset_config(
        method="proxyless",
        space="mbconv",
        **{**fields, "epochs": 2, "batch_size": 16, "arch_warmup_epochs": 0, "out": None},
        **{"validate": "never", "gap": False},
        network=mbconv.MBConvOptions(**OPTIONS),
        options=ProxylessOptions(**options),
    )


@pytest.mark.parametrize(("every", "moves"), [(3, True), (4, False), (9, False)])
def test_architecture_steps_of_proxyless_further_apart_than_an_epoch(every, moves):
    events, moved = ran(proxyless(arch_every=every))
    text = (
        f"the architecture takes no step: one is made after every {every} iterations of an epoch "
        "(--arch-every), which has 3, and the genotype is read off the initial logits; try "
        "--arch-every 3 or less"
    )
    assert (events[1] == text) is not moves
    assert bool(moved) is moves


def test_reinforce_takes_steps_in_every_epoch():
    settings = proxyless(estimator="reinforce", rl_samples=2, rl_updates=1)
    events, moved = ran(settings)
    assert events[1] == "epoch 1"
    assert moved


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_train_their_architecture(preset, method):
    settings = preset_config(preset, method=method, space="nasbench201")
    assert frozen_architecture(settings, 25) is None
