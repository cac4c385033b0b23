"""Compiles every CUDA source of the extension with nvcc to an object, warnings as errors.

No GPU is needed, nor a torch that has CUDA: its headers are the same. Linking and running are left
to setup.py on a machine that has both.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils.cpp_extension import include_paths

CSRC = Path(__file__).parents[1]
FLAGS = ["-std=c++17", "-arch=sm_90", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wno-psabi"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020b000000000000"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nvcc", default=shutil.which("nvcc"), help="default: that on PATH")
    parser.add_argument("--host-compiler", help="the C++ compiler that nvcc is to use")
    options = parser.parse_args()
    if not options.nvcc:
        sys.exit("no nvcc on PATH: name one with --nvcc")
    lines = [line.split("#")[0].strip() for line in (CSRC / "sources.txt").open()]
    sources = [CSRC / line for line in lines if line.endswith(".cu")]
    command = [options.nvcc, *FLAGS]
    command += [flag for path in include_paths() for flag in ("-isystem", path)]
    if options.host_compiler:
        command += ["-ccbin", options.host_compiler]

    def compiled(source: Path) -> bool:
        start = time.monotonic()
        target = Path(folder) / f"{source.stem}.o"
        done = subprocess.run(
            [*command, "-c", str(source), "-o", str(target)], capture_output=True, text=True
        )
        right = done.returncode == 0 and target.stat().st_size > 0
        state = f"{time.monotonic() - start:.0f} s" if right else "FAILED"
        print(f"{source.name:24} {state}\n{done.stdout}{done.stderr}".rstrip(), flush=True)
        return right

    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool,
    ):
        failed = list(pool.map(compiled, sources)).count(False)
    print(f"{len(sources)} sources, {failed} failed")
    sys.exit(1 if failed or not sources else 0)


if __name__ == "__main__":
    main()
