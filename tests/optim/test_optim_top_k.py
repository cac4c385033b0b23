"""LyapunovSGD with k curvatures: 1/|h_i| along the tracked eigenvectors, 1/h_k elsewhere."""

import math

import pytest
import torch
from torch import nn

import lyapcuda
from nets import case
from optim_cases import exact, quadratic


def settle(optimizer, closure, times=60):
    """The warm-up waits for h0 alone."""
    optimizer.warmup(closure)
    for _ in range(times):
        optimizer.tracker.step(closure)


def dense_hessian(loss, parameters):
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    flat = torch.cat([g.flatten() for g in gradients])
    rows = [torch.autograd.grad(g, parameters, retain_graph=True) for g in flat]
    matrix = torch.stack([torch.cat([x.flatten() for x in row]) for row in rows])
    return (matrix + matrix.T) / 2


def test_the_leading_directions_are_solved_in_one_step():
    theta, closure = quadratic([100.0, 10.0, 1.0, 0.5])
    optimizer = exact([theta], k=3)
    settle(optimizer, closure)
    optimizer.step(closure)
    rates = optimizer.rates
    torch.testing.assert_close(
        rates, 1 / torch.tensor([100.0, 10.0, 1.0, 1.0], dtype=torch.float64), rtol=1e-2, atol=0
    )
    assert float(optimizer.lr) == float(rates[-1])
    expected = torch.tensor([0.0, 0.0, 0.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(theta.detach(), expected, rtol=0, atol=1e-2)


def test_it_needs_far_fewer_steps_than_one_curvature_where_few_are_large():
    spectrum = [1000.0, 300.0, 100.0, *[1.0] * 20]
    steps = []
    for k in (1, 4):
        theta, closure = quadratic(spectrum)
        optimizer = exact([theta], k=k, estimate="rayleigh", warmup_tol=1e-6)
        count = 0
        while float(closure()) > 1e-3 and count < 400:
            optimizer.step(closure)
            count += 1
        steps.append(count)
    assert steps[1] < 40 and steps[0] == 400


def test_schwarz_quotients_give_the_same_rates():
    theta, closure = quadratic([100.0, 10.0, 1.0, 0.5])
    optimizer = exact([theta], k=2, estimate="schwarz", warmup_tol=1e-9)
    settle(optimizer, closure, 60)
    optimizer.step(closure)
    assert optimizer.rates[:2].tolist() == pytest.approx([1e-2, 1e-1], rel=1e-3)


def test_it_is_the_pseudo_inverse_on_a_net():
    """The step against dense eigenvectors of the Hessian, on a smooth net."""
    truth = case("tanh_mlp", seed=1, dtype=torch.float64)
    parameters = list(truth.model.parameters())
    optimizer = exact(parameters, k=2, gain=0.5, warmup_tol=1e-9)
    settle(optimizer, truth.closure, 150)
    before = torch.cat([p.detach().flatten() for p in parameters])
    hessian = dense_hessian(truth.closure(), parameters)
    optimizer.step(truth.closure)
    moved = before - torch.cat([p.detach().flatten() for p in parameters])
    gradient = torch.cat([p.grad.flatten() for p in parameters])
    values, vectors = torch.linalg.eigh(hessian)
    rates = optimizer.rates
    expected = rates[2] * gradient
    for i in range(2):
        v = vectors[:, -1 - i]
        assert float(rates[i]) == pytest.approx(0.5 / float(values[-1 - i]), rel=1e-3)
        expected += (rates[i] - rates[2]) * (v @ gradient) * v
    assert (moved - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["ce", "mse"])
def test_training_with_k_curvatures_lowers_the_loss(kind, dtype):
    truth = case("gelu_mlp", seed=3, kind=kind, dtype=dtype)
    optimizer = lyapcuda.LyapunovSGD(truth.model.parameters(), k=4, warmup_tol=0.2)
    losses = [float(optimizer.step(truth.closure)) for _ in range(40)]
    assert losses[-1] < 0.7 * losses[0]


def test_one_step_of_groups_of_several_dtypes_and_rates():
    a = nn.Parameter(torch.ones(5, dtype=torch.float64))
    b = nn.Parameter(torch.ones(5, 2))
    c = nn.Parameter(torch.ones(3))
    groups = [{"params": [a]}, {"params": [b], "gain": 0.5, "momentum": 0.5}, {"params": [c]}]
    optimizer = exact(groups, k=2, warmup_tol=1e-6)

    def closure():
        outer = 8 * a[0].square() + 2 * b[0, 0].square() + 0 * c.sum()
        return outer + a.square().sum() + 0.5 * b.double().square().sum()

    settle(optimizer, closure)
    loss = float(closure())
    optimizer.step(closure)
    assert abs(float(a[0])) < 1e-3  # 1/h0 along it
    assert float(b[0, 0]) == pytest.approx(0.5, abs=2e-2)  # half of 1/h1
    assert float(closure()) < 0.5 * loss
    assert torch.equal(c, torch.ones(3))  # its gradient is zero
    assert "momentum_buffer" in optimizer.state[b] and "momentum_buffer" not in optimizer.state[a]


@pytest.mark.parametrize("spectrum", [[-3.0, -1.0, -0.5], [0.0, 0.0, 0.0], [5.0, -4.0, -4.0]])
def test_without_positive_curvature_the_step_is_bounded(spectrum):
    theta, closure = quadratic(spectrum)
    optimizer = lyapcuda.LyapunovSGD([theta], k=2, max_lr=0.5, warmup_iterations=30)
    optimizer.step(closure)
    assert bool((optimizer.rates <= 0.5).all()) and bool((optimizer.rates > 0).all())
    assert bool(torch.isfinite(theta).all())


def test_a_batch_that_is_not_finite_changes_nothing():
    truth = case("tanh_mlp", seed=2)
    optimizer = lyapcuda.LyapunovSGD(truth.model.parameters(), k=3, momentum=0.5, gain=0.2)
    for _ in range(3):
        optimizer.step(truth.closure)
    before = [p.detach().clone() for p in truth.model.parameters()]
    optimizer.step(lambda: truth.closure() * math.inf)
    assert all(map(torch.equal, before, truth.model.parameters()))
    assert not optimizer.rates.any()
    optimizer.step(truth.closure)
    assert not torch.equal(before[0], next(truth.model.parameters()))


def test_steps_between_measurements_use_the_last_directions():
    theta, closure = quadratic([100.0, 10.0, 1.0])
    optimizer = exact([theta], k=3, every=4)
    optimizer.warmup(closure)
    for _ in range(8):
        optimizer.step(closure)
    assert float(theta.detach().abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"k": 33}, "k=33"),
        ({"k": 9}, "k=9: there are only 8"),
        ({"k": 2, "estimate": "growth"}, "estimate='growth': .* one of rayleigh, schwarz"),
        ({"every": 0}, "every=0"),
        ({"momentum": -0.1}, "momentum=-0.1"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        lyapcuda.LyapunovSGD(nn.Linear(3, 2).parameters(), **options)
