# SPDX-License-Identifier: Apache-2.0
"""EnTranNAS-DST: thresholds of nodes, any topology, what stops learning, the gap."""

from __future__ import annotations

import pytest
import search_tiny as tiny
import torch
import torch.nn.functional as F

from fastnas import evaluate
from fastnas.evaluate import Evaluation
from fastnas.evaluate import preset_config as evaluation_config
from fastnas.methods import ArchParameters, EnTranNASDST, EnTranNASDSTOptions, Moment
from fastnas.nn.candidates import DARTS_PRIMITIVES
from fastnas.search import Progress, Search
from fastnas.spaces import SPACES, CellRoles, CellSelection, CellSpec
from fastnas.spaces.darts import Genotype, Network, Supernet

SPEC = CellSpec((2, 3, 4, 5), DARTS_PRIMITIVES[1:])
SPECS = {"normal": SPEC, "reduce": SPEC}
NOW = Moment(epoch=0, epochs=2, step=0)
EVERYTHING = (tuple(range(7)),) * 14


pytestmark = pytest.mark.usefixtures("one_thread")


def dst(**options: object) -> EnTranNASDST:
    return EnTranNASDST(SPECS, EnTranNASDSTOptions(**options))


def scattered(method: EnTranNASDST, spread: float = 1.0) -> ArchParameters:
    arch = method.parameters().double()
    with torch.no_grad():
        for parameter in arch.parameters():
            parameter.normal_(std=spread)
    return arch


def kept(method: EnTranNASDST, arch: ArchParameters, kind: str = "normal") -> list[int]:
    """Connections of each node."""
    found = method.connections(arch)[kind]
    return [sum(map(len, found[rows])) for rows in SPEC.node_slices]


def search(**fields: object) -> Search:
    options = fields.pop("options", EnTranNASDSTOptions())
    values = {"space": "darts", "batch_size": 8, "epochs": 1, "arch_lr": 0.3, **fields}
    settings = tiny.config("entrannas_dst", options=options, **values)
    return Search(settings, data=tiny.images(32), progress=Progress())


# --- properties -----------------------------------------------------------------------------------


def test_parameters() -> None:
    arch = dst(beta_init=-0.5).parameters()
    for kind in SPECS:
        assert arch.alpha(kind).shape == (14, 7) and arch.alpha(kind).abs().max() < 1e-2
        assert arch.beta(kind).tolist() == [-0.5] * 4
    # P8: everything is alive at the start, and nothing far above it.
    method = dst()
    assert kept(method, method.parameters()) == [14, 21, 28, 35]
    method = dst(beta_init=9.0)
    assert max(kept(method, method.parameters())) < 35


def test_every_node_keeps_its_strongest() -> None:
    method = dst()
    for beta in (-30.0, 0.0, 5.0, 50.0):
        arch = scattered(method, 3.0)
        with torch.no_grad():
            arch.beta("normal").fill_(beta)
        p, found = method.scores(arch)["normal"], method.connections(arch)["normal"]
        for rows in SPEC.node_slices:
            edge, k = divmod(int(p[rows].argmax()), 7)
            assert k in found[rows.start + edge]
        if beta == 50.0:
            assert kept(method, arch) == [1, 1, 1, 1]
        if beta == -30.0:
            assert kept(method, arch) == [14, 21, 28, 35]


def test_survivors_shrink_with_the_threshold() -> None:
    method = dst()
    arch = scattered(method)
    before = EVERYTHING
    for beta in torch.linspace(-6, 6, 25):
        with torch.no_grad():
            arch.beta("normal").fill_(beta)
        found = method.connections(arch)["normal"]
        assert all(set(now) <= set(then) for now, then in zip(found, before, strict=True))
        before = found
    assert kept(method, arch) != [14, 21, 28, 35]


@pytest.mark.parametrize("norm", ["edge", "node"])
def test_weights_are_those_of_what_is_derived(norm: str) -> None:
    method = dst(norm=norm)
    for _ in range(10):
        arch = scattered(method)
        for roles in method.weights(arch, NOW).values():
            assert isinstance(roles, CellRoles) and isinstance(roles.engine, CellSelection)
            assert roles.engine.connections == roles.transit.connections
            assert roles.transit.ops is None
            support = tuple(tuple(row.nonzero().flatten().tolist()) for row in roles.engine.ops)
            assert support == roles.transit.connections
            sums = roles.engine.ops.sum(1)
            live = torch.tensor([len(ks) > 0 for ks in support])
            if norm == "edge":
                assert (sums[live] - 1).abs().max() < 1e-12 and (sums[~live] == 0).all()
            else:
                per_node = torch.stack([sums[rows].sum() for rows in SPEC.node_slices])
                torch.testing.assert_close(per_node, torch.ones(4).double())


def test_options_reach_the_weights() -> None:
    """What each option of the formula changes; the formula itself is tested with the op."""
    plain = dst()
    arch = scattered(plain)
    ops = plain.strengths(arch)["normal"]
    for name, value in (("tau", 0.5), ("norm", "node")):
        assert not torch.allclose(dst(**{name: value}).strengths(arch)["normal"], ops)
    grad = torch.randn(14, 7, dtype=torch.float64)
    gradients = [
        torch.autograd.grad((grad * method.strengths(arch)["normal"]).sum(), arch.alpha("normal"))[
            0
        ]
        for method in (plain, dst(detach_max=True))
    ]
    assert not torch.allclose(*gradients)
    p = torch.softmax(arch.alpha("normal") / 0.5, -1)
    torch.testing.assert_close(dst(tau=0.5).scores(arch)["normal"], p)
    entropy = -(p * p.log()).sum(1).mean().item()
    assert dst(tau=0.5).entropy(arch)["normal"] == pytest.approx(entropy)


# --- the Engine-cell ------------------------------------------------------------------------------


def test_dead_connections_may_be_left_out() -> None:
    """The same loss and gradients as with everything executed, from fewer calls."""
    method = dst()
    net = Supernet(4, 3, 5, none=False, engine_cells="last", share=True).double()
    arch, x = scattered(method), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    calls = [0]
    for op in net.cells[0]._ops:
        for candidate in op._ops:
            candidate.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))

    def gradients(everything: bool) -> list[torch.Tensor]:
        weights = dict(method.weights(arch, NOW))
        if everything:
            weights = {
                kind: CellRoles(CellSelection(EVERYTHING, w.engine.ops), w.transit)
                for kind, w in weights.items()
            }
        loss = F.cross_entropy(net(x, weights), torch.arange(3))
        inputs = [*arch.parameters(), *net.cells[2].parameters()]
        return [loss, *torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)]

    few, fewer = gradients(False), calls[0]
    everything = gradients(True)
    assert fewer < 35 and calls[0] - fewer == 35
    for one, two in zip(few, everything, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
    assert all(g.abs().sum() > 0 for g in few[1:5])


def test_a_node_of_single_survivors_learns_nothing_with_norm_edge() -> None:
    """P5, and the two ways out of it."""
    moved = {}
    for name, options in (("edge", {}), ("node", {"norm": "node"}),
                          ("lambda", {"sparsity_lambda": 0.1})):  # fmt: skip
        s = search(options=EnTranNASDSTOptions(**options), arch_weight_decay=0.0)
        with torch.no_grad():
            for kind in SPECS:
                # One candidate an edge; the edges are not alike, or a node's gradients cancel.
                s.arch.alpha(kind).zero_()[:, 3] = torch.linspace(4.0, 4.3, 14)
        assert kept(s.method, s.arch) == [2, 3, 4, 5]
        batch = next(iter(s.halves.weights.iterate(0)))
        before = {n: p.detach().clone() for n, p in s.arch.named_parameters()}
        s.method.iteration(s.learner, batch, lambda batch=batch: batch, NOW)
        moved[name] = {n for n, p in s.arch.named_parameters() if not torch.equal(p, before[n])}
    assert moved["edge"] == set()
    assert {"alpha_normal", "beta_normal", "alpha_reduce", "beta_reduce"} <= moved["node"]
    assert {"beta_normal", "beta_reduce"} <= moved["lambda"]


def test_sparsity_lambda() -> None:
    method = dst(sparsity_lambda=2.0)
    arch = scattered(method)
    terms = []
    for kind in SPECS:
        p, total = torch.softmax(arch.alpha(kind).detach(), -1), 0.0
        for rows, b in zip(SPEC.node_slices, arch.beta(kind).tolist(), strict=True):
            t = 1 / (1 + torch.tensor(-b).exp())
            total += sum(max(float(v / p[rows].max() - t), 0.0) for v in p[rows].flatten())
        terms.append(total / 98)
    task = torch.tensor(1.25, dtype=torch.float64)
    assert method.objective(task, arch, NOW).item() == pytest.approx(1.25 + 2 * sum(terms))
    assert dst().objective(task, arch, NOW) is task
    method.objective(task, arch, NOW).backward()
    for kind in SPECS:
        assert (arch.beta(kind).grad < 0).all()  # descending raises every threshold


def test_the_term_prunes() -> None:
    counts = []
    for weight in (0.0, 3.0):
        s = search(options=EnTranNASDSTOptions(sparsity_lambda=weight), epochs=2, validate="never")
        s.run()
        counts.append(sum(kept(s.method, s.arch)) + sum(kept(s.method, s.arch, "reduce")))
    assert counts[1] < counts[0]


def test_what_is_derived_is_of_the_updated_parameters() -> None:
    s = search()
    for batch in s.halves.weights.iterate(0):
        s.method.iteration(s.learner, batch, lambda batch=batch: batch, NOW)
        for kind, found in s.method.connections(s.arch).items():
            p = torch.softmax(s.arch.alpha(kind), -1).detach()
            t = torch.sigmoid(s.arch.beta(kind)).detach()
            for rows, threshold in zip(SPEC.node_slices, t, strict=True):
                live = p[rows] / p[rows].max() > threshold
                assert found[rows] == tuple(tuple(r.nonzero().flatten().tolist()) for r in live)


def test_alphas_of_nan_are_left_to_the_loop() -> None:
    method = dst()
    arch = method.parameters()
    with torch.no_grad():
        arch.alpha("normal").fill_(float("nan"))
    assert kept(method, arch) == [14, 21, 28, 35]


# --- topologies -----------------------------------------------------------------------------------


def test_any_topology_is_derived_and_built() -> None:
    method = dst()
    arch = scattered(method)
    with torch.no_grad():
        for kind in SPECS:
            arch.beta(kind).fill_(-0.5)
            alpha = arch.alpha(kind).fill_(-9.0)
            alpha[:, 2] = 0.0  # every edge prefers a skip connection ...
            alpha[[0], 3] = 9.0  # ... and alone on edge 0
            alpha[1] = 0.0  # edge 1 is flat
            alpha[5, 3] = 0.1  # two on edge 5
    genotype = method.derive(arch, SPACES["darts"])
    # In-degree 1, two operations on an edge, and every predecessor.
    assert genotype.nodes("normal")[0] == (("sep_conv_3x3", 0),)
    assert genotype.nodes("normal")[2] == (
        *(("skip_connect", 1), ("skip_connect", 2), ("skip_connect", 3)),
        *(("sep_conv_3x3", 0), ("skip_connect", 0)),
    )
    assert genotype.normal_inputs == (1, 3, 5, 5)
    assert {source for _, source in genotype.nodes("normal")[3]} == set(range(5))
    assert genotype.to_dict()["version"] == 2
    assert Genotype.parse(str(genotype)) == genotype
    assert Genotype.from_dict(genotype.to_dict()) == genotype
    net = Network(genotype, C=4, layers=3, num_classes=4)
    loss = net(torch.randn(2, 3, 8, 8)).square().sum()
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("beta", [60.0, -60.0])
def test_extreme_topologies(beta: float) -> None:
    """In-degree 1 everywhere, and every candidate on every edge."""
    method = dst()
    arch = scattered(method)
    with torch.no_grad():
        for kind in SPECS:
            arch.beta(kind).fill_(beta)
    genotype = method.derive(arch, SPACES["darts"])
    assert genotype.normal_inputs == ((1, 1, 1, 1) if beta > 0 else (14, 21, 28, 35))
    assert Network(genotype, C=4, layers=3, num_classes=4)(torch.randn(2, 3, 8, 8)).shape == (2, 4)


def test_search_then_evaluation(tmp_path) -> None:
    s = search(out=str(tmp_path / "run"), epochs=2)
    genotype = s.run().genotype
    assert genotype == Genotype.load(tmp_path / "run" / "genotype.json")
    assert s.history[-1]["genotype"] == genotype.to_dict()
    fields = {"C": 4, "layers": 3, "epochs": 1, "device": "cpu", "out": None, "auxiliary": False}
    trained = Evaluation(
        evaluation_config("demo", source=str(tmp_path / "run"), **fields),
        data=tiny.images(16, 16),
        progress=evaluate.Progress(),
    ).run()
    assert trained.history[0]["train_loss"] > 0


# --- the gap --------------------------------------------------------------------------------------


def test_with_its_weights_the_pruned_supernet_is_the_supernet() -> None:
    for share in (True, False):
        s = search(options=EnTranNASDSTOptions(keep_weights=True, share=share))
        with torch.no_grad():
            for parameter in s.arch.parameters():
                parameter.normal_()
        s.supernet.eval()
        x = next(iter(s.halves.validation.iterate(0)))[0]
        hot = s.space.one_hot(s.genotype(), s.method.specs)
        pruned = s.method.pruned_weights(s.arch, hot)
        weights = s.method.weights(s.arch, NOW)
        assert len(pruned["normal"].engine.connections) == 14
        torch.testing.assert_close(
            s.supernet(x, pruned), s.supernet(x, weights), rtol=1e-6, atol=1e-6
        )
        found = s.measure_gap()
        assert found.pruned == found.supernet


def test_without_them_every_connection_weighs_one() -> None:
    s = search()
    hot = s.space.one_hot(s.genotype(), s.method.specs)
    for kind, given in s.method.pruned_weights(s.arch, hot).items():
        assert isinstance(given, CellSelection)
        assert given.connections == s.method.connections(s.arch)[kind]
        assert (
            given.ops.sum(1) == torch.tensor([float(len(ks)) for ks in given.connections])
        ).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"beta_init": float("inf")}, "beta_init: expected a finite number, but got inf"),
        (
            {"sparsity_lambda": -1.0},
            "sparsity_lambda: expected a finite number of at least 0, but got -1",
        ),
        (
            {"sparsity_lambda": float("nan")},
            "sparsity_lambda: expected a finite number of at least 0",
        ),
    ],
)
def test_options_that_are_refused(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dst(**given)
