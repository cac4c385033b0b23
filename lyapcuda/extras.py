"""Packages that only a part of lyapcuda needs: imported where they are first used, never before."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["EXTRAS", "require"]

#: Package → the extra of pyproject.toml that brings it.
EXTRAS = {
    "accelerate": "accelerate",
    "lightning": "lightning",
    "matplotlib": "plot",
    "mlflow": "mlflow",
    "safetensors": "transformers",
    "scipy": "scipy",
    "tensorboard": "tensorboard",
    "tqdm": "progress",
    "transformers": "transformers",
    "wandb": "wandb",
}


def require(module: str, what: str) -> ModuleType:
    """Imports a module of an optional package.

    Args:
        module: its dotted name, as in "matplotlib.pyplot".
        what: needs it, for the message: "plot()".

    Raises:
        ImportError: the package isn't installed; says which extra brings it.

    Example:
        >>> require("not_there.part", "this line")
        Traceback (most recent call last):
        ImportError: this line needs not_there: pip install not_there
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise  # the package is there, and lacks one of its own
        name = f"'lyapcuda[{EXTRAS[package]}]'" if package in EXTRAS else package
        raise ImportError(f"{what} needs {package}: pip install {name}") from error
