"""``python -m examples.paper eigs``: of models as they begin, and of runs."""

import json

import pytest
import torch
from torch import nn

import lyapcuda
from examples.paper.__main__ import main
from examples.paper.data import load
from examples.paper.models import build

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")


def run(*arguments: str, status: int = 0) -> None:
    assert main(["eigs", "--no-progress", *arguments]) == status


def test_built_in_model_and_data(tmp_path, capsys):
    # Not "mse": each of its eigenvalues is there ten times, and rounding decides what is known.
    run("--model", "linear", "--samples", "300", "-k", "2", "--out", str(tmp_path))
    found = json.loads((tmp_path / "eigs.json").read_text())
    dataset = load("digits")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build("linear", 1, 8, 10)
    x, y = dataset.standardise(dataset.train.images[:300]), dataset.train.labels[:300]
    loss = nn.functional.cross_entropy
    reference = lyapcuda.eigsh(lambda: loss(model(x), y), model.parameters(), k=2, mode="exact")
    assert found["parameters"] == 650
    assert found["eigenvalues"] == pytest.approx(reference.eigenvalues.tolist(), rel=2e-3)


def test_from_a_training_runs_checkpoint(tmp_path, capsys):
    out = tmp_path / "run"
    train = ["train", "--model", "linear", "--max-steps", "5", "--out", str(out), "--no-progress"]
    assert main(train) == 0
    capsys.readouterr()
    run("--checkpoint", str(out / "checkpoint.pt"), "--samples", "200", "-k", "1", "--json")
    found = json.loads(capsys.readouterr().out)
    assert "linear of" in found["model"] and found["eigenvalues"][0] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "vgg"], ["--model", "vgg"]),
        (["--data", "nofolder"], ["nofolder", "no such folder"]),
        (["--loss", "huber"], ["--loss", "huber"]),
        (["--weights", "none.pt"], ["none.pt"]),
        (["--checkpoint", "none.pt"], ["none.pt"]),
        (["--samples", "0"], ["samples", "0"]),
        (["--classes", "0,x"], ["--classes", "0,x"]),
        (["--select", "nothing*", "--samples", "20"], ["select", "nothing*"]),
        (["--device", "abacus"], ["device=abacus"]),
    ],
)
def test_errors_are_one_line_and_name_the_argument(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    run(*arguments, status=2)
    error = capsys.readouterr().err.strip()
    assert error.startswith("examples.paper: error:") and "\n" not in error
    assert all(word in error for word in words), error


def test_weights_are_loaded(tmp_path, capsys):
    with torch.random.fork_rng():
        model = build("linear", 1, 8, 10)
    model.load_state_dict({name: torch.zeros_like(p) for name, p in model.state_dict().items()})
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    arguments = ["--model", "linear", "--samples", "100", "-k", "1", "--json"]
    run(*arguments, "--weights", str(tmp_path / "weights.pt"))
    dataset = load("digits")
    x, y = dataset.standardise(dataset.train.images[:100]), dataset.train.labels[:100]
    loss = nn.functional.cross_entropy
    exact = lyapcuda.eigsh(lambda: loss(model(x), y), model.parameters(), k=1, mode="exact")
    found = json.loads(capsys.readouterr().out)["eigenvalues"]
    assert found == pytest.approx(exact.eigenvalues.tolist(), rel=2e-3)
