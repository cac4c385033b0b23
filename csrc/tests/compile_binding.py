"""Compiles the CUDA sources of the extension with nvcc to an object, warnings as errors.

No GPU is needed, nor a torch that has CUDA: its headers are the same. Linking and running are left
to setup.py on a machine that has both. All sources are one translation unit: torch's headers, which
nvcc reads three times over, are nine tenths of the work. That each has the headers it needs is seen
where g++ compiles them one by one, for the emulator (tests/simt_library.py).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from torch.utils.cpp_extension import include_paths

CSRC = Path(__file__).resolve().parents[1]
FLAGS = ["-std=c++17", "-arch=sm_90", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wno-psabi"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
#: What the device code becomes is check_ptx.py's business. From nvcc 12.9 on.
FAST = ["-Ofc", "max"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nvcc", default=shutil.which("nvcc"), help="default: that on PATH")
    parser.add_argument("--host-compiler", help="the C++ compiler that nvcc is to use")
    options = parser.parse_args()
    if not options.nvcc:
        sys.exit("no nvcc on PATH: name one with --nvcc")
    lines = [line.split("#")[0].strip() for line in (CSRC / "sources.txt").open()]
    sources = [CSRC / line for line in lines if line.endswith(".cu")]
    if not sources:
        sys.exit("csrc/sources.txt names no .cu")
    command = [options.nvcc, *FLAGS]
    known = subprocess.run([options.nvcc, "--help"], capture_output=True, text=True).stdout
    command += FAST if "--Ofast-compile" in known else []
    command += [flag for path in include_paths() for flag in ("-isystem", path)]
    if options.host_compiler:
        command += ["-ccbin", options.host_compiler]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        unit, target = Path(folder) / "binding.cu", Path(folder) / "binding.o"
        unit.write_text("".join(f'#include "{source}"\n' for source in sources))
        done = subprocess.run([*command, "-c", str(unit), "-o", str(target)])
        right = done.returncode == 0 and target.stat().st_size > 0
    state = f"{time.monotonic() - start:.0f} s" if right else "FAILED"
    print(f"{len(sources)} sources: {state}")
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
