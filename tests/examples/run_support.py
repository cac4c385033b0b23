"""What a run left in its folder."""

import csv
from pathlib import Path

import torch


def rows_of(out: Path) -> list[dict[str, float]]:
    with (out / "run.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def state_of(out: Path) -> dict:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}
