"""The evaluation of a copy: the right gradients, and nothing of the user's disturbed."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lyapcuda
from lyapcuda.objective.evaluator import Evaluator
from lyapcuda.objective.isolation import modules_of
from nets import Attention, Square, WrittenOutAttention
from noisy import snapshot


def test_no_trace_is_left(noisy):
    model, closure = noisy
    closure().backward()
    gradients = [p.grad for p in model.parameters()]
    tracker = lyapcuda.CurvatureTracker(model.parameters())
    before = snapshot(model)
    for _ in range(3):
        tracker.step(closure)
    assert snapshot(model) == before
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))


def test_leave_grad_leaves_what_a_plain_evaluation_leaves(noisy):
    model, closure = noisy
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    loss = closure()
    loss.backward()
    plain = snapshot(model)
    for p in model.parameters():
        p.grad = None
    torch.set_rng_state(state[0])
    random.setstate(state[1])
    np.random.set_state(state[2])
    model.load_state_dict(buffers, strict=False)
    tracked = lyapcuda.CurvatureTracker(model.parameters()).step(closure, leave_grad=True)
    assert snapshot(model) == plain
    assert torch.equal(tracked, loss.detach()) and not tracked.requires_grad


@pytest.mark.parametrize("fails_at", range(8))
@pytest.mark.parametrize("leave", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_everything_is_restored_after_an_exception_anywhere(noisy, fails_at, leave, error):
    model, closure = noisy
    closure().backward()
    tracker = lyapcuda.CurvatureTracker(model.parameters())
    tracker.step(closure)
    points = 0

    def reach():
        nonlocal points
        points += 1
        if points == fails_at + 1:
            raise error("here")

    handles = [
        module.register_forward_hook(lambda *_: reach()) for module in (model.norm, model.last)
    ]
    handles += [p.register_hook(lambda _: reach()) for p in (model.first.weight, model.last.bias)]
    before, kept = snapshot(model), tracker.state_dict()
    with pytest.raises(error):
        tracker.step(closure, leave_grad=leave)
    assert points == fails_at + 1
    assert snapshot(model) == before
    for handle in handles:
        handle.remove()
    # The tracker goes on as if that step had never been tried.
    after = tracker.state_dict()
    same = dict(rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(
        after["separations"][0]["state"], kept["separations"][0]["state"], **same
    )
    torch.testing.assert_close(after["separations"][0]["q"], kept["separations"][0]["q"], **same)
    assert after["calls"] == kept["calls"]
    tracker.step(closure)
    twin = lyapcuda.CurvatureTracker(model.parameters())
    twin.load_state_dict(kept)
    twin.step(closure)
    assert torch.equal(twin.h, tracker.h)


def test_both_copies_see_the_same_function(noisy):
    """With q → 0 the two gradients agree: same masks, same statistics, same random numbers."""
    model, closure = noisy
    parameters = list(model.parameters())
    names = [n for n, _ in model.named_parameters()]
    same = [[p.detach().clone() for p in parameters] for _ in range(2)]
    found = Evaluator(parameters, names, modules_of(parameters)).gradients(closure, same)
    for copy, loss in zip(found.copies, found.losses, strict=True):
        for g0, g1 in zip(found.g0, copy, strict=True):
            assert torch.equal(g0, g1)
        assert torch.equal(found.loss0, loss)


@pytest.mark.parametrize("mode", [True, False])
def test_mode_is_the_users(noisy, mode):
    model, closure = noisy
    model.train(mode)
    seen = []
    model.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    lyapcuda.CurvatureTracker(model.parameters(), debug=False).step(closure)
    assert seen == [mode, mode] and model.training is mode


def test_other_parameters_keep_their_gradients():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    x = torch.randn(8, 4)
    model(x).square().sum().backward()
    kept = [(p.grad, p.grad.clone()) for p in model.parameters()]
    tracker = lyapcuda.CurvatureTracker(model[0].parameters())
    tracker.step(lambda: model(x).square().mean())
    for p, (gradient, value) in zip(model.parameters(), kept, strict=True):
        assert p.grad is gradient and torch.equal(gradient, value)


def test_a_closure_may_call_backward_itself(noisy):
    model, closure = noisy
    model.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def lbfgs_style():
        optimizer.zero_grad()
        loss = closure()
        loss.backward()
        return loss

    def accumulating():
        for _ in range(2):
            loss = closure() / 2
            loss.backward()
        return loss.item() * 2

    values = []
    for form in (closure, lbfgs_style, accumulating):
        random.seed(0), np.random.seed(0)
        tracker = lyapcuda.CurvatureTracker(model.parameters())
        for _ in range(3):
            tracker.step(form)
        values.append(float(tracker.h))
    assert values[0] == values[1]
    assert values[2] == pytest.approx(values[0], rel=0.2)  # two random draws in one closure


def test_a_pending_graph_of_the_users_still_works(noisy):
    """Parameters are pointed elsewhere, not written: a graph made before the step stays valid."""
    model, closure = noisy
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()
    pending = closure()
    torch.set_rng_state(state[0])
    random.setstate(state[1])
    np.random.set_state(state[2])
    expected = torch.autograd.grad(closure(), list(model.parameters()))
    lyapcuda.CurvatureTracker(model.parameters()).step(closure)
    pending.backward()
    for p, g in zip(model.parameters(), expected, strict=True):
        assert torch.equal(p.grad, g)


# --- models that break exact Hessian-vector products ---------------------------------------------


def converged(model, closure, steps=400, **options):
    tracker = lyapcuda.CurvatureTracker(model.parameters(), **options)
    for _ in range(steps):
        tracker.step(closure)
    return float(tracker.h)


def exact_h0(model, closure):
    """The largest eigenvalue by double backward, in float64."""
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(closure(), parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    rows = []
    for value in flat:
        row = torch.autograd.grad(value, parameters, retain_graph=True)
        rows.append(torch.cat([r.reshape(-1) for r in row]))
    matrix = torch.stack(rows)
    return float(torch.linalg.eigvalsh((matrix + matrix.T) / 2)[-1])


def test_scaled_dot_product_attention():
    torch.manual_seed(0)
    model = Attention().double()
    x, y = torch.randn(8, 5, 8, dtype=torch.float64), torch.randint(0, 3, (8,))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        closure = lambda: nn.functional.cross_entropy(model(x), y)  # noqa: E731
        with pytest.raises(RuntimeError, match="derivative"):
            exact_h0(model, closure)
        h = converged(model, closure)
    twin = WrittenOutAttention().double()
    twin.load_state_dict(model.state_dict())
    assert h == pytest.approx(
        exact_h0(twin, lambda: nn.functional.cross_entropy(twin(x), y)), rel=1e-5
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    torch.manual_seed(0)
    body, head = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.2)), nn.Linear(7, 3)
    model = nn.Sequential(body, head).double()
    x = torch.randn(16, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, 3, (16,))

    def checkpointed():
        hidden = checkpoint(body, x, use_reentrant=reentrant, preserve_rng_state=True)
        return nn.functional.cross_entropy(head(hidden), y)

    torch.manual_seed(5)
    h = converged(model, checkpointed)
    torch.manual_seed(5)
    rng = torch.get_rng_state()

    def plain():
        torch.set_rng_state(rng)
        return nn.functional.cross_entropy(model(x), y)

    assert h == pytest.approx(exact_h0(model, plain), rel=1e-5)


def test_dropout_and_batchnorm(noisy):
    """The Hessian of the function with this mask and these batch statistics, exactly."""
    torch.manual_seed(1)
    layers = [nn.Linear(6, 10), nn.BatchNorm1d(10), nn.Tanh(), nn.Dropout(0.1), nn.Linear(10, 3)]
    model = nn.Sequential(*layers).double()
    x, y = torch.randn(32, 6, dtype=torch.float64), torch.randint(0, 3, (32,))
    rng = torch.get_rng_state()

    def plain():
        torch.set_rng_state(rng)
        return nn.functional.cross_entropy(model(x), y)

    h = converged(model, lambda: nn.functional.cross_entropy(model(x), y))
    assert torch.equal(torch.get_rng_state(), rng)
    assert int(model[1].num_batches_tracked) == 0
    assert h == pytest.approx(exact_h0(model, plain), rel=1e-5)


def test_once_differentiable():
    """Beside such an op an exact product can be silently wrong; a difference of gradients isn't."""
    torch.manual_seed(0)
    first, last = nn.Linear(4, 6).double(), nn.Linear(6, 1).double()
    model = nn.Sequential(first, last)
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 1, dtype=torch.float64)
    h = converged(model, lambda: nn.functional.mse_loss(last(Square.apply(first(x))), y))
    exact = exact_h0(model, lambda: nn.functional.mse_loss(last(first(x).square()), y))
    assert h == pytest.approx(exact, rel=1e-5)


def test_inside_the_users_autocast():
    """Autocast caches cast weights by tensor: a stale one would make the two gradients equal."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3))
    x, y = torch.randn(64, 20), torch.randint(0, 3, (64,))

    def closure():
        return nn.functional.cross_entropy(model(x), y)

    def casting():  # a cache of its own, cleared at the end
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return closure()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        outside = converged(model, closure, steps=20, perturbation=0.5)
    assert outside == converged(model, casting, steps=20, perturbation=0.5)
    assert outside > 0.1


def test_compiled_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(32, 6, dtype=torch.float64), torch.randint(0, 3, (32,))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    # (A compiled graph is hidden: the default would take another estimate there, and another Δq.)
    one = {"steps": 100, "estimate": "rayleigh"}
    h = converged(model, lambda: nn.functional.cross_entropy(compiled(x), y), **one)
    eager = converged(model, lambda: nn.functional.cross_entropy(model(x), y), **one)
    assert h == pytest.approx(eager, rel=1e-9)


# --- closures that are no closures ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m, x: None, TypeError, "closure.*NoneType"),
        (lambda m, x: m(x), ValueError, r"closure.*\(8, 2\)"),
        (lambda m, x: torch.tensor(1.0), ValueError, "closure.*depend"),
        (lambda m, x: m(x).sum().detach(), ValueError, "closure.*depend"),
    ],
)
def test_bad_closures(make, error, message):
    model, x = nn.Linear(4, 2), torch.randn(8, 4)
    tracker = lyapcuda.CurvatureTracker(model.parameters())
    with pytest.raises(error, match=message):
        tracker.step(lambda: make(model, x))
    with pytest.raises(TypeError, match="closure"):
        tracker.step(model(x).sum())


def test_sparse_gradients_are_refused_by_name():
    model = nn.Embedding(10, 4, sparse=True)
    tracker = lyapcuda.CurvatureTracker(model.named_parameters())
    before = model.weight.detach().clone()
    with pytest.raises(TypeError, match="weight.*sparse"):
        tracker.step(lambda: model(torch.tensor([1, 2])).sum())
    assert model.weight.grad is None and torch.equal(model.weight, before)
