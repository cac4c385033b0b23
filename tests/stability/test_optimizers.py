"""P and the thresholds of torch's optimizers, against the optimizers themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn, optim

from lyapcuda.params.flat import FlatLayout
from lyapcuda.stability.metric import Metric

#: Entries of a state that P is made of.
_FROZEN = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "grad_avg", "sum", "mu_product")


def parameters(*sizes, seed=0, scale=1.0, dtype=torch.float64):
    torch.manual_seed(seed)
    return [
        nn.Parameter((torch.randn(size, dtype=torch.float64) * scale).to(dtype)) for size in sizes
    ]


def step(optimizer, params, size=1.0):
    """One step along random gradients."""
    for p in params:
        p.grad = torch.randn_like(p) * size
    optimizer.step()


def root_of(metric, layout):
    """S of every parameter, in one vector."""
    return torch.cat([view.reshape(-1) for view in layout.views(metric.buffers)])


# --- P -------------------------------------------------------------------------------------------

# Without momentum a step is rate·g/P.
PLAIN = {
    "adam": (optim.Adam, {"betas": (0.0, 0.9)}),
    "adam amsgrad": (optim.Adam, {"betas": (0.0, 0.9), "amsgrad": True}),
    "adam fused": (optim.Adam, {"betas": (0.0, 0.9), "fused": True}),
    "adamw": (optim.AdamW, {"betas": (0.0, 0.9), "weight_decay": 0.0}),
    "nadam": (optim.NAdam, {"betas": (0.0, 0.9)}),
    "rmsprop": (optim.RMSprop, {"alpha": 0.9}),
    "rmsprop centered": (optim.RMSprop, {"alpha": 0.9, "centered": True}),
    "adagrad": (optim.Adagrad, {"lr_decay": 0.1}),
}


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("eps", [1e-8, 0.3])
def test_p_is_what_the_optimizer_divides_by(kind, eps):
    make, options = PLAIN[kind]
    params = parameters((3, 4), 5)
    optimizer = make(params, lr=0.01, eps=eps, **options)
    layout = FlatLayout(params)
    metric = Metric(layout, optimizer)
    for size in (1.0, 5.0, 0.2):  # the largest squares aren't the latest
        before = [p.detach().clone() for p in params]
        step(optimizer, params, size)
        metric.refresh()
        moved = torch.cat(
            [(b - p.detach()).reshape(-1) for b, p in zip(before, params, strict=True)]
        )
        gradient = torch.cat([p.grad.reshape(-1) for p in params])
        # (lr_decay is in the rate; S is relative to the reference.)
        expected = moved / gradient / metric.reference_rate
        torch.testing.assert_close(root_of(metric, layout).square(), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_in_16_bits_are_taken_in_float32(dtype):
    params = parameters((3, 4), 5, dtype=dtype)
    optimizer = optim.RMSprop(params, centered=True, alpha=0.5, eps=1e-3)
    for _ in range(2):
        step(optimizer, params)
    layout = FlatLayout(params)
    metric = Metric(layout, optimizer)
    metric.refresh()
    assert metric.buffers[0].dtype == torch.float32
    for view, p in zip(layout.views(metric.buffers), params, strict=True):
        square, mean = (optimizer.state[p][key].double() for key in ("square_avg", "grad_avg"))
        expected = ((square - mean**2).sqrt() + 1e-3).rsqrt()
        torch.testing.assert_close(view.double(), expected, rtol=1e-5, atol=0)


# --- thresholds ----------------------------------------------------------------------------------


def edge_of(metric, layout, hessian):
    """By the dense S·H·S."""
    metric.refresh()
    root = torch.ones(len(hessian), dtype=torch.float64)
    root = root if metric.trivial else root_of(metric, layout)
    return float(metric.edge_of(torch.linalg.eigvalsh(root[:, None] * hessian * root)[-1]))


class FrozenOptimizer:
    """Steps of an optimizer on a quadratic from one P: a linear map of θ and the momentum."""

    def __init__(self, optimizer, params, hessian):
        self.optimizer, self.params, self.hessian = optimizer, params, hessian
        self.kept = [
            {key: value.clone() for key, value in state.items() if key in (*_FROZEN, "step")}
            for state in optimizer.state.values()
        ]

    def step(self, theta, momentum):
        """The next of both."""
        optimizer, moved = self.optimizer, []
        for kept, state in zip(self.kept, optimizer.state.values(), strict=True):
            for key, value in kept.items():
                state[key].copy_(value)
        pieces = zip(self.params, *(x.split([3, 2]) for x in (theta, momentum)), strict=True)
        with torch.no_grad():
            for p, position, velocity in pieces:
                p.copy_(position)
                p.grad = (self.hessian @ theta).split([3, 2])[0 if len(p) == 3 else 1].clone()
                held = self._momentum(p)
                if held is not None:
                    held.copy_(velocity)
        optimizer.step()
        for p in self.params:
            held = self._momentum(p)
            moved.append(torch.zeros_like(p) if held is None else held.clone())
        return torch.cat([*(p.detach() for p in self.params), *moved])

    def _momentum(self, p):
        state = self.optimizer.state.get(p, {})
        return next(
            (state[k] for k in ("exp_avg", "momentum_buffer") if state.get(k) is not None), None
        )

    def growth(self):
        """The spectral radius of the map; what stands still, by a rate of 0, left out."""
        size = 1e-9  # so that squares don't move P
        columns = [
            self.step(*(size * unit).split(5)) for unit in torch.eye(10, dtype=torch.float64)
        ]
        found = torch.linalg.eigvals(torch.stack(columns, 1) / size)
        return float(found[(found - 1).abs() > 1e-9].abs().max())


GROUPS = {
    "sgd": (optim.SGD, {}, [{}, {}]),
    "heavy ball": (optim.SGD, {"momentum": 0.8}, [{}, {}]),
    "dampening": (optim.SGD, {"momentum": 0.8, "dampening": 0.5}, [{}, {}]),
    "dampening without momentum": (optim.SGD, {"dampening": 0.5}, [{}, {}]),
    "nesterov": (optim.SGD, {"momentum": 0.8, "nesterov": True}, [{}, {}]),
    "sgd, other rates and momenta": (optim.SGD, {}, [{"lr": 0.3, "momentum": 0.9}, {"lr": 1.0}]),
    "sgd, a rate of 0": (optim.SGD, {"momentum": 0.5}, [{"lr": 0.0}, {"lr": 1.0}]),
    "adam": (optim.Adam, {}, [{}, {}]),
    "adam amsgrad": (optim.Adam, {"amsgrad": True, "betas": (0.7, 0.99)}, [{}, {}]),
    "adam, other rates and betas": (
        *(optim.Adam, {}),
        [{"lr": 1.0, "betas": (0.5, 0.99)}, {"lr": 4.0, "eps": 0.1}],
    ),
    "adamw": (optim.AdamW, {"weight_decay": 0.0}, [{}, {}]),
    "nadam": (optim.NAdam, {}, [{}, {}]),
    "nadam early": (optim.NAdam, {"steps": 3, "momentum_decay": 0.1}, [{}, {}]),
    "nadam, other rates and betas": (
        *(optim.NAdam, {}),
        [{"lr": 1.0, "betas": (0.5, 0.99)}, {"lr": 4.0, "momentum_decay": 0.1}],
    ),
    "rmsprop": (optim.RMSprop, {}, [{}, {}]),
    "rmsprop momentum": (optim.RMSprop, {"momentum": 0.7, "centered": True}, [{}, {}]),
    "rmsprop, other momenta": (optim.RMSprop, {}, [{"momentum": 0.9}, {"lr": 3.0}]),
    "adagrad": (optim.Adagrad, {"steps": 40, "lr_decay": 0.1}, [{}, {}]),
    "adagrad, other rates": (optim.Adagrad, {}, [{"lr": 5.0}, {"lr": 1.0, "lr_decay": 0.1}]),
}


@pytest.mark.parametrize("case", GROUPS)
def test_steps_on_a_quadratic_shrink_below_the_edge_and_grow_above_it(case):
    make, options, overrides = GROUPS[case]
    options = dict(options)
    steps = options.pop("steps", 200)  # Adam's first are longer
    params = parameters(3, 2)
    torch.manual_seed(1)
    factor = torch.randn(5, 5, dtype=torch.float64)
    hessian = factor @ factor.T + 0.1 * torch.eye(5, dtype=torch.float64)
    groups = [{"params": [p], **other} for p, other in zip(params, overrides, strict=True)]
    optimizer = make(groups, **{"lr": 1.0, **options})
    layout = FlatLayout(params)
    metric = Metric(layout, optimizer)
    for _ in range(steps):
        step(optimizer, params)
    frozen = FrozenOptimizer(optimizer, params, hessian)
    frozen.step(*torch.zeros(2, 5, dtype=torch.float64))
    edge = edge_of(metric, layout, hessian)
    rates = [group["lr"] for group in optimizer.param_groups]
    growth = []
    for share in (0.97, 1.0, 1.03):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share / edge
        growth.append(frozen.growth())
        assert edge_of(metric, layout, hessian) == pytest.approx(share, rel=1e-9)
    assert growth[0] < 0.9995
    assert growth[1] == pytest.approx(1.0, abs=1e-6)
    assert growth[2] > 1.0005
