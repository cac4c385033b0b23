"""The tracker in an optimizer's metric: eigenvalues of P⁻¹H against dense ones, and the edge."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lyapcuda import CurvatureLog, CurvatureTracker, RateCap, eigsh

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2),
    "centered": lambda p: torch.optim.RMSprop(p, lr=1e-2, centered=True, eps=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


def diagonal(optimizer: torch.optim.Optimizer, p: Tensor) -> Tensor:
    """P as torch's update formulas have it, on the host."""
    state, group = optimizer.state[p], optimizer.param_groups[0]
    if isinstance(optimizer, torch.optim.SGD):
        return torch.ones_like(p)
    if isinstance(optimizer, torch.optim.Adagrad):
        return state["sum"].sqrt() + group["eps"]
    if isinstance(optimizer, torch.optim.RMSprop):
        v = state["square_avg"]
        if group["centered"]:
            v = v - state["grad_avg"] ** 2
        return v.sqrt() + group["eps"]
    v = state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"]
    return (v / (1 - group["betas"][1] ** float(state["step"]))).sqrt() + group["eps"]


class Problem:
    """A small smooth net, trained for some steps; the dense eigenvalues of P⁻¹H there."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float64, steps: int = 12) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)).to(dtype)
        x, y = torch.randn(64, 4, dtype=dtype), torch.randint(0, 3, (64,))
        self.loss = lambda: nn.functional.cross_entropy(self.model(x), y)
        self.optimizer = OPTIMIZERS[name](self.model.parameters())
        self.parameters = list(self.model.parameters())
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.loss().backward()
            self.optimizer.step()
        self.optimizer.zero_grad()

    def exact(self) -> Tensor:
        """Descending eigenvalues of P⁻¹H, from double backward in float64."""
        wide = copy.deepcopy(self.model).double()
        ps = list(wide.parameters())
        (x, y) = (c.cell_contents for c in _cells(self.loss))
        grads = torch.autograd.grad(
            nn.functional.cross_entropy(wide(x.double()), y), ps, create_graph=True
        )
        flat = torch.cat([g.reshape(-1) for g in grads])
        rows = [
            torch.cat([r.reshape(-1) for r in torch.autograd.grad(e, ps, retain_graph=True)])
            for e in flat
        ]
        hessian = torch.stack(rows)
        group = self.optimizer.param_groups[0]
        if not group.get("decoupled_weight_decay", isinstance(self.optimizer, torch.optim.AdamW)):
            hessian = hessian + group["weight_decay"] * torch.eye(len(hessian))
        p = torch.cat([diagonal(self.optimizer, p).double().reshape(-1) for p in self.parameters])
        scale = p.rsqrt()
        return torch.linalg.eigvalsh(scale[:, None] * hessian * scale).flip(0)


def _cells(loss: Callable[[], Tensor]) -> list:
    names = loss.__code__.co_freevars
    return [c for name, c in zip(names, loss.__closure__, strict=True) if name in ("x", "y")]


@pytest.mark.parametrize("mode", ["difference", "exact"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_values_are_those_of_the_dense_matrix(name, mode):
    for dtype, within in ((torch.float64, 1e-6), (torch.float32, 1e-3)):
        problem = Problem(name, dtype)
        exact = problem.exact()
        for k in (1, 5):
            tracker = CurvatureTracker(
                problem.parameters,
                k,
                optimizer=problem.optimizer,
                mode=mode,
                tol=1e-4 if dtype == torch.float64 else 1e-2,
                iterations=4,
                estimate="rayleigh",
                debug=False,
            )
            for _ in range(40):
                tracker.step(problem.loss)
            assert torch.allclose(tracker.h.reshape(-1), exact[:k], rtol=within), (k, dtype)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_separations_are_orthogonal_in_the_metric(k):
    problem = Problem("adam")
    tracker = CurvatureTracker(problem.parameters, k, optimizer=problem.optimizer, debug=False)
    for _ in range(300):
        tracker.step(problem.loss)
    exact = problem.exact()[:k]
    assert torch.allclose(tracker.h.reshape(-1), exact, rtol=1e-4)
    p = torch.cat([diagonal(problem.optimizer, p).reshape(-1) for p in problem.parameters])
    q = torch.stack([torch.cat([x.reshape(-1) for x in tracker.vector(i)]) for i in range(k)])
    assert torch.allclose(q.norm(dim=1), torch.full((k,), tracker.perturbation).double())
    products = (q * p) @ q.T
    sizes = products.diag().sqrt()
    assert (products / sizes[:, None] / sizes - torch.eye(k)).abs().max() < 1e-8


def test_a_step_in_the_metric_leaves_no_trace():
    problem = Problem("adam", torch.float32)
    twin = copy.deepcopy(problem.optimizer.state_dict())
    tracker = CurvatureTracker(problem.parameters, optimizer=problem.optimizer)
    before = [p.clone() for p in problem.parameters]
    for _ in range(3):
        tracker.step(problem.loss)
    assert all(torch.equal(a, b) for a, b in zip(before, problem.parameters, strict=True))
    state = problem.optimizer.state_dict()["state"]
    assert all(torch.equal(state[i][n], v) for i, s in twin["state"].items() for n, v in s.items())


def test_nothing_is_measured_before_there_is_a_preconditioner():
    problem = Problem("adam", steps=0)
    tracker = CurvatureTracker(problem.parameters, optimizer=problem.optimizer)
    assert not tracker.due and math.isnan(tracker.edge)
    tracker.backward(problem.loss)
    assert tracker.calls == 1 and math.isnan(tracker.h)
    problem.optimizer.step()
    assert tracker.due
    tracker.backward(problem.loss)
    assert tracker.h > 0 and tracker.edge > 0


def test_preconditioned_false_measures_the_hessian_itself():
    problem = Problem("adamw")
    options = {"optimizer": problem.optimizer, "preconditioned": False, "debug": False}
    tracker = CurvatureTracker(problem.parameters, **options)
    for _ in range(100):
        tracker.step(problem.loss)
    exact = eigsh(problem.loss, problem.parameters, tol=1e-6).eigenvalues[0]
    assert abs(float(tracker.h / exact) - 1) < 1e-5
    with pytest.raises(RuntimeError, match="preconditioned=False"):
        _ = tracker.edge


def test_a_diagonal_of_ones_own():
    problem = Problem("sgd")
    ones = [torch.full_like(p, 4.0) for p in problem.parameters]
    for given in (ones, lambda p: torch.full_like(p, 4.0)):
        tracker = CurvatureTracker(problem.parameters, preconditioned=given, debug=False)
        for _ in range(100):
            tracker.step(problem.loss)
        exact = eigsh(problem.loss, problem.parameters, tol=1e-6).eigenvalues[0]
        assert abs(float(4 * tracker.h / exact) - 1) < 1e-5
        assert not tracker.has_edge


def test_state_goes_on_where_it_was(tmp_path):
    problem = Problem("adam", torch.float32)
    make = lambda: CurvatureTracker(problem.parameters, 2, optimizer=problem.optimizer)  # noqa: E731
    one, other = make(), make()
    for _ in range(5):
        one.step(problem.loss)
    torch.save(one.state_dict(), tmp_path / "saved")
    other.load_state_dict(torch.load(tmp_path / "saved"))
    for tracker in (one, other):
        tracker.step(problem.loss)
    assert torch.equal(one.h, other.h) and torch.equal(one.edge, other.edge)
    plain = CurvatureTracker(problem.parameters, 2)
    with pytest.raises(ValueError, match="preconditioned"):
        plain.load_state_dict(one.state_dict())
    problem.optimizer.state.clear()
    early = make()
    with pytest.raises(ValueError, match="load its state first"):
        early.load_state_dict(one.state_dict())


def test_the_edge_is_in_history_and_log(tmp_path):
    problem = Problem("adam", torch.float32)
    tracker = CurvatureTracker(problem.parameters, optimizer=problem.optimizer)
    with CurvatureLog(tracker, tmp_path / "run.csv"):
        for _ in range(4):
            problem.optimizer.zero_grad()
            tracker.backward(problem.loss)
            problem.optimizer.step()
    history = tracker.history()
    expected = history.h * 1e-2 / 38
    assert torch.allclose(history.edge, expected)
    assert (tmp_path / "run.csv").read_text().splitlines()[0].endswith(",edge")
    assert CurvatureTracker(problem.parameters).history().edge is None


def test_gradient_curvature_is_free_where_the_gradient_was_a_direction():
    problem = Problem("adam")
    tracker = CurvatureTracker(problem.parameters, optimizer=problem.optimizer, tol=1e-8)
    seen = []
    for _ in range(8):
        tracker.step(problem.loss)
        seen.append(float(tracker.gradient_curvature))
    found = [value for value in seen if not math.isnan(value)]
    loss = problem.loss()
    gradients = torch.autograd.grad(loss, problem.parameters, create_graph=True)
    g = [x.detach() + 0.01 * p.detach() for x, p in zip(gradients, problem.parameters, strict=True)]
    u = [x / diagonal(problem.optimizer, p) for x, p in zip(g, problem.parameters, strict=True)]
    inner = sum((a * b).sum() for a, b in zip(gradients, u, strict=True))
    hu = torch.autograd.grad(inner, problem.parameters)
    numerator = sum((a * (b + 0.01 * a)).sum() for a, b in zip(u, hu, strict=True))
    denominator = sum((a * b).sum() for a, b in zip(u, g, strict=True))
    assert found and all(abs(x / float(numerator / denominator) - 1) < 1e-5 for x in found)


# --- the edge ------------------------------------------------------------------------------------


def quadratic(rate: float) -> tuple[nn.Parameter, torch.optim.Optimizer, CurvatureTracker]:
    theta = nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = torch.optim.SGD([theta], lr=rate)
    return theta, optimizer, CurvatureTracker([theta], optimizer=optimizer)


def train(theta, optimizer, tracker, steps=30) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        tracker.backward(lambda: theta[0].square() + 4.0 * theta[1].square())
        optimizer.step()


def test_a_warning_comes_once_a_crossing():
    theta, optimizer, tracker = quadratic(0.2)
    calls = []
    handle = tracker.on_edge(lambda t: calls.append((t.calls, float(t.edge))))
    train(theta, optimizer, tracker)
    assert not calls  # 0.8
    optimizer.param_groups[0]["lr"] = 0.3
    train(theta, optimizer, tracker, 5)
    optimizer.param_groups[0]["lr"] = 0.2
    train(theta, optimizer, tracker, 5)
    optimizer.param_groups[0]["lr"] = 0.3
    train(theta, optimizer, tracker, 5)
    assert [step for step, _ in calls] == [31, 41]
    assert all(abs(edge - 1.2) < 1e-3 for _, edge in calls)
    handle.remove()
    with pytest.raises(RuntimeError, match="optimizer"):
        CurvatureTracker([theta]).on_edge(print)


def test_rates_stay_below_the_cap_over_a_schedule():
    theta, optimizer, tracker = quadratic(1.0)
    cap = RateCap(optimizer, tracker, c=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 20, gamma=0.1)
    used = []
    for _ in range(40):
        train(theta, optimizer, tracker, 1)
        used.append(optimizer.param_groups[0]["lr"] * float(cap.factor))
        schedule.step()
    assert abs(used[19] - 0.225) < 1e-3 and abs(used[-1] - 0.1) < 1e-6
    assert math.isclose(optimizer.param_groups[0]["lr"], 0.01)
    assert theta.abs().max() < 1e-3
    cap.remove()


def test_a_rate_is_as_scheduled_after_a_closure_raised():
    theta, optimizer, tracker = quadratic(1.0)
    cap = RateCap(optimizer, tracker)
    train(theta, optimizer, tracker, 5)

    def raises():
        assert optimizer.param_groups[0]["lr"] < 0.3
        raise KeyError("of the user's")

    with pytest.raises(KeyError):
        optimizer.step(raises)
    assert optimizer.param_groups[0]["lr"] == 1.0
    other = torch.optim.SGD([theta], lr=0.1)
    with pytest.raises(ValueError, match="another optimizer"):
        RateCap(other, tracker)
    cap.remove()
