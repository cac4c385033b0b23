r"""What nvcc makes of every CUDA kernel of the extension; no GPU is needed.

    python bench/kernel_counts.py [--json FILE] [--source ascent gram]
    python bench/kernel_counts.py --compare OLD.json NEW.json [--rename '^ascent<(.*)>$=step<\1>']

Compiles each source of the CUDA backend with setup.py's flags, to PTX and with ptxas -v, and counts
by kernel. Accesses are those of global memory; a copy straight to shared memory is a load. The
comparison matches kernels by their demangled names. A rename is a pattern of Python's re in the old
name and what takes its place; with @FILE there is one a line.
"""

from __future__ import annotations

import argparse
import json
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("90", "80")
#: The columns of a row, and their titles.
COUNTS = {
    "registers": "registers",
    "stack": "stack",
    "spill_stores": "spill st",
    "spill_loads": "spill ld",
    "shared": "shared",
    "instructions": "PTX",
    "loads_16": "ld 16 B",
    "stores_16": "st 16 B",
    "loads_8": "ld 8 B",
    "stores_8": "st 8 B",
    "loads": "ld all",
    "stores": "st all",
}
USAGE = re.compile(
    r"Compiling entry function '(\w+)' for 'sm_(\d+)'"
    r".*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers([^\n]*)",
    re.DOTALL,
)
ACCESS = re.compile(r"^\s*(?:@\S+\s+)?(ld|st)\.global(\S*)\s", re.MULTILINE)
TO_SHARED = re.compile(r"cp\.async\.c[ag]\.shared\.global\S*\s[^;]*?, (\d+)[,;]")

Row = dict[str, Any]


def compile_source(source: str, nvcc: str, flags: Sequence[str], arch: str) -> tuple[str, str]:
    """What ptxas says, and the PTX."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernels.cubin"
        command = [nvcc, *flags, f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin"]
        command += ["--keep", "--keep-dir", folder, "-o", str(out), "-x", "cu", str(ROOT / source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{done.stdout}{done.stderr}\nnvcc failed: {' '.join(command)}")
        (ptx,) = Path(folder).glob("*.ptx")
        return done.stdout + done.stderr, ptx.read_text()


def bodies(ptx: str) -> dict[str, str]:
    """The text of each kernel, from its brace to the one that closes it."""
    found = {}
    # A static kernel is not .visible.
    for entry in re.finditer(r"^(?:\.visible )?\.entry (\w+)\(", ptx, re.MULTILINE):
        start = ptx.index("\n{", entry.end())
        found[entry[1]] = ptx[start : ptx.index("\n}", start)]
    return found


def width(modifiers: str) -> int:
    """Bytes of an access, by what follows ld.global: `.nc.v4.f32`."""
    lanes, bits = re.search(r"\.v(\d)\b", modifiers), re.search(r"\.[bfsu](\d+)$", modifiers)
    return int(lanes[1] if lanes else 1) * int(bits[1]) // 8 if bits else 0


def counted(body: str) -> dict[str, int]:
    """Instructions and accesses in a kernel's text."""
    lines = (line.strip() for line in body.splitlines())
    instructions = sum(line.endswith(";") and not line.startswith(".") for line in lines)
    widths: dict[str, list[int]] = {"ld": [], "st": []}
    for word, modifiers in ACCESS.findall(body):
        widths[word].append(width(modifiers))
    widths["ld"] += map(int, TO_SHARED.findall(body))
    row = {"instructions": instructions}
    for word, name in (("ld", "loads"), ("st", "stores")):
        row[name] = len(widths[word])
        row[f"{name}_16"] = widths[word].count(16)
        row[f"{name}_8"] = widths[word].count(8)
    return row


def demangled(symbols: Iterable[str]) -> dict[str, str]:
    """Names with their template arguments, without our namespaces."""
    symbols = list(symbols)
    command = ["c++filt", "--no-params"]
    told = subprocess.run(
        command, input="\n".join(symbols), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    short = (re.sub(r"^void |lyapcuda::(\w+::)*|c10::|torch::\w+::", "", name) for name in told)
    return dict(zip(symbols, short, strict=True))


def rows_of(source: str, report: str, ptx: str) -> list[Row]:
    """A row a kernel of one source for one architecture."""
    texts, rows = bodies(ptx), []
    names = demangled(texts) if texts else {}
    for symbol, arch, stack, stores, loads, registers, rest in USAGE.findall(report):
        shared = re.search(r"(\d+) bytes smem", rest)
        row: Row = {"kernel": names[symbol], "arch": arch, "source": source}
        row |= {"registers": int(registers), "stack": int(stack)}
        row |= {"spill_stores": int(stores), "spill_loads": int(loads)}
        rows.append(row | {"shared": int(shared[1]) if shared else 0} | counted(texts[symbol]))
    if {row["kernel"] for row in rows} != set(names.values()):
        sys.exit(f"{source}: the kernels in ptxas' report are not those of the PTX")
    return rows


def measured(only: Sequence[str] | None, jobs: int) -> list[Row]:
    """The rows of all sources; of ``only`` those with these stems."""
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    home = setup["cuda_home"]()
    if home is None:
        sys.exit("kernel_counts: nvcc was not found: put it on PATH or set CUDA_HOME")
    flags = [f"-D{name}" + (f"={value}" if value else "") for name, value in setup["CUDA_DEFINES"]]
    flags += [f"-I{path}" for path in cpp_extension.include_paths()]
    flags += [*cpp_extension.COMMON_NVCC_FLAGS, *setup["NVCC_FLAGS"]]
    sources = [name for name in setup["sources"]("cuda") if not only or Path(name).stem in only]

    def work(task: tuple[str, str]) -> list[Row]:
        source, arch = task
        rows = rows_of(source, *compile_source(source, str(home / "bin" / "nvcc"), flags, arch))
        print(f"sm_{arch} {source}: {len(rows)} kernels", file=sys.stderr, flush=True)
        return rows

    tasks = [(source, arch) for arch in ARCHITECTURES for source in sources]
    with ThreadPoolExecutor(jobs) as pool:
        return [row for rows in pool.map(work, tasks) for row in rows]


def table(rows: Sequence[Row], arch: str) -> list[str]:
    """Lines of Markdown."""
    lines = [f"## sm_{arch}", "", "| kernel | " + " | ".join(COUNTS.values()) + " |"]
    lines.append("|---" * (len(COUNTS) + 1) + "|")
    for row in sorted(rows, key=lambda row: row["kernel"]):
        if row["arch"] == arch:
            values = (str(row[name]) for name in COUNTS)
            lines.append(f"| `{row['kernel']}` | " + " | ".join(values) + " |")
    return [*lines, ""]


def renamed(name: str, renames: Sequence[str]) -> str:
    for rule in renames:
        old, _, new = rule.partition("=")
        name = re.sub(old, new, name)
    return name


def distance(old: Row, new: Row) -> float:
    """How much a kernel changed: the largest of its relative changes; what is worse counts more."""
    changes = []
    for name in COUNTS:
        more = (new[name] - old[name]) / max(old[name], 1)
        worse = more if not name.endswith("_16") else -more  # wide accesses are what is wanted
        changes.append(1.5 * worse if worse > 0 else -worse)
    return max(changes)


def comparison(old: Sequence[Row], new: Sequence[Row], renames: Sequence[str]) -> list[str]:
    """Lines of Markdown: before → after, the largest changes first; what has no partner last."""
    lines: list[str] = []
    for arch in ARCHITECTURES:
        # The same kernel may be in two sources.
        before = {renamed(row["kernel"], renames): row for row in old if row["arch"] == arch}
        after = {row["kernel"]: row for row in new if row["arch"] == arch}
        both = sorted(
            before.keys() & after.keys(),
            key=lambda name: (-distance(before[name], after[name]), name),
        )
        same = [name for name in both if distance(before[name], after[name]) == 0]
        lines += [f"## sm_{arch}: {len(both)} kernels in both, {len(same)} of them unchanged", ""]
        lines += ["| kernel | " + " | ".join(COUNTS.values()) + " |"]
        lines += ["|---" * (len(COUNTS) + 1) + "|"]
        for name in both:
            if name in same:
                continue
            cells = []
            for count in COUNTS:
                a, b = before[name][count], after[name][count]
                cells.append(str(a) if a == b else f"{a} → {b}")
            lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
        for title, names in (
            ("Only before", before.keys() - after.keys()),
            ("Only after", after.keys() - before.keys()),
        ):
            lines += ["", f"{title} ({len(names)}): " + ", ".join(f"`{n}`" for n in sorted(names))]
        for title, rows in (("before", before), ("after", after)):
            totals = [f"{COUNTS[c]} {sum(row[c] for row in rows.values())}" for c in COUNTS]
            lines += ["", f"All {len(rows)} {title}: " + ", ".join(totals)]
        lines.append("")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], fromfile_prefix_chars="@")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here, too")
    parser.add_argument("--source", nargs="+", metavar="STEM", help="only these sources")
    parser.add_argument("--jobs", type=int, default=1, help="compilers at a time")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("OLD", "NEW"))
    parser.add_argument("--rename", nargs="+", default=[], metavar="OLD=NEW")
    options = parser.parse_args()
    if options.compare:
        old, new = (json.loads(path.read_text())["rows"] for path in options.compare)
        print("\n".join(comparison(old, new, options.rename)))
        return
    rows = measured(options.source, options.jobs)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=0) + "\n")
    for arch in ARCHITECTURES:
        print("\n".join(table(rows, arch)))


if __name__ == "__main__":
    main()
