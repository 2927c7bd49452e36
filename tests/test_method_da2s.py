# SPDX-License-Identifier: Apache-2.0
"""DA2S: its losses, transforms and schedules at every published number, targets, derivation."""

from __future__ import annotations

import math

import pytest
import search_tiny as tiny
import torch
from torch import Tensor

from fastnas.methods import DA2S, ArchParameters, DA2SOptions, Moment
from fastnas.methods.da2s import capped, edge_loss, least_sum_weight, released_logits
from fastnas.nn.candidates import DARTS_PRIMITIVES
from fastnas.search import Search, preset_config
from fastnas.spaces import SPACES, CellSpec, count_parameters

SPEC = CellSpec((2, 3, 4, 5), DARTS_PRIMITIVES[1:])
SPECS = {"normal": SPEC, "reduce": SPEC}
DARTS = SPACES["darts"]
TARGETS = ["2", "1", "2,2,2,2", "1,2,2,3", "2,3,4,5", "1,1,4,5", "total:4", "total:9", "total:14"]


def method(keep: str = "2", **options: object) -> DA2S:
    return DA2S(SPECS, DA2SOptions(keep=keep, **options))


def at(epoch: int, epochs: int = 50) -> Moment:
    """Epochs count from 1 here, as in the papers' code."""
    return Moment(epoch=epoch - 1, epochs=epochs, step=0)


def start(da2s: DA2S) -> ArchParameters:
    """The start values without their noise."""
    arch = da2s.parameters()
    with torch.no_grad():
        for kind in SPECS:
            arch.alpha(kind).zero_()
            for group, beta in da2s._raw_betas(arch, kind):
                beta.fill_(group.keep / group.count)
    return arch


# --- transforms and losses ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "value"), [(0.5, 1), (-0.5, -1), (-1, -8), (-2, -64), (0.7, 1.4)]
)
def test_released_logits(alpha: float, value: float) -> None:
    assert released_logits(torch.tensor(alpha)).item() == pytest.approx(value)


@pytest.mark.parametrize(
    ("alpha", "slope"), [(3.0, 2), (0.2, 2), (-0.5, 2), (-0.5 - 1e-6, 6), (-1, 24), (-2, 96)]
)
def test_slope_of_the_released_logits(alpha: float, slope: float) -> None:
    x = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    released_logits(x).backward()
    assert x.grad.item() == pytest.approx(slope, rel=1e-4)


def test_capped_betas() -> None:
    beta = torch.tensor([-3.0, 0.5, 1.0, 1.5], requires_grad=True)
    b = capped(beta)
    assert b.tolist() == [-3.0, 0.5, 1.0, 1.0]
    b.sum().backward()
    assert beta.grad.tolist() == [1.0, 1.0, 0.0, 0.0]


def test_limits_of_the_losses() -> None:
    da2s = method()
    arch = start(da2s)
    assert da2s.operation_loss(arch).item() == pytest.approx(28 * math.log(7), abs=1e-4)
    assert da2s.operation_loss(arch).item() == pytest.approx(54.4855, abs=1e-4)
    entropies = 2 * (math.log(3) + math.log(4) + math.log(5))
    assert da2s.edge_loss(arch).item() == pytest.approx(entropies, abs=1e-5)
    assert entropies == pytest.approx(8.1887, abs=1e-4)
    # The released code begins at .666 instead of 2/3.
    rounded = edge_loss(torch.full((3,), 0.666), 2, 0.2) - math.log(3)
    assert 2 * rounded.item() == pytest.approx(1.6e-6, abs=2e-7)


def test_the_ideal_final_state() -> None:
    da2s = method()
    arch = start(da2s)
    with torch.no_grad():
        for kind in SPECS:
            arch.alpha(kind)[:, 4] = 30.0
            arch.beta(kind).fill_(-1e4)
            for rows in da2s._raw_betas(arch, kind):
                rows[1][:2] = 1.0
    assert da2s.operation_loss(arch).item() == pytest.approx(0, abs=1e-5)
    assert da2s.edge_loss(arch).item() == pytest.approx(6 * math.log(2), abs=1e-5)
    assert 6 * math.log(2) == pytest.approx(4.1589, abs=1e-4)


def test_half_and_half() -> None:
    p = torch.softmax(torch.tensor([1.0, 1.0, 0.0]), 0)
    torch.testing.assert_close(p, torch.tensor([0.4223, 0.4223, 0.1554]), atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    ("epoch", "loss"),
    [(1, 2.302585), (8, 2.770510), (9, 3.002325), (25, 5.970611), (50, 11.060911)],
)
def test_whole_loss(epoch: int, loss: float) -> None:
    da2s = method()
    task = torch.tensor(math.log(10))
    assert da2s.objective(task, start(da2s), at(epoch)).item() == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("parametrisation", ["released", "plain"])
@pytest.mark.parametrize("value", [-2.35, -60.0, 1e4, -1e20, 3.4e38, -3.4e38, math.inf, -math.inf])
def test_no_nan_at_any_logit(parametrisation: str, value: float) -> None:
    da2s = method(parametrisation=parametrisation)
    arch = start(da2s)
    with torch.no_grad():
        arch.alpha("normal")[::2, 3] = value
        arch.beta("normal")[::2] = value
    loss = da2s.objective(torch.zeros(()), arch, at(50))
    weights = da2s.weights(arch, at(50))["normal"]
    total = loss + weights.ops.square().sum() + weights.edges.square().sum()
    total.backward()
    assert total.isfinite() and weights.ops.isfinite().all() and weights.edges.isfinite().all()
    assert all(p.grad.isfinite().all() for p in arch.parameters())


def test_plain_takes_alpha_as_it_is() -> None:
    da2s, released = method(parametrisation="plain"), method()
    arch = da2s.parameters()
    with torch.no_grad():
        arch.alpha("reduce").normal_()
    expected = torch.softmax(arch.alpha("reduce"), -1)
    torch.testing.assert_close(da2s.weights(arch, at(1))["reduce"].ops, expected)
    doubled = torch.softmax(released_logits(arch.alpha("reduce")), -1)
    torch.testing.assert_close(released.weights(arch, at(1))["reduce"].ops, doubled)


# --- stability of the target -------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "least"), [(1, 0), (2, 1 / 8), (3, 1 / 9), (4, 3 / 32)])
def test_least_sum_weight(keep: int, least: float) -> None:
    assert least_sum_weight(keep) == pytest.approx(least)


def descend(keep: int, weight: float, cap: bool = True) -> Tensor:
    """Betas after a descent from just beside the target's state, the dropped ones far away."""
    beta = torch.cat([torch.ones(keep), torch.full((5 - keep,), -40.0)]).double()
    beta[0] -= 1e-3
    beta.requires_grad_()
    for _ in range(1000):
        loss = edge_loss(capped(beta) if cap else beta, keep, weight)
        (gradient,) = torch.autograd.grad(loss, beta)
        with torch.no_grad():
            beta -= 1.5 * gradient
    return beta.detach()


@pytest.mark.parametrize("keep", [2, 3, 4])
def test_the_target_is_stable_above_the_least_weight_only(keep: int) -> None:
    stable = descend(keep, least_sum_weight(keep) * 1.1)
    assert (stable[:keep] - 1).abs().max() < 1e-2
    unstable = descend(keep, least_sum_weight(keep) * 0.9)
    assert unstable[0] < 0.9


def test_without_the_cap_the_target_is_not_stable() -> None:
    assert (descend(2, 0.2, cap=False)[:2] - 1).abs().max() > 0.5


def test_one_edge_left_is_lower_than_two() -> None:
    far = -1e4
    one = edge_loss(torch.tensor([1.0, far, far]), 2, 0.2).item()
    two = edge_loss(torch.tensor([1.0, 1.0, far]), 2, 0.2).item()
    assert one == pytest.approx(0.2) and two == pytest.approx(math.log(2))
    between = [edge_loss(torch.tensor([1.0, x, far]), 2, 0.2).item() for x in (0.2, 0.1, 0.0, -0.2)]
    assert max(between) == pytest.approx(0.78, abs=0.01)


def test_the_weight_is_checked_against_the_target() -> None:
    with pytest.raises(ValueError, match=r"sum_weight: expected more than 0\.125, or 2 edges"):
        method("2", sum_weight=0.125)
    method("1", sum_weight=1e-3)
    method("2,3,4,5", sum_weight=0.0)
    with pytest.raises(ValueError, match=r"sum_weight: expected more than 0\.1111, or 3 edges"):
        method("1,1,1,3", sum_weight=0.11)


# --- parameters and weights --------------------------------------------------------------------


def test_supernet_without_none() -> None:
    options = DA2S.supernet_options(DA2SOptions())
    net = DARTS.supernet(C=16, layers=8, num_classes=10, **options)
    assert net.cell_specs["normal"].primitives == DARTS_PRIMITIVES[1:]
    assert count_parameters(net) == 1_930_618
    partial = DARTS.supernet(C=16, **DA2S.supernet_options(DA2SOptions(partial_channels=4)))
    assert partial.cell_specs == net.cell_specs and count_parameters(partial) < 300_000


def test_parameters() -> None:
    arch = method().parameters()
    for kind in SPECS:
        assert arch.alpha(kind).shape == (14, 7) and 0 < arch.alpha(kind).abs().max() < 1e-3
        expected = torch.tensor([2 / 3] * 3 + [0.5] * 4 + [0.4] * 5)
        torch.testing.assert_close(arch.beta(kind), expected, atol=1e-3, rtol=0)
        assert not torch.equal(arch.beta(kind), expected)


@pytest.mark.parametrize("keep", TARGETS)
def test_equal_betas_are_the_plain_sum(keep: str) -> None:
    da2s = method(keep)
    edges = da2s.weights(start(da2s), at(1))["normal"].edges
    torch.testing.assert_close(edges, torch.ones(14))


@pytest.mark.parametrize("keep", TARGETS)
def test_betas_begin_at_the_target(keep: str) -> None:
    da2s = method(keep)
    arch = da2s.parameters()
    for kind in SPECS:
        for group, beta in da2s._raw_betas(arch, kind):
            assert beta.sum().item() == pytest.approx(group.keep, abs=2e-3)


def test_each_kind_of_cell_has_its_own_betas() -> None:
    """The released code swaps them."""
    da2s = method()
    arch = start(da2s)
    with torch.no_grad():
        arch.beta("normal")[0] = -5.0
    weights = da2s.weights(arch, at(1))
    assert weights["normal"].edges[2] < 0.01
    torch.testing.assert_close(weights["reduce"].edges, torch.ones(14))
    kept = da2s.kept(arch)
    assert not kept["normal"][2] and kept["reduce"][2]


def test_gradients_reach_alphas_and_betas() -> None:
    da2s = method("1,2,2,3")
    arch = da2s.parameters()
    da2s.objective(torch.zeros(()), arch, at(50)).backward()
    for kind in SPECS:
        assert arch.alpha(kind).grad.abs().sum() > 0
        assert arch.beta(kind).grad.abs().min() > 0


# --- targets and derivation --------------------------------------------------------------------


@pytest.mark.parametrize("keep", TARGETS)
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_derivation_meets_the_target_exactly(keep: str, spread: float) -> None:
    da2s = method(keep)
    for _ in range(5):
        arch = da2s.parameters()
        with torch.no_grad():
            for parameter in arch.parameters():
                parameter.copy_(spread * torch.randn_like(parameter))
        genotype = da2s.derive(arch, DARTS)
        for inputs in (genotype.normal_inputs, genotype.reduce_inputs):
            if da2s.target.total is not None:
                assert sum(inputs) == da2s.target.total and min(inputs) >= 1
            else:
                assert inputs in (da2s.target.per_node, da2s.target.per_node * 4)


def test_betas_choose_the_edges_and_alphas_the_candidates() -> None:
    da2s = method("1,2,2,3")
    arch = start(da2s)
    with torch.no_grad():
        arch.alpha("normal")[:, 2] = 0.1  # skip_connect
        arch.alpha("normal")[12, 3] = 0.7  # sep_conv_3x3, the best of all, on an edge that stays
        arch.alpha("normal")[13, 4] = 2.0  # better still, on one that does not
        arch.beta("normal").copy_(torch.tensor([0, 1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 0.0]))
    skip = "skip_connect"
    assert da2s.derive(arch, DARTS).nodes("normal") == (
        ((skip, 1),),
        ((skip, 1), (skip, 2)),
        ((skip, 2), (skip, 3)),
        (("sep_conv_3x3", 3), (skip, 0), (skip, 2)),
    )


def test_a_total_lets_edges_go_where_they_are_strong() -> None:
    da2s = method("total:7")
    arch = start(da2s)
    with torch.no_grad():
        arch.beta("normal").copy_(torch.linspace(0, 1, 14))
    inputs = da2s.derive(arch, DARTS).normal_inputs
    assert inputs == (1, 1, 1, 4)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("", "keep: expected the edges of every node .*, but got ''"),
        ("0", "keep: expected the edges"),
        ("2,0,1,1", "keep: expected the edges"),
        ("two", "keep: expected the edges"),
        ("total:4,4", "keep: expected the edges"),
        ("-2", "keep: expected the edges"),
        ("6", "keep: expected at most 2 at node 2, which has no more edges, but got 6"),
        ("1,2,3", "keep: expected one number or 4, one for each node, but got 3"),
        ("1,2,5,1", "keep: expected at most 4 at node 4"),
        ("total:3", r"keep: expected a total of 4 \(one a node\) to 14 \(all edges\), but got 3"),
        ("total:15", "keep: expected a total of 4"),
    ],
)
def test_targets_that_are_refused(keep: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(keep)


def test_options_that_are_refused() -> None:
    for name, value in (("delay", -1), ("partial_channels", 0), ("aux_weight", math.nan)):
        with pytest.raises(ValueError, match=f"{name}: expected at least"):
            DA2SOptions(**{name: value})


def test_a_target_of_cost_is_refused() -> None:
    with pytest.raises(ValueError, match=r"target: expected none with the method 'da2s'"):
        preset_config("demo", method="da2s", target="macs=1M", out=None)


# --- the search --------------------------------------------------------------------------------


@pytest.fixture
def space():
    with tiny.registered():
        yield


def test_alphas_rest_while_betas_move(space: None) -> None:
    options = DA2SOptions(keep="1,2", alpha_warmup_epochs=1)
    search = Search(tiny.config("da2s", options=options), data=tiny.images())
    start = {name: value.clone() for name, value in search.arch.state_dict().items()}

    def moved() -> dict[str, bool]:
        return {n: not torch.equal(start[n], v) for n, v in search.arch.state_dict().items()}

    with search._running(0, False):
        search._run_epoch()
        assert moved() == {
            "alpha_normal": False,
            "alpha_reduce": False,
            "beta_normal": True,
            "beta_reduce": True,
        }
        # Adam has learnt its moments meanwhile.
        state = search.learner.arch_optimizer.state[search.arch.alpha("normal")]
        assert state["exp_avg"].abs().max() > 0
        search._run_epoch()
    assert all(moved().values())
    groups = search.learner.arch_optimizer.param_groups
    assert [group["lr"] for group in groups] == [0.01, 0.01]
    assert search.genotype().normal_inputs == (1, 2)


@pytest.mark.parametrize("keep", ["2,2", "1,1", "total:5", "2,3"])
def test_a_search_with_any_target(space: None, keep: str) -> None:
    options = DA2SOptions(keep=keep, alpha_warmup_epochs=0, delay=0)
    result = Search(tiny.config("da2s", options=options, epochs=1), data=tiny.images()).run()
    assert sum(result.genotype.reduce_inputs) == {"2,2": 4, "1,1": 2}.get(keep, 5)


def test_the_second_loss_makes_the_weights_discrete(space: None) -> None:
    """An imbalanced target and a strong loss: what is derived is what the supernet computes."""
    options = DA2SOptions(
        keep="1,2",
        **{"aux_weight": 1.0, "delay": 0, "alpha_warmup_epochs": 0, "schedule": "const"},
    )
    config = tiny.config("da2s", options=options, epochs=12, arch_lr=0.25, validate="never")
    search = Search(config, data=tiny.images())
    genotype = search.run().genotype
    assert genotype.normal_inputs == genotype.reduce_inputs == (1, 2)
    assert max(search.method.entropy(search.arch).values()) < 0.02
    kept = search.method.kept(search.arch)
    for kind, weights in search.method.weights(search.arch, at(1)).items():
        assert weights.edges[~kept[kind]].max() < 0.1
        assert weights.edges[kept[kind]].min() > 0.9


@pytest.mark.parametrize("partial_channels", [1, 2])
def test_on_the_supernet_of_darts(partial_channels: int) -> None:
    options = DA2SOptions(keep="1,2,2,3", partial_channels=partial_channels)
    fields = {"space": "darts", "epochs": 1, "validate": "never", "batch_size": 8}
    search = Search(tiny.config("da2s", options=options, **fields), data=tiny.images(16))
    inputs = search.run().genotype.normal_inputs
    assert inputs == (1, 2, 2, 3)
