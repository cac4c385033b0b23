"""What a solver should have returned, and whether it did."""

from __future__ import annotations

import math

from torch import Tensor, cat

import lyapcuda


def wanted(eigenvalues: Tensor, k: int, which: str) -> Tensor:
    """The exact values in a result's or a tracker's order, from ascending ones."""
    down = eigenvalues.flip(0)
    if which == "LA":
        return down[:k]
    if which == "SA":
        return eigenvalues[:k]
    if which == "LM":
        return eigenvalues[eigenvalues.abs().argsort(descending=True)][:k]
    return cat([down[: (k + 1) // 2], down[len(down) - k // 2 :]])


def is_off(result: lyapcuda.EigenResult, i: int, exact: Tensor, times: float = 1.0) -> bool:
    """Whether value i isn't the i-th wanted one within the tolerance (``times`` it), or, where it
    counts as zero, within three times the differences' error.
    """
    value, right = result.eigenvalues[i], wanted(exact, len(result.eigenvalues), result.which)[i]
    slack = max(result.tol * abs(float(right)), 0.0)
    error = float(result.difference_errors[i])
    if abs(float(value)) <= 3.0 * error:
        slack = max(slack, 3.0 * error)
    # By magnitude −a and a are a tie.
    if result.which == "LM":
        nearest = float((exact - value).abs().min())
        return max(nearest, abs(float(value.abs() - right.abs()))) > times * slack
    return abs(float(value - right)) > times * slack


def growth_of_curvature(curvature: float, rate: float, *, momentum: float = 0.0) -> float:
    """The exponent λ of the map along an eigenvector: the inverse of
    `lyapcuda.lyapunov.curvature_of_growth`.

    With momentum, the larger of the two modes; complex modes grow by √m a step.
    """
    if momentum == 0.0:
        return math.log(abs(1.0 + rate * curvature))
    trace = 1.0 + momentum + rate * curvature
    discriminant = trace * trace - 4.0 * momentum
    if discriminant < 0.0:
        return 0.5 * math.log(momentum)
    return math.log((abs(trace) + math.sqrt(discriminant)) / 2.0)
