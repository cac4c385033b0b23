"""Curvature of a neural network's loss while it trains, from first-order gradients alone."""

import torch  # noqa: F401  (its libraries are what lyapcuda._C links to)

from lyapcuda import lyapunov, ops
from lyapcuda.optim import LyapunovSGD
from lyapcuda.tracker import CurvatureTracker

__version__ = "0.1.0"

__all__ = ["CurvatureTracker", "LyapunovSGD", "lyapunov", "ops"]
