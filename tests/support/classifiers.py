"""Small classifiers, a few steps into their training, and their exact Hessians in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nets import Case, exact_eigenvalues


class Act(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def clusters(samples: int = 256, features: int = 8, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Noise around a centre a class, from torch's global generator. So many samples that some unit
    changes sides wherever one goes.
    """
    labels = torch.arange(samples) % classes
    return torch.randn(classes, features)[labels] + torch.randn(samples, features), labels


def mlp(act: Callable[[Tensor], Tensor], width: int = 12, kept: int = 12) -> nn.Sequential:
    """8 features, two hidden layers of which ``act`` leaves so many features, 4 classes."""
    return nn.Sequential(
        *(nn.Linear(8, width), Act(act), nn.Linear(kept, width), Act(act), nn.Linear(kept, 4))
    )


def classifier(
    build: Callable[[], nn.Module],
    plain: Callable[[], nn.Module] | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    samples: int = 256,
    steps: int = 30,
) -> Case:
    """A net after ``steps`` of plain gradient descent.

    Args:
        build, plain: the net, and one of the same parameters in the same order that says the same
            by what torch differentiates twice (default: the net itself). That one is trained, and
            has the eigenvalues.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
        twin = (plain or build)()
        x, y = clusters(samples)
    parameters, others = list(model.parameters()), list(twin.parameters())
    with torch.no_grad():
        for p, q in zip(parameters, others, strict=True):
            q.copy_(p)
    for _ in range(steps):
        gradients = torch.autograd.grad(F.cross_entropy(twin(x), y), others)
        with torch.no_grad():
            for q, gradient in zip(others, gradients, strict=True):
                q -= 0.1 * gradient
    with torch.no_grad():
        for p, q in zip(parameters, others, strict=True):
            p.copy_(q)
    eigenvalues = exact_eigenvalues(twin, lambda forward: F.cross_entropy(forward(x), y))
    model, inputs = model.to(dtype), x.to(dtype)
    return Case(model, lambda: F.cross_entropy(model(inputs), y), eigenvalues)
