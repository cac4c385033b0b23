"""LyapunovSGD under torch.amp: the scale is taken out of gradients and curvature alike."""

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

import lyapcuda
from nets import case
from optim_cases import exact, quadratic
from sync import no_waiting


def scaler_of(**options):
    return torch.amp.GradScaler("cpu", **{"init_scale": 2.0**12, **options})


def own_backward(closure, scaler):
    def scaled():
        loss = closure()
        scaler.scale(loss).backward()
        return loss

    return scaled


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("own", [True, False])
def test_a_scaled_run_is_the_unscaled_one_to_the_bit(own, k):
    """Powers of two change no digit: steps and curvatures are those without a scaler."""
    runs = []
    for scaler in (None, scaler_of(growth_interval=2)):
        truth = case("tanh_mlp", seed=2)
        optimizer = lyapcuda.LyapunovSGD(truth.model.parameters(), k=k, momentum=0.5, gain=0.5)
        closure = own_backward(truth.closure, scaler) if own and scaler else truth.closure
        values = []
        for _ in range(6):
            loss = optimizer.measure(closure, scaler=scaler)
            clip_grad_norm_(truth.model.parameters(), 1.0)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            values += [loss, optimizer.tracker.h, optimizer.rates]
        runs.append((values, [p.detach() for p in truth.model.parameters()]))
    for plain, scaled in zip(*runs, strict=True):
        assert all(map(torch.equal, plain, scaled))
    assert scaler.get_scale() > 2.0**12  # it grew on the way


def test_autocast_with_a_scaler():
    truth = case("gelu_mlp", seed=3)
    optimizer = lyapcuda.LyapunovSGD(truth.model.parameters(), perturbation=0.3)
    scaler = scaler_of()

    def closure():
        with torch.autocast("cpu", torch.bfloat16):
            return truth.closure()

    losses = []
    for _ in range(30):
        losses.append(float(optimizer.measure(closure, scaler=scaler)))
        scaler.step(optimizer)
        scaler.update()
    assert losses[-1] < 0.9 * losses[0]
    assert scaler.get_scale() == 2.0**12


@pytest.mark.parametrize("where", ["θ", "θ + q"])
def test_an_overflow_in_either_gradient_skips_the_step_and_lowers_the_scale(where):
    theta = nn.Parameter(torch.ones(2))
    optimizer, scaler = exact([theta], momentum=0.5, warmup_tol=1e-4), scaler_of()
    plain = lambda: 2 * theta.square().sum()  # noqa: E731
    optimizer.measure(plain, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    before, held = theta.detach().clone(), optimizer.state[theta]["momentum_buffer"].clone()
    h, calls = optimizer.tracker.h, 0

    def overflows():
        nonlocal calls
        calls += 1  # θ comes last
        loss = plain()
        return loss * (1e38 if calls == {"θ + q": 1, "θ": 2}[where] else 1.0)

    optimizer.measure(overflows, scaler=scaler)
    with no_waiting():
        scaler.step(optimizer)
    scaler.update()
    assert torch.equal(theta, before) and torch.equal(optimizer.tracker.h, h)
    assert torch.equal(optimizer.state[theta]["momentum_buffer"], held)
    assert float(optimizer.lr) == 0.0
    assert scaler.get_scale() == 2.0**11
    optimizer.measure(plain, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(theta, before)


def test_unequal_scales_of_two_gradients_are_an_error_and_change_nothing():
    theta = nn.Parameter(torch.ones(2))
    optimizer, scaler = exact([theta], warmup_tol=1e-4), scaler_of(growth_interval=1)
    closure = lambda: 2 * theta.square().sum()  # noqa: E731
    optimizer.warmup(closure, scaler=scaler)
    before, steps = theta.detach().clone(), int(optimizer.tracker.steps)

    def rescales():
        loss = closure()
        scaler.scale(loss).backward()
        scaler.update(2.0)
        return loss

    with pytest.raises(RuntimeError, match="scaler: its scale changed"):
        optimizer.measure(rescales, scaler=scaler)
    assert torch.equal(theta, before) and theta.grad is None
    assert int(optimizer.tracker.steps) == steps
    optimizer.measure(closure, scaler=scaler)
    assert float(optimizer.tracker.h) == pytest.approx(4.0, rel=1e-3)


def test_a_scaler_that_measure_was_not_told_of_is_an_error():
    theta = nn.Parameter(torch.ones(2))
    optimizer, scaler = exact([theta], warmup_tol=1e-4), scaler_of()
    closure = own_backward(lambda: 2 * theta.square().sum(), scaler)
    optimizer.measure(closure)
    before = theta.detach().clone()
    with pytest.raises(RuntimeError, match=r"measure\(closure, scaler=scaler\)"):
        scaler.step(optimizer)
    assert torch.equal(theta, before)


def test_the_order_of_calls_is_checked():
    theta = nn.Parameter(torch.ones(2))
    optimizer, scaler = exact([theta], warmup_tol=1e-4), scaler_of()
    closure = lambda: 2 * theta.square().sum()  # noqa: E731
    optimizer.measure(closure, scaler=scaler)
    with pytest.raises(RuntimeError, match="scaler.update"):
        optimizer.measure(closure, scaler=scaler)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="scaler.update"):
        optimizer.measure(closure, scaler=scaler)
    scaler.update()
    optimizer.measure(closure, scaler=scaler)
    with pytest.raises(RuntimeError, match="not on scaler.scale"):
        fresh = scaler_of()

        def unscaled():
            loss = closure()
            loss.backward()
            return loss

        exact([theta], warmup_tol=1e-4).measure(unscaled, scaler=fresh)


def test_a_disabled_scaler_is_none_at_all():
    theta, closure = quadratic([4.0, 1.0])
    optimizer, scaler = exact([theta], warmup_tol=1e-4), torch.amp.GradScaler("cpu", enabled=False)
    optimizer.measure(closure, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert float(optimizer.lr) == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("how", ["batches", "part"])
def test_micro_batches_and_parts_are_unscaled_alike(how):
    theta, whole = nn.Parameter(torch.ones(3)), torch.tensor([1.0, 3.0])
    optimizer, scaler = exact([theta], warmup_tol=1e-4), scaler_of()

    def loss_of(batch):
        return (batch[:, None] * theta.square()).sum(1).mean()

    if how == "batches":
        optimizer.measure(loss_of, batches=[whole[:1], whole[1:]], scaler=scaler)
    else:
        part = whole[1:]
        optimizer.measure(lambda: loss_of(whole), part=lambda: loss_of(part), scaler=scaler)
    torch.testing.assert_close(theta.grad, torch.full((3,), 4.0))
    assert float(optimizer.tracker.h) == pytest.approx(6.0, rel=1e-3)
    scaler.step(optimizer)
    scaler.update()


def test_float16_gradients_are_refused():
    theta = nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = exact([theta], warmup_tol=1e-4)
    with pytest.raises(ValueError, match="float16 gradients"):
        optimizer.measure(lambda: theta.float().square().sum(), scaler=scaler_of())
    assert theta.grad is None
