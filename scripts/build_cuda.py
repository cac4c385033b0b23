"""Builds lyapcuda._C with its CUDA backend: one stripped file, for every Python from 3.11 on.

    bash scripts/build_cuda.sh        # see there

The flags and sources are those of setup.py, which builds against a torch that has CUDA. Here
torch's headers suffice, and those of the CPU wheel are the same. The extension uses torch's C shims
alone, so that one file serves torch 2.11 to 2.15 of the same major version of CUDA, whichever torch
it was built with. Every source is compiled on its own and all are linked, so a kernel that two of
them define is an error here as it is there.
"""

from __future__ import annotations

import argparse
import os
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[1]
#: What torch's own CUDA build has beside its CPU build and the extension needs at run time.
CUDA_LIBRARIES = ("c10_cuda", "torch_cuda")
TORCH_LIBRARIES = ("c10", "torch", "torch_cpu")


@dataclass
class Target:
    """An interpreter whose headers the extension is built with: any from 3.11 on can import it."""

    python: str
    include: Path

    @classmethod
    def of(cls, python: str) -> Target:
        """Asks an interpreter; its headers have to be there, its torch need not."""
        code = "import sysconfig as s; print(s.get_path('include')); print(s.get_python_version())"
        try:
            told = subprocess.run([python, "-c", code], capture_output=True, text=True)
        except OSError as error:
            sys.exit(f"build_cuda: --python {python}: {error.strerror}")
        if told.returncode != 0:
            sys.exit(f"build_cuda: --python {python} does not run: {told.stderr.strip()[-300:]}")
        include, version = told.stdout.split("\n")[:2]
        if tuple(map(int, version.split("."))) < (3, 11):
            sys.exit(f"build_cuda: --python {python} is Python {version}: 3.11 or newer is needed")
        if not (Path(include) / "Python.h").exists():
            sys.exit(f"build_cuda: no Python.h in {include}: install the headers of {python}")
        return cls(python, Path(include))


def quoted(words: Sequence[Any]) -> str:
    """As one line of a ninja file, which runs it in a shell."""
    return " ".join(f"'{word}'" if set(str(word)) & set(" ;'()") else str(word) for word in words)


def architecture_flags(architectures: str) -> list[str]:
    """nvcc's flags for a list in the form of TORCH_CUDA_ARCH_LIST."""
    before = os.environ.get("TORCH_CUDA_ARCH_LIST")
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
    try:
        return cpp_extension._get_cuda_arch_flags()
    except ValueError as error:
        sys.exit(f"build_cuda: --arch {architectures}: {error}")
    finally:
        if before is None:
            del os.environ["TORCH_CUDA_ARCH_LIST"]
        else:
            os.environ["TORCH_CUDA_ARCH_LIST"] = before


def stub_libraries(folder: Path, compiler: str) -> Path:
    """Empty libraries that bear the names of torch's CUDA ones, to link to where those aren't.

    The extension then names them as needed, and finds torch's own, loaded by then, at run time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in CUDA_LIBRARIES:
        command = [compiler, "-shared", "-x", "c", os.devnull, f"-Wl,-soname,lib{name}.so"]
        subprocess.run([*command, "-o", str(folder / f"lib{name}.so")], check=True)
    return folder


def ninja_file(
    setup: dict[str, Any], target: Target, home: Path, architectures: str, folder: Path, out: Path
) -> str:
    """The text of build.ninja: an object a source, and the library of all of them."""
    # In full: the same compiler under two names would be another command, and all compiled anew.
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        sys.exit("build_cuda: no C++ compiler was found: install g++ or set CXX")
    torch_library = Path(cpp_extension.TORCH_LIB_PATH)
    own = (torch_library / "libtorch_cuda.so").exists()
    cuda_at = torch_library if own else stub_libraries(folder / "stubs", compiler)
    toolkit = home / "lib64" if (home / "lib64").exists() else home / "lib"

    defines = [
        f"-D{name}" + (f"={value}" if value else "") for name, value in setup["CUDA_DEFINES"]
    ]
    defines += ["-DTORCH_API_INCLUDE_EXTENSION_H", f"-DPy_LIMITED_API={setup['PY_LIMITED_API']}"]
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    common = [*defines, *includes, f"-I{target.include}"]
    nvcc = [*common, *cpp_extension.COMMON_NVCC_FLAGS, "-Xcompiler", "-fPIC", "-ccbin", compiler]
    nvcc += [*setup["NVCC_FLAGS"], *architecture_flags(architectures)]
    libraries = [f"-L{path}" for path in (torch_library, cuda_at, toolkit)]
    libraries += ["-Wl,--no-as-needed"]
    libraries += [f"-l{name}" for name in (*TORCH_LIBRARIES, *CUDA_LIBRARIES, "cudart")]
    lines = [
        "ninja_required_version = 1.3",
        "rule cxx",
        f"  command = {compiler} -MD -MF $out.d -c $in -o $out -fPIC "
        + quoted([*common, *setup["CXX_FLAGS"]]),
        "  depfile = $out.d",
        "  deps = gcc",
        "rule nvcc",
        f"  command = {home / 'bin' / 'nvcc'} -MD -MF $out.d -x cu -c $in -o $out " + quoted(nvcc),
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} -shared $in -o $out -s " + quoted(libraries),
    ]
    objects = []
    for section, rule in (("cpu", "cxx"), ("cuda", "nvcc")):
        for source in setup["sources"](section):
            objects.append(f"{section}/{source}.o")
            lines.append(f"build {section}/{source}.o: {rule} {ROOT / source}")
    lines += [f"build {out}: link {' '.join(objects)}", f"default {out}", ""]
    return "\n".join(lines)


def undefined(library: Path) -> list[str]:
    """Functions of our own that a linked library lacks, demangled."""
    command = ["nm", "--dynamic", "--undefined-only", "--demangle", str(library)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line.strip() for line in told.splitlines() if "lyapcuda" in line]


def imported(target: Target, library: Path) -> str:
    """A sentence on whether the interpreter imports the extension, where its torch has CUDA."""
    code = (
        "import importlib.util as u, sys, torch\n"
        "if torch.version.cuda is None: sys.exit(3)\n"
        "spec = u.spec_from_file_location('lyapcuda._C', sys.argv[1])\n"
        "module = u.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "print(torch.__version__, module.build_info()['backend'])"
    )
    told = subprocess.run(
        [target.python, "-c", code, str(library)], capture_output=True, text=True, cwd="/"
    )
    if told.returncode == 0:
        return f"imported beside torch {told.stdout.strip()}"
    if told.returncode == 3 or "No module named 'torch'" in told.stderr:
        return f"not imported here: {target.python} has no torch with CUDA"
    sys.exit(f"build_cuda: {library} does not import:\n{told.stderr.strip()[-1500:]}")


def compiled(text: str, folder: Path, jobs: int | None = None) -> bool:
    """Whether ninja built what a build.ninja of that text describes; its errors are printed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(text)
    ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if ninja is None:
        sys.exit("build_cuda: ninja was not found: pip install ninja")
    command = [ninja, "-C", str(folder), "--quiet", *(["-j", str(jobs)] if jobs else [])]
    return subprocess.run(command).returncode == 0


def main() -> None:
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--python",
        default=sys.executable,
        help="whose headers are taken, and which imports the file",
    )
    parser.add_argument(
        "--arch",
        default=os.environ.get("TORCH_CUDA_ARCH_LIST", setup["CUDA_ARCHITECTURES"]),
        help="GPUs, as in TORCH_CUDA_ARCH_LIST (default: that, else %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "lyapcuda", help="folder for the file")
    parser.add_argument("--jobs", type=int, default=int(os.environ.get("MAX_JOBS", 0)) or None)
    options = parser.parse_args()
    home = setup["cuda_home"]()
    # Which torch will load it isn't known here: that of the toolkit's own version can.
    version = ".".join(map(str, (home and setup["nvcc_version"](home)) or (0, 0)))
    missing = setup["missing_for_cuda"](home, version) or setup["architecture_fault"](options.arch)
    if missing:
        sys.exit(f"build_cuda: {missing}")
    target = Target.of(options.python)

    start = time.monotonic()
    out = options.out.resolve() / "_C.abi3.so"
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = ROOT / "build" / "cuda" / options.arch.replace(";", "_")
    text = ninja_file(setup, target, home, options.arch, folder, out)
    if not compiled(text, folder, options.jobs):
        sys.exit("build_cuda: the build failed: see the lines above")
    if lacking := undefined(out):
        out.unlink()
        sys.exit("build_cuda: nothing defines " + ", ".join(lacking))
    told = imported(target, out)
    size, took = out.stat().st_size / 1e6, time.monotonic() - start
    print(f"{out}: {size:.1f} MB, {took:.0f} s, nvcc {version}, {options.arch}; {told}")


if __name__ == "__main__":
    main()
