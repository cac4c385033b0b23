"""How the extension is built: what it links to, what the environment decides."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lyapcuda import _C, ops, parameters

ROOT = Path(__file__).parents[1]


def setup(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_cuda_wanted_but_not_to_be_had_fails_in_one_clear_line():
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA: the build would go on")
    result = setup("--version", LYAPCUDA_CUDA="1")
    assert result.returncode != 0
    assert re.search(r"lyapcuda: LYAPCUDA_CUDA=1, but .+", result.stderr)
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("value", ["auto", "0"])
def test_without_cuda_the_cpu_backend_is_built(value):
    result = setup("--version", LYAPCUDA_CUDA=value)
    assert result.returncode == 0, result.stderr


def test_another_value_is_named():
    result = setup("--version", LYAPCUDA_CUDA="yes")
    assert result.returncode != 0 and "LYAPCUDA_CUDA='yes'" in result.stderr


def test_no_torch_is_said_in_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    result = setup("--version", PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert "torch is not installed" in result.stderr and "Traceback" not in result.stderr


def test_every_source_is_listed_once():
    lines = [line.split("#")[0].strip() for line in (ROOT / "csrc/sources.txt").open()]
    listed = [line for line in lines if line and not line.startswith("[")]
    found = {
        str(path.relative_to(ROOT / "csrc"))
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in (".cpp", ".cu")
        and not {"tests", "simt"} & set(path.parts)  # simt: the emulator, for tests alone
    }
    assert sorted(listed) == sorted(found)


@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils' nm isn't here")
def test_only_the_stable_abi_of_torch_is_used():
    """No C++ symbol of torch: then one build serves every torch from 2.11 on."""
    command = ["nm", "--dynamic", "--undefined-only", "--demangle", _C.__file__]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "aoti_torch_library_def" in symbols  # the C shim: it is what we link to
    assert not re.findall(r"\b(?:c10|at|torch|caffe2)::\S+", symbols)
    assert ops.build_info()["torch_target_version"].startswith("0x020b")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_only_torchs_own_openmp_is_loaded():
    """A second libgomp would make every call wait for its threads."""
    code = "import lyapcuda; print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(set(re.findall(r"\S*lib(?:g|i)omp\S*", maps.stdout))) <= 1


def test_build_info_says_what_runs():
    info = ops.build_info()
    assert info["backend"] in ("cpu", "cpu, cuda") and info["compiler"]
    assert info["simd"] in ("baseline", "avx2")
    assert info["threads"] == torch.get_num_threads()


def test_build_info_and_parameters_name_the_backends_that_have_ops():
    table = torch._C._dispatch_dump("lyapcuda::ascent_")
    registered = {key for key in ("CPU", "CUDA") if re.search(rf"^{key}: ", table, re.MULTILINE)}
    assert {name.upper() for name in parameters.BACKENDS} == registered
    assert ops.build_info()["backend"] == ", ".join(parameters.BACKENDS)
