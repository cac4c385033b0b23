"""LyapunovSGD with momentum: torch.optim.SGD's steps, and the bounds of stability in the docs."""

import pytest
import torch
from torch import nn

from nets import case
from optim_cases import exact, quadratic

KINDS = [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_are_those_of_torch_sgd(kind, dtype):
    truth, twin = case("tanh_mlp", seed=2, dtype=dtype), case("tanh_mlp", seed=2, dtype=dtype)
    optimizer = exact(truth.model.parameters(), gain=0.1, weight_decay=1e-2, **kind)
    reference = torch.optim.SGD(twin.model.parameters(), lr=1.0, weight_decay=1e-2, **kind)
    optimizer.warmup(truth.closure)
    for _ in range(5):
        optimizer.step(truth.closure)
        reference.param_groups[0]["lr"] = float(optimizer.lr)
        reference.zero_grad()
        twin.closure().backward()
        reference.step()
    for a, b in zip(truth.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-7)
        held, expected = optimizer.state[a], reference.state[b]
        torch.testing.assert_close(held["momentum_buffer"], expected["momentum_buffer"])


def limit(momentum, nesterov):
    if nesterov:
        return 2 * (1 + momentum) / (1 + 2 * momentum)
    return 2 * (1 + momentum)


@pytest.mark.parametrize(
    ("k", "momentum", "nesterov"),
    [
        (1, 0.0, False),
        (1, 0.5, False),
        (1, 0.9, False),
        (1, 0.5, True),
        (1, 0.9, True),
        (2, 0.0, False),
        (2, 0.9, True),
    ],
)
def test_the_gain_is_stable_below_the_documented_bound_and_not_above(k, momentum, nesterov):
    ends = []
    for part in (0.97, 1.03):
        theta, closure = quadratic([4.0, 3.0, 1.0], start=1e-3)
        optimizer = exact(
            [theta], k=k, gain=part * limit(momentum, nesterov),
            momentum=momentum, nesterov=nesterov,
        )  # fmt: skip
        optimizer.warmup(closure)
        sizes = []
        for _ in range(200):
            optimizer.step(closure)
            sizes.append(float(theta.detach().abs().max()))
        ends.append(max(sizes[-20:]) / 1e-3)
    assert ends[0] < 0.1 and ends[1] > 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_have_a_buffer_in_float32(dtype):
    theta = nn.Parameter(torch.ones(5, dtype=dtype))
    optimizer = exact([theta], gain=0.1, momentum=0.9)
    optimizer.warmup(lambda: theta.float().square().sum())
    for _ in range(3):
        optimizer.step(lambda: theta.float().square().sum())
    held = optimizer.state[theta]["momentum_buffer"]
    assert held.dtype == torch.float32 and held.shape == theta.shape
    assert not torch.equal(held, held.to(dtype).float())  # more digits than θ has


def test_momentum_of_parameters_of_any_stride():
    base = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    for theta in (nn.Parameter(base.t().clone(memory_format=torch.preserve_format)),
                  nn.Parameter(base[:, ::2])):  # fmt: skip
        twin = nn.Parameter(theta.detach().clone())
        optimizer = exact([theta], gain=0.1, momentum=0.9)
        reference = torch.optim.SGD([twin], lr=1.0, momentum=0.9)
        optimizer.warmup(lambda theta=theta: theta.square().sum())
        for _ in range(4):
            optimizer.step(lambda theta=theta: theta.square().sum())
            reference.param_groups[0]["lr"] = float(optimizer.lr)
            reference.zero_grad()
            twin.square().sum().backward()
            reference.step()
        torch.testing.assert_close(theta, twin)


def test_a_batch_that_is_not_finite_leaves_the_momentum():
    theta, closure = quadratic([4.0, 1.0])
    optimizer = exact([theta], momentum=0.9)
    optimizer.step(closure)
    held = optimizer.state[theta]["momentum_buffer"].clone()
    optimizer.step(lambda: closure() * float("inf"))
    assert torch.equal(optimizer.state[theta]["momentum_buffer"], held)


def test_nesterov_needs_momentum():
    theta, _ = quadratic([1.0])
    with pytest.raises(ValueError, match="nesterov=True: needs a momentum"):
        exact([theta], nesterov=True)
