"""The small nets and losses that curvlinops tests its Hessian on, restated.

From curvlinops-for-pytorch 3.0.1, test/cases.py (github.com/f-dangel/curvlinops). MIT License,
Copyright (c) 2021 Felix Dangel, Runa Eschenhagen, Lukas Tatzel & Philipp Hennig: permission is
granted, free of charge, to use, copy, modify and distribute it, provided that this notice is kept;
it comes without warranty of any kind.

The random numbers are drawn in the order of the original, from the same seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Data = list[tuple[Tensor, Tensor]]


@dataclass
class Case:
    """A model, a loss of its outputs, and batches; targets are made like their kind asks."""

    name: str
    model: nn.Module
    criterion: nn.Module
    data: Data


class ClassesSecond(nn.Sequential):
    """Moves the classes from the last place to the second, where cross-entropy wants them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).movedim(-1, 1)


def _net(features: int, outputs: int) -> list[nn.Module]:
    return [nn.Linear(features, 5), nn.ReLU(), nn.Linear(5, outputs)]


def _classes(count: int) -> Callable[[tuple[int, ...]], Tensor]:
    """Labels; the shape is that of the samples."""
    return lambda shape: torch.randint(size=shape, low=0, high=count)


def _binary(outputs: int) -> Callable[[tuple[int, ...]], Tensor]:
    return lambda shape: torch.randint(size=(*shape, outputs), low=0, high=2).float()


def _real(outputs: int) -> Callable[[tuple[int, ...]], Tensor]:
    return lambda shape: torch.rand(*shape, outputs)


_CE, _BCE, _MSE = nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, nn.MSELoss
#: (loss, reduction, features, outputs, targets, sizes of the batches, further dimensions)
_FORMS = (
    (_CE, "mean", 10, 3, _classes(3), (3, 4), ()),
    (_CE, "sum", 10, 3, _classes(3), (3, 4), ()),
    (_BCE, "mean", 10, 1, _binary(1), (3, 4), ()),
    (_BCE, "mean", 10, 2, _binary(2), (3, 4), ()),
    (_BCE, "sum", 10, 2, _binary(2), (3, 4), ()),
    (_MSE, "mean", 8, 3, _real(3), (2, 6), ()),
    (_MSE, "sum", 8, 3, _real(3), (2, 6), ()),
    # Inputs in a dictionary in the original.
    (_CE, "mean", 10, 3, _classes(3), (3, 4), ()),
    (_BCE, "mean", 10, 1, _binary(1), (3, 4), ()),
    (_MSE, "mean", 10, 2, _real(2), (3, 4), ()),
    # With a sequence.
    (_CE, "mean", 10, 3, _classes(3), (3, 4), (5,)),
    (_CE, "sum", 10, 3, _classes(3), (3, 4), (5,)),
    (_BCE, "mean", 10, 2, _binary(2), (3, 4), (5,)),
    (_BCE, "sum", 10, 2, _binary(2), (3, 4), (5,)),
    (_MSE, "mean", 8, 3, _real(3), (2, 6), (5,)),
    (_MSE, "sum", 8, 3, _real(3), (2, 6), (5,)),
)


def restated_cases() -> list[Case]:
    """All 16."""
    cases = []
    for i, (loss, reduction, features, outputs, targets, sizes, more) in enumerate(_FORMS):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = _net(features, outputs)
            kind = ClassesSecond if loss is _CE and more else nn.Sequential
            model = kind(*layers)
            data = [(torch.rand(n, *more, features), targets((n, *more))) for n in sizes]
        name = f"{i} {loss.__name__} {reduction}" + (" over a sequence" if more else "")
        cases.append(Case(name, model, loss(reduction=reduction), data))
    return cases
