# SPDX-License-Identifier: Apache-2.0
"""Targets: their words, their term in the loss, the multiplier, and the best network under them."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from fastnas.costs import Cost
from fastnas.methods import CostTerm, Darts, PCDarts, Proxyless, Target
from fastnas.methods.base import Moment
from fastnas.methods.budget import choose_within, is_chain, within_budget
from fastnas.spaces import CellSpec, get_space, mbconv
from fastnas.spaces.blocks import Block, BlockPlan, MixedEdge

# Edge 56x56x24 -> 56x56x24 of the released table, in ms; Zero costs nothing.
EDGE = (6.2731, 11.0949, 7.9019, 14.1313, 10.2148, 18.5406, None)
# First block of that stage: one candidate less.
FIRST = (6.2406, 16.7662, 7.5191, 18.9413, 9.1438, 22.1047)


def cost_of(*rows, fixed=0.0):
    """A cost whose candidates cost what the rows say."""
    values = {f"{e}.{k}": v for e, row in enumerate(rows) for k, v in enumerate(row) if v}
    values["fixed"] = fixed
    blocks = {key: Block(key, (1, 1, 1), torch.nn.Identity) for key in values}
    edges = [
        MixedEdge("block", e, tuple(None if v is None else f"{e}.{k}" for k, v in enumerate(row)))
        for e, row in enumerate(rows)
    ]
    plan = BlockPlan(blocks, tuple(edges), ("fixed",))
    return Cost(plan, values.__getitem__, name="latency", unit="ms")


def specs_of(*rows):
    width = max(map(len, rows))
    names = tuple(f"op{k}" for k in range(width))
    return {"block": CellSpec((1,) * len(rows), names, tuple(map(len, rows)))}


# --- words -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("macs=300M", "macs", 3e8),
        ("macs=1.5G", "macs", 1.5e9),
        ("params=4M", "params", 4e6),
        ("params=90000", "params", 9e4),
        ("params=2e3k", "params", 2e6),
        ("latency=12ms", "latency", 12.0),
        ("latency=0.5s", "latency", 500.0),
        ("latency=80us", "latency", 0.08),
    ],
)
def test_words(text, name, value):
    assert Target.parse(text) == Target(name, pytest.approx(value))


@pytest.mark.parametrize(
    "text",
    ["", "macs", "macs=", "macs=0", "macs=-3M", "macs=3ms", "latency=12", "energy=3J", "macs=nan"],
)
def test_other_words(text):
    with pytest.raises(ValueError, match="target: expected macs=300M, params=4M or latency=12ms"):
        Target.parse(text)


# --- expected cost (vectors of the released table) -------------------------------------------


def test_expected_latency_of_an_edge_and_its_gradient():
    cost = cost_of(EDGE)
    alpha = torch.zeros(1, 7, dtype=torch.float64, requires_grad=True)
    expected = cost.expected({"block": torch.softmax(alpha, 1)})
    assert expected.item() == pytest.approx(9.736668, abs=5e-5)  # of means with four digits
    (found,) = torch.autograd.grad(expected, alpha)
    wanted = (-0.494797, 0.194035, -0.262112, 0.627807, 0.068310, 1.257709, -1.390953)
    assert found[0].tolist() == pytest.approx(wanted, abs=2e-5)


def test_loss_forms():
    E, T = torch.tensor(113.988129, dtype=torch.float64), 80.0
    ce = torch.tensor(2.0, dtype=torch.float64)
    cost = cost_of(EDGE)
    linear = CostTerm(cost, T, "linear", 1.0)
    assert linear.loss(ce, E).item() - 2 == pytest.approx(0.4248516, abs=1e-7)
    for weight, factor in ((1.0, 1.0808000), (0.3, 1.0235843), (0.6, 1.0477247)):
        term = CostTerm(cost, T, "log_ratio", weight)
        assert term.loss(ce, E).item() / 2 == pytest.approx(factor, abs=1e-6)
    # A cost below one unit has no logarithm to a fractional power: it is no NaN all the same.
    assert CostTerm(cost, T, "log_ratio").loss(ce, E * 0).isfinite()
    assert [CostTerm(cost, T, form).weight for form in ("linear", "log_ratio")] == [0.1, 0.3]


@pytest.mark.parametrize("multiplier", [0.0, 0.5])
@pytest.mark.parametrize("E", [160.0, 80.0, 60.0, 20.0])
def test_the_constraint_pulls_as_far_as_it_is_violated(multiplier, E):
    term = CostTerm(cost_of(EDGE), 80.0, "constraint", multiplier)
    expected = torch.tensor(E, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(term.loss(torch.zeros(()), expected), expected)
    c = math.log(E / 80)
    assert found.item() == pytest.approx(max(0.0, multiplier + c) / E, abs=1e-9)
    value = term.loss(torch.tensor(2.0), expected).item()
    assert value == pytest.approx(2 + (max(0.0, multiplier + c) ** 2 - multiplier**2) / 2)


def test_the_multiplier_follows_the_excess():
    term = CostTerm(cost_of(EDGE), 80.0, rate=0.1)
    term.update(torch.tensor(160.0))
    assert term.multiplier == pytest.approx(0.1 * math.log(2))
    state = term.state_dict()
    term.update(torch.tensor(80.0))
    assert term.multiplier == pytest.approx(0.1 * math.log(2))
    for _ in range(5):
        term.update(torch.tensor(40.0))
    assert term.multiplier == 0.0
    other = CostTerm(cost_of(EDGE), 80.0)
    other.load_state_dict(state)
    assert other.multiplier == pytest.approx(0.1 * math.log(2))
    fixed = CostTerm(cost_of(EDGE), 80.0, "linear")
    fixed.update(torch.tensor(160.0))
    assert fixed.weight == 0.1 and fixed.multiplier == pytest.approx(0.1)


def test_limits_that_cannot_be():
    for form, limit in (("constraint", 0.0), ("log_ratio", 1.0), ("linear", math.nan)):
        with pytest.raises(ValueError, match="limit: expected more than"):
            CostTerm(cost_of(EDGE), limit, form)
    with pytest.raises(ValueError, match="form: expected one of"):
        CostTerm(cost_of(EDGE), 5.0, "square")


@pytest.mark.parametrize("method", [Darts, PCDarts])
@pytest.mark.parametrize("name", ["params", "macs"])
def test_costs_serve_methods_of_cells(method, name):
    space = get_space("darts")
    k = 2 if method is PCDarts else 1
    net = space.supernet(C=4, layers=3, in_channels=1, partial_channels=k)
    cost = Cost.counted(name, space.blocks.plan(space.blocks.shape(C=4, layers=3)))
    found = method(net.cell_specs, term=CostTerm(cost, 1e4, weight=1.0))
    arch = found.parameters()
    task = torch.zeros(())
    loss = found.objective(task, arch, Moment(0, 1, 0))
    assert loss.requires_grad
    gradient = torch.autograd.grad(loss, list(arch.parameters()))
    assert all(g.abs().sum() > 0 for g in gradient)
    expected = cost.expected(found.weights(arch, Moment(0, 1, 0))).item()
    excess = math.log(expected / 1e4)
    assert loss.item() == pytest.approx((max(0.0, 1 + excess) ** 2 - 1) / 2, rel=1e-4)
    facts = found.facts(arch, Moment(0, 1, 0))[name]
    assert facts["expected"] == pytest.approx(expected)
    found.settle(arch, Moment(0, 1, 0))
    step = 0.02 * excess
    assert found.term.multiplier == pytest.approx(1 + step, rel=1e-4)


# --- the best network under a limit ----------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_is_the_best_there_is(seed):
    rng = random.Random(seed)
    gains = [[rng.uniform(-5, 0) for _ in range(rng.randint(1, 4))] for _ in range(5)]
    costs = [[rng.choice([0.0, rng.uniform(0, 9)]) for _ in row] for row in gains]
    least = sum(map(min, costs))
    for share in (0.0, 0.2, 0.5, 1.0):
        budget = least + share * (sum(map(max, costs)) - least) + 1e-9
        chosen = choose_within(gains, costs, budget)
        spent = sum(row[k] for row, k in zip(costs, chosen, strict=True))
        assert spent <= budget
        # Costs are rounded up to steps of the budget: no better choice well inside it is missed.
        inside = budget * (1 - 6 / 20_000)
        best = max(
            (
                sum(row[k] for row, k in zip(gains, choice, strict=True))
                for choice in itertools.product(*(range(len(row)) for row in gains))
                if sum(row[k] for row, k in zip(costs, choice, strict=True)) <= inside
            ),
            default=-math.inf,
        )
        assert sum(row[k] for row, k in zip(gains, chosen, strict=True)) >= best - 1e-12


def test_costs_are_rounded_up():
    """Two costs a little above half the budget do not fit, however they are rounded."""
    row = [0.500_04, 0.1]
    assert sum(choose_within([[0.0, -1.0]] * 2, [row] * 2, 1.0)) == 1


def test_no_choice():
    with pytest.raises(ValueError, match="budget: expected at least 3, but got 2"):
        choose_within([[0.0, 0.0]], [[3.0, 4.0]], 2.0)
    assert choose_within([[0.0, -1.0], [0.0]], [[1.0, 0.0], [0.0]], 0.0) == [1, 0]


def test_a_budget_keeps_one_candidate_an_edge():
    rows = (FIRST, EDGE)
    cost, specs = cost_of(*rows, fixed=1.0), specs_of(*rows)
    scores = {"block": torch.tensor([[0.1] * 5 + [0.5, 0.0], [0.1] * 6 + [0.4]])}
    assert is_chain(specs)
    kept = within_budget(scores, cost.values, specs, 100.0)["block"]
    assert kept.argmax(1).tolist() == [5, 6] and kept.sum(1).tolist() == [1, 1]
    # The column that the first edge does not have costs 0 in the table, and is never chosen.
    kept = within_budget(scores, cost.values, specs, 6.3)["block"]
    assert kept.argmax(1).tolist() == [0, 6]


def test_a_block_is_skipped_where_that_is_more_probable_than_all_else():
    specs = {"block": CellSpec((1, 1, 1), ("a", "b", "c", "zero"), (4, 4, 3), "zero")}
    scores = {
        "block": torch.tensor(
            [[0.3, 0.1, 0.1, 0.5 - 0.05], [0.2, 0.1, 0.1, 0.6], [0.2, 0.5, 0.3, 0]]
        )
    }
    cost = cost_of((1.0, 0.5, 0.5, None), (1.0, 1.0, 1.0, None), (1.0, 1.0, 1.0))
    kept = within_budget(scores, cost.values, specs, 9.0)["block"]
    assert kept.argmax(1).tolist() == [0, 3, 1]
    # What the budget does not allow is worth less by its share among the others, or is skipped.
    kept = within_budget(scores, cost.values, specs, 1.6)["block"]
    assert kept.argmax(1).tolist() == [3, 3, 1]
    scores["block"][0] = torch.tensor([0.3, 0.25, 0.1, 0.35])
    kept = within_budget(scores, cost.values, specs, 1.6)["block"]
    assert kept.argmax(1).tolist() == [1, 3, 1]
    kept = within_budget(scores, cost.values, specs, 1.1)["block"]
    assert kept.argmax(1).tolist() == [3, 3, 1]


def method_of(limit, form="constraint", fixed=1.0):
    rows = (FIRST, EDGE)
    return Proxyless(specs_of(*rows), term=CostTerm(cost_of(*rows, fixed=fixed), limit, form))


def test_a_target_that_no_network_meets_is_refused():
    with pytest.raises(ValueError, match="no network of this space is so cheap: expected at least"):
        method_of(7.0)
    with pytest.raises(ValueError, match=r"at least 7\.2406 ms, but got 7"):
        method_of(7.0)
    method_of(7.25)
    method_of(7.0, form="linear")  # nothing has to be met


@pytest.mark.parametrize("limit", [7.25, 12.0, 20.0, 30.0, 100.0])
def test_derived_networks_are_under_the_target(limit):
    method = method_of(limit)
    arch = method.parameters()
    with torch.no_grad():
        for row in arch.rows("block"):
            row.copy_(torch.randn(len(row)))
    facts = method.facts(arch, Moment(0, 1, 0))["latency"]
    assert facts["derived"] <= limit
    assert facts["target"] == limit and facts["unit"] == "ms"
    # And it is this network that is tested.
    tested = method.weights(arch, Moment(0, 1, 0, "validation"))["block"].edges
    cost = method.term.cost
    assert cost.of({"block": [gate.active for gate in tested]}) == pytest.approx(facts["derived"])


def test_the_supernet_s_widths_reach_the_derived_network():
    options = {"stage_channels": (16, 24), "stage_blocks": (2, 2), "stage_strides": (2, 2)}
    net = mbconv.Supernet(10, 1, **options)
    shape = mbconv.MBConvShape(image_size=16, **options)
    cost = Cost.counted("params", mbconv.SPACE.blocks.plan(shape))
    most = cost.fixed + cost.values["block"].amax(1).sum().item()
    least = cost.fixed + cost.values["block"][[0, 2]][:, :6].amin(1).sum().item()
    for limit in (least, (least + most) / 2, most):
        method = Proxyless(net.cell_specs, term=CostTerm(cost, limit))
        arch = method.parameters()
        genotype = method.derive(arch, mbconv.SPACE)
        derived = mbconv.Network(genotype)
        count = sum(p.numel() for p in derived.parameters())
        assert count <= limit
        assert count == method.facts(arch, Moment(0, 1, 0))["params"]["derived"]
