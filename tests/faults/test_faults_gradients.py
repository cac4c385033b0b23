"""Faults in what the closure gives: gradients missing, flat, huge, tiny or not finite, and
separations that are lost."""

import math

import pytest
import torch
from torch import nn

import lyapcuda
import nets
from fault_cases import bits, bowl, curvatures, found, state_of, steps, surroundings
from lyapcuda.objective.pointing import at_a_copy

F32, F64 = torch.float32, torch.float64
INF, NAN = math.inf, math.nan


# --- missing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("where", ["everywhere", "at theta", "at the copies"])
def test_a_parameter_without_gradient_counts_as_zero_there(backend, where, k):
    """None in one copy only is a zero in that one: the difference is the other's gradient."""
    used, sometimes = (nn.Parameter(torch.ones(3, dtype=F64)) for _ in range(2))
    here = {"everywhere": [False, False], "at theta": [True, False], "at the copies": [False, True]}

    def closure():
        loss = (used * used).sum()
        return loss + sometimes.sum() if here[where][at_a_copy()] else loss

    tracker = lyapcuda.CurvatureTracker([used, sometimes], k=k, debug=False)
    before = surroundings([used, sometimes])
    tracker.start()
    size = tracker.perturbation
    tracker.step(closure)
    assert float(tracker.skipped) == 0 and surroundings([used, sometimes]) == before
    assert tracker.h.isfinite().all() and tracker.interval.isfinite().all()
    if where == "everywhere":
        steps(tracker, closure, 10)
        assert found(tracker) == pytest.approx([2.0] * k, rel=1e-4)
    else:  # y holds ±1 in half of the places: the residual says that no eigenvalue is known
        assert float(tracker.residual.max()) > 0.1 / size


def test_no_gradient_at_all_is_an_error_and_changes_nothing(backend):
    theta, closure = bowl()
    tracker = lyapcuda.CurvatureTracker([("w", theta)])
    tracker.step(closure)
    before, state = surroundings([theta]), state_of(tracker)
    other = torch.ones(3, requires_grad=True)
    for bad, message in (
        (lambda: other.sum(), "gives none of the tracked parameters a gradient"),
        (lambda: closure().detach(), "no parameter got a gradient"),
        (lambda: 0.5, "no parameter got a gradient"),
    ):
        with pytest.raises(ValueError, match=f"closure: .*{message}"):
            tracker.step(bad)
        assert surroundings([theta]) == before and state_of(tracker) == state


# --- flat ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimate", ["rayleigh", "growth", "paper"])
@pytest.mark.parametrize("k", [1, 3])
def test_equal_gradients_have_exponent_zero_and_no_nan(backend, k, estimate):
    """g1 ≡ g0: a linear loss. λ = 0, h = 0; then curvature appears and is found."""
    theta, curved = bowl(k)
    slope = torch.linspace(1, 2, 6, dtype=F64)
    tracker = lyapcuda.CurvatureTracker([theta], k=k, estimate=estimate)
    steps(tracker, lambda: (slope * theta).sum(), 5)
    assert (int(tracker.steps), int(tracker.skipped)) == (5, 0)
    # θ + q rounds, so the difference of equal slopes is exactly nothing.
    assert tracker.h.abs().max() == 0 and tracker.residual.abs().max() == 0
    assert tracker.interval.isfinite().all()
    assert tracker.exponent.abs().max() < 1e-12
    if estimate == "rayleigh":
        steps(tracker, curved, 15)
        assert found(tracker) == pytest.approx(curvatures(k)[:k], rel=1e-3)


# --- not finite ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["theta", "copy", "both"])
@pytest.mark.parametrize("k", [1, 2])
def test_a_gradient_that_is_not_finite_changes_no_bit_of_the_state(backend, k, where, bad):
    theta, closure = bowl(k, F32)
    spoilt = False
    hit = {"theta": [True, False], "copy": [False, True], "both": [True, True]}[where]

    def broken():
        loss = closure()
        handle = theta.register_hook(spoil)
        loss.backward()
        handle.remove()
        return loss

    def spoil(gradient):
        gradient = gradient.clone()
        if spoilt and hit[at_a_copy()]:
            gradient[2] = bad
        return gradient

    tracker = lyapcuda.CurvatureTracker([theta], k=k, momentum=0.5)
    twin = lyapcuda.CurvatureTracker([theta], k=k, momentum=0.5)
    for t in (tracker, twin):
        steps(t, broken, 3)
    spoilt = True
    kept = bits([tracker.h, tracker.h_ema, tracker.beta, tracker.interval, tracker.exponent])
    vectors = bits([tracker.vector(i) for i in range(k)])
    before = surroundings([theta])
    steps(tracker, broken, 2)
    assert (int(tracker.skipped), int(tracker.steps), int(tracker.reseeds)) == (2, 3, 0)
    assert (
        bits([tracker.h, tracker.h_ema, tracker.beta, tracker.interval, tracker.exponent]) == kept
    )
    assert (
        bits([tracker.vector(i) for i in range(k)]) == vectors and surroundings([theta]) == before
    )
    spoilt = False
    for t in (tracker, twin):
        steps(t, broken, 2)
    assert bits([tracker.h, tracker.beta, tracker.interval]) == bits(
        [twin.h, twin.beta, twin.interval]
    )


@pytest.mark.parametrize("k", [1, 2])
def test_training_goes_on_after_a_step_that_is_not_finite(backend, k):
    case = nets.case("tanh_mlp", 1)
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    tracker = lyapcuda.CurvatureTracker(case.model.parameters(), k=k)
    tracker.attach(optimizer)
    losses, kept = [], {}
    for i in range(10):
        optimizer.zero_grad()
        factor = NAN if i in (1, 7) else 1.0
        before = bits(list(case.model.parameters()))
        loss = optimizer.step(lambda factor=factor: case.closure() * factor)
        if factor != factor:  # as without a tracker: SGD itself takes NaN
            assert bits(list(case.model.parameters())) != before
            with torch.no_grad():
                case.model.load_state_dict(kept)
            continue
        kept = {n: t.clone() for n, t in case.model.state_dict().items()}
        losses.append(float(loss))
    assert int(tracker.skipped) == 2 and int(tracker.steps) == 8
    assert losses[-1] < losses[0] and tracker.h.isfinite().all()


# --- of any size ---------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("size", [1e38, 1e30, 1e-30, 1e-38, 1e-41])
def test_gradients_of_any_size_that_float32_has(backend, size, k):
    """The largest gradient is ``size``, the loss finite: h to the gradients' own precision."""
    h = torch.tensor([1.0, 0.9 if k == 2 else 0.02, 0.01, -0.02])
    theta = nn.Parameter(torch.full((4,), 0.5))

    def closure():
        theta.grad = (
            h * theta.detach() * 2.0
        ) * size  # (a loss of 1e38 and more is its own matter)
        return 1.0

    tracker = lyapcuda.CurvatureTracker([theta], k=k, perturbation=0.25, debug=False)
    steps(tracker, closure, 15)
    assert float(tracker.skipped) == 0
    expected = [2.0 * size * float(value) for value in h]
    if size > 1e-40:
        assert found(tracker) == pytest.approx(expected[:k], rel=1e-3, abs=0)
    else:  # β stays a float32: the copies part slowly, but the interval is right
        for low, high in tracker.interval.view(-1, 2).tolist():
            assert any(low <= value <= high for value in expected)
    assert 0 < float(tracker.beta) <= 1e38


def test_a_gradient_that_leaves_float32_is_skipped_and_counted(backend):
    theta = nn.Parameter(torch.ones(4))
    tracker = lyapcuda.CurvatureTracker([theta])
    steps(tracker, lambda: (theta * theta).sum(), 5)
    h = float(tracker.h)
    for _ in range(3):
        tracker.step(lambda: (theta * 3e38 * theta * 2).sum())
    assert int(tracker.skipped) == 3 and float(tracker.h) == h


# --- separations that are lost -------------------------------------------------------------------


def spoil(tracker, change):
    """A tracker's q as ``change`` makes it, by way of its own checkpoint."""
    saved = tracker.state_dict()
    change(saved["separations"][0]["q"][0])
    tracker.load_state_dict(saved)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("k", [1, 3])
def test_a_separation_of_no_length_is_replaced(backend, k, momentum):
    theta, closure = bowl(k, F32)
    tracker = lyapcuda.CurvatureTracker([theta], k=k, momentum=momentum)
    steps(tracker, closure, 3)
    spoil(tracker, lambda q: (q if k == 1 else q[1]).zero_())
    h = bits(tracker.h)
    tracker.step(closure)
    assert (int(tracker.skipped), int(tracker.reseeds)) == (1, 1) and bits(tracker.h) == h
    norm = sum(float(v.double().square().sum()) for v in tracker.vector(1 if k > 1 else 0)) ** 0.5
    assert 0.6 < norm / tracker.perturbation < 1.4
    steps(tracker, closure, 20)
    assert (int(tracker.skipped), int(tracker.reseeds)) == (1, 1)
    assert found(tracker) == pytest.approx(curvatures(k)[:k], rel=2e-3)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("copies", [(1, 0), (2, 1), (2, 0, 1)])
def test_of_parallel_separations_one_is_replaced(backend, copies, dtype):
    """Row ``copies[0]`` becomes a copy (a multiple) of the others named; or of all of them."""
    theta, closure = bowl(3, dtype)
    tracker = lyapcuda.CurvatureTracker([theta], k=3)
    steps(tracker, closure, 3)
    first, *others = copies
    spoil(tracker, lambda q: q[first].copy_(-0.7 * q[others].sum(0)))
    tracker.step(closure)
    assert (int(tracker.skipped), int(tracker.reseeds)) == (1, 1)
    steps(tracker, closure, 15)
    assert (int(tracker.skipped), int(tracker.reseeds)) == (1, 1)
    assert found(tracker) == pytest.approx(curvatures(3)[:3], rel=1e-3)
    vectors = torch.stack([tracker.vector(i)[0].double() for i in range(3)])
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(3, dtype=F64), rtol=0, atol=1e-5)


def test_all_separations_parallel_come_back_one_a_step(backend):
    theta, closure = bowl(4)
    tracker = lyapcuda.CurvatureTracker([theta], k=4)
    steps(tracker, closure, 2)
    spoil(tracker, lambda q: q[1:].copy_(q[0].expand(3, -1)))
    steps(tracker, closure, 20)
    assert (int(tracker.skipped), int(tracker.reseeds)) == (3, 3)
    assert found(tracker) == pytest.approx(curvatures(4)[:4], rel=1e-3)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("beta", [0.25, None])
def test_copies_that_meet_part_again(backend, k, beta):
    """‖d‖ = 0: 1 + βh = 0 along q. A β of ours is halved, under the user's q is replaced."""
    theta, closure = bowl([*[3.0, 2.5][:k], *[0.2, 0.1][: 3 - k], -4.0])
    tracker = lyapcuda.CurvatureTracker([theta], k=k, beta=beta)
    tracker.step(closure)
    saved = tracker.state_dict()
    rows = saved["separations"][0]["q"][0]
    rows.zero_()
    for row, place in zip(rows, (3, 0), strict=False):  # eigenvectors, of −4, 3
        row[place] = tracker.perturbation
    lyapcuda.ops.state_field(saved["separations"][0]["state"], k, "beta").fill_(0.25)
    tracker.load_state_dict(saved)
    tracker.step(closure)
    assert int(tracker.skipped) == 0 and tracker.h.isfinite().all()
    assert float(tracker.rayleigh.reshape(-1)[-1]) == pytest.approx(-4.0)  # it was measured
    assert int(tracker.reseeds) == (0 if beta is None else 1)
    assert float(tracker.beta) == (0.25 if beta else 0.125)
    if beta is not None:  # another direction, with every eigenvector in it
        steps(tracker, closure, 25)
        assert found(tracker) == pytest.approx([3.0, 2.5][:k], rel=1e-3)
    assert int(tracker.skipped) == 0
