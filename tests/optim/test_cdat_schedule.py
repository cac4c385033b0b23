"""CDAT under torch's learning-rate schedulers: a step is s·lr/peak times the update at the peak."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import lyapcuda
from nets import case
from optim_cases import quadratic

SCHEDULERS = {
    "LambdaLR": (lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (t + 1)), [1, 1 / 2, 1 / 3]),
    "a warm-up": (lambda o: lr_scheduler.LambdaLR(o, lambda t: t / 2), [0, 1 / 2, 1]),
    "CosineAnnealingLR": (lambda o: lr_scheduler.CosineAnnealingLR(o, 2), [1, 1 / 2, 0]),
    "OneCycleLR": (
        lambda o: lr_scheduler.OneCycleLR(
            o, 3.0, total_steps=5, pct_start=0.4, anneal_strategy="linear", cycle_momentum=False
        ),
        [1 / 25, 1, 2 / 3],
    ),
}


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_step_is_the_schedulers_share_of_the_one_without(name, tensor):
    """On a quadratic of one curvature h, where s·U is −g/h."""
    make, shares = SCHEDULERS[name]
    lr = torch.tensor(0.125, dtype=torch.float64) if tensor else 0.125
    theta, closure = quadratic([2.0, 2.0])
    inner = torch.optim.SGD([theta], lr=lr, foreach=False)
    optimizer = lyapcuda.CDAT(inner, 1.0, every=1, ema=0.5, max_step=100.0)
    scheduler = make(optimizer)
    for share in shares:
        with torch.no_grad():
            theta.fill_(1.0)
        rates = [group["lr"] for group in optimizer.param_groups]
        optimizer.step(closure)
        assert all(a["lr"] is b for a, b in zip(optimizer.param_groups, rates, strict=True))
        torch.testing.assert_close(
            theta.detach(), torch.full_like(theta, 1.0 - share), rtol=0, atol=1e-5
        )
        scheduler.step()


@pytest.mark.parametrize("name", ["CosineAnnealingWarmRestarts", "CyclicLR"])
def test_a_rate_that_jumps_up_is_never_past_sigma(name):
    theta, closure = quadratic([2.0, 2.0])
    optimizer = lyapcuda.CDAT(torch.optim.SGD([theta], lr=0.1), 1.0, every=3, max_step=100.0)
    scheduler = {
        "CosineAnnealingWarmRestarts": lambda: lr_scheduler.CosineAnnealingWarmRestarts(
            optimizer, 4
        ),
        "CyclicLR": lambda: lr_scheduler.CyclicLR(optimizer, 0.1, 10.0, 3, cycle_momentum=False),
    }[name]()
    for _ in range(12):
        with torch.no_grad():
            theta.fill_(1.0)
        optimizer.step(closure)
        assert float(theta.detach().min()) > -1e-6  # 0 is the lowest point
        scheduler.step()


def test_groups_follow_their_own_schedules():
    net = case("gelu_mlp", 0)
    params = list(net.model.parameters())
    groups = [{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": 0.2}]
    optimizer = lyapcuda.CDAT(torch.optim.SGD(groups))
    lr_scheduler.LambdaLR(optimizer, [lambda t: 0.0, lambda t: 1.0])
    before = [p.detach().clone() for p in params]
    optimizer.step(net.closure)
    assert torch.equal(params[0], before[0])
    assert all(not torch.equal(p, q) for p, q in zip(params[1:], before[1:], strict=True))


def test_the_peak_is_saved():
    theta, closure = quadratic([2.0, 1.0])
    optimizer = lyapcuda.CDAT(torch.optim.SGD([theta], lr=0.1), every=1)
    optimizer.step(closure)
    optimizer.param_groups[0]["lr"] = 0.01
    other = copy.deepcopy(theta)
    resumed = lyapcuda.CDAT(torch.optim.SGD([other], lr=0.01), every=1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step(closure)
    resumed.step(lambda: 0.5 * (torch.tensor([2.0, 1.0]) * other.square()).sum())
    torch.testing.assert_close(other, theta)


def test_schedulers_see_its_steps():
    theta = nn.Parameter(torch.ones(2))
    optimizer = lyapcuda.CDAT(torch.optim.SGD([theta], lr=0.1))
    scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
    optimizer.step(lambda: theta.square().sum())
    scheduler.step()  # warns where it saw none; warnings are errors
    assert optimizer.optimizer.param_groups[0]["lr"] == 0.05
