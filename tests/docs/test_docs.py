"""The examples in docs/tracking.md, optimizer.md and decisions.md run, one after another."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import torch

DOCS = Path(__file__).parents[2] / "docs"


def run_blocks(page: str, least: int) -> dict:
    """The names that a page's code blocks leave, run one after another; there are ``least``."""
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text("utf-8"), re.S)
    assert len(blocks) >= least
    with torch.random.fork_rng():
        for block in blocks:
            exec(compile(block, f"docs/{page}", "exec"), names)
    return names


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_blocks("tracking.md", 6)
    with (tmp_path / "run.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 21))  # ten, and ten more resumed
    assert {row["lr"] for row in rows} == {"0.1"}
    assert capsys.readouterr().out


def test_the_examples_of_the_optimizer_run(capsys):
    names = run_blocks("optimizer.md", 7)
    assert names["optimizer"].rates.shape == (5,)
    assert all(torch.isfinite(p).all() for p in names["model"].parameters())
    assert capsys.readouterr().out


def test_the_examples_of_decisions_run(capsys):
    names = run_blocks("decisions.md", 3)
    assert torch.isfinite(names["tracker"].history().edge[1:]).all()
    assert "edge" in capsys.readouterr().out
