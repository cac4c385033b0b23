"""CDAT: the step that the curvature along another optimizer's update allows, and what it leaves."""

import copy
import math
import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn

import lyapcuda
from fault_cases import bits
from nets import case
from noisy import interrupted, snapshot
from optim_cases import quadratic
from sync import no_waiting


class Lion(torch.optim.Optimizer):
    """A user's own, with decoupled weight decay that nothing says is so."""

    def __init__(self, params, lr=1e-3, weight_decay=0.1):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_((0.9 * m + 0.1 * p.grad).sign(), alpha=group["lr"])
                m.lerp_(p.grad, 0.01)


MADE = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p),
    "AdamW": lambda p: torch.optim.AdamW(p, weight_decay=0.1),
    "Muon": lambda p: torch.optim.Muon([q for q in p if q.dim() == 2]),
    "Lion": lambda p: Lion(p),
}


def flat(tensors):
    return torch.cat([t.detach().flatten().double() for t in tensors])


def trained(made, steps, **options):
    """(model, closure, CDAT), some steps on."""
    net = case("gelu_mlp", 0)
    optimizer = lyapcuda.CDAT(made(list(net.model.parameters())), **options)
    losses = [optimizer.step(net.closure) for _ in range(steps)]
    return net, optimizer, losses


# --- the step ------------------------------------------------------------------------------------


def test_along_the_gradient_it_is_cauchys_step():
    """Without an average and at sigma = 1: the lowest point along −g, whatever the rate."""
    spectrum = torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)
    for lr in (1e-4, 1.0):
        theta, closure = quadratic(spectrum.tolist())
        optimizer = lyapcuda.CDAT(
            torch.optim.SGD([theta], lr=lr), 1.0, every=1, ema=0.0, max_step=1e3
        )
        for _ in range(3):
            here = theta.detach().clone()
            g = spectrum * here
            best = (g @ g) / (g @ (spectrum * g))
            optimizer.step(closure)
            torch.testing.assert_close(theta.detach(), here - best * g, rtol=1e-7, atol=1e-12)
            assert math.isclose(float(optimizer.rate), float(best) / lr, rel_tol=1e-7)
            assert math.isclose(float(optimizer.curvature), 1 / float(best), rel_tol=1e-7)
            assert math.isclose(float(optimizer.sharpness), 1 / float(best), rel_tol=1e-7)


@pytest.mark.parametrize("name", MADE)
def test_u_is_the_optimizers_own_update_and_its_state_advances_once(name):
    net, optimizer, _ = trained(MADE[name], 2, every=2)
    twin = copy.deepcopy(net.model)
    inner = MADE[name](list(twin.parameters()))
    inner.load_state_dict(copy.deepcopy(optimizer.optimizer.state_dict()))
    before = flat(net.model.parameters())
    optimizer.step(net.closure)  # measures
    for p, q in zip(net.model.parameters(), twin.parameters(), strict=True):
        q.grad = p.grad
    inner.step()
    update = flat(twin.parameters()) - before
    moved = flat(net.model.parameters()) - before
    torch.testing.assert_close(moved, optimizer.rate * update, rtol=1e-3, atol=1e-6)
    for p, q in zip(net.model.parameters(), twin.parameters(), strict=True):
        assert bits(dict(optimizer.state[p])) == bits(dict(inner.state[q]))


@pytest.mark.parametrize("name", MADE)
def test_it_trains(name):
    _, _, losses = trained(MADE[name], 60)
    assert losses[-1] < 0.8 * losses[0]


def test_the_averages_are_exponential_and_a_step_between_measurements_keeps_the_factor():
    net, optimizer, _ = trained(MADE["Adam"], 1, every=3, ema=0.5)
    rates = []
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        return net.closure()

    for _ in range(6):
        optimizer.step(closure)
        rates.append(float(optimizer.rate))
    assert rates[0] == rates[1] != rates[2] == rates[3] == rates[4] != rates[5]
    assert calls == 6 + 2


def test_weight_decay_is_part_of_the_loss_where_the_optimizer_adds_it_to_the_gradient():
    theta, closure = quadratic([2.0, 2.0])
    optimizer = lyapcuda.CDAT(
        torch.optim.SGD([theta], lr=0.01, weight_decay=1.0), 1.0, every=1, ema=0.0, max_step=1e3
    )
    optimizer.step(closure)
    assert theta.detach().abs().max() < 1e-7  # curvature 3 everywhere
    assert math.isclose(float(optimizer.curvature), 3.0, rel_tol=1e-7)


def test_max_step_bounds_the_first_steps_and_those_without_curvature():
    theta = nn.Parameter(torch.full((4,), 2.0, dtype=torch.float64))
    optimizer = lyapcuda.CDAT(torch.optim.SGD([theta], lr=1e-3), every=1, max_step=0.25)
    optimizer.step(theta.sum)  # a plane: s would be infinite
    torch.testing.assert_close(theta.detach(), torch.full((4,), 1.5, dtype=torch.float64))


def test_uphill_it_stays():
    theta, closure = quadratic([1.0])

    class Uphill(torch.optim.SGD):
        def step(self, closure=None):
            theta.data.add_(theta.grad)

    optimizer = lyapcuda.CDAT(Uphill([theta], lr=1.0))
    optimizer.step(closure)
    assert float(theta.detach()) == 1.0 and float(optimizer.rate) == 0.0
    assert math.isinf(optimizer.sharpness)


def test_no_step_waits_for_the_device():
    net, optimizer, _ = trained(MADE["SGD"], 2, every=1)  # (Adam's own reads its counter.)
    with no_waiting():
        for _ in range(2):
            optimizer.step(net.closure)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters(dtype):
    net = case("gelu_mlp", 0, dtype)
    optimizer = lyapcuda.CDAT(torch.optim.SGD(net.model.parameters(), lr=0.1))
    losses = [float(optimizer.step(net.closure)) for _ in range(40)]
    assert losses[-1] < 0.9 * losses[0]


def test_parameters_of_any_strides_and_tied_ones():
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    params = [
        nn.Parameter(base.t()),
        nn.Parameter(torch.randn(4, 10)[:, ::2].detach()),
        nn.Parameter(torch.tensor(0.5)),
        nn.Parameter(torch.zeros(0, 3)),
    ]

    def closure():
        return sum((p - 1).square().sum() for p in params)

    optimizer = lyapcuda.CDAT(torch.optim.SGD(params, lr=0.1), 1.0, every=1, ema=0.0, max_step=9.0)
    optimizer.step(closure)
    assert all((p - 1).abs().max() < 1e-2 for p in params if p.numel())


# --- what it leaves ------------------------------------------------------------------------------


def test_a_step_leaves_what_one_evaluation_leaves(noisy):
    model, closure = noisy
    optimizer = lyapcuda.CDAT(torch.optim.Adam(model.parameters()), every=1)
    optimizer.step(closure)
    twin = copy.deepcopy(model)
    start = torch.get_rng_state(), random.getstate(), np.random.get_state()
    optimizer.step(closure)
    after = snapshot(model)[2:], [b.clone() for b in model.buffers()]
    torch.set_rng_state(start[0]), random.setstate(start[1]), np.random.set_state(start[2])
    x, y = closure.__closure__[1].cell_contents, closure.__closure__[2].cell_contents
    twin.zero_grad()
    nn.functional.cross_entropy(twin(x), y).backward()
    assert snapshot(twin)[2:] == after[0]
    assert bits(list(twin.buffers())) == bits(after[1])


@pytest.mark.parametrize("at", [1, 2])  # at θ, at θ + εU
def test_after_an_exception_everything_is_as_it_was(at, noisy):
    model, closure = noisy
    optimizer = lyapcuda.CDAT(torch.optim.Adam(model.parameters()), every=1)
    optimizer.step(closure), optimizer.step(closure)
    before = snapshot(model), bits(optimizer.state_dict())
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(interrupted(closure, at))
    assert (snapshot(model), bits(optimizer.state_dict())) == before
    optimizer.step(closure)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_leaves_theta_and_a_finite_state(bad, every):
    net, optimizer, _ = trained(MADE["Adam"], 2, every=every)
    before, rate = flat(net.model.parameters()), float(optimizer.rate)
    loss = optimizer.step(lambda: net.closure() * bad)
    assert not loss.isfinite()
    assert torch.equal(flat(net.model.parameters()), before)
    assert float(optimizer.rate) == rate
    assert all(v.isfinite().all() for s in optimizer.state.values() for v in s.values())
    assert all((p.grad == 0).all() for p in net.model.parameters())
    optimizer.step(net.closure)
    assert flat(net.model.parameters()).isfinite().all()
    assert not torch.equal(flat(net.model.parameters()), before)


def test_what_is_not_finite_beside_theta_goes_on_with_the_last_factor():
    net, optimizer, _ = trained(MADE["Adam"], 2, every=1)
    before, rate = flat(net.model.parameters()), float(optimizer.rate)
    optimizer.step(lambda: net.closure() * (math.nan if lyapcuda.at_a_copy() else 1.0))
    assert float(optimizer.rate) == rate
    after = flat(net.model.parameters())
    assert after.isfinite().all() and not torch.equal(after, before)


def test_a_clipped_gradient_makes_the_update_and_the_whole_one_the_slope():
    theta, closure = quadratic([2.0, 2.0])

    def clipping():
        optimizer.zero_grad()
        loss = closure()
        loss.backward()
        nn.utils.clip_grad_norm_([theta], 1e-3)
        return loss

    optimizer = lyapcuda.CDAT(torch.optim.SGD([theta], lr=1.0), 1.0, every=1, ema=0.0, max_step=9.0)
    optimizer.step(clipping)
    assert theta.detach().abs().max() < 1e-6
    assert math.isclose(float(theta.grad.norm()), 1e-3, rel_tol=1e-3)


# --- groups, saving ------------------------------------------------------------------------------


def test_groups_and_state_are_the_wrapped_optimizers():
    theta, closure = quadratic([2.0, 1.0])
    other = nn.Parameter(torch.ones(3, dtype=torch.float64))
    inner = torch.optim.SGD([theta], lr=0.1, momentum=0.9)
    optimizer = lyapcuda.CDAT(inner, every=4)
    assert optimizer.param_groups is inner.param_groups and optimizer.state is inner.state
    optimizer.step(closure)
    optimizer.add_param_group({"params": [other], "lr": 0.2})
    assert inner.param_groups[1]["lr"] == 0.2

    def both():
        return closure() + other.square().sum()

    rate = float(optimizer.rate)
    optimizer.step(both)  # measures at once
    assert float(optimizer.rate) != rate and (other != 1).all()
    optimizer.zero_grad()
    assert theta.grad is None and other.grad is None
    with pytest.raises(ValueError, match="maximize=True"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "maximize": True})
    assert len(inner.param_groups) == 2


def test_frozen_parameters_stay_and_thawed_ones_move():
    theta, closure = quadratic([2.0, 1.0])
    other = nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=False)
    other.grad = torch.ones_like(other)
    optimizer = lyapcuda.CDAT(torch.optim.SGD([theta, other], lr=0.1))

    def both():
        return closure() + other.square().sum()

    optimizer.step(both)
    assert torch.equal(other, torch.ones_like(other)) and other.grad is not None
    other.requires_grad_()
    other.grad = None
    optimizer.step(both)
    assert (other != 1).all()


@pytest.mark.parametrize("name", ["momentum", "Adam"])
@pytest.mark.parametrize("through", ["state_dict", "pickle", "deepcopy"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(name, through, tmp_path):
    net, optimizer, _ = trained(MADE[name], 4, every=3)
    if through == "state_dict":
        model = copy.deepcopy(net.model)
        resumed = lyapcuda.CDAT(MADE[name](list(model.parameters())), every=3)
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    elif through == "pickle":
        model, resumed = pickle.loads(pickle.dumps((net.model, optimizer)))
    else:
        model, resumed = copy.deepcopy((net.model, optimizer))
    inputs = [cell.cell_contents for cell in net.closure.__closure__[0].cell_contents.__closure__]
    x, labels = (
        next(t for t in inputs if getattr(t, "dtype", None) == d)
        for d in (torch.float32, torch.int64)
    )

    def closure_of(model):
        return lambda: nn.functional.cross_entropy(model(x), labels)

    for _ in range(4):
        optimizer.step(closure_of(net.model))
        resumed.step(closure_of(model))
    assert bits(list(model.parameters())) == bits(list(net.model.parameters()))
    assert bits(resumed.state_dict()) == bits(optimizer.state_dict())
    assert torch.equal(resumed.rate, optimizer.rate)


def test_states_of_others_are_refused_and_change_nothing():
    _, optimizer, _ = trained(MADE["Adam"], 2)
    before = bits(optimizer.state_dict())
    with pytest.raises(ValueError, match="not the state of a CDAT"):
        optimizer.load_state_dict(optimizer.optimizer.state_dict())
    saved = optimizer.state_dict()
    saved["cdat"] = {**saved["cdat"], "numbers": torch.zeros(2)}
    with pytest.raises(ValueError, match="numbers"):
        optimizer.load_state_dict(saved)
    other = lyapcuda.CDAT(torch.optim.Adam([nn.Parameter(torch.ones(1))])).state_dict()
    with pytest.raises(ValueError, match="group"):
        optimizer.load_state_dict(other)
    assert bits(optimizer.state_dict()) == before


# --- what is refused -----------------------------------------------------------------------------


def a_parameter():
    return [nn.Parameter(torch.ones(2))]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.optim.LBFGS(a_parameter()), "LBFGS takes several evaluations"),
        (lambda: lyapcuda.LyapunovSGD(a_parameter()), "LyapunovSGD measures its own rate"),
        (lambda: lyapcuda.CDAT(torch.optim.SGD(a_parameter())), "is a CDAT already"),
        (lambda: torch.optim.SGD, "expected a torch.optim.Optimizer"),
        (a_parameter, "expected a torch.optim.Optimizer"),
    ],
)
def test_what_cannot_be_wrapped_is_refused_by_name(make, message):
    with pytest.raises(TypeError, match=message):
        lyapcuda.CDAT(make())


@pytest.mark.parametrize(
    "options",
    [{"sigma": 0}, {"sigma": None}, {"every": 0}, {"ema": 1.0}, {"max_step": -1.0},
     {"perturbation": 0.0}],
)  # fmt: skip
def test_wrong_arguments_are_named(options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"{name}="):
        lyapcuda.CDAT(torch.optim.SGD(a_parameter()), **options)


def test_steps_that_cannot_be_taken_say_what_to_do():
    theta, closure = quadratic([1.0, 2.0])
    optimizer = lyapcuda.CDAT(torch.optim.SGD([theta]))
    with pytest.raises(RuntimeError, match="without a closure: .*call step\\(closure\\)"):
        optimizer.step()
    with pytest.raises(TypeError, match="closure=3"):
        optimizer.step(3)
    tracker = lyapcuda.CurvatureTracker([theta])
    handle = tracker.attach(optimizer)
    with pytest.raises(RuntimeError, match="call tracker.step\\(closure\\) before it"):
        optimizer.step(closure)
    handle.remove()
    assert math.isfinite(tracker.step(closure)) and math.isfinite(optimizer.step(closure))
    closure().backward()
    with pytest.raises(RuntimeError, match="gradients are in .grad already"):
        optimizer.step(closure)
    table = nn.Embedding(3, 2, sparse=True)
    optimizer = lyapcuda.CDAT(torch.optim.SGD(table.parameters()))
    with pytest.raises(TypeError, match="sparse"):
        optimizer.step(lambda: table(torch.tensor([0])).sum())
