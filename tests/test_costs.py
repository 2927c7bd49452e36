# SPDX-License-Identifier: Apache-2.0
"""Expected costs and their gradients: the numbers of ProxylessNAS' table, and the DARTS space."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastnas.costs import Cost
from fastnas.methods import METHODS, Moment
from fastnas.nn.candidates import DARTS_PRIMITIVES
from fastnas.spaces import Block, BlockPlan, CellWeights, MixedEdge, count_macs, count_parameters
from fastnas.spaces.darts import GENOTYPES, SPACE, DartsShape, Supernet

# Mean milliseconds on a Pixel 1, as published (ProxylessNAS): by shape, k3e3 k3e6 k5e3 ... k7e6.
FIRST = {
    "24/2": (6.2406, 16.7662, 7.5191, 18.9413, 9.1438, 22.1047),
    "40/2": (3.9412, 7.1387, 4.3828, 7.8806, 5.0262, 9.1910),
    "80/2": (1.8103, 3.4540, 1.9846, 3.7976, 2.2292, 4.2522),
    "96/1": (1.9608, 3.6715, 2.2529, 4.2889, 2.6299, 5.0895),
    "192/2": (1.6477, 3.2435, 1.7546, 3.4905, 1.9018, 3.7877),
    "320/1": (2.6441, 4.8769, 2.8289, 5.2648, 3.0498, 5.8281),
}
REPEATED = {
    "24/2": (6.2731, 11.0949, 7.9019, 14.1313, 10.2148, 18.5406),
    "40/2": (2.8568, 5.3627, 3.4837, 6.6215, 4.3674, 8.3770),
    "80/2": (1.8414, 3.4695, 2.1265, 4.0798, 2.5003, 4.8805),
    "96/1": (2.4547, 4.9233, 2.7916, 5.6446, 3.2347, 6.6467),
    "192/2": (2.0538, 3.8000, 2.2407, 4.1644, 2.4566, 4.6927),
}
FIXED = {"stem": 4.0838, "head": 3.0886, "classifier": 0.3096, "first block": 3.8821}


def published() -> Cost:
    """The cost of the published space by the published table."""
    times = dict(FIXED)
    edges = []

    def place(name, row):
        keys = tuple(f"{name} {number}" for number in range(len(row)))
        times.update(zip(keys, row, strict=True))
        return keys

    for name, row in FIRST.items():
        edges.append(MixedEdge("blocks", len(edges), place(f"first {name}", row)))
        for _ in range(3 if name in REPEATED else 0):
            keys = (*place(f"repeated {name}", REPEATED[name]), None)
            edges.append(MixedEdge("blocks", len(edges), keys))
    blocks = {key: Block(key, (1, 1, 1), nn.Identity) for key in times}
    plan = BlockPlan(blocks, tuple(edges), tuple(FIXED))
    return Cost(plan, times.__getitem__, name="latency", unit="ms")


def uniform(cost: Cost) -> torch.Tensor:
    """``[21, 7]``, alike over the candidates that an edge has."""
    weights = torch.full((21, 7), 1 / 7, dtype=torch.float64)
    for row in range(0, 21, 4):
        weights[row] = torch.tensor([1 / 6] * 6 + [0], dtype=torch.float64)
    return weights


# The table is given to four digits: 24 terms are wrong by 0.0012 at most.
ROUNDED = 1.2e-3


def test_expected_latency_of_the_published_space():
    cost = published()
    assert cost.fixed == pytest.approx(11.364156, abs=ROUNDED)
    assert cost.expected({"blocks": uniform(cost)}).item() == pytest.approx(113.988129, abs=ROUNDED)


@pytest.mark.parametrize(
    ("choice", "milliseconds"),
    [("least", 29.608776), ("most", 191.029871), (0, 76.048099), (1, 136.466266)],
    ids=["least", "most", "all k3e3", "all k3e6"],
)
def test_latency_of_single_architectures(choice, milliseconds):
    cost = published()
    values = cost.values["blocks"]
    chosen = [choice] * 21
    if choice in ("least", "most"):
        pick = min if choice == "least" else max
        legal = [6 if row % 4 == 0 else 7 for row in range(21)]
        chosen = [
            pick(range(count), key=values[row].tolist().__getitem__)
            for row, count in enumerate(legal)
        ]
    assert cost.of({"blocks": chosen}) == pytest.approx(milliseconds, abs=ROUNDED)
    one_hot = nn.functional.one_hot(torch.tensor(chosen), 7).double()
    assert cost.expected({"blocks": one_hot}).item() == pytest.approx(milliseconds, abs=ROUNDED)


def test_latency_of_the_published_mobile_net():
    k3e3, k5e3, k5e6, k7e3, k7e6, skip = 0, 2, 3, 4, 5, 6
    chosen = [
        *(k5e3, k3e3, skip, skip),
        *(k7e3, k3e3, k5e3, k5e3),
        *(k7e6, k5e3, k5e3, k5e3),
        *(k5e6, k5e3, k5e3, k5e3),
        *(k7e6, k7e6, k7e3, k7e3),
        k7e6,
    ]
    assert published().of({"blocks": chosen}) == pytest.approx(82.523860, abs=ROUNDED)


def test_gradient_of_an_edge():
    keys = tuple(map(str, range(6)))
    times = dict(zip(keys, REPEATED["24/2"], strict=True))
    blocks = {key: Block(key, (1, 1, 1), nn.Identity) for key in keys}
    plan = BlockPlan(blocks, (MixedEdge("chain", 0, (*keys, None)),), ())
    cost = Cost(plan, times.__getitem__, name="latency", unit="ms")
    alpha = torch.zeros(1, 7, dtype=torch.float64, requires_grad=True)
    expected = cost.expected({"chain": alpha.softmax(-1)})
    assert expected.item() == pytest.approx(9.736668, abs=1e-4)
    expected.backward()
    wanted = (-0.494797, 0.194035, -0.262112, 0.627807, 0.068310, 1.257709, -1.390953)
    assert alpha.grad[0].tolist() == pytest.approx(wanted, abs=2e-5)
    assert alpha.grad.sum().item() == pytest.approx(0, abs=1e-12)


def test_gradient_is_p_times_value_minus_mean():
    torch.manual_seed(1)
    cost = published()
    alpha = torch.randn(21, 7, dtype=torch.float64, requires_grad=True)
    p = alpha.softmax(-1)
    cost.expected({"blocks": p}).backward()
    values = cost.values["blocks"]
    wanted = p * (values - (p * values).sum(-1, keepdim=True))
    torch.testing.assert_close(alpha.grad, wanted.detach(), rtol=1e-12, atol=1e-12)


# --- the DARTS space -----------------------------------------------------------------------------

SHAPE = DartsShape(image_size=8, C=4, layers=5)
PLAN = SPACE.blocks.plan(SHAPE)


@pytest.fixture(params=["macs", "params"])
def darts_cost(request):
    return Cost.counted(request.param, PLAN)


def choices_of(genotype):
    """The choices of ``Cost.of`` for a genotype."""
    found = {}
    for kind in ("normal", "reduce"):
        rows = [None] * 14
        for number, (op, source) in enumerate(getattr(genotype, kind)):
            node = number // 2
            rows[sum(range(2, 2 + node)) + source] = DARTS_PRIMITIVES.index(op)
        found[kind] = rows
    return found


@pytest.mark.parametrize("name", GENOTYPES)
def test_cost_of_a_genotype_is_that_of_its_network(darts_cost, name):
    network = SPACE.blocks.network(GENOTYPES[name], SHAPE)
    counted = {"macs": count_macs(network, (1, 1, 8, 8)), "params": count_parameters(network)}
    assert darts_cost.of(choices_of(GENOTYPES[name])) == counted[darts_cost.name]


def test_expected_cost_of_a_certain_genotype_is_its_cost(darts_cost):
    choices = choices_of(GENOTYPES["PC_DARTS_cifar"])
    weights = {}
    for kind, rows in choices.items():
        ops = torch.zeros(14, 8, dtype=torch.float64)
        kept = torch.zeros(14, dtype=torch.float64)
        for row, choice in enumerate(rows):
            if choice is not None:
                ops[row, choice], kept[row] = 1, 0.5
        weights[kind] = CellWeights(ops, kept)
    assert darts_cost.expected(weights).item() == darts_cost.of(choices)


def test_expected_cost_is_the_mean_over_random_architectures():
    cost = Cost.counted("macs", PLAN)
    generator = torch.Generator().manual_seed(0)
    drawn = [SPACE.blocks.sample(SHAPE, generator) for _ in range(2000)]
    found = torch.tensor([cost.of(choices_of(genotype)) for genotype in drawn])
    # Drawn without ``none``, the first candidate.
    ops = torch.tensor([0.0] + [1 / 7] * 7).repeat(14, 1)
    expected = cost.expected({"normal": ops, "reduce": ops}).item()
    error = found.std().item() / 2000**0.5
    assert abs(found.mean().item() - expected) < 4 * error
    assert error < 0.01 * expected


@pytest.mark.parametrize("method", ["darts", "pc_darts"])  # whose weights are softmax(alpha)
def test_methods_can_take_it_into_their_loss(method):
    cost = Cost.counted("macs", PLAN)
    specs = Supernet(C=4, layers=3).cell_specs
    method = METHODS[method](specs)
    arch = method.parameters()
    weights = method.weights(arch, Moment(0, 1, 0, "architecture"))
    expected = cost.expected(weights)
    assert expected.dtype == torch.float32
    cost.expected({kind: CellWeights(*w) for kind, w in weights.items()}).log().backward()
    for kind in ("normal", "reduce"):
        ops, edges = weights[kind].ops, weights[kind].edges
        incoming = torch.tensor([2.0] * 2 + [3.0] * 3 + [4.0] * 4 + [5.0] * 5)
        chance = 2 / incoming if edges is None else 2 * edges
        values = cost.values[kind].float()
        mean = (ops * values).sum(-1, keepdim=True)
        wanted = chance[:, None] * ops * (values - mean) / expected
        torch.testing.assert_close(arch.alpha(kind).grad, wanted.detach(), rtol=1e-4, atol=1e-7)
        if edges is not None:
            assert arch.beta(kind).grad.abs().max() > 0


def test_half_precision_is_summed_in_float32():
    cost = Cost.counted("macs", PLAN)
    ops = torch.full((14, 8), 1 / 8, dtype=torch.float16)  # a sum of 1e6 would be infinite
    found = cost.expected({"normal": ops, "reduce": ops})
    wanted = cost.expected({"normal": ops.double(), "reduce": ops.double()})
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_weights_on_their_device(device):
    cost = Cost.counted("params", PLAN)
    ops = torch.full((14, 8), 1 / 8, device=device)
    assert cost.expected({"normal": ops, "reduce": ops}).device.type == device.type


def test_wrong_arguments_are_named():
    cost = Cost.counted("params", PLAN)
    ops = torch.zeros(14, 8)
    with pytest.raises(ValueError, match="weights: expected the kinds normal, reduce, but got nor"):
        cost.expected({"normal": ops})
    with pytest.raises(ValueError, match=r"weights\['reduce'\]: expected shape \(14, 8\).*13, 8"):
        cost.expected({"normal": ops, "reduce": ops[:13]})
    with pytest.raises(ValueError, match=r"weights\['normal'\]\.edges: expected shape \(14,\)"):
        cost.expected({"normal": CellWeights(ops, ops), "reduce": ops})
    with pytest.raises(ValueError, match=r"choices\['normal'\]\[1\]: expected a .* 0 to 7.* got 8"):
        cost.of({"normal": [0, 8] + [None] * 12, "reduce": [None] * 14})
    with pytest.raises(ValueError, match=r"choices\['reduce'\]: expected 14 edges, but got 1"):
        cost.of({"normal": [None] * 14, "reduce": [0]})
    with pytest.raises(ValueError, match="expected one of macs, params, but got 'flops'"):
        Cost.counted("flops", PLAN)


def test_a_plan_that_contradicts_itself_is_refused():
    block = Block("a", (1, 1, 1), nn.Identity)

    def cost(*edges):
        plan = BlockPlan({"a": block}, edges, ())
        return Cost(plan, lambda key: 1.0, name="latency", unit="ms")

    with pytest.raises(ValueError, match="chain 0 has 1 candidates at one place and 2 at another"):
        cost(MixedEdge("chain", 0, ("a",)), MixedEdge("chain", 0, ("a", None)))
    with pytest.raises(ValueError, match=r"the rows of chain are \[1\]"):
        cost(MixedEdge("chain", 1, ("a",)))
