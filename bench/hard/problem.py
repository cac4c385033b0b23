"""A loss to measure and its truth: the dense Hessian, in float64, of a loss written plainly."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from classifiers import clusters

Loss = Callable[[], Tensor]
Criterion = Callable[[Tensor, Tensor], Tensor]
#: What is asked of eigsh: (which, k).
Asks = tuple[tuple[str, int], ...]
ASKS: Asks = (("LA", 1), ("LA", 3), ("SA", 1), ("LM", 3), ("BE", 5))
BOTH = (torch.float32, torch.float64)


@dataclass
class Problem:
    """What eigsh is given, and what it should find.

    Attributes:
        params: the parameters.
        closure: as eigsh takes it.
        truth: the exact eigenvalues, ascending, in float64. None where there is no matrix: whatever
            is called converged is then wrong.
        exact_truth: where mode="exact" has another truth: that of the graph, which holds constant
            what it doesn't differentiate.
        options: more arguments of eigsh.
    """

    params: list[Tensor]
    closure: Callable[..., Any]
    truth: Callable[[], Tensor] | None
    exact_truth: Callable[[], Tensor] | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """Problems of one kind, a seed each.

    Attributes:
        kind: the table's section.
        make: (seed, dtype) → a problem.
        dtypes: of the parameters.
        asks: what is asked.
        climbs: what method="lyapunov" is asked.
        plain: central differences of the closure's gradient, in float64, can show the truth.
        fresh: made anew for every run, as the closure has a state.
    """

    name: str
    kind: str
    make: Callable[[int, torch.dtype], Problem]
    dtypes: tuple[torch.dtype, ...] = BOTH
    asks: Asks = ASKS
    climbs: Asks = ()
    plain: bool = True
    fresh: bool = False


def dense_hessian(loss: Loss, params: Iterable[Tensor]) -> Tensor:
    """The Hessian by double backward, a row at a time."""
    params = list(params)

    def flat(parts: Iterable[Tensor | None]) -> Tensor:
        pairs = zip(parts, params, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])

    first = flat(torch.autograd.grad(loss(), params, create_graph=True, allow_unused=True))
    if not first.requires_grad:
        return torch.zeros(len(first), len(first), dtype=first.dtype)
    rows = [
        flat(torch.autograd.grad(entry, params, retain_graph=True, allow_unused=True))
        for entry in first
    ]
    return torch.stack(rows).detach()


def eigenvalues(matrix: Tensor) -> Tensor:
    return torch.linalg.eigvalsh((matrix + matrix.T) / 2)


def few() -> tuple[Tensor, Tensor]:
    """Samples for a dense Hessian that is made quickly."""
    return clusters(64)


def many() -> tuple[Tensor, Tensor]:
    """So many samples that some unit changes sides wherever one goes."""
    return clusters(256)


def pictures(samples: int = 32, classes: int = 4) -> tuple[Tensor, Tensor]:
    """The same, of 1 × 8 × 8."""
    x, y = clusters(samples, 64, classes)
    return x.unflatten(1, (1, 8, 8)), y


def mlp(
    act: Callable[[], nn.Module], width: int = 12, *, narrower: int = 1, depth: int = 2
) -> nn.Sequential:
    """8 features, ``depth`` hidden layers, 4 classes; ``act`` leaves width/narrower features."""
    layers: list[nn.Module] = []
    features = 8
    for _ in range(depth):
        layers += [nn.Linear(features, width), act()]
        features = width // narrower
    return nn.Sequential(*layers, nn.Linear(features, 4))


def train(params: list[Tensor], loss: Loss, steps: int, rate: float = 0.1) -> None:
    """Plain gradient descent."""
    for _ in range(steps):
        gradients = torch.autograd.grad(loss(), params, allow_unused=True)
        with torch.no_grad():
            for p, g in zip(params, gradients, strict=True):
                if g is not None:
                    p -= rate * g


def supervised(
    seed: int,
    dtype: torch.dtype,
    build: Callable[[], nn.Module],
    plain: Callable[[], nn.Module] | None = None,
    *,
    data: Callable[[], tuple[Tensor, Tensor]] = few,
    criterion: Criterion = F.cross_entropy,
    plain_criterion: Criterion | None = None,
    closure: Callable[[nn.Module, Loss], Callable[..., Any]] | None = None,
    change: Callable[[nn.Module], None] | None = None,
    steps: int = 30,
) -> Problem:
    """A net on made-up data, a few steps into its training.

    Args:
        build, plain: the net, and one of the same parameters in the same order that says the same
            by plain means (default: the net itself). That one is trained, and has the truth.
        criterion, plain_criterion: likewise.
        closure: (model, its loss) → the closure. Default: the loss.
        change: what happens to the parameters after the training.
        steps: of gradient descent.
    """
    plain_criterion = plain_criterion or criterion
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
        torch.manual_seed(seed)
        twin = (plain or build)()
        x, y = data()
    params, plainly = list(model.parameters()), list(twin.parameters())
    with torch.no_grad():
        for p, q in zip(params, plainly, strict=True):
            q.copy_(p)
    train(plainly, lambda: plain_criterion(twin(x), y), steps)
    if change is not None:
        change(twin)
    with torch.no_grad():
        for p, q in zip(params, plainly, strict=True):
            p.copy_(q)
    model.to(dtype)
    inputs = x.to(dtype) if x.is_floating_point() else x
    targets = y.to(dtype) if y.is_floating_point() else y

    def loss() -> Tensor:
        return criterion(model(inputs), targets)

    def truth() -> Tensor:
        twin.double()
        x64 = x.double() if x.is_floating_point() else x
        y64 = y.double() if y.is_floating_point() else y
        return eigenvalues(
            dense_hessian(lambda: plain_criterion(twin(x64), y64), twin.parameters())
        )

    return Problem(params, loss if closure is None else closure(model, loss), truth)
