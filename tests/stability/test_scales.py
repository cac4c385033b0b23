"""The metric of an optimizer: when there is one, what it refuses, and P as a user gives it."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import nn, optim
from torch.distributed import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lyapcuda.params.flat import FlatLayout
from lyapcuda.stability.metric import Metric
from ranks import on_ranks
from sync import no_waiting


def parameters(*sizes, dtype=torch.float64):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(size, dtype=dtype)) for size in sizes]


def step(optimizer, params):
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()


def views(layout, metric):
    return layout.views(metric.buffers)


def named(params):
    return list(zip(("first", "second", "third", "fourth", "fifth"), params, strict=False))


# --- when there is one ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", [optim.Adam, optim.NAdam, optim.RMSprop, optim.Adagrad])
def test_there_is_no_p_before_the_first_step(make):
    params = parameters(3, 2)
    optimizer = make(params)
    metric = Metric(FlatLayout(params), optimizer)
    assert not metric.ready
    assert not metric.trivial
    with pytest.raises(RuntimeError, match=f"<{make.__name__}>: it hasn't taken a step"):
        metric.refresh()
    with pytest.raises(RuntimeError, match="taken a step"):
        metric.edge_of(torch.tensor(1.0))
    step(optimizer, params)
    assert metric.ready
    metric.refresh()
    again = make(params)
    again.load_state_dict(optimizer.state_dict())
    loaded = Metric(FlatLayout(params), again)
    assert loaded.ready
    loaded.refresh()
    assert torch.equal(loaded.buffers[0], metric.buffers[0])
    assert not optim.Adam(params).state  # asking for a state doesn't make one


@pytest.mark.parametrize("make", [optim.Adam, optim.NAdam, optim.RMSprop, optim.Adagrad])
def test_a_parameter_without_a_step_takes_no_part(make):
    params = parameters(3, 2)
    optimizer = make(params)
    step(optimizer, params[:1])
    layout = FlatLayout(params)
    metric = Metric(layout, optimizer)
    metric.refresh()
    first, second = views(layout, metric)
    assert bool((first > 0).all())
    assert not second.any()
    step(optimizer, params)
    metric.refresh()
    assert bool((second > 0).all())


def test_gaps_stay_zero_and_buffers_stay_where_they_are():
    params = parameters(3, (5, 4), dtype=torch.float32)
    optimizer = optim.RMSprop(params)
    step(optimizer, params)
    metric = Metric(FlatLayout(params), optimizer)
    metric.refresh()
    before = metric.buffers[0]
    step(optimizer, params)
    metric.refresh()
    assert metric.buffers[0] is before
    assert int((before == 0).sum()) == len(before) - 23


def test_every_dtype_and_layout_has_its_buffer():
    torch.manual_seed(0)
    params = [
        nn.Parameter(torch.randn(4, 3).T),  # not contiguous
        nn.Parameter(torch.randn(5, dtype=torch.float64)),
        nn.Parameter(torch.randn(2, dtype=torch.bfloat16)),
    ]
    optimizer = optim.RMSprop(params, alpha=0.5)
    step(optimizer, params)
    layout = FlatLayout(params)
    metric = Metric(layout, optimizer)
    metric.refresh()
    dtypes = [buffer.dtype for buffer in metric.buffers]
    assert dtypes == [torch.float32, torch.float64, torch.float32]
    for view, p in zip(views(layout, metric), params, strict=True):
        square = optimizer.state[p]["square_avg"].to(view.dtype)
        torch.testing.assert_close(view, (square.sqrt() + 1e-8).rsqrt())


def test_a_wrapped_optimizer_is_looked_into():
    wrapped = type("AcceleratedOptimizer", (), {"__module__": "accelerate.optimizer"})()
    params = parameters(3, 2)
    wrapped.optimizer = optim.Adam(params)
    metric = Metric(FlatLayout(params), wrapped)
    assert not metric.ready
    step(wrapped.optimizer, params)
    metric.refresh()
    assert float(metric.reference_threshold) == pytest.approx(38.0)


@pytest.mark.parametrize("make", [optim.SGD, optim.Adam, optim.NAdam, optim.RMSprop])
def test_a_refresh_waits_for_nothing(make):
    params = parameters(3, 2)
    rate = torch.tensor(0.1, dtype=torch.float64)
    optimizer = make([{"params": params[:1], "lr": rate}, {"params": params[1:], "lr": 0.05}])
    step(optimizer, params)
    layout = FlatLayout(params)
    metric = Metric(layout, optimizer)
    with no_waiting():
        metric.refresh()
        assert not metric.trivial
        edge = metric.edge_of(torch.ones(2, dtype=torch.float64))
    assert edge.shape == (2,)
    assert float(edge[0]) == float(metric.reference_rate / metric.reference_threshold)


def test_one_rate_leaves_p_as_it_is():
    params = parameters(3, 2)
    optimizer = optim.RMSprop([{"params": [p]} for p in params], lr=0.3, momentum=0.7)
    step(optimizer, params)
    layout = FlatLayout(params)
    metric = Metric(layout, optimizer)
    metric.refresh()
    for view, p in zip(views(layout, metric), params, strict=True):
        assert torch.equal(view, (optimizer.state[p]["square_avg"].sqrt() + 1e-8).rsqrt())
    assert float(metric.reference_rate) == 0.3
    assert float(metric.reference_threshold) == 3.4


def test_rates_of_0_everywhere_leave_p_as_it_is_and_no_edge():
    params = parameters(3, 2)
    optimizer = optim.RMSprop(params, lr=0.0)
    step(optimizer, params)
    metric = Metric(FlatLayout(params), optimizer)
    metric.refresh()
    assert metric.buffers[0].count_nonzero() == 5
    assert float(metric.edge_of(torch.tensor(7.0))) == 0.0


def test_sgd_is_trivial_until_its_rates_differ():
    params = parameters(3, 2)
    optimizer = optim.SGD([{"params": [p]} for p in params], lr=0.1, momentum=0.5)
    layout = FlatLayout(params)
    metric = Metric(layout, optimizer)
    assert metric.ready
    assert metric.trivial
    assert metric.buffers == []
    assert float(metric.edge_of(torch.tensor(30.0))) == pytest.approx(1.0)
    optimizer.param_groups[1]["lr"] = 0.4
    metric.refresh()
    assert not metric.trivial
    assert [float(view[0]) for view in views(layout, metric)] == [1.0, 2.0]
    assert not Metric(layout, optimizer).trivial


# --- what is refused -----------------------------------------------------------------------------


def with_flag(make, flag):
    """An optimizer whose second group differs in a flag."""

    def made(params):
        extra = {"momentum": 0.9} if flag == "nesterov" else {}
        return make([{"params": params[:1], **extra}, {"params": params[1:], **extra, flag: True}])

    return made


REFUSED = [
    (optim.LBFGS, TypeError, "<LBFGS>: it has no diagonal metric that is known here: "),
    (optim.LBFGS, TypeError, "preconditioned=False measures H itself;\nor pass preconditioned=a"),
    (optim.Adafactor, TypeError, "<Adafactor>: it has no diagonal metric"),
    (functools.partial(optim.Adam, maximize=True), ValueError, "maximize=True for first"),
    (lambda p: optim.Adam(p[:1]), ValueError, "<Adam>: it doesn't hold second, which is tracked"),
    (
        with_flag(optim.Adam, "amsgrad"),
        ValueError,
        "amsgrad=False for first, amsgrad=True for s",
    ),
    (with_flag(optim.SGD, "nesterov"), ValueError, "nesterov=False for first"),
    (with_flag(optim.RMSprop, "centered"), ValueError, "centered=False for first"),
    (with_flag(optim.NAdam, "decoupled_weight_decay"), ValueError, "decoupled_weight_decay=F"),
    (functools.partial(optim.Adam, eps=0.0), ValueError, "has eps=0.0 for first"),
    (functools.partial(optim.Adagrad, eps=0.0), ValueError, "has eps=0.0 for first"),
    (lambda p: 3, TypeError, "preconditioned=3: expected an optimizer, a function"),
    (lambda p: "adam", TypeError, "preconditioned='adam': expected an optimizer"),
    (lambda p: torch.ones(2), TypeError, "preconditioned=<Tensor of shape"),
    (lambda p: p[:1], ValueError, "expected a tensor for each of the 2 parameters"),
]


@pytest.mark.parametrize(("make", "error", "words"), REFUSED)
def test_refused(make, error, words):
    params = parameters(3, 2)
    with pytest.raises(error) as caught:
        Metric(FlatLayout(named(params)), make(params))
    assert words in str(caught.value)


def test_few_of_many_names_are_shown_and_the_argument_is_the_callers():
    params = parameters(1, 2, 3, 4, 5)
    optimizer = optim.Adam(params[:1])
    with pytest.raises(
        ValueError, match="^preconditioner=<Adam>.*second, third, fourth and 1 more"
    ):
        Metric(FlatLayout(named(params)), optimizer, argument="preconditioner")


# --- P as a user gives it ------------------------------------------------------------------------


def test_a_function_or_tensors_give_p():
    params = parameters(3, (2, 4))
    given = [torch.tensor([1.0, 4.0, 16.0]), torch.tensor([[4.0], [0.25]])]  # broadcasts
    layout = FlatLayout(params)
    of = dict(zip(map(id, params), given, strict=True))
    for source in (given, lambda p: of[id(p)]):
        metric = Metric(layout, source)
        assert metric.ready
        assert not metric.trivial
        metric.refresh()
        first, second = views(layout, metric)
        assert first.tolist() == [1.0, 0.5, 0.25]
        assert second.tolist() == [[0.5] * 4, [2.0] * 4]
        assert not metric.has_edge
        with pytest.raises(RuntimeError, match="no edge without an optimizer"):
            metric.edge_of(torch.tensor(1.0))
    with no_waiting():
        metric.refresh()  # what is given is read back once


def test_an_optimizer_beside_tells_how_near_the_edge():
    params = parameters(3, 2)
    optimizer = optim.SGD([{"params": params[:1]}, {"params": params[1:], "lr": 0.4}], lr=0.1)
    layout = FlatLayout(params)
    metric = Metric(layout, lambda p: torch.full_like(p, 4.0), optimizer)
    metric.refresh()
    assert [float(view[0]) for view in views(layout, metric)] == [0.5, 1.0]
    assert float(metric.edge_of(torch.tensor(10.0))) == 0.5
    unknown = Metric(layout, lambda p: torch.full_like(p, 4.0), optim.Adafactor(params))
    assert unknown.ready
    assert not unknown.has_edge


@pytest.mark.parametrize(
    ("p", "error", "words"),
    [
        (torch.tensor([1.0, 0.0]), ValueError, "the diagonal P of second has values that aren't"),
        (torch.tensor([1.0, -1.0]), ValueError, "finite and above 0"),
        (torch.tensor([1.0, math.inf]), ValueError, "finite and above 0"),
        (torch.tensor([1.0, math.nan]), ValueError, "finite and above 0"),
        (
            torch.ones(3),
            ValueError,
            "of second is <Tensor of shape (3,)>; expected the parameter's",
        ),
        (torch.ones(2).to_sparse(), TypeError, "expected a dense tensor of real numbers"),
        (
            torch.ones(2, dtype=torch.complex64),
            TypeError,
            "expected a dense tensor of real numbers",
        ),
        (1.0, TypeError, "the diagonal P of second is 1.0; expected a dense tensor"),
    ],
)
def test_what_is_no_p(p, error, words):
    params = parameters(3, 2)
    metric = Metric(FlatLayout(named(params)), [torch.ones(3), p])
    with pytest.raises(error) as caught:
        metric.refresh()
    assert words in str(caught.value)


# --- DTensors ------------------------------------------------------------------------------------


def sharded(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    whole = parameters((5, 3), (4, 2))
    params = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in whole]
    gradients = [torch.randn_like(p) for p in whole]
    optimizers = [optim.Adam(of, foreach=False) for of in (whole, params)]
    for alone, p, gradient in zip(whole, params, gradients, strict=True):
        alone.grad, p.grad = gradient, distribute_tensor(gradient, mesh, [Shard(0)])
    given = [p.detach().square() + 1.0 for p in whole]
    layouts = FlatLayout(whole), FlatLayout(params)
    for sources in (optimizers, [given, given]):
        for optimizer in optimizers:
            optimizer.step()
        one, two = (Metric(layout, s) for layout, s in zip(layouts, sources, strict=True))
        one.refresh()
        two.refresh()
        pairs = zip(layouts[0].unpack(one.buffers), layouts[1].unpack(two.buffers), strict=True)
        assert all(torch.equal(a, b.full_tensor()) for a, b in pairs)


def test_shards_have_their_part_of_p():
    on_ranks(2, sharded)
