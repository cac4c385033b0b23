"""The example notebook runs from its first cell to its last, and shows what it says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

if not os.environ.get("LYAPCUDA_ALL_EXTRAS"):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("sklearn")

NOTEBOOK = Path(__file__).parents[2] / "examples" / "curvature.ipynb"


@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs():
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    kinds = [kinds_of(cell) for cell in notebook.cells]
    NotebookClient(notebook, timeout=240, kernel_name="python3").execute(cwd=NOTEBOOK.parent)
    # Each cell shows what it shows in the repository: text, a table, a picture; each picture once.
    assert [kinds_of(cell) for cell in notebook.cells] == kinds
    shown = sum(kinds, [])
    assert shown.count("image/png") == 2 and shown.count("text/html") == 1


def kinds_of(cell):
    """The kinds of output of a cell, in order."""
    outputs = cell.get("outputs", [])
    return [kind for output in outputs for kind in sorted(output.get("data", {}))]


def test_it_is_small_and_keeps_no_trace_of_a_machine():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 300_000
    assert "execution" not in text.replace("execution_count", "")
    assert "/home/" not in text and "/root/" not in text and "/tmp/" not in text
