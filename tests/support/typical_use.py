"""A user's program by the types that it sees: tests/docs/test_types.py checks and runs it.

mypy compares what each ``assert_type`` says with the package's hints; at run time it does nothing.
"""

from __future__ import annotations

from typing import assert_type

import torch
from torch import Tensor, nn

import lyapcuda

torch.manual_seed(0)
x, y = torch.randn(32, 3), torch.randn(32, 2)
model = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)


def closure() -> Tensor:
    return nn.functional.mse_loss(model(x), y)


def along_training() -> None:
    tracker = lyapcuda.CurvatureTracker(model.parameters(), optimizer=optimizer)
    assert_type(tracker, lyapcuda.CurvatureTracker)
    assert_type(tracker.backward(closure), Tensor)
    optimizer.step()
    assert_type(tracker.h, Tensor)
    assert_type(tracker.h_error, Tensor)
    assert_type(tracker.edge, Tensor)
    assert_type(tracker.history(), lyapcuda.CurvatureHistory)
    assert_type(lyapcuda.RateCap(optimizer, tracker), lyapcuda.RateCap)


def at_one_theta() -> None:
    operator = lyapcuda.HessianOperator(closure, model.parameters())
    assert_type(operator @ torch.randn(50), Tensor)
    result = lyapcuda.eigsh(operator, k=2, tol=1e-2)
    assert_type(result, lyapcuda.EigenResult)
    assert_type(result.eigenvalues, Tensor)
    assert_type(lyapcuda.eigsh(closure, model.parameters(), k=1), lyapcuda.EigenResult)
    assert_type(lyapcuda.trace(operator, samples=6), lyapcuda.TraceResult)
    assert_type(lyapcuda.trace(operator, samples=6).trace, float)
    density = lyapcuda.spectral_density(operator, draws=2, steps=5)
    assert_type(density, lyapcuda.SpectralDensity)
    assert_type(lyapcuda.finite_scale(operator, result), lyapcuda.FiniteScale)


def optimizers() -> None:
    optimizer.zero_grad()
    assert_type(lyapcuda.CDAT(optimizer).step(closure), Tensor)
    own = lyapcuda.LyapunovSGD(model.parameters())
    assert_type(own.step(closure), Tensor | None)
    found = lyapcuda.critical_sharpness(closure, optimizer)
    assert_type(found, lyapcuda.CriticalSharpness)
    assert_type(found.rate, float)


def mistakes() -> None:
    """Each is an error of mypy's: else its ``ignore`` would be an unused one."""
    operator = lyapcuda.HessianOperator(closure, model.parameters())
    lyapcuda.eigsh(operator, neighbours=3)  # type: ignore[call-overload]
    lyapcuda.eigsh(closure)  # type: ignore[call-overload]
    lyapcuda.CurvatureTracker(model.parameters(), every="two")  # type: ignore[arg-type]


if __name__ == "__main__":
    along_training()
    at_one_theta()
    optimizers()
