"""What nvcc makes of the kernels, held against what they were designed for; no GPU is needed.

    python csrc/tests/check_kernels.py --arch 80 90

Compiles every source of the CUDA backend as setup.py does, for these architectures with warnings as
errors, and fails on spills and stack frames, on registers and shared memory past the occupancy a
kernel was designed for, and where a kernel's PTX has fewer 16-byte loads and stores than it has
streams, or fewer products on the tensor cores than its sums are unrolled to. Products may be fused
with sums here, which the extension's build forbids: one that doesn't ask for it is an error, and
without any the code is the same. Then links all of them: what two define, or none, is an error.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import contraction
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]

THREADS = 256  # kThreads
REGISTERS_PER_SM = 65536  # on sm_80 and sm_90
SHARED_PER_BLOCK = 48 << 10  # what static shared memory may have
#: Of gram, by the rows of its tile: threads and blocks.
GRAM = {8: (256, 4), 16: (256, 4), 32: (256, 4), 64: (256, 2), 128: (512, 1), 256: (512, 1)}
#: Bytes of an element.
SIZE = {"float": 4, "double": 8, "BFloat16": 2, "Half": 2}


@dataclass
class Design:
    """What a kernel may use: blocks that fit a multiprocessor, shared memory, streams."""

    blocks: int
    shared: int
    loads: int = 0  # 16-byte accesses that the vectorised path needs
    stores: int = 0
    threads: int = THREADS
    products: int = 0

    @property
    def registers(self) -> int:
        # Registers are given out in units of 8 a thread; 255 is the most one can have.
        return min(REGISTERS_PER_SM // (self.blocks * self.threads) // 8 * 8, 255)


def tile_bytes(rows: int) -> int:
    """Of a row of a tile."""
    return next((2048 >> i for i, most in enumerate((8, 16, 64, 129)) if rows <= most), 128)


def slots(rows: int) -> int:
    """Tiles of a block."""
    return 2 if rows <= 33 else 1


def tiles(buffer: str, rows: int) -> int:
    """Bytes of a block's tiles of csrc/kernels/panel.cuh."""
    return slots(rows) * rows * (tile_bytes(rows) + 4 * SIZE[buffer])


def products(rows: int) -> int:
    """The fewest instructions of a sum in csrc/kernels/panel_gram.cuh, all its sizes together: on
    sm_90 13 of one triangle up to 32 rows, 6 + 8 of larger stacks."""
    return {8: 1, 16: 3}.get(rows, 13)


def design_of_panels(name: str, arguments: list[str]) -> Design | None:
    """Those that stage tiles in shared memory. What is copied there counts as a load, twice: for a
    block's first tile, and for the next one."""
    buffer = arguments[0] if arguments else ""
    rows = int(arguments[-1]) if arguments and arguments[-1].isdigit() else 0
    shared = tiles(buffer, rows) if rows else 0
    if name == "gram":
        threads, blocks = GRAM[rows]
        _, symmetric, weighted, _ = arguments
        blocks -= weighted == "true" and rows == 32
        loads = (2 if symmetric == "true" else 4) + (weighted == "true")
        return Design(blocks, shared, loads, 0, threads, products(rows))
    if name == "panel_ascent":
        _, storage, realised, momentum, metric, _ = arguments
        loads = 1 + (momentum == "true") + (metric == "true")  # q, p, S
        if storage == buffer:
            loads += 2 + (realised == "true")  # g1, g0, θ; 8 bytes of 16-bit storage
        large = rows > 64
        stores = 1 + (momentum == "true")
        plain = buffer == "float" and realised == momentum == metric == "false"
        blocks = (3 if rows <= 16 else 1 if large else 2) + (rows <= 32 and plain)
        row = tile_bytes(rows) // SIZE[buffer] * SIZE[storage]  # of g0; of θ, where it is read
        shared += slots(rows) * (row + (row if realised == "true" else 16))
        shared += slots(rows) * (tile_bytes(rows) if metric == "true" else 16)
        return Design(blocks, shared, 2 * loads, stores, 512 if large else 256, products(rows))
    if name in ("combine", "panel_recenter"):
        shared += rows * rows * SIZE[buffer] if rows <= 32 else 12288  # the matrix
    if name == "combine":
        return Design(4, shared, 2, 8)
    if name == "panel_recenter":
        _, storage, metric, _ = arguments
        same = storage == buffer  # else copies and θ go by 8 bytes
        shared += 2 * tile_bytes(rows) // SIZE[buffer] * SIZE[storage]  # of θ
        shared += 2 * (tile_bytes(rows) if metric == "true" else 16)
        blocks = 4 if same and not (metric == "true" and buffer == "double") else 3
        return Design(blocks, shared, 4 + 2 * (metric == "true"), 8 if same else 4)
    if name == "project":
        return Design(5 if rows <= 32 else 3, shared + (rows + 1) // 2 * 2 * 8, 2)
    return None


def design_of_elements(op: str, arguments: list[str]) -> Design:
    """Those of the elementwise driver, by the op; KeyError for one that nobody designed.

    A group of elements is 16 bytes of the lists' type; flat buffers take ``flat`` accesses for it.
    """
    buffer, storage = (arguments + arguments)[:2]
    flat = SIZE[buffer] // SIZE[storage]
    flags = [flag == "true" for flag in arguments[2:]]
    if op == "Ascent":
        realised, heavy, metric = flags
        rows = 2 + realised + heavy
        sums = rows * (rows + 1) // 2
        loads = flat + 2 + realised + (heavy + metric) * flat  # q, g0, g1, θ, p, S
        blocks = 3 if realised and heavy else 4
        return Design(blocks, THREADS // 32 * sums * 8, loads, flat + heavy * flat)
    if op == "Recenter":
        heavy, metric = (flag * flat for flag in flags)  # p, taken back; S
        return Design(5, 0, flat + 1 + heavy + metric, flat + 1 + heavy)  # q or d, θ
    if op == "Descend":
        heavy = flat if arguments[2] != "0" else 0  # the momentum's buffer
        return Design(5, 0, 2 + heavy, 1 + heavy)
    if op == "Displace":
        return Design(5, THREADS // 32 * 2 * 8, flat + 1, 1)
    if op == "Directional":
        return Design(5, THREADS // 32 * 3 * 8, flat + 2, 0)
    if op == "Difference":
        return Design(4, 0, 2 + flags[0] * flat, flat)
    return {"ReseedRow": Design(4, 0)}[op]  # a number at a time: nearly always it only returns


def design(name: str, arguments: list[str]) -> Design:
    """By a kernel's name and template arguments; KeyError for one that nobody designed."""
    if name == "elementwise":
        return design_of_elements(*parsed(arguments[0]))
    panels = design_of_panels(name, arguments)
    if panels:
        return panels
    if name in ("slopes", "newton_descend"):
        buffer, storage, momentum = arguments[:3]
        flat = SIZE[buffer] // SIZE[storage]
        if name == "slopes":
            return Design(4, tiles(buffer, int(arguments[3])), 2)
        heavy = flat if momentum != "0" else 0  # the momentum's buffer
        # θ, g, the buffer, a row of the panel.
        return Design(4, 32 * (8 + SIZE[buffer]), 2 + heavy + flat, 1)
    if name == "elementwise_finish":
        op, of = parsed(arguments[0])
        rows = 2 + of[2:].count("true")
        sums = {"DisplaceArguments": 2, "DirectionalArguments": 3}
        sums["AscentArguments"] = rows * (rows + 1) // 2
        return Design(4, THREADS // 32 * sums[op] * 8)
    scratch = 36032  # benettin_scratch(32)
    return {
        "gram_finish": Design(4, THREADS * 8),
        "project_finish": Design(4, THREADS * 8),
        "panel_ascent_check": Design(1, 0),  # one thread
        "benettin": Design(1, scratch),
        "benettin_refine": Design(1, scratch),
    }[name]


def parsed(name: str) -> tuple[str, list[str]]:
    """What stands before the brackets of a template, and its arguments."""
    head, _, rest = name.partition("<")
    parts, depth = [""], 0
    for letter in rest.removesuffix(">"):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    # As in (lyapcuda::Momentum)2 and 16.
    return head, [re.sub(r"^\(.*\)", "", part.strip()) for part in parts if part]


def demangled(symbols: Iterable[str]) -> dict[str, str]:
    """Names with their template arguments, without namespaces."""
    symbols = list(symbols)
    told = subprocess.run(
        ["c++filt", "--no-params"], input="\n".join(symbols), capture_output=True, text=True,
        check=True,
    ).stdout.splitlines()  # fmt: skip
    short = (re.sub(r"^void |\w+::", "", name) for name in told)
    return dict(zip(symbols, short, strict=True))


def flags_of(setup: dict[str, Any], host: str | None) -> list[str]:
    """nvcc's, as setup.py and torch have them, but with what `contraction` reads."""
    defines = [
        f"-D{name}" + (f"={value}" if value else "") for name, value in setup["CUDA_DEFINES"]
    ]
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    flags = [*defines, *includes, *cpp_extension.COMMON_NVCC_FLAGS, *setup["NVCC_FLAGS"]]
    flags[flags.index("-fmad=false")] = "-fmad=true"
    flags.remove("-O3")  # of the code on the host, which nothing here looks at
    return [*flags, "-lineinfo", "-Xcompiler", "-fPIC", *(["-ccbin", host] if host else [])]


def compile_source(
    source: Path, archs: Sequence[str], nvcc: str, flags: Sequence[str], folder: Path
) -> tuple[Path, str, dict[str, str]]:
    """The object, the compiler's report, and the PTX of each architecture."""
    out = folder / f"{source.stem}.o"
    command = [nvcc, *flags, "-x", "cu", "-c", str(source), "-o", str(out)]
    for arch in archs:
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    command += ["--keep", "--keep-dir", str(folder), "-Xptxas", "-v,-Werror"]
    done = subprocess.run(command, capture_output=True, text=True)
    report = done.stdout + done.stderr
    if done.returncode != 0:
        sys.exit(f"{report}\nnvcc failed: {' '.join(command)}")
    # One architecture's has no name but the source's.
    names = {arch: f".compute_{arch}" if len(archs) > 1 else "" for arch in archs}
    ptx = {a: (folder / f"{source.stem}{name}.ptx").read_text() for a, name in names.items()}
    return out, report, ptx


def link_faults(objects: Sequence[Path], compiler: str, folder: Path) -> list[str]:
    """What two of the objects define, or none."""
    out = folder / "library.so"
    command = [compiler, "-shared", *map(str, objects), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return [line for line in done.stderr.splitlines() if "multiple definition" in line] or [
            done.stderr
        ]
    command = ["nm", "--dynamic", "--undefined-only", "--demangle", str(out)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [f"undefined: {line.strip()}" for line in told.splitlines() if "lyapcuda" in line]


def entries(ptx: str) -> dict[str, str]:
    """The text of each kernel."""
    # A static kernel is not .visible.
    parts = re.split(r"^(?:\.visible )?\.entry (\w+)\(", ptx, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def usages(report: str) -> dict[tuple[str, str], dict[str, int]]:
    """(symbol, arch) → what ptxas says it uses."""
    found = {}
    pattern = (
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'"
        r".*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)"
    )
    for part in re.finditer(pattern, report, flags=re.DOTALL):
        shared = re.search(r"(\d+) bytes smem", part[7])
        found[part[1], part[2]] = {
            "stack": int(part[3]),
            "spilled": int(part[4]) + int(part[5]),
            "registers": int(part[6]),
            "shared": int(shared[1]) if shared else 0,
        }
    return found


def count_wide(text: str, word: str) -> int:
    """16-byte accesses of global memory: four of 32 bits or two of 64."""
    wide = r"(?:v4\.[fbus]32|v2\.[fbus]64)"
    return len(re.findall(rf"^\s*(?:@\S+\s+)?{word}\.global\S*\.{wide}\s", text, re.MULTILINE))


def faults_of(use: dict[str, int], wide: dict[str, int], planned: Design) -> list[str]:
    faults = []
    if use["spilled"] or use["stack"]:
        faults.append(f"spills {use['spilled']} bytes, stack frame of {use['stack']}")
    if use["registers"] > planned.registers:
        faults.append(f"registers past {planned.registers}, for {planned.blocks} blocks")
    if use["shared"] > planned.shared:
        faults.append(f"shared memory past {planned.shared} bytes")
    if planned.shared > SHARED_PER_BLOCK:
        faults.append(f"designed for more shared memory than {SHARED_PER_BLOCK} bytes")
    for word in ("loads", "stores"):
        if wide[word] < getattr(planned, word):
            faults.append(f"{wide[word]} 16-byte {word} instead of {getattr(planned, word)}")
    if wide["products"] < planned.products:
        faults.append(f"{wide['products']} mma.sync instead of {planned.products}")
    return faults


def check(report: str, ptx: dict[str, str]) -> int:
    """Prints a line a kernel; the number of faults."""
    used = usages(report)
    names = demangled({symbol for symbol, _ in used}) if used else {}
    failed = 0
    for arch in ptx:
        texts = entries(ptx[arch])
        if {symbol for symbol, at in used if at == arch} != set(texts):
            print(f"sm_{arch}: the kernels in nvcc's report are not those of the PTX")
            failed += 1
            continue
        for symbol, text in sorted(texts.items(), key=lambda item: names[item[0]]):
            title = names[symbol]
            use = used[symbol, arch]
            wide = {"loads": count_wide(text, "ld"), "stores": count_wide(text, "st")}
            wide["loads"] += len(re.findall(r"cp\.async\.cg\.shared\.global.*, 16", text))
            wide["products"] = text.count("mma.sync")
            try:
                planned = design(*parsed(title))
            except (KeyError, ValueError):
                print(f"{title}: has no design in {Path(__file__).name}")
                failed += 1
                continue
            print(
                f"{title:64} {arch} {use['registers']:5} {planned.registers:5} "
                f"{planned.blocks:7} {use['shared']:7} {use['spilled']:7}  "
                f"{wide['loads']}/{wide['stores']}"
            )
            faults = faults_of(use, wide, planned)
            for fault in faults:
                print(f"  FAILED: {fault}")
            failed += len(faults)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nvcc", default=shutil.which("nvcc"), help="default: that on PATH")
    parser.add_argument("--arch", nargs="+", default=["80", "90"], help="default: 80 90")
    parser.add_argument("--host-compiler", help="the C++ compiler that nvcc is to use")
    parser.add_argument("sources", nargs="*", type=Path, help="default: the extension's")
    options = parser.parse_args()
    if not options.nvcc:
        sys.exit("no nvcc on PATH: name one with --nvcc")
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    sources = options.sources or [ROOT / name for name in setup["sources"]("cuda")]
    flags, failed, objects = flags_of(setup, options.host_compiler), 0, []
    fused: set[contraction.Place] = set()
    print(f"{'kernel':64} sm  regs  most  blocks  shared  spills  16-byte ld/st")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:

        def work(source: Path) -> tuple[Path, str, dict[str, str]]:
            own = Path(folder) / source.stem
            own.mkdir()
            return compile_source(source, options.arch, options.nvcc, flags, own)

        for out, report, ptx in pool.map(work, sources):
            failed += check(report, ptx)
            fused |= contraction.fused(ptx[options.arch[-1]])
            objects.append(out)
        faults = link_faults(objects, options.host_compiler or "c++", Path(folder))
    faults += [f"contracted at {line}" for line in contraction.unasked(fused)]
    if not fused:
        faults.append("no fused product at all: the PTX is not what contraction.py reads")
    for fault in faults:
        print(f"FAILED: {fault}")
    failed += len(faults)
    print(f"{failed} faults")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
