"""What may count as converged: nothing that isn't one symmetric matrix's, and nothing unknown."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import lyapcuda
from classifiers import classifier, clusters, mlp
from nets import quadratic
from noisy import snapshot
from truths import is_off, wanted


def doubted(what: str, *args, **options) -> tuple[lyapcuda.EigenResult, str]:
    """The result of eigsh, of which nothing may have converged, and its one warning, which names
    ``what``.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = lyapcuda.eigsh(*args, **options)
    messages = [str(w.message) for w in caught if w.category is lyapcuda.ConvergenceWarning]
    assert not result.converged.any()
    assert len(messages) == 1 and what in messages[0]
    return result, messages[0]


# --- another function at each call ---------------------------------------------------------------

Changing = tuple[nn.Module, Callable, dict]


def gelu(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """A net and 168 samples."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return mlp(F.gelu), *clusters(168)


def moving() -> Changing:
    """Other samples at each call, as ``next(iterator)`` in a closure has them."""
    model, x, y = gelu()
    rng = np.random.default_rng(0)

    def closure():
        rows = torch.from_numpy(rng.integers(len(x), size=32))
        return F.cross_entropy(model(x[rows]), y[rows])

    return model, closure, {}


def cycling() -> Changing:
    """Two batches in turn: every other evaluation is the same."""
    model, x, y = gelu()
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        half = slice(calls % 2, None, 2)
        return F.cross_entropy(model(x[half]), y[half])

    return model, closure, {}


def own_mask() -> Changing:
    """Dropout by a generator that nothing outside of the closure knows."""
    model, x, y = gelu()
    own = torch.Generator().manual_seed(0)

    def closure():
        hidden = model[:4](x)
        return F.cross_entropy(model[4](hidden * (torch.rand(12, generator=own) < 0.8)), y)

    return model, closure, {}


class Augmented(Dataset):
    """Each sample with new noise from a NumPy generator of its own."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.own = x, y, np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i] + 0.3 * torch.from_numpy(self.own.standard_normal(8)).float(), self.y[i]


def augmented() -> Changing:
    model, x, y = gelu()
    loader = DataLoader(Augmented(x[:64], y[:64]), batch_size=32)
    return model, lambda batch: F.cross_entropy(model(batch[0]), batch[1]), {"data": loader}


CHANGING = [moving, cycling, own_mask, augmented]


@pytest.mark.parametrize("mode", ["auto", "exact", "difference"])
@pytest.mark.parametrize("make", CHANGING)
def test_a_closure_that_changes_has_no_eigenvalues(make, mode):
    model, closure, options = make()
    which = "SA" if mode == "exact" else "LA"
    result, _ = doubted(
        "closure", closure, model.parameters(), 2, which, mode=mode, maxiter=40, **options
    )
    assert any("closure" in doubt for doubt in result.doubts)


@pytest.mark.parametrize("method", ["lanczos", "lyapunov"])
def test_nor_by_either_method_and_end(method):
    model, closure, _ = cycling()
    doubted("closure", closure, model.parameters(), 2, "BE", method=method, maxiter=20)


@pytest.mark.parametrize("solver", ["trace", "spectral_density"])
@pytest.mark.parametrize("make", CHANGING)
def test_nor_a_trace_nor_a_density(make, solver):
    model, closure, options = make()
    options |= {"samples": 6} if solver == "trace" else {"draws": 1, "steps": 3}
    with pytest.warns(lyapcuda.ConvergenceWarning, match="closure"):
        found = getattr(lyapcuda, solver)(closure, model.parameters(), **options)
    assert any("closure" in doubt for doubt in found.doubts)


@pytest.mark.parametrize("mode", ["auto", "exact", "difference"])
@pytest.mark.parametrize("make", CHANGING)
def test_debug_ends_it_at_once(make, mode):
    model, closure, options = make()
    calls = 0

    def counted(*batch):
        nonlocal calls
        calls += 1
        return closure(*batch)

    before = snapshot(model)
    with pytest.raises(RuntimeError, match="closure: two evaluations at the same θ"):
        lyapcuda.eigsh(counted, model.parameters(), mode=mode, debug=True, **options)
    assert calls <= 2 * 4 and snapshot(model) == before


def test_debug_lets_a_loss_be_that_is_one_function():
    truth = classifier(lambda: mlp(F.gelu))
    params = list(truth.model.parameters())
    result = lyapcuda.eigsh(truth.closure, params, debug=True)
    assert bool(result.converged.all()) and not is_off(result, 0, truth.eigenvalues)


# --- a gradient that isn't the loss's -------------------------------------------------------------


def straight_through() -> tuple[nn.Module, Callable]:
    """Weights rounded to eighths; the gradient passes as if they weren't."""
    truth = classifier(lambda: mlp(torch.tanh))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        x, y = clusters()

    def closure():
        values = {
            name: p + ((8 * p).round() / 8 - p).detach()
            for name, p in truth.model.named_parameters()
        }
        return F.cross_entropy(functional_call(truth.model, values, (x,)), y)

    return truth.model, closure


def stopped() -> tuple[nn.Module, Callable]:
    """A value net beside a reward and its own next value, which is held constant."""
    model, x, y = gelu()

    def closure():
        values = model(x)
        target = (values.roll(1, 0).logsumexp(1) * 0.9 + (y == 0)).detach()
        return F.mse_loss(values.gather(1, y[:, None]).squeeze(1), target)

    return model, closure


@pytest.mark.parametrize("mode", ["auto", "exact"])
@pytest.mark.parametrize("make", [straight_through, stopped])
def test_a_replaced_gradient_has_no_hessian(make, mode):
    model, closure = make()
    doubted("", closure, model.parameters(), 2, mode=mode)


# --- what differences can't show ------------------------------------------------------------------

HIDDEN = {
    "where": lambda z: torch.where(z > 0, z, torch.zeros_like(z)),
    "clamp": lambda z: z.clamp(min=0),
    "mask": lambda z: z * (z > 0),
}


@pytest.mark.parametrize("which", ["LA", "BE"])
@pytest.mark.parametrize(("name", "seed"), [("where", 0), ("clamp", 1), ("mask", 2)])
def test_differences_among_hidden_kinks_have_not_converged(name, seed, which):
    """In float32 they are up to a third off here."""
    truth = classifier(lambda: mlp(HIDDEN[name]), seed=seed, samples=512)
    params = list(truth.model.parameters())
    result, _ = doubted("kinks", truth.closure, params, 3, which, mode="difference")
    assert is_off(result, 0, truth.eigenvalues)
    assert any("kinks" in doubt for doubt in result.doubts)


@pytest.mark.parametrize("seed", range(3))
def test_under_autocast_the_interval_holds_the_value_of_float32(seed):
    truth = classifier(lambda: mlp(F.gelu), seed=seed)

    def closure():
        with torch.autocast("cpu", torch.bfloat16):
            return truth.closure()

    result, _ = doubted("precision", closure, truth.model.parameters())
    assert float(result.eigenvalues[0]) == pytest.approx(truth.h0, rel=0.03)
    low, high = result.interval[0].tolist()
    assert low <= truth.h0 <= high


# --- zeros ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["exact", "difference"])
@pytest.mark.parametrize("which", ["SA", "BE"])
def test_true_zeros_of_a_rank_deficient_hessian_converge(which, mode):
    """Squared error of a linear net on 3 samples: rank 4 · 3 of 60."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x, y = nn.Linear(14, 4).double(), torch.randn(3, 14), torch.randn(3, 4)
    closure = lambda: F.mse_loss(model(x.double()), y.double())  # noqa: E731
    result = lyapcuda.eigsh(closure, model.parameters(), 4, which, mode=mode)
    assert bool(result.converged.all())
    low = result.eigenvalues if which == "SA" else result.eigenvalues[2:]
    scale = float(lyapcuda.eigsh(closure, model.parameters(), mode="exact").eigenvalues[0])
    assert low.tolist() == pytest.approx([0.0] * len(low), abs=1e-6 * scale)


@pytest.mark.parametrize("options", [{}, {"difference": "forward"}])
def test_what_is_only_not_known_is_no_zero(options):
    """A value below its error, which isn't small beside the tolerance's share of the largest."""
    spectrum = np.concatenate([[-1e-4], np.linspace(0.5, 1.0, 20), [10.0]])
    theta, closure, _ = quadratic(spectrum, seed=1, dtype=torch.float32)
    with pytest.warns(lyapcuda.ConvergenceWarning, match="1 of 2"):
        result = lyapcuda.eigsh(closure, [theta], 2, "BE", **options)
    assert result.converged.tolist() == [True, False]
    low, high = result.interval[1].tolist()
    assert low <= -1e-4 <= high


@pytest.mark.parametrize(("mode", "k"), [("exact", 3), ("difference", 2)])
@pytest.mark.parametrize("seed", range(6))
def test_all_copies_of_a_zero_at_the_low_end_are_found(seed, mode, k):
    """Softmax regression: a shift of all logits changes nothing, whatever the features: 7 zeros."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, x = nn.Linear(6, 3).double(), torch.randn(80, 6).double()
        y = torch.randint(0, 3, (80,))
    closure = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    result = lyapcuda.eigsh(closure, model.parameters(), k, "SA", seed=seed, mode=mode)
    assert bool(result.converged.all())
    assert result.eigenvalues.tolist() == pytest.approx([0.0] * k, abs=1e-6)


# --- multiple, close and hidden values -----------------------------------------------------------

TOPS = {
    "double": [1.0, 1.0],
    "double second": [1.0, 0.8, 0.8],
    "pair": [1.0, 0.999],
    "closer": [1.0, 0.9999, 0.9995],
    "cluster": [1.0, 0.998, 0.995, 0.993, 0.99],
}


@pytest.mark.parametrize(
    ("name", "k"),
    [(name, k) for name, tops in TOPS.items() for k in range(1, min(len(tops), 3) + 1)],
)
def test_verify_ends_soon(name, k):
    tops = TOPS[name]
    bulk = np.random.default_rng(0).uniform(-0.2, 0.5, 200 - len(tops))
    spectrum = np.sort(np.concatenate([bulk, tops]))
    theta, closure, _ = quadratic(spectrum, seed=0)
    result = lyapcuda.eigsh(closure, [theta], k, verify=True)
    assert bool(result.converged.all()) and result.iterations < 60
    exact = wanted(torch.tensor(spectrum), k, "LA")
    torch.testing.assert_close(result.eigenvalues, exact, rtol=1e-3, atol=0)


@pytest.mark.filterwarnings("ignore::lyapcuda.ConvergenceWarning")
@pytest.mark.parametrize("top", [1.01, 1.1, 1.6])
def test_a_value_of_which_the_gradient_knows_nothing_is_found(top):
    """θ lies along h1's vector alone, and so does g(θ)."""
    n, found = 20_000, 0
    for seed in range(4):
        rng = np.random.default_rng(seed)
        diagonal = torch.tensor(rng.uniform(0.0, 0.5, n))
        first, second = rng.choice(n, 2, replace=False)
        diagonal[first], diagonal[second] = top, 1.0
        theta = nn.Parameter(torch.zeros(n, dtype=torch.float64))
        theta.data[second] = 1.0
        closure = lambda t=theta, d=diagonal: 0.5 * (d * t * t).sum()  # noqa: E731
        result = lyapcuda.eigsh(closure, [theta], seed=seed)
        right = abs(float(result.eigenvalues[0]) / top - 1.0) < 1e-3
        assert right or not bool(result.converged[0])
        found += right
    assert found >= 3


def test_two_climbs_into_one_eigenspace_give_orthonormal_vectors():
    """All other eigenvalues are the same: both climbs end among them."""
    matrix = torch.ones(30, 30, dtype=torch.float64) + 0.01 * torch.eye(30)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        theta = nn.Parameter(torch.randn(30, generator=generator, dtype=torch.float64))
        result = lyapcuda.eigsh(
            lambda t=theta: 0.5 * t @ (matrix @ t), [theta], 3, "BE", method="lyapunov", seed=seed
        )
        products = result.eigenvectors @ result.eigenvectors.T
        torch.testing.assert_close(products, torch.eye(3).double(), rtol=0, atol=1e-6)
        exact = torch.tensor([30.01, 0.01, 0.01], dtype=torch.float64)
        torch.testing.assert_close(result.eigenvalues, exact, rtol=1e-3, atol=0)
