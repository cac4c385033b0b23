"""Losses that are another at each evaluation: no matrix, so nothing of them can be converged."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from hard.problem import (
    Asks,
    Family,
    Problem,
    clusters,
    dense_hessian,
    eigenvalues,
    mlp,
    supervised,
)

_ASKS: Asks = (("LA", 1), ("LA", 3), ("SA", 1), ("BE", 2))


def _smooth(seed: int, dtype: torch.dtype) -> tuple[nn.Module, Problem, Tensor, Tensor]:
    """A GELU net, its problem without noise, and 168 more samples (it divides by 2, 3 and 7)."""
    kept: list[nn.Module] = []

    def build() -> nn.Module:
        kept.append(mlp(nn.GELU))
        return kept[-1]

    problem = supervised(seed, dtype, build)
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1000)
        x, y = clusters(168)
    return kept[0], problem, x.to(dtype), y


def _dropout(seed: int, dtype: torch.dtype) -> Problem:
    """The mask from a generator of the closure's own."""
    model, problem, x, y = _smooth(seed, dtype)
    own = torch.Generator().manual_seed(seed)

    def closure() -> Tensor:
        hidden = model[:4](x)
        mask = torch.rand(hidden.shape, generator=own, dtype=dtype) < 0.8
        return F.cross_entropy(model[4](hidden * mask / 0.8), y)

    return Problem(problem.params, closure, None)


def _augmented(seed: int, dtype: torch.dtype) -> Problem:
    """Noise on the inputs, from NumPy."""
    model, problem, x, y = _smooth(seed, dtype)
    own = np.random.default_rng(seed)

    def closure() -> Tensor:
        noise = torch.from_numpy(own.standard_normal(x.shape)).to(dtype)
        return F.cross_entropy(model(x + 0.3 * noise), y)

    return Problem(problem.params, closure, None)


def _moving(seed: int, dtype: torch.dtype) -> Problem:
    """Other samples at each call."""
    model, problem, x, y = _smooth(seed, dtype)
    own = torch.Generator().manual_seed(seed)

    def closure() -> Tensor:
        rows = torch.randint(len(x), (32,), generator=own)
        return F.cross_entropy(model(x[rows]), y[rows])

    return Problem(problem.params, closure, None)


def _cycling(count: int) -> Callable[[int, torch.dtype], Problem]:
    def make(seed: int, dtype: torch.dtype) -> Problem:
        model, problem, x, y = _smooth(seed, dtype)
        batches = list(zip(x.chunk(count), y.chunk(count), strict=True))
        calls = 0

        def closure() -> Tensor:
            nonlocal calls
            inputs, targets = batches[calls % count]
            calls += 1
            return F.cross_entropy(model(inputs), targets)

        return Problem(problem.params, closure, None)

    return make


def _tiny(size: float) -> Callable[[int, torch.dtype], Problem]:
    """The loss times 1 + size·noise. It has a truth: that without noise."""

    def make(seed: int, dtype: torch.dtype) -> Problem:
        _, problem, _, _ = _smooth(seed, dtype)
        quiet, own = problem.closure, np.random.default_rng(seed)

        def closure() -> Tensor:
            return quiet() * (1.0 + size * own.standard_normal())

        return Problem(problem.params, closure, problem.truth)

    return make


# --- data= ----------------------------------------------------------------------------------------


class Augmented(Dataset):
    """Each sample with new noise."""

    def __init__(self, x: Tensor, y: Tensor, seed: int) -> None:
        self.x, self.y, self.own = x, y, np.random.default_rng(seed)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        noise = torch.from_numpy(self.own.standard_normal(self.x.shape[1]))
        return self.x[i] + 0.3 * noise.to(self.x.dtype), self.y[i]


def _over(model: nn.Module) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
    return lambda batch: F.cross_entropy(model(batch[0]), batch[1])


def _augmented_data(seed: int, dtype: torch.dtype) -> Problem:
    model, problem, x, y = _smooth(seed, dtype)
    loader = DataLoader(Augmented(x[:64], y[:64], seed), batch_size=32)
    return Problem(problem.params, _over(model), None, options={"data": loader})


def _dropped_last(seed: int, dtype: torch.dtype) -> Problem:
    """Shuffled by a generator that the loader has, and is rewound: the same samples each time."""
    model, problem, x, y = _smooth(seed, dtype)
    own = torch.Generator().manual_seed(seed)
    data = TensorDataset(x[:64], y[:64])
    loader = DataLoader(data, batch_size=24, shuffle=True, drop_last=True, generator=own)
    exact = copy.deepcopy(model).double()

    def truth() -> Tensor:
        state = own.get_state()
        batches = [(a.double(), b) for a, b in loader]
        own.set_state(state)
        over, params = _over(exact), list(exact.parameters())
        return eigenvalues(dense_hessian(lambda: sum(map(over, batches)) / len(batches), params))

    return Problem(problem.params, _over(model), truth, options={"data": loader})


class Shuffled:
    """The same samples in batches of another order each time, by a generator of its own."""

    def __init__(self, x: Tensor, y: Tensor, seed: int) -> None:
        self.x, self.y, self.own = x, y, torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.x), generator=self.own)
        yield from ((self.x[rows], self.y[rows]) for rows in order.split(20))


def _shuffled(seed: int, dtype: torch.dtype) -> Problem:
    """The mean over the whole is the same: it has a truth."""
    model, problem, _, _ = _smooth(seed, dtype)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mlp(nn.GELU)
        x, y = clusters(64)
    data = Shuffled(x.to(dtype), y, seed)
    return Problem(problem.params, _over(model), problem.truth, options={"data": data})


def _family(name: str, make: Callable[[int, torch.dtype], Problem]) -> Family:
    return Family(name, "noise", make, asks=_ASKS, plain=False, fresh=True)


FAMILIES = [
    _family("dropout, a generator of its own", _dropout),
    _family("augmentation by NumPy", _augmented),
    _family("a new minibatch each call", _moving),
    *(_family(f"{count} batches in turn", _cycling(count)) for count in (2, 3, 7)),
    _family("loss times 1 + 1e-3·noise", _tiny(1e-3)),
    _family("loss times 1 + 1e-6·noise", _tiny(1e-6)),
    _family("data= augmented by NumPy", _augmented_data),
    _family("data= shuffled, last batch dropped", _dropped_last),
    _family("data= shuffled", _shuffled),
]
