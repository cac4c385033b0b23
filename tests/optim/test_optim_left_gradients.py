"""LyapunovSGD and gradients that are there before a step: its own are replaced, others refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

import lyapcuda
from fault_cases import bits
from nets import case
from optim_cases import exact, quadratic
from sync import no_waiting

MESSAGE = "gradients are in .grad already"


@pytest.fixture
def run():
    """θ, an optimizer that has taken a step, and a closure that leaves backward() to it."""
    theta, closure = quadratic([4.0, 1.0, 0.5])
    optimizer = exact([theta], warmup_tol=1e-3)
    optimizer.step(closure)
    return theta, optimizer, closure


def own_backward(closure, before=lambda: None, **options):
    """A closure that calls `before` and backward() itself."""

    def evaluate():
        loss = closure()
        before()
        loss.backward(**options)
        return loss

    return evaluate


def state_of(theta, optimizer):
    values = optimizer.tracker.state.clone(), theta.detach().clone(), theta.grad.clone()
    return bits([*values, torch.get_rng_state()])


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("how", ["step", "measure", "own backward", "batches", "create_graph"])
def test_accumulated_gradients_are_an_error_before_anything_changes(run, how, warm):
    theta, optimizer, closure = run
    if not warm:
        theta.grad, optimizer = None, exact([theta])
    closure().backward()  # onto what the step left, where that is there
    before, gradient = state_of(theta, optimizer), theta.grad
    with pytest.raises(RuntimeError, match=MESSAGE) as error:
        if how == "batches":
            optimizer.step(lambda batch: closure(), batches=[torch.ones(2), torch.ones(1)])
        elif how == "create_graph":
            optimizer.step(own_backward(closure, create_graph=True))
        else:
            part = optimizer.measure if how == "measure" else optimizer.step
            part(own_backward(closure) if how == "own backward" else closure)
    assert len(str(error.value).splitlines()) <= 3
    assert theta.grad is gradient and theta._backward_hooks in (None, {})
    assert before == state_of(theta, optimizer)
    optimizer.zero_grad()
    optimizer.step(closure)
    assert state_of(theta, optimizer)[1] != before[1]


def test_gradients_in_another_tensor_are_an_error_too(run):
    theta, optimizer, closure = run
    optimizer.zero_grad()
    closure().backward()
    with pytest.raises(RuntimeError, match=MESSAGE):
        optimizer.step(closure)
    theta.grad = torch.full_like(theta, torch.nan)
    with pytest.raises(RuntimeError, match=MESSAGE):
        optimizer.step(closure)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("how", ["own backward", "ours", "two backwards", "autograd.grad", "part"])
def test_a_closure_that_clears_them_is_fine(run, how, set_to_none):
    theta, optimizer, closure = run
    twin = nn.Parameter(theta.detach().clone())
    alone = exact([twin])
    alone.load_state_dict(optimizer.state_dict())
    value = lambda p: 0.5 * (torch.tensor([4.0, 1.0, 0.5]) * p.square()).sum()  # noqa: E731

    def evaluate(p, clear):
        loss = value(p)
        if how == "autograd.grad":
            torch.autograd.grad(loss, p, retain_graph=True)
        clear(set_to_none=set_to_none)
        if how == "two backwards":
            (0.5 * loss).backward(retain_graph=True)
            (0.5 * loss).backward()
        elif how != "ours":
            loss.backward()
        return loss

    closure().backward()
    for p, each in ((theta, optimizer), (twin, alone)):
        options = {"part": lambda p=p: value(p)} if how == "part" else {}
        each.step(lambda p=p, each=each: evaluate(p, each.zero_grad), **options)
    assert torch.equal(theta.grad, twin.grad) and torch.equal(theta, twin)
    assert torch.equal(optimizer.tracker.state, alone.tracker.state)


def test_a_closure_that_clears_some_of_them_is_an_error():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = exact([a, b], warmup_tol=1e-3)
    closure = lambda: a.square().sum() + b.square().sum()  # noqa: E731
    closure().backward()

    def clears_one():
        a.grad = None
        return closure()

    with pytest.raises(RuntimeError, match=MESSAGE):
        optimizer.step(clears_one)


def test_gradients_of_zero_and_those_of_a_step_are_replaced_without_waiting(run):
    theta, optimizer, closure = run
    with no_waiting():
        optimizer.step(closure)
        optimizer.measure(closure)
        clip_grad_norm_([theta], 1e-3)
        optimizer.step()
        optimizer.step(closure)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step(closure)
    again = lyapcuda.LyapunovSGD([theta])  # a new one knows of them, whether the old one is there
    del optimizer
    again.step(closure)


def test_gradients_that_were_changed_between_two_measurements_are_an_error(run):
    theta, optimizer, closure = run
    optimizer.measure(closure)
    optimizer.measure(closure)
    theta.grad.mul_(0.5)
    with pytest.raises(RuntimeError, match=MESSAGE):
        optimizer.measure(closure)


def test_after_an_exception_of_the_closure_they_are_still_those_of_the_step(run):
    theta, optimizer, closure = run
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert theta.grad is not None
    optimizer.step(closure)


def test_a_copy_knows_which_gradients_a_step_left():
    theta = torch.ones(2, requires_grad=True)  # (a Parameter's copy has no gradient)
    optimizer = exact([theta], warmup_tol=1e-3)
    optimizer.step(lambda: theta.square().sum())
    p, twin = copy.deepcopy((theta, optimizer))
    assert p.grad is not None
    twin.step(lambda: p.square().sum())
    p.square().sum().backward()
    q, other = copy.deepcopy((p, twin))
    with pytest.raises(RuntimeError, match=MESSAGE):
        other.step(lambda: q.square().sum())


def test_records_of_gradients_that_are_gone_do_not_pile_up():
    from lyapcuda.objective import left_gradients

    for _ in range(3):
        some = [nn.Parameter(torch.ones(1)) for _ in range(700)]
        for p in some:
            p.grad = torch.ones(1)
        left_gradients.note(some)
        kept = some  # so that ids differ
    assert len(kept) <= len(left_gradients._left) <= 2800


def test_no_gradient_is_kept_in_memory(run):
    import weakref

    theta, optimizer, _ = run
    gradient = weakref.ref(theta.grad)
    optimizer.zero_grad()
    assert gradient() is None


def test_a_loop_like_lightnings():
    """zero_grad, backward and clipping inside the closure; with accumulation no zero_grad."""
    truth = case("tanh_mlp", seed=2)
    parameters = list(truth.model.parameters())
    optimizer = exact(parameters, gain=0.1, warmup_tol=1e-1)

    def closure(clear=True):
        loss = truth.closure()
        if clear:
            optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(parameters, 1e3)
        return loss

    for _ in range(3):
        optimizer.step(closure)
    closure()  # a first micro-batch
    before = [p.grad.clone() for p in parameters]
    with pytest.raises(RuntimeError, match=MESSAGE):
        optimizer.step(lambda: closure(clear=False))
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, before, strict=True))
