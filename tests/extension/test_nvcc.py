"""What is checked of the CUDA sources without a GPU, on sources with a fault of each kind."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import build_cuda  # noqa: E402

SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
HOME = SETUP["cuda_home"]()
pytestmark = pytest.mark.skipif(HOME is None or shutil.which("nm") is None, reason="no nvcc here")

KERNEL = "__global__ void twice(double* x) { x[0] *= 2; }\n"
LAUNCH = "void launch_%s(double* x) { twice<<<1, 1>>>(x); }\n"


def linked(folder: Path, texts: dict[str, str]) -> tuple[bool, Path]:
    """Builds .cu files of these texts as build_cuda builds the extension's."""
    for name, text in texts.items():
        (folder / f"{name}.cu").write_text(text)
    sources = {"cpu": [], "cuda": [str(folder / f"{name}.cu") for name in texts]}
    setup = {**SETUP, "sources": sources.__getitem__}
    target, out = build_cuda.Target.of(sys.executable), folder / "library.so"
    text = build_cuda.ninja_file(setup, target, HOME, "9.0", folder / "build", out)
    return build_cuda.compiled(text, folder / "build"), out


def test_a_kernel_that_two_sources_define_is_an_error_of_the_link(tmp_path, capfd):
    (tmp_path / "twice.cuh").write_text(KERNEL)
    both = {name: '#include "../twice.cuh"\n' + LAUNCH % name for name in "ab"}
    both = {name: text.replace("../", f"{tmp_path}/") for name, text in both.items()}
    right, out = linked(tmp_path, both)
    assert not right and not out.exists()
    printed = capfd.readouterr()
    assert "multiple definition" in printed.out + printed.err and "twice" in printed.out


def test_a_static_one_links(tmp_path):
    (tmp_path / "twice.cuh").write_text("static " + KERNEL)
    include = f'#include "{tmp_path}/twice.cuh"\n'
    right, out = linked(tmp_path, {name: include + LAUNCH % name for name in "ab"})
    assert right and build_cuda.undefined(out) == []


def test_what_nothing_defines_is_found_though_a_library_may_lack_it(tmp_path):
    text = "namespace lyapcuda { void nowhere(); void here() { nowhere(); } }\n"
    right, out = linked(tmp_path, {"a": text})
    assert right and any("lyapcuda::nowhere()" in line for line in build_cuda.undefined(out))


def test_a_product_that_may_be_fused_is_named_with_its_line(tmp_path):
    asked = "__global__ void %s(double* x) {\n  x[0] = fma(x[1], x[2], x[3]);\n"
    texts = {
        "wrong": asked % "f" + "  x[4] = x[5] * x[6] + x[7];\n}\n",
        "right": asked % "g" + "  x[4] = __dmul_rn(x[5], x[6]) + x[7];\n}\n",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.cu").write_text(text)
    command = [sys.executable, str(ROOT / "csrc" / "tests" / "check_kernels.py")]
    command += [str(tmp_path / f"{name}.cu") for name in texts]
    command += ["--nvcc", str(HOME / "bin" / "nvcc"), "--arch", "90"]
    result = subprocess.run(command, capture_output=True, text=True)
    # (A kernel without a design is a fault, too.)
    assert result.returncode == 1 and "3 faults" in result.stdout
    assert "FAILED: contracted at wrong.cu:3: x[4] = x[5] * x[6] + x[7];" in result.stdout
    assert "wrong.cu:2" not in result.stdout and "right.cu" not in result.stdout


def test_the_extension_is_built_without_contraction():
    assert "-fmad=false" in SETUP["NVCC_FLAGS"] and "-ffp-contract=off" in SETUP["CXX_FLAGS"]
    assert not any("fast-math" in flag for flag in SETUP["NVCC_FLAGS"] + SETUP["CXX_FLAGS"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--python", "no-such-python"], "no-such-python"),
        (["--arch", "7.5"], "names 7.5"),
        (["--arch", "99.9"], "99.9"),
    ],
    ids=str,
)
def test_what_cant_be_built_is_one_line(arguments, words):
    command = [sys.executable, str(ROOT / "scripts" / "build_cuda.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0
    assert words in result.stderr and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
