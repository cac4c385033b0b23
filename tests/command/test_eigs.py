"""``lyapcuda eigs``: models and data by name, the table, JSON and the picture."""

from __future__ import annotations

import json
import textwrap

import pytest
import torch
from torch import nn

import lyapcuda
from examples.paper import problem
from examples.paper.data import load
from examples.paper.models import build
from lyapcuda.__main__ import main

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

FACTORIES = """
    import torch
    from torch import nn

    def net():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()

    def batches():
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(40, 4, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 3, (40,), generator=generator)
        return [(x[:25], y[:25]), (x[25:], y[25:])]

    def loss(outputs, targets):
        return nn.functional.cross_entropy(outputs, targets)

    def one_tensor():
        return [torch.randn(3, 4).double()]

    number = 3
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "my_net.py").write_text(textwrap.dedent(FACTORIES))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str, status: int = 0) -> None:
    assert main(["eigs", "--no-progress", *arguments]) == status


def test_a_models_factory_and_its_files(factories, capsys):
    import sys

    run(
        *("--model", "my_net.py:net", "--data", "my_net.py:batches", "--loss", "my_net.py:loss"),
        *("-k", "3", "--tol", "1e-6", "--trace", "12", "--density", "10", "--out", "found"),
    )
    printed = capsys.readouterr().out
    found = json.loads((factories / "found" / "eigs.json").read_text())
    assert (factories / "found" / "eigs.png").stat().st_size > 10000

    sys.path.insert(0, str(factories))
    try:
        import my_net
    finally:
        sys.path.remove(str(factories))
        sys.modules.pop("my_net", None)
    model, data = my_net.net(), my_net.batches()
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    parameters = dict(model.named_parameters())

    def flat_loss(vector):
        parts = vector.split([p.numel() for p in parameters.values()])
        values = {n: v.view(p.shape) for (n, p), v in zip(parameters.items(), parts, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(model, values, (x,)), y)

    flat = torch.cat([p.detach().flatten() for p in parameters.values()])
    exact = torch.linalg.eigvalsh(torch.func.hessian(flat_loss)(flat)).flip(0)
    assert found["eigenvalues"] == pytest.approx(exact[:3].tolist(), rel=1e-5)
    assert all(found["converged"]) and found["parameters"] == len(flat)
    assert abs(found["trace"] - float(exact.sum())) < 4 * found["trace_standard_error"] + 1e-6
    assert len(found["density"]["grid"]) == 1000
    for value in found["eigenvalues"]:
        assert f"{value:.6g}" in printed
    assert "eigs.json" in printed and "trace" in printed and "gradient evaluations" in printed


def test_the_same_by_module_name_as_json(factories, capsys):
    run(
        *(
            "--model",
            "my_net:net",
            "--data",
            "my_net:batches",
            "--which",
            "BE",
            "-k",
            "2",
            "--json",
        ),
        *("--weight-decay", "0.5"),
    )
    found = json.loads(capsys.readouterr().out)
    assert found["which"] == "BE" and len(found["eigenvalues"]) == 2
    run("--model", "my_net:net", "--data", "my_net:batches", "--which", "BE", "-k", "2", "--json")
    without = json.loads(capsys.readouterr().out)
    shifted = [value + 0.5 for value in without["eigenvalues"]]
    assert found["eigenvalues"] == pytest.approx(shifted, rel=1e-3)


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


def test_weights_are_loaded(factories, capsys):
    arguments = ["--model", "my_net:net", "--data", "my_net:batches", "-k", "1", "--json"]
    run(*arguments)
    before = json.loads(capsys.readouterr().out)["eigenvalues"][0]
    import sys

    sys.path.insert(0, str(factories))
    import my_net

    sys.path.remove(str(factories))
    model = my_net.net()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    torch.save(model.state_dict(), "weights.pt")
    run(*arguments, "--weights", "weights.pt")
    after = json.loads(capsys.readouterr().out)["eigenvalues"][0]
    assert abs(after / before - 1) > 0.05
    sys.modules.pop("my_net", None)


def test_only_selected_parameters(factories, capsys):
    arguments = ["--model", "my_net:net", "--data", "my_net:batches", "-k", "1", "--json"]
    run(*arguments, "--select", "2.*")
    assert json.loads(capsys.readouterr().out)["parameters"] == 6 * 3 + 3


def test_what_has_not_converged_is_said(factories, capsys):
    run(
        *("--model", "my_net:net", "--data", "my_net:batches"),
        *("-k", "3", "--tol", "1e-12", "--maxiter", "4"),
        status=1,
    )
    printed = capsys.readouterr()
    assert printed.out.count(" NO") == 3 and "3 of 3" in printed.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "vgg"], ["model='vgg'"]),
        (["--model", "nowhere:net"], ["model='nowhere:net'", "nowhere"]),
        (["--model", "my_net:nothing"], ["model='my_net:nothing'", "nothing"]),
        (["--model", "my_net:number"], ["model='my_net:number'", "int"]),
        (["--model", "my_net:batches"], ["model='my_net:batches'", "list"]),
        (["--data", "my_net:batches"], ["model='mlp'", "built-in"]),
        (["--data", "nofolder"], ["nofolder"]),
        (["--model", "my_net:net", "--data", "my_net:one_tensor"], ["data", "(inputs, targets)"]),
        (["--loss", "huber"], ["loss='huber'"]),
        (["--weights", "none.pt"], ["none.pt"]),
        (["--checkpoint", "none.pt"], ["none.pt"]),
        (["--samples", "0"], ["samples", "0"]),
        (["-k", "0"], ["k=0"]),
        (["--which", "XX"], ["--which", "XX"]),
        (["--tol", "-1"], ["tol=-1"]),
        (["--trace", "3"], ["samples=3"]),
        (["--select", "nothing*", "--samples", "20"], ["select", "nothing*"]),
        (["--device", "abacus"], ["device=abacus"]),
    ],
)
def test_errors_are_one_line_and_name_the_argument(factories, capsys, arguments, words):
    run(*arguments, status=2)
    error = capsys.readouterr().err.strip()
    assert error.startswith("lyapcuda: error:") and "\n" not in error
    assert all(word in error for word in words), error


def test_a_problem_needs_pairs():
    found = problem.Problem(nn.Linear(2, 2), nn.functional.cross_entropy, [], 0.0, {})
    with pytest.raises(ValueError, match=r"data: expected batches of \(inputs, targets\)"):
        found.closure(torch.zeros(3, 2))
