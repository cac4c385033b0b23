"""Curvature of a neural network's loss while it trains, from first-order gradients alone."""

from importlib.metadata import PackageNotFoundError, version

import lyapcuda.extension  # noqa: F401, I001  (first: it says why the others couldn't be imported)
from lyapcuda import ops
from lyapcuda.cdat import CDAT
from lyapcuda.critical_sharpness import CriticalSharpness, critical_sharpness
from lyapcuda.dynamics import lyapunov
from lyapcuda.history import CurvatureHistory
from lyapcuda.log import CsvWriter, CurvatureLog, JsonlWriter, TensorBoardWriter
from lyapcuda.objective.pointing import at_a_copy
from lyapcuda.objective.splitting import split_batch
from lyapcuda.optim import LyapunovSGD
from lyapcuda.params.ranks import RankError
from lyapcuda.rate_cap import RateCap
from lyapcuda.solvers.density import SpectralDensity, spectral_density
from lyapcuda.solvers.eigsh import eigsh
from lyapcuda.solvers.finite_scale import FiniteScale, finite_scale
from lyapcuda.solvers.gauss_newton import EmpiricalFisherOperator, GGNOperator
from lyapcuda.solvers.operator import HessianOperator
from lyapcuda.solvers.result import ConvergenceWarning, EigenResult
from lyapcuda.solvers.symmetric import SymmetricOperator
from lyapcuda.solvers.trace import TraceResult, trace
from lyapcuda.tracker import CurvatureTracker

try:
    __version__ = version("lyapcuda")
except PackageNotFoundError:  # imported from its sources' folder, not installed
    __version__ = "0+unknown"

__all__ = [
    "CDAT",
    "ConvergenceWarning",
    "CriticalSharpness",
    "CsvWriter",
    "CurvatureHistory",
    "CurvatureLog",
    "CurvatureTracker",
    "EigenResult",
    "EmpiricalFisherOperator",
    "FiniteScale",
    "GGNOperator",
    "HessianOperator",
    "JsonlWriter",
    "LyapunovSGD",
    "RankError",
    "RateCap",
    "SpectralDensity",
    "SymmetricOperator",
    "TensorBoardWriter",
    "TraceResult",
    "at_a_copy",
    "critical_sharpness",
    "eigsh",
    "finite_scale",
    "lyapunov",
    "ops",
    "spectral_density",
    "split_batch",
    "trace",
]
