"""How the extension is built: what it links to, what the environment decides."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from lyapcuda import _C, extension, ops
from lyapcuda.params.collect import BACKENDS

ROOT = Path(__file__).parents[2]
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")


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


def test_no_setuptools_scm_is_said_in_one_line(tmp_path):
    """Without it setuptools would go on, with version 0.0.0."""
    hidden = "import importlib.util as u; old = u.find_spec\n"
    hidden += "u.find_spec = lambda name, *a: None if name == 'setuptools_scm' else old(name, *a)\n"
    (tmp_path / "sitecustomize.py").write_text(hidden)
    result = setup("--version", PYTHONPATH=str(tmp_path))
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert "setuptools-scm is not installed" in result.stderr


def toolkit(folder: Path, release: str) -> Path:
    """A CUDA toolkit whose nvcc only tells its version and its home."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    told = f"Cuda compilation tools, release {release}, V{release}.88"
    nvcc.write_text(f"#!/bin/sh\necho '{told}'\necho '#$ TOP={folder}/bin/..' >&2\n")
    nvcc.chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("release", "torch_cuda", "words"),
    [
        ("13.0", "13.0", None),
        ("13.1", "13.0", None),  # minor versions go together
        ("12.1", "12.8", None),
        ("12.8", "13.0", "is of CUDA 12.8, this torch of CUDA 13.0"),
        ("13.0", "12.8", "install a torch for CUDA 13.0"),
        ("11.8", "11.8", "too old: CUDA 12.1"),
        ("13.0", None, "built without CUDA"),
    ],
    ids=str,
)
def test_an_nvcc_that_cant_build_it_is_named(tmp_path, monkeypatch, release, torch_cuda, words):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    found = SETUP["missing_for_cuda"](toolkit(tmp_path, release), torch_cuda)
    assert (found is None) if words is None else (words in found and "\n" not in found)


def test_no_nvcc_and_an_empty_toolkit_are_told_apart(tmp_path):
    assert "nvcc was not found" in SETUP["missing_for_cuda"](None, "13.0")
    assert f"no nvcc in {tmp_path}/bin" in SETUP["missing_for_cuda"](tmp_path, "13.0")


def test_the_toolkit_is_that_of_the_nvcc_behind_a_wrapper(tmp_path, monkeypatch):
    real = toolkit(tmp_path / "cuda-13", "13.0")
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {real}/bin/nvcc "$@"\n')
    wrapper.chmod(0o755)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    assert SETUP["cuda_home"]() == real
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "named"))
    assert SETUP["cuda_home"]() == tmp_path / "named"


@pytest.mark.parametrize(
    ("architectures", "words"),
    [("8.0;9.0+PTX", None), ("Hopper", None), ("7.5;8.6", "7.5"), ("6.1 9.0", "6.1")],
)
def test_gpus_that_the_kernels_cant_serve_are_refused(architectures, words):
    found = SETUP["architecture_fault"](architectures)
    assert (found is None) if words is None else (words in found and "8.0" in found)


# --- an extension that can't be imported ---------------------------------------------------------

LOST = "{}: cannot open shared object file: No such file or directory"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ImportError(LOST.format("libcudart.so.13")), "built for CUDA 13"),
        (ImportError(LOST.format("libc10_cuda.so")), "built with CUDA, but this is torch"),
        (ImportError("_C.so: undefined symbol: torch_list_size"), "torch_list_size"),
        (ModuleNotFoundError("No module named 'lyapcuda._C'"), "isn't built here"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_why_the_extension_isnt_imported_is_one_line(error, words, tmp_path):
    told = extension.import_fault(error, tmp_path)
    assert words in told and "pip install" in told and "\n" not in told


def test_an_extension_for_another_python_is_named(tmp_path):
    (tmp_path / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    told = extension.import_fault(ImportError("cannot import name '_C' from 'lyapcuda'"), tmp_path)
    assert "_C.cpython-39-x86_64-linux-gnu.so, for another Python" in told


def test_another_fault_is_told_as_it_is(tmp_path):
    assert extension.import_fault(ImportError("no memory"), tmp_path) == "no memory"


def test_without_a_gpu_it_is_said_why(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert extension.gpus_here() == "none: this torch is built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def too_old() -> bool:
        warnings.warn(
            "CUDA initialization: The NVIDIA driver on your system is too old (found version "
            "11040). Please update your GPU driver by downloading it from the URL: http://x",
            stacklevel=2,
        )
        return False

    monkeypatch.setattr(torch.cuda, "is_available", too_old)
    told = "none: The NVIDIA driver on your system is too old (found version 11040)"
    assert extension.gpus_here() == told
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no NVIDIA driver or no GPU" in extension.gpus_here()


def test_what_is_said_of_a_gpu_without_code(tmp_path):
    """In full: what an op raises on one (csrc/tests/errors_test.cpp has the other errors)."""
    source, program = tmp_path / "say.cpp", tmp_path / "say"
    source.write_text(
        '#include "cuda/errors.h"\n#include <cstdio>\nusing namespace lyapcuda::cuda;\n'
        "int main() { std::puts(advice(kNoKernelImageForDevice, {12, 0}, "
        '"sm_80, sm_90", "13.0").c_str()); }\n'
    )
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, "-std=c++17", f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    told = subprocess.run([program], capture_output=True, text=True, check=True).stdout.strip()
    assert told == (
        "lyapcuda is built for sm_80, sm_90 and has no code for this GPU, sm_120: "
        "build it again with TORCH_CUDA_ARCH_LIST=12.0"
    )


# --- what was built ------------------------------------------------------------------------------


def test_every_source_is_built():
    built = {name for section in ("cpu", "cuda") for name in SETUP["sources"](section)}
    found = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "csrc").rglob("*.cpp")
        if not {"tests", "simt"} & set(path.parts)  # simt: the emulator, for tests alone
    }
    assert built == found


def test_every_op_is_compiled_for_both_backends_from_one_source():
    ops = [name for name in SETUP["sources"]("cpu") if name.startswith("csrc/ops/")]
    assert ops and set(ops) < set(SETUP["sources"]("cuda"))
    # torch takes .cu alone for CUDA: a stub that finds the source from wherever it is compiled.
    stub = ROOT / SETUP["as_cuda"](ops[0])
    included = re.fullmatch(r'#include "(.+)"\n', stub.read_text())
    assert stub.suffix == ".cu" and Path(included[1]) == (ROOT / ops[0]).resolve()


@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils' nm isn't here")
def test_only_the_stable_abi_of_torch_is_used():
    """No C++ symbol of torch: then one build serves every torch from 2.11 on."""
    command = ["nm", "--dynamic", "--undefined-only", "--demangle", _C.__file__]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "aoti_torch_library_def" in symbols  # the C shim: it is what we link to
    assert not re.findall(r"\b(?:c10|at|torch|caffe2)::\S+", symbols)
    assert ops.build_info()["torch_target_version"].startswith("0x020b")


def test_the_extension_is_one_for_every_python():
    """Compiled with Py_LIMITED_API, which hides all else: that of the tag, or of an older one."""
    assert Path(_C.__file__).name == "_C.abi3.so"
    asked = int(SETUP["PY_LIMITED_API"], 16) >> 16
    assert asked <= 0x0300 + int(SETUP["WHEEL_TAG"].removeprefix("cp3"))


def test_no_folder_of_the_machine_that_built_it_is_in_the_file():
    """A wheel would carry it to others. (Errors say the name of the source.)"""
    content = Path(_C.__file__).read_bytes()
    assert b"csrc/ops/gram.cpp" in content
    assert not re.findall(rb"[\w./-]*/csrc/ops/\w+\.cpp", content)


@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils' nm isn't here")
def test_nothing_private_of_python_is_used():
    command = ["nm", "--dynamic", "--undefined-only", _C.__file__]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    symbols = set(re.findall(r"\b_?Py\w+", told))
    # Of the stable ABI: what Py_DECREF, PyArg_ParseTuple and Py_BuildValue stand for.
    public = {"_Py_Dealloc", "_PyArg_ParseTuple_SizeT", "_Py_BuildValue_SizeT"}
    assert symbols and not {name for name in symbols if name.startswith("_Py")} - public


def test_a_build_in_place_supersedes_those_for_one_python(tmp_path):
    """Python would import them first, old as they are."""
    names = ["_C.abi3.so", "_C.cpython-311-x86_64-linux-gnu.so", "_C.cpython-313-darwin.so"]
    for name in names:
        (tmp_path / name).touch()
    assert [path.name for path in SETUP["superseded"](tmp_path)] == names[1:]


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
    assert {name.upper() for name in BACKENDS} == registered
    assert ops.build_info()["backend"] == ", ".join(BACKENDS)
