"""Problems for the tests of LyapunovSGD."""

from __future__ import annotations

import torch
from torch import nn

import lyapcuda


def quadratic(spectrum, start=1.0, dtype=torch.float64):
    """θ and the closure of ½·Σ h_i·θ_i²."""
    theta = nn.Parameter(torch.full((len(spectrum),), start, dtype=dtype))
    tensor = torch.tensor(spectrum, dtype=dtype)
    return theta, lambda: 0.5 * (tensor * theta.square()).sum()


def exact(params, *gain, **options):
    """An optimizer that knows h0 to many digits after its warm-up; of gain 1 without momentum."""
    if not gain and "lr" not in options:
        options = {"gain": 1.0, **options}
    options = {
        "ema": 0.0,
        "momentum": 0.0,
        "warmup_tol": 1e-10,
        "warmup_iterations": 300,
        **options,
    }
    return lyapcuda.LyapunovSGD(params, *gain, **options)
