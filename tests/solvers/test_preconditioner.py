"""preconditioner=: the eigenvalues of P⁻¹H, against the dense P^(-1/2)·H·P^(-1/2)."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn, optim
from torch.func import functional_call

import lyapcuda
from lyapcuda.basis import Basis
from lyapcuda.params.flat import FlatLayout
from lyapcuda.solvers.agreement import both_sides, one_side
from lyapcuda.stability.metric import Metric
from operators import dense, exact
from truths import wanted


@dataclass
class Problem:
    """A net, an optimizer that has stepped, and both matrices in float64."""

    model: nn.Module
    batch: tuple[Tensor, Tensor]
    optimizer: optim.Optimizer
    hessian: Tensor
    root: Tensor

    def loss(self, batch=None):
        x, y = self.batch if batch is None else batch
        return nn.functional.cross_entropy(self.model(x), y)

    def operator(self, **options):
        options = {"preconditioner": self.optimizer, **options}
        return lyapcuda.HessianOperator(self.loss, self.model.parameters(), **options)

    @property
    def scaled(self):
        return self.root[:, None] * self.hessian * self.root

    @property
    def eigenvalues(self):
        return torch.linalg.eigvalsh(self.scaled)


def root_of(model, source):
    """P^(-1/2) of all parameters in one vector."""
    layout = FlatLayout(model.parameters())
    metric = Metric(layout, source)
    metric.refresh()
    if metric.trivial:
        return torch.ones(layout.numel, dtype=torch.float64)
    return layout.gather(metric.buffers).double()


def problem(make=optim.Adam, dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 3)).to(dtype)
    x, y = torch.randn(40, 5, dtype=dtype), torch.randint(0, 3, (40,))
    optimizer = make(model.parameters(), **{"lr": 1e-2, **options})
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    twin = copy.deepcopy(model).double()
    hessian = dense(
        exact(lambda: nn.functional.cross_entropy(twin(x.double()), y), list(twin.parameters()))
    )
    return Problem(model, (x, y), optimizer, hessian, root_of(model, optimizer))


OPTIMIZERS = {
    "sgd": (optim.SGD, {"momentum": 0.9}),
    "adam": (optim.Adam, {}),
    "adamw": (optim.AdamW, {"amsgrad": True}),
    "nadam": (optim.NAdam, {}),
    "rmsprop": (optim.RMSprop, {"centered": True}),
    "adagrad": (optim.Adagrad, {}),
}


@pytest.mark.parametrize("mode", ["exact", "difference"])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-6), (torch.float32, 1e-3)])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_values_and_vectors_are_those_of_the_dense_matrix(kind, dtype, tol, mode):
    make, options = OPTIMIZERS[kind]
    given = problem(make, dtype, **options)
    operator = given.operator(mode=mode)
    for k, which in ((1, "LA"), (5, "LA"), (2, "SA"), (3, "LM")):
        found = lyapcuda.eigsh(operator, k, which, tol=tol)
        right = wanted(given.eigenvalues, k, which)
        torch.testing.assert_close(found.eigenvalues, right, rtol=tol, atol=0)
        assert bool(found.converged.all())
        for value, vector in zip(found.eigenvalues, found.eigenvectors.double(), strict=True):
            assert float(vector.norm()) == pytest.approx(1.0, rel=1e-6)
            along = given.root.square() * (given.hessian @ vector)
            assert float((along - value * vector).norm()) < 30 * tol * abs(float(value))


@pytest.mark.parametrize("mode", ["exact", "difference", "auto"])
def test_a_product_is_scaled_on_both_sides(mode):
    given = problem()
    operator = given.operator(mode=mode)
    torch.manual_seed(1)
    matrix = torch.randn(len(given.root), 3, dtype=torch.float64)
    right = given.scaled @ matrix
    torch.testing.assert_close(operator @ matrix[:, 0], right[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(operator @ matrix, right, rtol=1e-5, atol=1e-5)
    x, y = given.batch
    batches = [(x[:10], y[:10]), (x[10:], y[10:])]
    over = lyapcuda.HessianOperator(
        *(given.loss, given.model.parameters()),
        data=batches,
        mode=mode,
        preconditioner=given.optimizer,
    )
    torch.testing.assert_close(over @ matrix, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["exact", "difference"])
def test_weight_decay_is_scaled_with_the_hessian(mode):
    given = problem(weight_decay=0.3)
    params = given.optimizer  # whose groups have the weight decay
    operator = lyapcuda.HessianOperator(
        given.loss, params, mode=mode, preconditioner=given.optimizer
    )
    v = torch.ones(len(given.root), dtype=torch.float64)
    right = given.scaled @ v + 0.3 * given.root.square() * v
    torch.testing.assert_close(operator @ v, right, rtol=1e-5, atol=1e-5)


def test_differences_move_theta_by_the_perturbation_whatever_p_is():
    """Along a vector whose scale is 1e4 a displacement of its own length would be far too long."""
    given = problem()
    tiny = [torch.full_like(p, 1e-8) for p in given.model.parameters()]
    found = lyapcuda.eigsh(given.operator(preconditioner=tiny, mode="difference"), 2)
    right = wanted(torch.linalg.eigvalsh(given.hessian) * 1e8, 2, "LA")
    torch.testing.assert_close(found.eigenvalues, right, rtol=1e-3, atol=0)
    assert bool(found.converged.all())


def test_p_is_a_function_or_tensors_as_well():
    given = problem()
    params = list(given.model.parameters())
    sizes = {id(p): 0.5 + i for i, p in enumerate(params)}
    plain = [p.detach().new_full((1,), sizes[id(p)]) for p in params]
    root = torch.cat([torch.full((p.numel(),), sizes[id(p)] ** -0.5) for p in params]).double()
    right = torch.linalg.eigvalsh(root[:, None] * given.hessian * root)[-1]
    for source in (plain, lambda p: torch.full_like(p, sizes[id(p)])):
        found = lyapcuda.eigsh(given.loss, params, preconditioner=source, tol=1e-6)
        torch.testing.assert_close(found.eigenvalues[0], right, rtol=1e-6, atol=0)


def test_p_is_read_once():
    given = problem()
    operator = given.operator(mode="exact")
    for p in given.model.parameters():
        given.optimizer.state[p]["exp_avg_sq"].mul_(4.0)
    v = torch.ones(len(given.root), dtype=torch.float64)
    torch.testing.assert_close(operator @ v, given.scaled @ v)


def test_groups_with_other_rates_are_folded_into_one_edge():
    def make(params, lr):
        first, *rest = params
        return optim.SGD([{"params": [first], "momentum": 0.5}, {"params": rest, "lr": 4 * lr}], lr)

    given = problem(make, lr=0.01)
    operator = given.operator()
    assert float(operator.metric.reference_threshold) == 3.0
    top = lyapcuda.eigsh(operator, tol=1e-6).eigenvalues
    rates = torch.tensor([0.01 / 3] * 30 + [0.04 / 2] * (len(given.root) - 30)).double()
    right = torch.linalg.eigvals(rates[:, None] * given.hessian).real.max()
    torch.testing.assert_close(operator.metric.edge_of(top)[0], right, rtol=1e-6, atol=0)


def test_a_start_vector_is_a_displacement_of_the_parameters():
    given = problem()
    operator = given.operator(mode="exact")
    cold = lyapcuda.eigsh(operator, 2, tol=1e-6)
    warm = lyapcuda.eigsh(operator, 2, tol=1e-6, v0=cold.eigenvectors)
    assert warm.gradient_evaluations <= 0.5 * cold.gradient_evaluations
    torch.testing.assert_close(warm.eigenvalues, cold.eigenvalues, rtol=1e-6, atol=0)
    tracker = lyapcuda.CurvatureTracker(given.model.parameters())
    for _ in range(5):
        tracker.step(given.loss)
    started = lyapcuda.eigsh(operator, tol=1e-6, v0=tracker)
    torch.testing.assert_close(started.eigenvalues, cold.eigenvalues[:1], rtol=1e-6, atol=0)


def test_a_start_vector_without_a_part_in_the_metric_is_refused():
    given = problem()
    first, *_ = given.model.parameters()
    del given.optimizer.state[first]
    v0 = torch.zeros(len(given.root), dtype=torch.float64)
    v0[:10] = 1.0
    with pytest.raises(ValueError, match="v0: its norm is 0.0"):
        lyapcuda.eigsh(given.operator(), v0=v0)


def test_other_solvers_take_it():
    given = problem()
    operator = given.operator(mode="exact")
    found = lyapcuda.trace(operator, samples=180)
    assert found.trace == pytest.approx(float(given.scaled.trace()), rel=1e-6)
    density = lyapcuda.spectral_density(operator, draws=1, steps=57)
    assert float(density.nodes.max()) == pytest.approx(float(given.eigenvalues[-1]), rel=1e-6)
    top = lyapcuda.eigsh(operator, 2)
    scales = lyapcuda.finite_scale(operator, top, [1e-4, 1e-3])
    for row in scales.curvatures:
        torch.testing.assert_close(row, top.eigenvalues, rtol=1e-4, atol=0)
    subspace = lyapcuda.eigsh(operator, 2, method="lyapunov")
    torch.testing.assert_close(subspace.eigenvalues, top.eigenvalues, rtol=1e-3, atol=0)


@pytest.mark.parametrize("p", [1e-8, 1e4])
def test_a_gradient_that_is_not_the_losses_is_seen_at_any_scale(p):
    given = problem()
    x, _ = given.batch

    def stopped():
        other = given.model(x).square().mean()
        return given.loss() + other - other.detach()

    scale = [torch.full_like(q, p) for q in given.model.parameters()]
    for loss, right in ((given.loss, True), (stopped, False)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", lyapcuda.ConvergenceWarning)
            found = lyapcuda.eigsh(
                *(loss, given.model.parameters()), preconditioner=scale, mode="exact"
            )
        assert bool(found.converged.all()) is right
        assert [doubt.partition(":")[0] for doubt in found.doubts] == (
            [] if right else ["gradient"]
        )


@pytest.mark.parametrize("p", [1e-6, 1e2])
def test_products_are_compared_as_if_the_loss_were_one_of_z(p):
    """θ = θ₀ + S·z, written out, has the same Hessian by z."""
    given = problem()
    x, y = given.batch
    params = dict(given.model.named_parameters())
    operator = given.operator(preconditioner=[torch.full_like(q, p) for q in params.values()])
    z = [torch.zeros_like(q, requires_grad=True) for q in params.values()]

    def written_out():
        pairs = zip(params.items(), z, strict=True)
        theta = {name: q.detach() + p**-0.5 * part for (name, q), part in pairs}
        return nn.functional.cross_entropy(functional_call(given.model, theta, (x,)), y)

    other = lyapcuda.HessianOperator(written_out, z)
    found, size = [], 1e-5
    for h, width in ((operator, size), (other, size * p**0.5)):
        # Along the gradient, the same direction in both.
        u, hu = Basis.empty(h.layout, 1), Basis.empty(h.layout, 1)
        h.products.start(u.row(0), exact=False)
        norm = u.gram(u)[0, 0].sqrt()
        value = float(norm)
        h.products.exact([u.row(0)], [hu.row(0)], 1.0)
        both = both_sides(h.products, u, hu, norm, width)
        u.row(0)[0].div_(norm)
        found.append((both, one_side(h.products, u, value, width, 0.0, 0.0)))
    for mine, theirs in zip(*found, strict=True):
        assert mine.own and theirs.own
        assert mine.noise == pytest.approx(theirs.noise, rel=1e-3)
        assert mine.along == pytest.approx(theirs.along, rel=1e-3)
        assert mine.offset == pytest.approx(theirs.offset, rel=0.1, abs=1e-9)


def test_what_is_refused():
    given = problem()
    params = list(given.model.parameters())
    with pytest.raises(RuntimeError, match="preconditioner=<Adam>: it hasn't taken a step"):
        given.operator(preconditioner=optim.Adam(params))
    with pytest.raises(TypeError, match="preconditioner=None measures H itself") as caught:
        given.operator(preconditioner=optim.LBFGS(params))
    assert "pass preconditioner=a function" in str(caught.value)
    with pytest.raises(TypeError, match="preconditioner=3: expected an optimizer"):
        lyapcuda.eigsh(given.loss, params, preconditioner=3)
    with pytest.raises(ValueError, match="expected a tensor for each of the 4 parameters"):
        given.operator(preconditioner=[torch.ones(2)])
