"""Whether a compiler that contracts would round the kernels otherwise than the CPU; needs no GPU.

The extension is built with -fmad=false. This compiles its CUDA sources with -fmad=true, and fails
where the PTX has a fused product on a line that doesn't ask for one: by fma(), or by a function of
CUDA's library, which has its own. Such a product has to be mul() or product().
"""

from __future__ import annotations

import argparse
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
#: What may be fused: the words of a source line.
ASKED = re.compile(r"\bfma\(|\b(?:log|exp|expm1)\(")


def fused(ptx: str) -> set[tuple[Path, int]]:
    """The (file, line) of every fused product, from the PTX of a build with -lineinfo."""
    files = {
        number: Path(name)
        for number, name in re.findall(r'^\s*\.file\s+(\d+) "([^"]+)"', ptx, re.MULTILINE)
    }
    found, at = set(), None
    for line in ptx.splitlines():
        if place := re.match(r"\s*\.loc\s+(\d+) (\d+)", line):
            at = files[place[1]], int(place[2])
        elif re.match(r"\s*fma\.r", line):
            found.add(at)
    return found


def unasked(places: Iterable[tuple[Path, int]]) -> list[str]:
    """Those of the places whose source doesn't ask for it: "file:line: text"."""
    lines = []
    for path, number in sorted(places):
        text = path.read_text().splitlines()[number - 1].strip()
        if not ASKED.search(text):
            lines.append(f"{path.name}:{number}: {text}")
    return lines


def places(source: Path, nvcc: str, host: str | None) -> set[tuple[Path, int]]:
    """Where nvcc fuses products when it may."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.ptx"
        command = [nvcc, "-std=c++17", "-arch=sm_90", "-fmad=true", "-lineinfo", "-ptx", "-x", "cu"]
        command += [f"-I{path}" for path in cpp_extension.include_paths()]
        command += [*cpp_extension.COMMON_NVCC_FLAGS, *(["-ccbin", host] if host else [])]
        done = subprocess.run(
            [*command, str(source), "-o", str(out)], capture_output=True, text=True
        )
        if done.returncode != 0:
            sys.exit(f"{done.stdout}{done.stderr}\nnvcc failed on {source}")
        return fused(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nvcc", default=shutil.which("nvcc"), help="default: that on PATH")
    parser.add_argument("--host-compiler", help="the C++ compiler that nvcc is to use")
    parser.add_argument("sources", nargs="*", type=Path, help="default: the extension's")
    options = parser.parse_args()
    if not options.nvcc:
        sys.exit("no nvcc on PATH: name one with --nvcc")
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    sources = options.sources or [ROOT / name for name in setup["sources"]("cuda")]
    with ThreadPoolExecutor() as pool:
        each = pool.map(lambda s: places(s, options.nvcc, options.host_compiler), sources)
        found = set().union(*each)
    if not found:
        sys.exit("no fused product at all: the PTX is not what this reads")
    lines = unasked(found)
    for line in lines:
        print(f"FAILED: contracted at {line}")
    print(f"{len(sources)} sources, {len(lines)} products that a compiler may fuse with a sum")
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
