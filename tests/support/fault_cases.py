"""What the tests of faults share: losses of known curvature, and all that must stay as it was."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lyapcuda


def curvatures(k: int, n: int = 6) -> list[float]:
    """Descending, n of them: the first k so far from the rest that a dozen steps find them."""
    return [5.0 - 0.5 * i for i in range(k)] + [0.2, 0.1, 0.0, -0.1, -0.2][: n - k]


def bowl(
    h: int | Iterable[float] = 1, dtype: torch.dtype = torch.float64
) -> tuple[nn.Parameter, Callable[[], Tensor]]:
    """θ and ½·Σ h_i·θ_i², whose Hessian is diagonal; h: the curvatures, or for how many of them."""
    h = torch.tensor(curvatures(h) if isinstance(h, int) else list(h), dtype=dtype)
    theta = nn.Parameter(torch.ones_like(h))
    return theta, lambda: 0.5 * (h * theta * theta).sum()


def found(tracker: lyapcuda.CurvatureTracker) -> list[float]:
    return tracker.h.reshape(-1).tolist()


def steps(tracker: lyapcuda.CurvatureTracker, closure: Callable[[], Any], count: int) -> None:
    for _ in range(count):
        tracker.step(closure)


def bits(value: Any) -> Any:
    """Something to compare for equality to the bit: tensors and floats in containers become text or
    bytes (a NaN equals itself then).
    """
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        return str(value.dtype), tuple(value.shape), flat.view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [bits(item) for item in value]
    return value


def state_of(tracker: lyapcuda.CurvatureTracker) -> Any:
    return bits(tracker.state_dict())


def surroundings(parameters: Iterable[Tensor], modules: Iterable[nn.Module] = ()) -> Any:
    """Everything of the user's that a measurement must leave alone, to the bit."""
    parameters = list(parameters)
    buffers = [b for module in modules for b in module.buffers()]
    state = np.random.get_state()
    return (
        bits([*parameters, *buffers]),
        [p.data_ptr() for p in parameters],
        bits([p.grad for p in parameters]),
        bits(torch.get_rng_state()),
        random.getstate(),
        (state[0], state[1].tobytes(), *state[2:]),
    )
