"""Faults of the closure itself: it isn't a function of θ, throws, or steps its own tracker."""

import pytest
import torch
from torch import nn

import lyapcuda
from fault_cases import bits, bowl, state_of, steps, surroundings


def minibatches(count=3):
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(4, 1)
    return model, [torch.randn(8, 4, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("period", [2, 3])
def test_debug_finds_a_closure_that_returns_another_minibatch(backend, k, period):
    model, batches = minibatches(period)
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        return model(batches[calls % period]).square().mean()

    tracker = lyapcuda.CurvatureTracker(model.parameters(), k=k, debug=True)
    steps(tracker, lambda: model(batches[0]).square().mean(), 3)
    before, state = surroundings(model.parameters()), state_of(tracker)
    for leave in (False, True):
        with pytest.raises(
            RuntimeError, match="closure: two evaluations at the same θ .*minibatch"
        ):
            tracker.step(closure, leave_grad=leave)
        assert surroundings(model.parameters()) == before and state_of(tracker) == state


def test_debug_lets_a_function_of_theta_pass_and_changes_no_value(backend):
    """Dropout from the global generators is replayed: no fault."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.BatchNorm1d(8), nn.Linear(8, 1))
    x = torch.randn(16, 4)
    results = []
    for debug in (False, True):
        torch.manual_seed(1)
        tracker = lyapcuda.CurvatureTracker(model.parameters(), debug=debug, model=model)
        twin = surroundings(model.parameters(), [model])
        steps(tracker, lambda: model(x).square().mean(), 4)
        assert surroundings(model.parameters(), [model]) == twin
        tracker.step(lambda: model(x).square().mean(), leave_grad=True)
        results.append((bits(tracker.state), bits([p.grad for p in model.parameters()])))
        model.zero_grad()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.reset_running_stats()
    assert results[0] == results[1]


def test_debug_finds_random_numbers_of_the_closures_own_and_gradients_that_come_and_go():
    theta = nn.Parameter(torch.ones(3))
    generator = torch.Generator().manual_seed(0)
    tracker = lyapcuda.CurvatureTracker([theta], debug=True)
    with pytest.raises(RuntimeError, match="gave the losses"):
        tracker.step(lambda: (theta * torch.rand(3, generator=generator)).sum())
    other, calls = nn.Parameter(torch.ones(3)), []
    tracker = lyapcuda.CurvatureTracker([theta, other], debug=True)

    def closure():
        calls.append(1)
        return theta.sum() + (other.sum() if len(calls) % 2 else 0.0)

    with pytest.raises(RuntimeError, match="a gradient that came once only"):
        tracker.step(closure)


@pytest.mark.parametrize("part", ["measure", "batches"])
def test_debug_looks_at_a_part_of_the_batch_too(part):
    model, batches = minibatches()
    calls = 0

    def changing(*batch):
        nonlocal calls
        calls += 1
        return model(batches[calls % 3]).square().mean()

    tracker = lyapcuda.CurvatureTracker(model.parameters(), debug=True)
    options = {"measure": changing} if part == "measure" else {"batches": [batches[0]]}
    closure = changing if part == "batches" else lambda: model(batches[0]).square().mean()
    with pytest.raises(RuntimeError, match="two evaluations at the same θ"):
        tracker.step(closure, leave_grad=True, **options)
    assert all(p.grad is None for p in model.parameters())


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("options", [{}, {"which": "BE", "k": 3, "momentum": 0.5}], ids=str)
def test_a_closure_that_throws_at_every_call_leaves_everything(backend, options, error):
    """At each of its k + 1 evaluations, before and after its backward()."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 2))
    x = torch.randn(12, 4)
    k = options.get("k", 1)
    tracker = lyapcuda.CurvatureTracker(model.parameters(), **options)

    def closure(stop_at=None, after=False):
        nonlocal calls
        calls += 1
        loss = model(x).square().mean()
        if calls == stop_at and not after:
            raise error
        loss.backward()
        if calls == stop_at:
            raise error
        return loss

    calls = 0
    steps(tracker, closure, 3)
    model(x).sum().backward()
    before, state = surroundings(model.parameters(), [model]), state_of(tracker)
    for stop_at in range(1, k + 2):
        for after in (False, True):
            for leave in (False, True):
                calls = 0
                with pytest.raises(error):
                    tracker.step(lambda a=stop_at, b=after: closure(a, b), leave_grad=leave)
                assert calls == stop_at
                assert surroundings(model.parameters(), [model]) == before
                assert state_of(tracker) == state


def test_a_closure_that_steps_its_own_tracker_is_an_error(backend):
    theta, closure = bowl()
    tracker = lyapcuda.CurvatureTracker([theta])
    tracker.step(closure)
    before, state = surroundings([theta]), state_of(tracker)

    def nested():
        tracker.step(closure)
        return closure()

    with pytest.raises(RuntimeError, match="tracker.step was called from within its own closure"):
        tracker.step(nested)
    assert surroundings([theta]) == before and state_of(tracker) == state
    tracker.step(closure)
    assert int(tracker.steps) == 2


# --- under the solvers ---------------------------------------------------------------------------


def another_minibatch():
    """A net, and a closure that draws a minibatch by a generator of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    x, generator = torch.randn(64, 4), torch.Generator().manual_seed(0)

    def closure():
        chosen = torch.randint(64, (8,), generator=generator)
        return (model(x[chosen]) - x[chosen].sum(1, keepdim=True)).square().mean()

    return model, closure


@pytest.mark.parametrize("mode", ["auto", "exact", "difference"])
def test_solvers_say_that_a_closure_is_another_function_each_time(mode):
    model, closure = another_minibatch()
    before = surroundings(model.parameters())
    found = []
    for solver in (lyapcuda.eigsh, lyapcuda.trace, lyapcuda.spectral_density):
        with pytest.warns(lyapcuda.ConvergenceWarning, match="closure: two evaluations at"):
            found.append(solver(closure, model.parameters(), mode=mode))
        assert "minibatch from the loader" in found[-1].doubts[0]
    assert not found[0].converged.any()
    assert surroundings(model.parameters()) == before


@pytest.mark.parametrize("mode", ["auto", "exact", "difference"])
def test_debug_of_a_solver_finds_a_closure_that_returns_another_minibatch(mode):
    model, closure = another_minibatch()
    before = surroundings(model.parameters())
    with pytest.raises(RuntimeError, match="closure: two evaluations at the same θ .*minibatch"):
        lyapcuda.eigsh(closure, model.parameters(), mode=mode, debug=True)
    assert surroundings(model.parameters()) == before


def test_eigsh_says_that_a_gradient_is_not_that_of_its_loss():
    """Three times the gradient, by a loss that returns itself: symmetric, and no Hessian of it."""

    class Tripled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, gradient):
            return 3.0 * gradient

    model, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(32, 4)
    with pytest.warns(lyapcuda.ConvergenceWarning, match="gradient: it isn't that of the loss"):
        found = lyapcuda.eigsh(
            lambda: Tripled.apply((model(x) - 1.0).square().mean()), model.parameters()
        )
    assert found.mode == "exact" and not found.converged.any()


class Cubed(torch.autograd.Function):
    """Right once; its backward pass hides what it depends on."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        return 3.0 * ctx.saved_tensors[0].detach() ** 2 * gradient


def flash(x):
    """Attention of every row to itself and to the others, without a second derivative."""
    rows = x.reshape(1, 1, -1, 8)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        return nn.functional.scaled_dot_product_attention(rows, rows, rows).reshape(-1, 8)


@pytest.mark.parametrize(
    ("hidden", "says"),
    [(flash, "double backward fails here"), (Cubed.apply, "double backward is wrong here")],
)
def test_eigsh_takes_differences_where_double_backward_fails_or_is_wrong(hidden, says):
    torch.manual_seed(0)
    first, last, x = nn.Linear(4, 8), nn.Linear(8, 1), torch.randn(32, 4)
    params = [*first.parameters(), *last.parameters()]

    def closure():
        return (last(hidden(first(x))) - 1.0).square().mean()

    found = lyapcuda.eigsh(closure, params, tol=1e-2)
    assert found.mode == "difference" and says in found.reason
    alone = lyapcuda.eigsh(closure, params, tol=1e-2, mode="difference")
    assert found.converged.all()
    torch.testing.assert_close(found.eigenvalues, alone.eigenvalues, rtol=1e-2, atol=0)
