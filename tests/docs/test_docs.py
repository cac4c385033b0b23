"""The examples of all pages run, block after block, and print what the page says they print."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import lyapcuda
from lyapcuda.extras import EXTRAS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
#: On two ranks: test_distributed_docs.py.
DISTRIBUTED = {"docs/distributed.md", "docs/howto/fsdp2.md"}
_BLOCK = re.compile(r'^```(python|text title="prints")\n(.*?)^```$', re.S | re.M)


def blocks_of(page: str) -> Iterator[tuple[str, str | None]]:
    """(code, what it prints) of a page's blocks, in order; None where the page doesn't say."""
    found = [match.groups() for match in _BLOCK.finditer((ROOT / page).read_text("utf-8"))]
    for (kind, text), (after, output) in pairwise([*found, ("", "")]):
        if kind == "python":
            yield text, output if after.startswith("text") else None


PAGES = sorted(
    page
    for path in (ROOT / "README.md", *DOCS.rglob("*.md"))
    for page in [path.relative_to(ROOT).as_posix()]
    if page not in DISTRIBUTED and any(blocks_of(page))
)


def of_tracking(names: dict, folder: Path) -> None:
    with (folder / "run.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 21))  # ten, and ten more resumed
    assert {row["lr"] for row in rows} == {"0.1"}


def of_optimizer(names: dict, folder: Path) -> None:
    assert names["optimizer"].rates.shape == (5,)
    assert all(torch.isfinite(p).all() for p in names["model"].parameters())


def of_decisions(names: dict, folder: Path) -> None:
    assert torch.isfinite(names["tracker"].history().edge[1:]).all()


#: What holds after a page besides.
CHECKS = {
    "docs/tracking.md": of_tracking,
    "docs/optimizer.md": of_optimizer,
    "docs/decisions.md": of_decisions,
}


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps one state a process: what another test chose isn't the page's."""
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(True)
        state.GradientState._reset_state()


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.usefixtures("fresh_accelerate")
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names: dict = {"__name__": "__main__"}
    with torch.random.fork_rng():
        for code, printed in blocks_of(page):
            with contextlib.redirect_stdout(io.StringIO()) as output:
                try:
                    exec(compile(code, page, "exec"), names)
                except ImportError as error:  # an integration's package: CI has them all
                    package = (getattr(error.__cause__ or error, "name", "") or "").split(".")[0]
                    if package not in EXTRAS or os.environ.get("LYAPCUDA_ALL_EXTRAS"):
                        raise
                    pytest.skip(str(error))
            if printed is not None:
                assert output.getvalue() == printed, f"{page}: printed otherwise"
    CHECKS.get(page, lambda names, folder: None)(names, tmp_path)


def test_the_reference_has_every_public_name():
    pages = "\n".join(path.read_text("utf-8") for path in DOCS.glob("reference/*.md"))
    shown = set(re.findall(r"^::: lyapcuda\.(\w+)", pages, re.M))
    assert set(lyapcuda.__all__) - {"lyapunov"} <= shown  # it is shown as lyapcuda.dynamics's


def test_pages_of_several_ranks_are_run_there():
    runs = (ROOT / "tests/distributed/test_distributed_docs.py").read_text("utf-8")
    assert all(Path(page).name in runs for page in DISTRIBUTED)
