"""LyapunovSGD under torch's learning-rate schedulers, with numbers and with device tensors."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

import lyapcuda
from optim_cases import exact, quadratic
from sync import no_waiting

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 4),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0, 2, cycle_momentum=True),
    "CyclicLR, momentum as it is": lambda o: lr_scheduler.CyclicLR(
        o, 0.1, 1.0, 2, cycle_momentum=False
    ),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=10),
    # (Its max_lr is far below 1/h, which mustn't be bounded by it.)
    "OneCycleLR of small rates": lambda o: lr_scheduler.OneCycleLR(o, 1e-3, total_steps=10),
    "OneCycleLR, momentum as it is": lambda o: lr_scheduler.OneCycleLR(
        o, 1e-3, total_steps=10, cycle_momentum=False, three_phase=True, anneal_strategy="linear"
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "SWALR": lambda o: SWALR(o, swa_lr=0.05, anneal_epochs=3),
}


def test_every_scheduler_of_torch_is_here():
    found = {
        name
        for name, value in vars(lr_scheduler).items()
        if isinstance(value, type) and issubclass(value, lr_scheduler.LRScheduler)
    }
    assert found - {"LRScheduler", "_LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_scale_one_over_h0(name, capturable):
    """The rate follows the values the scheduler gives torch's own SGD."""
    theta, closure = quadratic([4.0, 1.0])
    optimizer = exact([theta], momentum=0.5, capturable=capturable)
    twin = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0, momentum=0.5)
    scheduler, other = SCHEDULERS[name](optimizer), SCHEDULERS[name](twin)
    rates = []
    for _ in range(6):
        expected = twin.param_groups[0]["lr"] / 4.0
        optimizer.step(closure)
        twin.step()
        assert float(optimizer.lr) == pytest.approx(expected, rel=1e-4, abs=1e-12)
        assert optimizer.param_groups[0]["momentum"] == twin.param_groups[0]["momentum"]
        rates.append(float(optimizer.lr))
        for each in (scheduler, other):
            each.step(1.0) if name == "ReduceLROnPlateau" else each.step()
    assert len(set(rates)) > 1  # it did something
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor) == capturable


def scheduled(name, capturable, momentum=0.5):
    """θ, and a function that takes a step of an optimizer and of its scheduler."""
    theta, closure = quadratic([4.0, 1.0])
    optimizer = lyapcuda.LyapunovSGD([theta], 0.2, momentum=momentum, capturable=capturable)
    scheduler = SCHEDULERS[name](optimizer)

    def step():
        optimizer.step(closure)
        scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()

    return theta, optimizer, scheduler, step


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_resumed_schedule_goes_on_to_the_bit(name, capturable):
    theta, optimizer, scheduler, step = scheduled(name, capturable)
    for _ in range(3):
        step()
    saved = optimizer.state_dict(), copy.deepcopy(scheduler.state_dict())
    resumed = scheduled(name, capturable)
    with torch.no_grad():
        resumed[0].copy_(theta)
    resumed[2].load_state_dict(saved[1])
    resumed[1].load_state_dict(saved[0])  # the last: schedulers write into the groups
    for _ in range(3):
        step()
        resumed[3]()
        assert torch.equal(resumed[1].lr, optimizer.lr)
    assert torch.equal(resumed[0], theta)
    for key in ("momentum", "max_inverse_h", "max_lr"):
        assert resumed[1].param_groups[0][key] == optimizer.param_groups[0][key]


@pytest.mark.parametrize("name", ["OneCycleLR", "OneCycleLR of small rates", "CyclicLR"])
def test_momentum_that_a_scheduler_starts_is_torchs(name):
    """As in torch.optim.SGD: a momentum of 0 is cycled too, from the first step on."""
    theta, optimizer, _, step = scheduled(name, False, momentum=0.0)
    assert optimizer.param_groups[0]["momentum"] > 0.8
    buffer = torch.zeros_like(theta)
    for _ in range(3):
        before, group = theta.detach().clone(), dict(optimizer.param_groups[0])
        step()
        buffer = group["momentum"] * buffer + theta.grad
        torch.testing.assert_close(optimizer.state[theta]["momentum_buffer"], buffer)
        torch.testing.assert_close(theta.detach(), before - optimizer.lr * buffer)


def test_one_cycle_leaves_the_bound_of_one_over_h():
    for bound in (0.5, 2.0):
        theta, closure = quadratic([-3.0, -1.0])
        groups = [{"params": [theta], "max_lr": bound}]
        optimizer = lyapcuda.LyapunovSGD(groups, estimate="growth", warmup_iterations=4)
        scheduler = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
        late = nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer.add_param_group({"params": [late], "max_lr": 0.25})
        gain = optimizer.param_groups[0]["lr"]
        with pytest.warns(UserWarning, match="not stable"):
            optimizer.step(closure)
        assert float(optimizer.lr) == gain * bound  # h0 < 0: it stands in for 1/h0
        assert scheduler.get_last_lr()[0] == gain
        assert [g["max_inverse_h"] for g in optimizer.param_groups] == [bound, 0.25]


def test_the_bound_may_be_changed_in_a_group():
    theta, closure = quadratic([-3.0, -1.0])
    optimizer = exact([theta], max_lr=0.5, warmup_iterations=0)
    for name in ("max_lr", "max_inverse_h"):
        optimizer.param_groups[0][name] = 0.125
        optimizer.step(closure)
        optimizer.step(closure)
        assert float(optimizer.lr) == 0.125
        # From here on it is OneCycleLR's.
        optimizer.param_groups[0] |= {"max_lr": 3.0, "min_lr": 0.1, "initial_lr": 1.0}


def test_a_rate_of_zero_moves_nothing_and_scales_the_bound_as_well():
    theta, closure = quadratic([-3.0, -1.0])
    optimizer = lyapcuda.LyapunovSGD([theta], max_lr=0.5, estimate="growth")
    for factor in (0.0, 0.1, 1.0):
        optimizer.param_groups[0]["lr"] = factor
        before = theta.detach().clone()
        optimizer.step(closure)
        assert float(optimizer.lr) == factor * 0.5  # h0 < 0: max_lr stands in for 1/h0
        assert torch.equal(theta, before) == (factor == 0.0)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_never_waits_for_the_device(capturable, k):
    theta, closure = quadratic([4.0, 1.0, 0.5])
    other = nn.Parameter(torch.ones(3))
    groups = [{"params": [theta], "momentum": 0.9}, {"params": [other], "gain": 0.5}]
    optimizer = lyapcuda.LyapunovSGD(groups, k=k, capturable=capturable)
    optimizer.warmup(lambda: closure() + other.square().sum())
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    with no_waiting():
        for _ in range(3):
            optimizer.step(lambda: closure() + other.square().sum())
            optimizer.measure(lambda: closure() + other.square().sum())
            optimizer.step()
            optimizer.lr, optimizer.rates  # noqa: B018
            if not capturable:  # torch's schedulers read a tensor's value themselves
                scheduler.step()
    assert float(optimizer.lr) > 0


def test_capturable_keeps_one_tensor_that_a_graph_would_read():
    a, closure = quadratic([4.0, 1.0])
    b = nn.Parameter(torch.ones(2))
    optimizer = exact([{"params": [a]}, {"params": [b], "gain": 0.5}], capturable=True)
    tensors = [group["lr"] for group in optimizer.param_groups]
    assert [t.dtype for t in tensors] == [torch.float64] * 2 and tensors[0] is not tensors[1]
    scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
    for expected in (0.25, 0.125):
        optimizer.step(lambda: closure() + b.square().sum())
        assert float(optimizer.lr) == pytest.approx(expected, rel=1e-5)
        scheduler.step()
    assert all(t is g["lr"] for t, g in zip(tensors, optimizer.param_groups, strict=True))


def test_a_tensor_as_gain_is_read_at_every_step():
    theta, closure = quadratic([4.0, 1.0])
    gain = torch.tensor(1.0)
    optimizer = exact([theta], gain=gain)
    for value in (1.0, 0.5):
        gain.fill_(value)
        optimizer.step(closure)
        assert float(optimizer.lr) == pytest.approx(value / 4, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr", -1.0, "lr=-1.0"),
        ("lr", math.nan, "lr=nan"),
        ("lr", torch.ones(2), "lr: expected a number"),
        ("momentum", 1.0, "momentum=1.0"),
        ("weight_decay", -1.0, "weight_decay=-1.0"),
        ("max_lr", 0.0, "max_lr=0.0"),
    ],
)
def test_a_wrong_value_in_a_group_is_named_before_anything_changes(name, value, message):
    theta, closure = quadratic([4.0, 1.0])
    optimizer = lyapcuda.LyapunovSGD([theta])
    optimizer.step(closure)
    optimizer.param_groups[0][name] = value
    before, steps = theta.detach().clone(), int(optimizer.tracker.steps)
    with pytest.raises(ValueError, match=message):
        optimizer.step(closure)
    assert torch.equal(theta, before) and int(optimizer.tracker.steps) == steps


def test_gain_and_lr_of_a_group_are_the_same():
    theta, closure = quadratic([4.0, 1.0])
    optimizer = exact([{"params": [theta], "lr": 0.5}])
    optimizer.step(closure)
    assert float(optimizer.lr) == pytest.approx(0.125, rel=1e-5)
    with pytest.raises(ValueError, match="both gain and lr"):
        lyapcuda.LyapunovSGD([{"params": [theta], "lr": 0.5, "gain": 0.5}])
