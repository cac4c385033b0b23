"""The CUDA backend where there is no GPU: csrc/cuda and csrc/kernels, built by g++ on the emulator
of csrc/simt as `torch.ops.lyapcuda_simt`, whose tensors are on the CPU.

    with simt_library.use("simt"):      # or "simt reverse", "cuda"
        ops.ascent_(...)

`Mirror` does the converse where there is a GPU: ops called with CPU tensors run on copies of their
memory on the device. So the same tests serve both, on the libraries that can be had or, where that
is set, on those that LYAPCUDA_TEST_LIBRARIES names (with commas between). As a pytest plugin
(``-p simt_library`` with ``LYAPCUDA_TEST_LIBRARY=cuda``, this folder on PYTHONPATH) it runs any
tests of the ops that way.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import re
import runpy
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import cpp_extension

from lyapcuda import ops

ROOT = Path(__file__).parents[2]
LIBRARIES = ("simt", "simt reverse", "cuda")
#: The emulator as a GPU is reached, over copies of memory: a rehearsal of what tests do on one.
COPIED = "simt copied"
FLAGS = ["-x", "c++", "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
FLAGS += ["-DLYAPCUDA_SIMT"]
#: Of the warps of a block, as csrc/simt/simt.h has them.
ORDERS = ("forward", "reverse", "reverse late")
#: Of the emulated device. A few, so that blocks take several chunks each.
PROCESSORS = 2
#: Tensors a launch, on the emulator and on a GPU.
SEGMENTS = int(
    re.search(r"kMaxSegments = (\d+);", (ROOT / "csrc/kernels/segments.cuh").read_text())[1]
)


# --- the emulated library ------------------------------------------------------------------------


def _fuses() -> bool:
    """Whether this processor has fused products: without them g++ calls a function for each."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return platform.machine() in ("aarch64", "arm64")
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and " fma " in cpuinfo.read_text()


def contraction_flags() -> list[str]:
    """Whether g++ may fuse a product with a sum, as nvcc would unless told not to.

    It may by default: what passes then doesn't hang on -fmad=false. LYAPCUDA_SIMT_CONTRACT=0 builds
    the library without.
    """
    wanted = os.environ.get("LYAPCUDA_SIMT_CONTRACT", "1")
    if wanted not in ("0", "1"):
        raise ValueError(f"LYAPCUDA_SIMT_CONTRACT={wanted!r}: expected 0 or 1")
    if wanted == "0" or not _fuses():
        return ["-ffp-contract=off"]
    fma = ["-mfma"] if platform.machine() in ("x86_64", "AMD64") else []
    return ["-ffp-contract=fast", "-DLYAPCUDA_CONTRACT", *fma]


def sanitizer_flags() -> list[str]:
    """Of the sanitizers that LYAPCUDA_SIMT_SANITIZE names, as in "address,undefined"."""
    names = os.environ.get("LYAPCUDA_SIMT_SANITIZE")
    if not names:
        return []
    checks = [f"-fsanitize={names}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    # Optimised, the kernels take longer to compile than they save when they run.
    return ["-DLYAPCUDA_FEW_TYPES", *checks, "-O0", "-g1"]


def _sources() -> list[Path]:
    """Those of the CUDA backend, the emulator, and its switches."""
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    own = [ROOT / "csrc/simt/simt.cpp", Path(__file__).with_name("simt_switches.cpp")]
    return [*own, *(ROOT / source for source in setup["sources"]("cuda"))]


def _digest(*parts: bytes | str) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part.encode() if isinstance(part, str) else part)
        whole.update(b"\0")
    return whole.hexdigest()[:20]


@functools.cache
def build() -> Path:
    """The library, from build/simt where these sources were built before."""
    folder = ROOT / "build" / "simt"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        # Processes that share the tests would all compile the same.
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _built(folder)


def _built(folder: Path) -> Path:
    compiler = os.environ.get("CXX", "c++")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    headers = sorted(p for p in (ROOT / "csrc").rglob("*.*") if p.suffix in (".h", ".cuh", ".inc"))
    texts = [path.read_bytes() for path in headers]
    flags = [*FLAGS, *contraction_flags(), *sanitizer_flags()]
    common = _digest(version.stdout, torch.__version__, torch.__file__, *flags, *texts)
    includes = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]

    def run(target: Path, command: Sequence[str | Path]) -> None:
        # What has the final name is whole, whenever the build was interrupted.
        unfinished = target.with_suffix(f".{os.getpid()}")
        done = subprocess.run(
            [compiler, *map(str, command), "-o", str(unfinished)], capture_output=True, text=True
        )
        if done.returncode != 0:
            raise RuntimeError(f"{target.stem} of the emulated library:\n{done.stderr}")
        unfinished.replace(target)

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}-{_digest(common, source.read_bytes())}.o"
        if not target.exists():
            run(target, [*flags, *includes, "-c", source])
        return target

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        objects = list(pool.map(compiled, _sources()))
    library = folder / f"lyapcuda_simt-{_digest(*(o.name for o in objects))}.so"
    if not library.exists():
        torch_libraries = cpp_extension.library_paths()
        paths = [f for path in torch_libraries for f in (f"-L{path}", f"-Wl,-rpath,{path}")]
        run(library, ["-shared", *sanitizer_flags(), *objects, *paths, "-ltorch_cpu"])
    return library


@functools.cache
def _loaded() -> ctypes.CDLL:
    path = str(build())
    torch.ops.load_library(path)
    return ctypes.CDLL(path)


def simt(order: str = "forward", processors: int = PROCESSORS) -> Any:
    """The emulated ops, with the warps of a block in that order from now on (`ORDERS`)."""
    _loaded().lyapcuda_simt_set(ORDERS.index(order), processors)
    return torch.ops.lyapcuda_simt


@contextmanager
def emulated(order: str = "forward", processors: int = PROCESSORS) -> Iterator[None]:
    """Inside, the ops of `lyapcuda.ops` are the emulated ones, on such a device."""
    with _library(simt(order, processors)):
        yield
    simt()


@contextmanager
def without_barrier(launch: int, barrier: int) -> Iterator[None]:
    """Inside, that launch of the emulator, from 0, does without its barrier of that number."""
    _loaded().lyapcuda_simt_missing(launch, barrier)
    try:
        yield
    finally:
        _loaded().lyapcuda_simt_missing(-1, 0)


@contextmanager
def last_blocks(count: int) -> Iterator[None]:
    """Inside, the emulator runs only so many blocks of every launch, its last ones."""
    _loaded().lyapcuda_simt_last_blocks(count)
    try:
        yield
    finally:
        _loaded().lyapcuda_simt_last_blocks(0)


# --- CPU tensors on a GPU ------------------------------------------------------------------------


class Mirror:
    """Ops of a namespace that take CPU tensors, run on another device and write back.

    Whole storages are copied, so views stay views: what shares memory, overlaps or stands off
    alignment does so there too.
    """

    def __init__(self, namespace: Any, device: str) -> None:
        self._namespace, self._device = namespace, torch.device(device)

    def __getattr__(self, name: str) -> Any:
        return functools.partial(self._call, getattr(self._namespace, name))

    def _call(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        storages: dict[int, tuple[Tensor, Tensor]] = {}  # by address: bytes here, bytes there

        def there(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return [there(item) for item in value]
            if not isinstance(value, Tensor) or value.device.type != "cpu":
                return value
            storage = value.untyped_storage()
            if storage.data_ptr() not in storages:
                here = torch.empty(0, dtype=torch.uint8).set_(storage)
                storages[storage.data_ptr()] = here, here.to(self._device, copy=True)
            base = storages[storage.data_ptr()][1].untyped_storage()
            moved = torch.empty(0, dtype=value.dtype, device=self._device)
            return moved.set_(base, value.storage_offset(), value.size(), value.stride())

        arguments = [there(value) for value in args]
        options = {name: there(value) for name, value in kwargs.items()}
        result = op(*arguments, **options)
        for here, elsewhere in storages.values():
            here.copy_(elsewhere)
        return result.cpu() if isinstance(result, Tensor) else result


# --- choosing ------------------------------------------------------------------------------------


def missing(name: str) -> str | None:
    """Why a library can't be had here; None where it can."""
    if name == "cuda" and "cuda" not in str(ops.build_info()["backend"]):
        return "lyapcuda is built without CUDA here: the emulator alone runs the CUDA backend"
    if name == "cuda" and not torch.cuda.is_available():
        return "no GPU here: the emulator alone runs the CUDA backend"
    return None


def library(name: str) -> Any:
    """One of `LIBRARIES`, taking CPU tensors."""
    if name == "cuda":
        return Mirror(torch.ops.lyapcuda, "cuda")
    if name == COPIED:
        return Mirror(simt(), "cpu")
    return simt("reverse" if name == "simt reverse" else "forward")


def chosen(variable: str) -> list[str] | None:
    """The libraries that an environment variable names; None where it isn't set.

    Raises:
        ValueError: one that there isn't.
        RuntimeError: one that can't be had here.
    """
    if variable not in os.environ:
        return None
    names = [name.strip() for name in os.environ[variable].split(",")]
    for name in names:
        if name not in (*LIBRARIES, COPIED):
            known = ", ".join((*LIBRARIES, COPIED))
            raise ValueError(f"{variable}: {name!r}: expected one of {known}")
        if reason := missing(name):
            raise RuntimeError(f"{variable}: {name}: {reason}")
    return names


#: Those that the tests of the binding run on: as LYAPCUDA_TEST_LIBRARIES names them, else those of
#: `LIBRARIES` that can be had here.
HERE = chosen("LYAPCUDA_TEST_LIBRARIES")
if HERE is None:
    HERE = [name for name in LIBRARIES if not missing(name)]


@contextmanager
def _library(namespace: Any) -> Iterator[None]:
    before, ops.library.namespace = ops.library.namespace, namespace
    try:
        yield
    finally:
        ops.library.namespace = before


def use(name: str) -> AbstractContextManager[None]:
    """Inside, the ops of `lyapcuda.ops` are those of that library."""
    return _library(library(name))


def cpu() -> AbstractContextManager[None]:
    """Inside, they call the CPU backend again."""
    return _library(torch.ops.lyapcuda)


def pytest_configure(config: Any) -> None:
    for name in chosen("LYAPCUDA_TEST_LIBRARY") or ():
        ops.library.namespace = library(name)


if __name__ == "__main__":  # scripts/test.sh: compiling takes longer than a test may
    build()
