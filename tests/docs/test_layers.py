"""The package's layers: a module imports from its own layer and the ones below it, never above."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import lyapcuda

ROOT = Path(lyapcuda.__file__).parent
#: From below to above.
LAYERS = [
    {"_C", "extension", "extras", "arguments", "files", "tables"},
    {"plots"},
    {"params"},
    {"stability"},
    {"ops"},
    {"basis", "running_peak"},
    {"objective"},
    {"dynamics"},
    {"solvers", "critical_sharpness"},
    {"history"},
    {"tracker"},
    {"log", "optim", "rate_cap"},
    {"cdat"},
    {"command", "integrations"},
]
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}


def imports_of(path: Path) -> set[str]:
    """The modules of the package that a file imports, as dotted names below it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lyapcuda":
            inside = (node.module or "").partition(".")[2]
            # Of the package itself: modules; classes and functions are above them all.
            names = {alias.name for alias in node.names} & LEVEL.keys()
            found |= {inside} if inside else names
        elif isinstance(node, ast.Import):
            found |= {
                a.name.partition(".")[2] for a in node.names if a.name.startswith("lyapcuda.")
            }
    return found


FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in ROOT.rglob("*.py")
    if path.name not in ("__init__.py", "__main__.py")
}


def test_no_module_imports_from_a_layer_above():
    upwards = [
        (name, other)
        for name, path in FILES.items()
        for other in imports_of(path)
        if LEVEL[other.split(".")[0]] > LEVEL[name.split(".")[0]]
    ]
    assert not upwards


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: imports_of(path) & FILES.keys() for name, path in FILES.items()}
    assert list(TopologicalSorter(graph).static_order())  # raises a CycleError with the circle
