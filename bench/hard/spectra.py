"""Smooth losses with spectra that solvers stumble over: zeros, multiple values, hidden ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from classifiers import Act
from hard.problem import Asks, Family, Problem, mlp, supervised

_ZEROS: Asks = tuple((which, k) for which in ("SA", "BE") for k in range(1, 5))
_TOP: Asks = (("LA", 1), ("LA", 3), ("LM", 2), ("BE", 3))


def _softmax_regression(seed: int, dtype: torch.dtype) -> Problem:
    """A shift of all logits changes nothing: as many zeros as features, and one."""
    return supervised(seed, dtype, lambda: nn.Linear(8, 4))


def _few_samples(seed: int, dtype: torch.dtype) -> Problem:
    """Squared error of a linear net: rank 4 · 3 of 90."""

    def data() -> tuple[Tensor, Tensor]:
        return torch.randn(3, 14), torch.randn(3, 6)

    return supervised(seed, dtype, lambda: nn.Linear(14, 6), data=data, criterion=F.mse_loss)


def _dead(seed: int, dtype: torch.dtype) -> Problem:
    """Every unit is off: the loss is constant but for the last layer's biases."""

    @torch.no_grad()
    def kill(model: nn.Module) -> None:
        model[2].bias -= 100.0

    return supervised(seed, dtype, lambda: mlp(nn.ReLU), change=kill)


def _constant(seed: int, dtype: torch.dtype) -> Problem:
    """The same without the last biases: no gradient at all."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4, bias=False))

    @torch.no_grad()
    def kill(model: nn.Module) -> None:
        model[0].bias -= 100.0

    return supervised(seed, dtype, build, change=kill)


def _linear(seed: int, dtype: torch.dtype) -> Problem:
    """A gradient, and no curvature."""

    def mean(out: Tensor, y: Tensor) -> Tensor:
        return out.gather(1, y[:, None]).mean()

    return supervised(seed, dtype, lambda: nn.Linear(8, 4), criterion=mean, steps=0)


def _saddle(seed: int, dtype: torch.dtype) -> Problem:
    """Untrained squares: as much curvature down as up."""

    def product(out: Tensor, y: Tensor) -> Tensor:
        return (out[:, 0] * out[:, 1] - out[:, 2] * out[:, 3]).mean()

    build = lambda: mlp(lambda: Act(torch.tanh))  # noqa: E731
    return supervised(seed, dtype, build, criterion=product, steps=0)


# --- quadratics -----------------------------------------------------------------------------------


def _dense(spectrum: Callable[[np.random.Generator], np.ndarray]) -> Callable[..., Problem]:
    """½·θᵀHθ, H with the given eigenvalues in a random basis."""

    def make(seed: int, dtype: torch.dtype) -> Problem:
        rng = np.random.default_rng(seed)
        values = spectrum(rng)
        basis, _ = np.linalg.qr(rng.standard_normal((len(values), len(values))))
        matrix = torch.tensor((basis * values) @ basis.T)
        matrix = (matrix + matrix.T) / 2
        theta = nn.Parameter(torch.tensor(rng.standard_normal(len(values)), dtype=dtype))
        rounded = matrix.to(dtype)
        return Problem(
            [theta],
            lambda: 0.5 * theta @ (rounded @ theta),
            lambda: torch.tensor(np.sort(values)),
        )

    return make


def _bulk(*tops: float) -> Callable[[np.random.Generator], np.ndarray]:
    return lambda rng: np.concatenate([rng.uniform(-0.2, 0.5, 200 - len(tops)), tops])


def _hidden(top: float, n: int) -> Callable[[int, torch.dtype], Problem]:
    """Diagonal: g(θ) lies in the second eigenvector alone, and the first has no part in it."""

    def make(seed: int, dtype: torch.dtype) -> Problem:
        rng = np.random.default_rng(seed)
        spectrum = rng.uniform(0.0, 0.5, n)
        first, second = rng.choice(n, 2, replace=False)
        spectrum[first], spectrum[second] = top, 1.0
        start = torch.zeros(n, dtype=dtype)
        start[second] = 1.0
        theta, diagonal = nn.Parameter(start), torch.tensor(spectrum, dtype=dtype)
        exact = torch.tensor(np.sort(spectrum))
        return Problem([theta], lambda: 0.5 * (diagonal * theta * theta).sum(), lambda: exact)

    return make


def _large(name: str, make: Callable[..., Problem]) -> Family:
    return Family(name, "spectra", make, asks=(("LA", 1),), plain=False)


def _family(name: str, make: Callable[..., Problem], asks: Asks) -> Family:
    return Family(name, "spectra", make, asks=asks)


_ENDS: Asks = (("LA", 1), ("SA", 2), ("BE", 3))
FAMILIES = [
    _family("softmax regression", _softmax_regression, _ZEROS),
    _family("3 samples, 6 outputs", _few_samples, _ZEROS + (("LA", 5),)),
    _family("dead units", _dead, _ENDS),
    _family("a constant loss", _constant, _ENDS),
    _family("a linear loss", _linear, _ENDS),
    _family("saddle", _saddle, (("LA", 1), ("SA", 1), ("LM", 3), ("BE", 5))),
    _family("double top value", _dense(_bulk(1.0, 1.0)), _TOP),
    _family("double second value", _dense(_bulk(1.0, 0.8, 0.8)), _TOP),
    _family("pair 0.1 % apart", _dense(_bulk(1.0, 0.999)), _TOP),
    _family("cluster of five", _dense(_bulk(1.0, 0.998, 0.995, 0.993, 0.99)), (*_TOP, ("LA", 5))),
    *(
        _large(f"hidden {top:g} beside 1, n = {n:,}", _hidden(top, n))
        for n in (20_000, 200_000, 1_000_000)
        for top in (1.01, 1.1, 1.6)
    ),
]
