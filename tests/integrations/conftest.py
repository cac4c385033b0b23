"""The packages that the integrations are tested with."""

from __future__ import annotations

import importlib.util
import os

import pytest

#: Set by CI, where every extra is installed: a package that is missing is a failure there.
ALL = "LYAPCUDA_ALL_EXTRAS"
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "LITNEXT_DISABLE_TELEMETRY": "1",
}


def pytest_ignore_collect(collection_path):
    """Leaves out the tests of a package that isn't installed; None leaves it to the others."""
    package = collection_path.stem.removeprefix("test_with_")
    if collection_path.stem == package or importlib.util.find_spec(package) is not None:
        return None
    if os.environ.get(ALL):
        pytest.exit(f"{ALL} is set, but {package} isn't installed", returncode=3)
    return True
