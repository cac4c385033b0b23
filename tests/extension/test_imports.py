"""What importing the package imports, and what an optional package that is missing says."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lyapcuda.extras import EXTRAS

#: Beside the extras: what takes long to import, or belongs to one of them.
HEAVY = (*EXTRAS, "pandas", "sklearn", "IPython", "lightning_fabric", "pytorch_lightning")


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_nothing_optional_is_imported_before_it_is_used():
    code = (
        f"import sys, lyapcuda, lyapcuda.__main__; print([m for m in {HEAVY} if m in sys.modules])"
    )
    assert python(code).stdout.strip() == "[]"


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
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))
    assert set(EXTRAS.values()) <= project["project"]["optional-dependencies"].keys()
