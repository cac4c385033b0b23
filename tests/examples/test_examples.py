"""The three examples, as a newcomer runs them but shorter."""

import csv
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("tracking", "eigenvalues", "optimizer")


@pytest.fixture
def output_of(monkeypatch, capsys):
    """The lines that an example prints, and what it says on standard error. It runs in this
    process: a process of its own (scripts/quickstart.sh is one) mostly imports."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    # As Python puts it there for a script.
    monkeypatch.syspath_prepend(EXAMPLES)

    def run(name: str, *arguments: str) -> tuple[list[str], str]:
        path = str(EXAMPLES / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [path, *arguments])
        runpy.run_path(path, run_name="__main__")
        printed = capsys.readouterr()
        return printed.out.splitlines(), printed.err

    with torch.random.fork_rng():
        yield run


@pytest.mark.filterwarnings("error")
def test_tracking_writes_a_row_a_step_and_a_picture(tmp_path, output_of):
    out = tmp_path / "new" / "run"
    # The second run replaces the first.
    for steps in (8, 16):
        arguments = ["--steps", str(steps), "--no-progress", "--out", str(out)]
        lines, error = output_of("tracking", *arguments)
        assert error == ""
    assert sorted(path.name for path in out.iterdir()) == ["run.csv", "run.png"]
    assert (out / "run.png").stat().st_size > 10_000
    with (out / "run.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 17))
    for row in rows:
        names = ("loss", "exponent", "h", "h_low", "h_high", "edge", "lr")
        assert all(math.isfinite(float(row[name])) for name in names)
        assert float(row["h_low"]) <= float(row["h_high"])
    assert float(rows[-1]["lr"]) < float(rows[8]["lr"]) == 1.0
    assert re.fullmatch(
        r"step 16: loss \S+, test accuracy \S+%, h0 \S+ ± \S+, see \S+run\.png",
        lines[-1],
    )
    assert float(re.search(r"loss (\S+),", lines[-1])[1]) == pytest.approx(
        float(rows[-1]["loss"]), rel=5e-3
    )


def test_eigenvalues_prints_them_with_their_error_bars(tmp_path, output_of):
    lines, _ = output_of("eigenvalues", "--steps", "20", "-k", "2", "--out", str(tmp_path / "new"))
    number = r"-?[\d.e+-]+"
    assert re.fullmatch(rf"loss {number} after 20 steps", lines[0])
    values = []
    for i, line in enumerate(lines[1:3]):
        found = re.fullmatch(rf"eigenvalue {i}: ({number}), in \[({number}), ({number})\]", line)
        value, low, high = map(float, found.groups())
        assert low <= value <= high and high - low < 0.1 * value
        values.append(value)
    assert values[0] > values[1] > 0
    assert re.fullmatch(rf"trace: {number} ± {number}", lines[3]) and len(lines) == 4
    assert (tmp_path / "new" / "density.png").stat().st_size > 10_000


@pytest.mark.filterwarnings("error")
def test_optimizer_prints_the_losses_of_every_epoch(tmp_path, output_of):
    lines, error = output_of("optimizer", "--epochs", "3", "--out", str(tmp_path / "new"))
    losses = {}
    for line in lines:
        name, _, values = line.partition(": ")
        losses[name] = [float(value) for value in values.split()]
    assert list(losses) == ["SGD, lr 0.1", "SGD, lr 0.3", "LyapunovSGD"] and error == ""
    for values in losses.values():
        assert len(values) == 3 and all(map(math.isfinite, values))
    assert losses["LyapunovSGD"][2] < 0.5 * losses["LyapunovSGD"][0]
    assert (tmp_path / "new" / "losses.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_says_how_to_run_it(name):
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    assert f"    python examples/{name}.py --out" in text.split('"""')[1]
