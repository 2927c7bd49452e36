# SPDX-License-Identifier: Apache-2.0
"""DARTS: both orders of the architecture step, and what a weight step must leave alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fastnas.methods.darts as darts_module
from fastnas.methods import (
    METHODS,
    ArchParameters,
    Darts,
    DartsOptions,
    Learner,
    Method,
    Moment,
    PCDartsOptions,
    register_method,
)
from fastnas.methods.darts import unrolled_gradient
from fastnas.spaces import SPACES, CellSpec, CellWeights

NOW = Moment(epoch=0, epochs=2, step=0)
SPECS = {"normal": CellSpec((2, 3), ("a", "b", "c")), "reduce": CellSpec((2, 3), ("a", "b", "c"))}


class Mixture(nn.Module):
    """A smooth stand-in for a supernet that has everything a step may disturb: BatchNorm, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)
        self.last = nn.Linear(5, 4)

    def forward(self, x: Tensor, weights: dict[str, CellWeights]) -> Tensor:
        h = self.norm(self.first(x))
        a, b = weights["normal"].ops.T, weights["reduce"].ops.T
        return self.last(torch.tanh(9 * h * a[0] * b[1]) + h * h * (a[1] * b[2] + a[2] - b[0]))


def learner(order: str = "first", momentum: float = 0.9, **settings: object) -> Learner:
    torch.manual_seed(3)
    net = Mixture().double()
    method = Darts(SPECS, DartsOptions(order))
    # Far from uniform, so that gradients are not near zero.
    arch = ArchParameters({kind: torch.randn(5, 3).double() for kind in SPECS})
    return Learner(
        net,
        arch,
        method,
        torch.optim.SGD(net.parameters(), 0.1, momentum=momentum, weight_decay=3e-4),
        torch.optim.Adam(arch.parameters(), 3e-4, betas=(0.5, 0.999), weight_decay=1e-3),
        nn.CrossEntropyLoss(),
        **settings,
    )


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 4, (12,), generator=generator)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {k for k, v in module.state_dict().items() if not torch.equal(v, before[k])}


# --- second order ----------------------------------------------------------------------------


def toy(lr: float) -> tuple[Tensor, list[float]]:
    """The example of the paper's figure 2: L_val = a w - 2 a + 1, L_train = w^2 - 2 a w + a^2."""
    a = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    w = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    seen: list[float] = []

    def val_loss() -> Tensor:
        seen.append(w.item())
        return a * w - 2 * a + 1

    (gradient,) = unrolled_gradient(
        [w],
        [a],
        lambda: w**2 - 2 * a * w + a**2,
        val_loss,
        lambda loss, inputs: list(torch.autograd.grad(loss, inputs)),
        lr,
        0.0,
        [None],
    )
    return gradient, seen


def test_second_order_of_the_papers_example() -> None:
    gradient, seen = toy(0.1)
    assert seen == [pytest.approx(-1.2, abs=1e-12)]
    assert gradient.item() == pytest.approx(-2.8, abs=1e-12)


def test_second_order_tends_to_first_order() -> None:
    # grad_a L_val = w - 2 at w = -2.
    assert toy(1e-9)[0].item() == pytest.approx(-4.0, abs=1e-7)


def exact_second_order(learner: Learner, train: object, val: object) -> list[Tensor]:
    """The gradient through one SGD step, by differentiating twice instead of by differences."""
    net = learner.supernet
    names = [name for name, _ in net.named_parameters()]
    weights = list(net.parameters())
    arch = list(learner.arch.parameters())

    def loss(values: list[Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        mix = learner.method.weights(learner.arch, NOW)
        buffers = {name: b.clone() for name, b in net.named_buffers()}
        named = dict(zip(names, values, strict=True))
        logits = torch.func.functional_call(net, {**named, **buffers}, (data[0], mix))
        return nn.functional.cross_entropy(logits, data[1])

    (group,) = learner.weight_optimizer.param_groups
    gradients = torch.autograd.grad(loss(weights, train), weights, create_graph=True)
    stepped = []
    for w, g in zip(weights, gradients, strict=True):
        velocity = learner.weight_optimizer.state[w]["momentum_buffer"]
        stepped.append(w - group["lr"] * (0.9 * velocity + g + group["weight_decay"] * w))
    return list(torch.autograd.grad(loss(stepped, val), arch))


def test_second_order_equals_the_exact_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    learned = learner("second")
    learned.weight_step(batch(0), NOW)  # fills the momentum buffers
    wanted = exact_second_order(learned, batch(1), batch(2))
    found: list[Tensor] = []
    monkeypatch.setattr(learned, "apply_architecture_gradient", found.extend)
    learned.method.architecture_step(learned, batch(1), batch(2), NOW)
    first_order = learner("first")
    first_order.supernet.load_state_dict(learned.supernet.state_dict())
    loss, _ = first_order.forward(batch(2), first_order.method.weights(first_order.arch, NOW))
    plain = torch.autograd.grad(loss, list(first_order.arch.parameters()))
    for got, exact, simple in zip(found, wanted, plain, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-3, atol=1e-7)
        assert (got - simple).norm() > 0.02 * simple.norm()


def test_second_order_unrolls_the_step_that_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the weights' own loss, which may be smoothed."""
    gradients = []
    monkeypatch.setattr(Learner, "apply_architecture_gradient", lambda self, g: gradients.append(g))
    for smoothing in (0.0, 0.4):
        learned = learner("second", weight_criterion=nn.CrossEntropyLoss(label_smoothing=smoothing))
        learned.method.architecture_step(learned, batch(1), batch(2), NOW)
    assert (gradients[0][0] - gradients[1][0]).abs().max() > 1e-4 * gradients[0][0].abs().max()


def test_second_order_restores_weights_and_statistics() -> None:
    learned = learner("second")
    learned.weight_step(batch(0), NOW)
    before, arch = state(learned.supernet), state(learned.arch)
    optimizer = copy.deepcopy(learned.weight_optimizer.state_dict())
    outcome = learned.method.architecture_step(learned, batch(1), batch(2), NOW)
    assert changed(learned.supernet, before) == set()
    assert changed(learned.arch, arch) == {"alpha_normal", "alpha_reduce"}
    after = learned.weight_optimizer.state_dict()
    for name, value in optimizer["state"].items():
        assert torch.equal(value["momentum_buffer"], after["state"][name]["momentum_buffer"])
    assert outcome.images == 12
    assert torch.isfinite(outcome.loss)


def test_second_order_restores_weights_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    learned = learner("second")
    before = state(learned.supernet)

    def fail(*args: object) -> list[Tensor]:
        with torch.no_grad():
            args[0][0].add_(1)
        raise RuntimeError("in the middle")

    monkeypatch.setattr(darts_module, "unrolled_gradient", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        learned.method.architecture_step(learned, batch(1), batch(2), NOW)
    assert changed(learned.supernet, before) == set()


def test_second_order_without_influence_of_the_weights() -> None:
    a = torch.tensor(3.0, requires_grad=True)
    w = torch.tensor(1.0, requires_grad=True)
    (gradient,) = unrolled_gradient(
        [w],
        [a],
        lambda: w * a,
        lambda: a * a + 0 * w,
        lambda loss, inputs: list(torch.autograd.grad(loss, inputs)),
        0.1,
        0.0,
        [None],
    )
    assert gradient.item() == 6.0


# --- first order and weight step -------------------------------------------------------------


def test_first_order_step_is_adam_on_the_validation_gradient() -> None:
    learned, twin = learner(), learner()
    before = state(learned.supernet)
    learned.method.architecture_step(learned, batch(1), batch(2), NOW)
    loss, _ = twin.forward(batch(2), twin.method.weights(twin.arch, NOW))
    loss.backward()
    twin.arch_optimizer.step()
    for got, wanted in zip(learned.arch.parameters(), twin.arch.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)
    # A pass at the current weights counts in the running statistics, as in the authors' code.
    assert changed(learned.supernet, before) == {
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }
    assert all(p.requires_grad and p.grad is None for p in learned.supernet.parameters())
    assert all(p.grad is None for p in learned.arch.parameters())


def test_weight_step_is_sgd_and_leaves_the_architecture() -> None:
    learned, twin = learner(grad_clip=0.0), learner()
    arch = state(learned.arch)
    learned.weight_step(batch(1), NOW)
    loss, _ = twin.forward(batch(1), twin.method.weights(twin.arch, NOW))
    loss.backward()
    twin.weight_optimizer.step()
    for got, wanted in zip(learned.supernet.parameters(), twin.supernet.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)
    assert changed(learned.arch, arch) == set()
    assert all(p.grad is None for p in learned.arch.parameters())


def test_weight_step_gives_the_supernet_constants() -> None:
    learned = learner()
    asked: list[bool] = []
    learned.supernet.register_forward_pre_hook(
        lambda _, args: asked.append(any(w.ops.requires_grad for w in args[1].values()))
    )
    learned.weight_step(batch(1), NOW)
    learned.architecture_step(batch(1), NOW)
    assert asked == [False, True]


def test_gradient_of_the_weights_is_clipped() -> None:
    def moved(clip: float) -> float:
        learned = learner(momentum=0.0, grad_clip=clip)
        learned.weight_optimizer.param_groups[0]["weight_decay"] = 0.0
        before = torch.cat([p.detach().flatten() for p in learned.supernet.parameters()]).clone()
        learned.weight_step(batch(1), NOW)
        after = torch.cat([p.detach().flatten() for p in learned.supernet.parameters()])
        return (after - before).norm().item()

    assert moved(0.01) == pytest.approx(0.1 * 0.01, rel=1e-3)
    assert moved(0.0) > 2 * moved(0.01)


def test_architecture_step_comes_first() -> None:
    learned = learner()
    calls: list[str] = []

    class Recorder:
        def architecture_step(self, data: object, moment: Moment) -> str:
            calls.append(f"architecture {data} {moment.phase}")
            return "val"

        def weight_step(self, data: object, moment: Moment) -> str:
            calls.append(f"weights {data} {moment.phase}")
            return "train"

    assert learned.method.iteration(Recorder(), "t", lambda: "v", NOW) == ("train", "val")
    assert learned.method.iteration(Recorder(), "t", None, NOW) == ("train", None)
    assert calls == ["architecture v architecture", "weights t weights", "weights t weights"]


# --- parameters, weights, genotype -----------------------------------------------------------


def supernet_specs() -> dict[str, CellSpec]:
    net = SPACES["darts"].supernet(C=4, layers=3, num_classes=2, in_channels=1)
    return net.cell_specs


def test_parameters_are_one_module() -> None:
    arch = Darts(supernet_specs()).parameters()
    assert {k: tuple(v.shape) for k, v in arch.state_dict().items()} == {
        "alpha_normal": (14, 8),
        "alpha_reduce": (14, 8),
    }
    values = torch.cat([p.flatten() for p in arch.parameters()])
    assert 5e-4 < values.std() < 2e-3
    assert arch.to(torch.float64).alpha("normal").dtype == torch.float64
    assert arch.entropy() == {k: pytest.approx(2.0794, abs=1e-4) for k in ("normal", "reduce")}


def test_weights_are_softmax_per_edge() -> None:
    method = Darts(supernet_specs())
    arch = method.parameters()
    with torch.no_grad():
        arch.alpha("reduce")[3, 1] = 2.0
    weights = method.weights(arch, NOW)
    assert weights["normal"].edges is None
    torch.testing.assert_close(weights["reduce"].ops.sum(1), torch.ones(14))
    expected = torch.exp(torch.tensor(2.0)) / (torch.exp(torch.tensor(2.0)) + 7)
    torch.testing.assert_close(weights["reduce"].ops[3, 1], expected, rtol=1e-3, atol=0)


def test_genotype_of_equal_alphas() -> None:
    method = Darts(supernet_specs())
    arch = method.parameters()
    with torch.no_grad():
        for parameter in arch.parameters():
            parameter.zero_()
    genotype = method.derive(arch, SPACES["darts"])
    assert genotype.normal == (("max_pool_3x3", 0), ("max_pool_3x3", 1)) * 4
    with torch.no_grad():
        # The strongest edge of the last node is from state 4, by its 5x5 convolution.
        arch.alpha("normal")[13, 5] = 1.0
        # A strong `none` takes edge 9 (last node, from state 0) out of the choice.
        arch.alpha("normal")[9, 0] = 5.0
    last = method.derive(arch, SPACES["darts"]).normal[6:]
    assert last == (("sep_conv_5x5", 4), ("max_pool_3x3", 1))


def test_options_are_of_the_method() -> None:
    with pytest.raises(TypeError, match="expected PCDartsOptions for method 'pc_darts'"):
        METHODS["pc_darts"](SPECS, DartsOptions())
    assert isinstance(METHODS["darts"](SPECS, PCDartsOptions()).options, DartsOptions)


def test_names_are_taken_once() -> None:
    with pytest.raises(ValueError, match="the name 'darts' is taken"):
        register_method("darts")(Darts)


def test_a_method_of_ones_own() -> None:
    """Sigmoids instead of softmax and an extra loss: a new method overrides just that."""

    class Sigmoids(Darts):
        def weights(self, arch: ArchParameters, moment: Moment) -> dict[str, CellWeights]:
            return {k: CellWeights(torch.sigmoid(arch.alpha(k))) for k in self.specs}

        def objective(self, loss: Tensor, arch: ArchParameters, moment: Moment) -> Tensor:
            assert moment.phase == "architecture"
            pull = sum((arch.alpha(k) ** 2).sum() for k in self.specs)
            return loss + 1e6 * pull

    learned = learner()
    learned.method = Sigmoids(SPECS)
    before = learned.arch.alpha("normal").detach().clone()
    learned.method.iteration(learned, batch(0), lambda: batch(1), NOW)
    after = learned.arch.alpha("normal").detach()
    # The extra loss dwarfs the task's: every alpha moves towards zero.
    assert (after.abs() < before.abs()).all()


def test_state_of_a_method_without_state() -> None:
    method: Method = Darts(SPECS)
    method.load_state_dict(method.state_dict())
    with pytest.raises(ValueError, match="has no state"):
        method.load_state_dict({"path": 1})
