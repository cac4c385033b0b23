"""critical_sharpness: the rate from which on a step raises the loss, and that nothing is left."""

import math

import pytest
import torch
from torch import nn

import lyapcuda
from fault_cases import bits
from lyapcuda.critical_sharpness import _search
from nets import case
from noisy import interrupted, snapshot
from optim_cases import quadratic

LINES = {
    "quadratic": (lambda e: -e + 1.5 * e * e, 2 / 3),
    "exponential": (lambda e: math.exp(3 * e) - 5 * e, 0.315763),
    "logarithm": (lambda e: -math.log1p(e) + 0.05 * e * e, 6.30725),
    "falls, rises, falls": (lambda e: -math.sin(8 * e), math.pi / 8),
    "not a number far out": (lambda e: -e if e < 0.7 else math.nan, 0.7),
    "infinite far out": (lambda e: -e if e < 0.7 else math.inf, 0.7),
}


@pytest.mark.parametrize("start", [0.05, 0.3, 4.0])
@pytest.mark.parametrize("name", LINES)
def test_the_search_brackets_where_a_function_rises(name, start):
    function, root = LINES[name]
    if name == "falls, rises, falls":
        start = min(start, 0.3)  # beyond, another root lies nearer
    calls = []

    def counted(rate):
        calls.append(rate)
        return function(rate)

    found = _search(counted, start, 0.05, 20)
    assert found.converged and abs(found.rate - root) <= 0.05 * root
    assert found.sharpness == 2 / found.rate
    assert found.evaluations == len(calls)
    risen = [r for r in calls if not function(r) <= function(0.0)]
    assert min(risen) <= 1.06 * max(r for r in calls if r not in risen and r < min(risen))


def test_from_near_by_a_quadratic_takes_five_evaluations():
    found = _search(LINES["quadratic"][0], 0.5, 0.05, 20)
    assert found.evaluations <= 6 and math.isclose(found.rate, 2 / 3, rel_tol=1e-12)


def test_what_was_not_bracketed_is_not_said_to_be_found():
    never, uphill = _search(lambda e: -e, 0.1, 0.05, 9), _search(lambda e: e, 0.1, 0.05, 9)
    assert (never.rate, never.sharpness, never.converged) == (math.inf, 0.0, False)
    assert (uphill.rate, uphill.sharpness, uphill.converged) == (0.0, math.inf, False)
    assert not _search(LINES["quadratic"][0], 0.1, 1e-6, 4).converged
    nowhere = _search(lambda e: math.nan, 0.1, 0.05, 9)
    assert math.isnan(nowhere.sharpness) and not nowhere.converged and nowhere.evaluations == 1


# --- along an optimizer's update -----------------------------------------------------------------


@pytest.mark.parametrize("lr", [1e-3, 10.0])
def test_along_minus_g_it_is_the_curvature_along_g(lr):
    spectrum = torch.tensor([5.0, 1.0, 0.2], dtype=torch.float64)
    theta, closure = quadratic(spectrum.tolist())
    closure().backward()
    g = theta.grad
    found = lyapcuda.critical_sharpness(closure, torch.optim.SGD([theta], lr=lr))
    assert found.converged
    assert math.isclose(found.sharpness, float(g @ (spectrum * g) / (g @ g)), rel_tol=1e-9)


def test_along_adams_update():
    spectrum = torch.tensor([5.0, 1.0, 0.2], dtype=torch.float64)
    theta, closure = quadratic(spectrum.tolist())
    optimizer = torch.optim.Adam([theta], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        closure().backward()
        optimizer.step()
    optimizer.zero_grad()
    closure().backward()
    found = lyapcuda.critical_sharpness(closure, optimizer)
    before = theta.detach().clone()
    g = theta.grad.clone()
    optimizer.step()
    u = (theta.detach() - before) / 1e-2
    expected = float(u @ (spectrum * u) / -(g @ u))
    assert found.converged and math.isclose(found.sharpness, expected, rel_tol=1e-6)


def test_a_direction_may_be_given():
    theta, closure = quadratic([4.0, 1.0])
    other = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    along = [-torch.tensor([1.0, 0.0])]  # g·u = −4, u·Hu = 4
    for params in (torch.optim.SGD([theta, other]), [theta, other]):
        found = lyapcuda.critical_sharpness(closure, params, direction=along)
        assert math.isclose(found.sharpness, 1.0, rel_tol=1e-9)


def test_of_cdat_it_is_the_wrapped_optimizers():
    net = case("gelu_mlp", 0)
    optimizer = lyapcuda.CDAT(torch.optim.SGD(net.model.parameters(), lr=0.1), every=1, ema=0.0)
    optimizer.step(net.closure)
    optimizer.zero_grad()
    net.closure().backward()
    found = lyapcuda.critical_sharpness(net.closure, optimizer)
    optimizer.zero_grad()
    optimizer.step(net.closure)  # at the same θ, to second order alone
    assert found.converged and 0.5 < found.sharpness / float(optimizer.sharpness) < 2


# --- what it leaves ------------------------------------------------------------------------------


def everything(model, optimizer):
    return snapshot(model), [bits(b) for b in model.buffers()], bits(optimizer.state_dict())


@pytest.mark.parametrize("made", ["fresh", "stepped"])
def test_it_leaves_no_trace(made, noisy):
    model, closure = noisy
    optimizer = torch.optim.Adam(model.parameters(), amsgrad=True)
    optimizer.register_step_pre_hook(lambda *_: pytest.fail("a hook was called"))
    closure().backward()
    if made == "stepped":
        torch.optim.Adam.step.__wrapped__(optimizer)
    before = everything(model, optimizer)
    pointers = [v.data_ptr() for s in optimizer.state.values() for v in s.values()]
    found = lyapcuda.critical_sharpness(closure, optimizer)
    assert everything(model, optimizer) == before
    assert [v.data_ptr() for s in optimizer.state.values() for v in s.values()] == pointers
    assert found.converged  # the same random numbers at every rate
    assert lyapcuda.critical_sharpness(closure, optimizer) == found


@pytest.mark.parametrize("at", [1, 3])
def test_it_leaves_no_trace_after_an_exception(at, noisy):
    model, closure = noisy
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    closure().backward()
    optimizer.step()
    before = everything(model, optimizer)
    with pytest.raises(KeyboardInterrupt):
        lyapcuda.critical_sharpness(interrupted(closure, at), optimizer)
    assert everything(model, optimizer) == before


def test_a_closure_runs_without_autograds_graph_unless_it_calls_backward():
    net, graphs = case("gelu_mlp", 0), []
    note = graphs.append
    optimizer = torch.optim.SGD(net.model.parameters(), lr=0.1)
    net.closure().backward()
    before = [bits(p.grad) for p in net.model.parameters()]

    def watched():
        note(torch.is_grad_enabled())
        return net.closure()

    def calling():
        optimizer.zero_grad()
        loss = net.closure()
        loss.backward()
        return loss

    found = lyapcuda.critical_sharpness(watched, optimizer)
    assert graphs == [False] * found.evaluations
    assert lyapcuda.critical_sharpness(calling, optimizer).rate == found.rate
    assert [bits(p.grad) for p in net.model.parameters()] == before


def test_what_is_wrong_is_named():
    theta, closure = quadratic([1.0, 2.0])
    optimizer = torch.optim.SGD([theta], lr=0.1)
    with pytest.raises(RuntimeError, match="call loss.backward"):
        lyapcuda.critical_sharpness(closure, optimizer)
    closure().backward()
    with pytest.raises(TypeError, match="closure=3"):
        lyapcuda.critical_sharpness(3, optimizer)
    for options in ({"start": 0.0}, {"tol": 1.0}, {"max_evaluations": 2}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}="):
            lyapcuda.critical_sharpness(closure, optimizer, **options)
    with pytest.raises(ValueError, match="direction=.*expected 1 tensors"):
        lyapcuda.critical_sharpness(closure, optimizer, direction=[torch.ones(3)])
    with pytest.raises(ValueError, match="its norm is 0"):
        lyapcuda.critical_sharpness(closure, optimizer, direction=[torch.zeros(2)])
    with pytest.raises(TypeError, match="pass direction="):
        lyapcuda.critical_sharpness(closure, [theta])
    with pytest.raises(TypeError, match="LBFGS"):
        lyapcuda.critical_sharpness(closure, torch.optim.LBFGS([theta]))
    with pytest.raises(RuntimeError, match="without a closure"):
        lyapcuda.critical_sharpness(closure, lyapcuda.LyapunovSGD([theta]))
    optimizer.param_groups[0]["lr"] = 0.0
    with pytest.raises(ValueError, match="lr is 0"):
        lyapcuda.critical_sharpness(closure, optimizer)
