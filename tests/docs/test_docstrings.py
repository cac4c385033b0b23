"""The examples in docstrings run, and every public function of the package has one."""

from __future__ import annotations

import doctest
import importlib
import os
import pkgutil

import pytest
import torch

import lyapcuda

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(lyapcuda.__path__, "lyapcuda.")
    if not module.name.endswith(("_C", "__main__"))
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:  # an integration's package: CI has them all
        if "lyapcuda[" not in str(error) or os.environ.get("LYAPCUDA_ALL_EXTRAS"):
            raise
        pytest.skip(str(error))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = doctest.testmod(module, extraglobs={"torch": torch, "lyapcuda": lyapcuda})
    assert found.failed == 0


@pytest.mark.parametrize(
    "name", ["CurvatureTracker", "HessianOperator", "LyapunovSGD", "CurvatureLog"]
)
def test_public_classes_show_an_example(name):
    assert any(test.examples for test in doctest.DocTestFinder().find(getattr(lyapcuda, name)))


@pytest.mark.parametrize(
    "name", ["eigsh", "trace", "spectral_density", "finite_scale", "split_batch"]
)
def test_public_functions_show_an_example(name):
    assert ">>>" in getattr(lyapcuda, name).__doc__
