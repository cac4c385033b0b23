"""Where a compiler that contracts would round the kernels otherwise than the CPU.

The extension is built with -fmad=false. In the PTX of a build with -fmad=true -lineinfo, a fused
product on a line that doesn't ask for one, by fma() or by a function of CUDA's library, which has
its own, has to become mul() or product().
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

Place = tuple[Path, int]
#: What may be fused: the words of a source line.
ASKED = re.compile(r"\bfma\(|\b(?:log|exp|expm1)\(")


def fused(ptx: str) -> set[Place]:
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


def unasked(places: Iterable[Place]) -> list[str]:
    """Those of the places whose source doesn't ask for it: "file:line: text"."""
    lines = []
    for path, number in sorted(places):
        text = path.read_text().splitlines()[number - 1].strip()
        if not ASKED.search(text):
            lines.append(f"{path.name}:{number}: {text}")
    return lines
