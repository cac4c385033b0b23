"""Builds lyapcuda._C from csrc/ (metadata is in pyproject.toml).

LYAPCUDA_CUDA=auto|0|1 chooses the CUDA backend: auto builds it when this torch has CUDA and a right
nvcc is found; 1 fails loudly when it can't be built. TORCH_CUDA_ARCH_LIST chooses the GPUs.

scripts/build_cuda.py takes the flags and lists from here.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    sys.exit(
        "lyapcuda: torch is not installed here. Install torch (2.11 to 2.15) first, then build "
        "with `pip install --no-build-isolation .`"
    )

if importlib.util.find_spec("setuptools_scm") is None:  # setuptools would call it 0.0.0
    sys.exit(
        "lyapcuda: setuptools-scm is not installed here. It tells the version: "
        "`pip install setuptools setuptools-scm ninja` first"
    )

ROOT = Path(__file__).parent
# The stable ABI of the oldest torch served: one build runs on every later one.
TORCH_TARGET_VERSION = "0x020b000000000000"
# Python's limited API, which torch's builders define: one build runs on every Python from 3.11 on.
PY_LIMITED_API = cpp_extension.min_supported_cpython
WHEEL_TAG = "cp311"
# No contraction: every instruction set must round alike. psabi: the notes are about GCC 4.
CXX_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-Wall", "-Wno-psabi", "-fvisibility=hidden"]
# The names of sources, which errors say, without the folders of the machine that builds.
_FOLDERS = (ROOT.resolve(), Path(torch.__file__).absolute().parents[1])
CXX_FLAGS += [f"-ffile-prefix-map={folder}/=" for folder in _FOLDERS]
# No contraction here either, or the device would round otherwise than the CPU: what is to be fused
# says fma() (csrc/kernels/vec.cuh).
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Werror", "all-warnings"]
NVCC_FLAGS += ["-Xcompiler", "-fvisibility=hidden"]
# Where no GPU is seen and TORCH_CUDA_ARCH_LIST isn't set.
CUDA_ARCHITECTURES = "8.0;9.0+PTX"
# The sums use tensor cores in float64; tables of segments need kernel arguments beyond 4 KB.
LEAST_ARCHITECTURE = (8, 0)
LEAST_NVCC = (12, 1)


def sources(section: str) -> list[str]:
    """The sources of a backend, "cpu" or "cuda". Those of csrc/ops are compiled for both."""
    ops = sorted(f"csrc/ops/{path.name}" for path in (ROOT / "csrc" / "ops").glob("*.cpp"))
    own = {"cpu": ["csrc/module.cpp", "csrc/cpu/targets.cpp"], "cuda": ["csrc/cuda/build.cpp"]}
    return own[section] + ops


def as_cuda(source: str) -> str:
    """A file beside the build that is the source by a name that torch compiles with nvcc."""
    stub = ROOT / "build" / "cuda_sources" / Path(source).with_suffix(".cu").name
    stub.parent.mkdir(parents=True, exist_ok=True)
    text = f'#include "{(ROOT / source).resolve()}"\n'
    if not stub.exists() or stub.read_text() != text:
        stub.write_text(text)
    return str(stub.relative_to(ROOT))


def headers() -> list[str]:
    """What a change of must rebuild, beside the sources."""
    suffixes = {".h", ".inc", ".cuh"}
    found = (path for path in (ROOT / "csrc").rglob("*") if path.suffix in suffixes)
    # The CUDA sources are behind stubs.
    return sorted(str(path.relative_to(ROOT)) for path in found) + sources("cuda")


def cuda_home() -> Path | None:
    """The CUDA toolkit: CUDA_HOME, CUDA_PATH, or what the nvcc on PATH calls its home.

    Not the folder above nvcc's, as torch takes it: the nvcc on PATH may be a wrapper.
    """
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        return Path(named)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        usual = Path("/usr/local/cuda")
        return usual if (usual / "bin" / "nvcc").exists() else None
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", dry.stdout + dry.stderr, re.MULTILINE)
    return Path(top[1].strip()).resolve() if top else Path(nvcc).resolve().parents[1]


def nvcc_version(home: Path) -> tuple[int, int] | None:
    """(major, minor) of a toolkit's nvcc, None where there is none that runs."""
    try:
        told = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True)
    except OSError:
        return None
    release = re.search(r"release (\d+)\.(\d+)", told.stdout)
    return (int(release[1]), int(release[2])) if release else None


def architecture_fault(architectures: str) -> str | None:
    """What is wrong with a TORCH_CUDA_ARCH_LIST, in words; None if nothing is."""
    for name in architectures.replace(" ", ";").split(";"):
        number = re.match(r"(\d+)\.(\d)", name)  # else a name of torch's, as in Hopper
        if number and (int(number[1]), int(number[2])) < LEAST_ARCHITECTURE:
            return (
                f"TORCH_CUDA_ARCH_LIST={architectures!r} names {name}: the kernels need GPUs of "
                "compute capability 8.0 (A100) or newer"
            )
    return None


def missing_for_cuda(home: Path | None, torch_cuda: str | None) -> str | None:
    """Why the CUDA backend can't be built; None where it can.

    Args:
        home: the toolkit's folder, None where none was found.
        torch_cuda: the CUDA that torch was built with, as in "13.0"; None for a torch without.
    """
    if torch_cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA: install one that has it"
    if home is None:
        return "nvcc was not found: put it on PATH or set CUDA_HOME to the CUDA toolkit's folder"
    version = nvcc_version(home)
    if version is None:
        return f"there is no nvcc in {home}/bin: set CUDA_HOME to a CUDA toolkit's folder"
    found = ".".join(map(str, version))
    if version < LEAST_NVCC:
        return f"nvcc {found} in {home} is too old: CUDA 12.1 or newer is needed"
    if version[0] != int(torch_cuda.split(".")[0]):
        return (
            f"nvcc in {home} is of CUDA {found}, this torch of CUDA {torch_cuda}: set CUDA_HOME to "
            f"a toolkit of CUDA {torch_cuda.split('.')[0]}, or install a torch for CUDA {found}"
        )
    return architecture_fault(os.environ.get("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES))


def with_cuda(home: Path | None) -> bool:
    """Whether to build the CUDA backend. Never asks for a GPU: builders have none."""
    wanted = os.environ.get("LYAPCUDA_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"lyapcuda: LYAPCUDA_CUDA={wanted!r}: expected auto, 0 or 1")
    missing = None if wanted == "0" else missing_for_cuda(home, torch.version.cuda)
    if wanted == "1" and missing:
        sys.exit(f"lyapcuda: LYAPCUDA_CUDA=1, but {missing}")
    if missing and torch.version.cuda is not None:
        print(f"lyapcuda: building without CUDA: {missing}", file=sys.stderr)
    return wanted != "0" and missing is None


DEFINES = [("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION), ("PY_SSIZE_T_CLEAN", None)]
CUDA_DEFINES = [*DEFINES, ("LYAPCUDA_WITH_CUDA", None)]


def extension() -> cpp_extension.CppExtension:
    home = cuda_home()
    if not with_cuda(home):
        return cpp_extension.CppExtension(
            "lyapcuda._C",
            sources("cpu"),
            depends=headers(),
            define_macros=DEFINES,
            extra_compile_args={"cxx": CXX_FLAGS},
            py_limited_api=True,
        )
    cpp_extension.CUDA_HOME = str(home)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
    return cpp_extension.CUDAExtension(
        "lyapcuda._C",
        sources("cpu") + [as_cuda(source) for source in sources("cuda")],
        depends=headers(),
        define_macros=CUDA_DEFINES,
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        py_limited_api=True,
    )


class BuildExtension(cpp_extension.BuildExtension):
    """torch's, which leaves no other build of the extension beside the one that it makes."""

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        for path in superseded(ROOT / "lyapcuda"):
            path.unlink()


def superseded(folder: Path) -> list[Path]:
    """Builds for one Python, as earlier versions made them: Python would import them first."""
    return sorted(folder.glob("_C.cpython-*.so"))


if __name__ == "__main__":
    setup(
        ext_modules=[extension()],
        cmdclass={"build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": WHEEL_TAG}},
    )
