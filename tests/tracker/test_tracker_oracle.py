"""Whole trackers on the compiled ops and on the oracles: the same steps, up to rounding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import lyapcuda
from lyapcuda.objective.pointing import at_a_copy
from oracle_backend import oracles

#: Relative to the largest value. 16-bit parameters round θ + q, at either side of a tie.
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2}


def run(dtype: torch.dtype, **options) -> list[Tensor]:
    """All that a tracker shows after every one of some steps, two of which don't count."""
    parts = [nn.Parameter(torch.linspace(-1, 1, n).to(dtype)) for n in (5, 40)]
    groups = [{"params": [part]} for part in parts]
    groups[1]["weight_decay"] = 0.25
    tracker = lyapcuda.CurvatureTracker(groups, **options)
    shown = []
    for number in range(12):

        def closure(spoilt: bool = number in (3, 4)) -> Tensor:
            x = torch.cat([part.flatten() for part in parts]).double()
            loss = (torch.linspace(-1, 4, 45) * x.square()).sum() / 2 + x.prod() + x.sin().sum()
            return loss * math.nan if spoilt and at_a_copy() else loss

        tracker.step(closure)
        shown.append(torch.stack([tracker.h, tracker.rayleigh, tracker.residual, tracker.exponent]))
        shown.append(torch.cat([v.flatten() for v in tracker.vector(tracker.k - 1)]))
    assert int(tracker.skipped.max()) == 2
    return shown


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize(("k", "which"), [(1, "LA"), (1, "SA"), (3, "LA"), (3, "BE")])
def test_the_oracles_take_the_same_steps(k, which, momentum, dtype):
    options = {"k": k, "which": which, "momentum": momentum, "beta": 0.2}
    compiled = run(dtype, **options)
    with oracles():
        exact = run(dtype, **options)
    for ours, wanted in zip(compiled, exact, strict=True):
        size = float(wanted[wanted.isfinite()].abs().max())
        torch.testing.assert_close(
            ours.double(), wanted.double(), rtol=0, atol=CLOSE[dtype] * size, equal_nan=True
        )
