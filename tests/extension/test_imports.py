"""What importing the package imports, how long it takes beside torch, and what is missing says."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import lyapcuda
from import_cost import IMPORTS
from lyapcuda.extras import EXTRAS

ROOT = Path(__file__).parents[2]


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.fixture(scope="module")
def imports() -> tuple[float, float, int, list[str]]:
    return json.loads(python(IMPORTS).stdout)


def test_nothing_optional_is_imported_before_it_is_used(imports):
    """Not matplotlib, scipy, pandas, tensorboard, lightning, ..., whatever is installed."""
    assert imports[3] == ["lyapcuda"]


def test_the_import_takes_a_fraction_of_torchs_own(imports):
    """bench/import_time.py measures it."""
    of_torch, over = imports[:2]
    assert over < max(of_torch / 2, 0.3)


def test_the_version_is_that_of_the_installed_package():
    try:
        installed = metadata.version("lyapcuda")
    except metadata.PackageNotFoundError:
        installed = "0+unknown"
    assert lyapcuda.__version__ == installed


def test_type_hints_are_shipped():
    folder = Path(lyapcuda.__file__).parent
    assert (folder / "py.typed").exists() and (folder / "_C.pyi").exists()


MODULES = ["lightning", "transformers", "accelerate", "wandb", "mlflow"]


@pytest.mark.parametrize("name", MODULES)
def test_an_integration_without_its_package_says_which_extra_to_install(name):
    code = f"import sys; sys.modules[{name!r}] = None; import lyapcuda.integrations.{name}"
    told = python(code)
    last = told.stderr.strip().splitlines()[-1]
    assert told.returncode == 1
    expected = f"lyapcuda.integrations.{name} needs {name}: pip install 'lyapcuda[{name}]'"
    assert last == f"ImportError: {expected}"


USES = {
    "scipy": "lyapcuda.HessianOperator(lambda: (p**2).sum(), [p]).to_scipy()",
    "tqdm": "lyapcuda.eigsh(lambda: (p**2).sum(), [p], progress=True)",
    "tensorboard": "lyapcuda.TensorBoardWriter('folder')",
    "matplotlib": "lyapcuda.spectral_density(lambda: (p**2).sum(), [p]).plot()",
}


@pytest.mark.parametrize("name", USES)
def test_so_does_every_use_of_another_optional_package(name):
    code = f"import sys; sys.modules[{name!r}] = None; import torch, lyapcuda; "
    code += "p = torch.ones(3, requires_grad=True); " + USES[name]
    told = python(code)
    assert told.returncode == 1
    assert f"needs {name}: pip install 'lyapcuda[{EXTRAS[name]}]'" in told.stderr


def test_every_extra_that_is_named_exists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert set(EXTRAS.values()) <= project["project"]["optional-dependencies"].keys()
