"""Builds lyapcuda._C from csrc/sources.txt (metadata is in pyproject.toml).

LYAPCUDA_CUDA=auto|0|1 chooses the CUDA backend: auto builds it when this torch has CUDA, nvcc is
found and csrc/sources.txt lists CUDA sources; 1 fails loudly when it can't be built.
"""

import os
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

ROOT = Path(__file__).parent
# The stable ABI of the oldest torch served: one build runs on every later one.
TORCH_TARGET_VERSION = "0x020b000000000000"
# No contraction: every instruction set must round alike. psabi: the notes are about GCC 4.
CXX_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-Wall", "-Wno-psabi", "-fvisibility=hidden"]
# The kernels say themselves which products may be contracted (csrc/kernels/vec.cuh).
NVCC_FLAGS = ["-std=c++17", "-O3", "-Werror", "all-warnings", "-Xcompiler", "-fvisibility=hidden"]
CUDA_ARCHITECTURES = "8.0;9.0+PTX"


def sources(section: str) -> list[str]:
    """The sources of one [section] of csrc/sources.txt."""
    found, current = [], None
    for line in (ROOT / "csrc" / "sources.txt").read_text().splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("["):
            current = line.strip("[]")
        elif line and current == section:
            found.append(f"csrc/{line}")
    return found


def headers() -> list[str]:
    """What a change of must rebuild, beside the sources."""
    suffixes = {".h", ".inc", ".cuh"}
    found = (path for path in (ROOT / "csrc").rglob("*") if path.suffix in suffixes)
    return sorted(str(path.relative_to(ROOT)) for path in found)


def with_cuda() -> bool:
    """Whether to build the CUDA backend. Never asks for a GPU: builders have none."""
    wanted = os.environ.get("LYAPCUDA_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"lyapcuda: LYAPCUDA_CUDA={wanted!r}: expected auto, 0 or 1")
    missing = None
    if not sources("cuda"):
        missing = "this version has no CUDA sources yet (csrc/sources.txt, [cuda])"
    elif torch.version.cuda is None:
        missing = f"this torch ({torch.__version__}) is built without CUDA"
    elif cpp_extension.CUDA_HOME is None:
        missing = "nvcc was not found (set CUDA_HOME)"
    if wanted == "1" and missing:
        sys.exit(f"lyapcuda: LYAPCUDA_CUDA=1, but {missing}")
    return wanted != "0" and missing is None


def extension() -> cpp_extension.CppExtension:
    defines = [("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION), ("PY_SSIZE_T_CLEAN", None)]
    if not with_cuda():
        return cpp_extension.CppExtension(
            "lyapcuda._C",
            sources("cpu"),
            depends=headers(),
            define_macros=defines,
            extra_compile_args={"cxx": CXX_FLAGS},
        )
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
    return cpp_extension.CUDAExtension(
        "lyapcuda._C",
        sources("cpu") + sources("cuda"),
        depends=headers(),
        define_macros=[*defines, ("LYAPCUDA_WITH_CUDA", None)],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": cpp_extension.BuildExtension})
