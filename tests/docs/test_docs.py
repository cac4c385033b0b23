"""The examples in docs/tracking.md, optimizer.md and decisions.md run, one after another."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import torch

DOCS = Path(__file__).parents[2] / "docs"


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "tracking.md").read_text("utf-8"), re.S)
    assert len(blocks) >= 6
    with torch.random.fork_rng():
        for block in blocks:
            exec(compile(block, "docs/tracking.md", "exec"), names)
    with (tmp_path / "run.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 21))  # ten, and ten more resumed
    assert {row["lr"] for row in rows} == {"0.1"}
    assert capsys.readouterr().out


def test_the_examples_of_the_optimizer_run(capsys):
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "optimizer.md").read_text("utf-8"), re.S)
    assert len(blocks) >= 7
    with torch.random.fork_rng():
        for block in blocks:
            exec(compile(block, "docs/optimizer.md", "exec"), names)
    assert names["optimizer"].rates.shape == (5,)
    assert all(torch.isfinite(p).all() for p in names["model"].parameters())
    assert capsys.readouterr().out


def test_the_examples_of_decisions_run(capsys):
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "decisions.md").read_text("utf-8"), re.S)
    assert len(blocks) >= 3
    with torch.random.fork_rng():
        for block in blocks:
            exec(compile(block, "docs/decisions.md", "exec"), names)
    assert torch.isfinite(names["tracker"].history().edge[1:]).all()
    assert "edge" in capsys.readouterr().out
