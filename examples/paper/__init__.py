"""The paper's experiments: models, data, schedules, training and plots.

Needs the packages of the extra ``examples``; each is imported where it is first needed.
A run is started by :func:`examples.paper.train.train`.
"""

from .config import TrainConfig
from .data import BatchLoader, Dataset, Split, load
from .models import MODELS, build
from .plots import plot_run

__all__ = [
    "MODELS",
    "BatchLoader",
    "Dataset",
    "Split",
    "TrainConfig",
    "build",
    "load",
    "plot_run",
]
