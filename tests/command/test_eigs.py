"""``lyapcuda eigs``: models and data by name, the table, JSON and the picture."""

from __future__ import annotations

import json
import sys
import textwrap

import pytest
import torch
from torch import nn

from lyapcuda.__main__ import main
from lyapcuda.command import eigs, problem

pytest.importorskip("matplotlib")

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

    def summed(outputs, targets):
        return nn.functional.cross_entropy(outputs, targets, reduction="sum")

    def size(batch):
        return len(batch[1]) if len(batch[1]) > 20 else 0

    def one_tensor():
        return [torch.randn(3, 4).double()]

    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, input, labels):
            return {"loss": nn.functional.cross_entropy(self.net(input), labels), "more": 3}

    def labelled():
        return [{"input": x, "labels": y} for x, y in batches()]

    def dicts():
        return [{"input": x} for x, _ in batches()]

    def odd_targets():
        return [(torch.randn(40, 4).double(), torch.randn(40).double())]

    number = 3
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "my_net.py").write_text(textwrap.dedent(FACTORIES))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str, status: int = 0) -> None:
    assert main(["eigs", "--no-progress", *arguments]) == status


def test_what_a_batch_counts(factories, capsys):
    names = ("--model", "my_net.py:net", "--data", "my_net.py:batches", "--json", "-k", "1")
    found = []
    for more in (
        ("--loss", "ce"),
        ("--loss", "my_net.py:summed"),
        ("--loss", "my_net.py:summed", "--sizes", "sum"),
        ("--loss", "my_net.py:summed", "--sizes", "my_net.py:size"),
    ):
        run(*names, *more)
        found.append(json.loads(capsys.readouterr().out)["eigenvalues"][0])
    assert found[1] == pytest.approx(40 * found[0], rel=1e-3)
    assert found[2] == pytest.approx(found[1]) and 0 < found[3] < found[2]


def test_a_models_factory_and_its_files(factories, capsys):
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


def test_a_models_own_loss_of_batches_by_name(factories, capsys):
    found = []
    for model, data, loss in (("net", "batches", "ce"), ("WithLoss", "labelled", "model")):
        run("--model", f"my_net:{model}", "--data", f"my_net:{data}", "--loss", loss, "--json")
        found.append(json.loads(capsys.readouterr().out)["eigenvalues"])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize("there", [True, False])
def test_a_bar_where_someone_sees_it(factories, capsys, monkeypatch, there):
    """On a terminal; without tqdm there is none, and with --json nothing but JSON."""
    common = ["eigs", "--model", "my_net:net", "--data", "my_net:batches", "-k", "1"]
    if not there:
        monkeypatch.setitem(sys.modules, "tqdm", None)
        monkeypatch.setattr(eigs, "find_spec", lambda name: None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(common) == 0
    assert ("iteration" in capsys.readouterr().err) == there
    for more in ("--json", "--no-progress"):
        assert main([*common, more]) == 0
        assert capsys.readouterr().err == ""


def test_weights_are_loaded(factories, capsys):
    arguments = ["--model", "my_net:net", "--data", "my_net:batches", "-k", "1", "--json"]
    run(*arguments)
    before = json.loads(capsys.readouterr().out)["eigenvalues"][0]
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
        (["--data", "digits"], ["data='digits'", "file.py:name"]),
        (["--data", "my_net:one_tensor"], ["data", "(inputs, targets)"]),
        (["--data", "my_net:odd_targets", "--loss", "mse"], ["loss=mse", "(40, 3)", "(40,)"]),
        (["--loss", "huber"], ["loss='huber'"]),
        (["--data", "my_net:dicts"], ["data: batches are dicts", "loss=model"]),
        (["--loss", "model"], ["expected dicts for loss=model", "tuple"]),
        (["--loss", "model", "--data", "my_net:dicts"], ["a Tensor without a loss", "have input"]),
        (["--weights", "none.pt"], ["none.pt"]),
        (["--weights", "other.pt"], ["other.pt", "it lacks 0.bias"]),
        (["--weights-key", "ema"], ["weights_key='ema'", "path"]),
        (["--threads", "0"], ["threads", "0"]),
        (["-k", "0"], ["k=0"]),
        (["--method", "guess"], ["--method", "guess"]),
        (["--which", "XX"], ["--which", "XX"]),
        (["--tol", "-1"], ["tol=-1"]),
        (["--trace", "3"], ["samples=3"]),
        (["--select", "nothing*"], ["select", "nothing*"]),
        (["--device", "abacus"], ["device=abacus"]),
    ],
)
def test_errors_are_one_line_and_name_the_argument(factories, capsys, arguments, words):
    torch.save(nn.Linear(2, 2).state_dict(), "other.pt")
    run("--model", "my_net:net", "--data", "my_net:batches", *arguments, status=2)
    error = capsys.readouterr().err.strip()
    assert error.startswith("lyapcuda: error:") and "\n" not in error
    assert all(word in error for word in words), error


def test_a_problem_needs_pairs():
    found = problem.Problem(nn.Linear(2, 2), nn.functional.cross_entropy, [], 0.0, {})
    with pytest.raises(ValueError, match=r"data: expected batches of \(inputs, targets\)"):
        found.closure(torch.zeros(3, 2))


def test_a_model_and_its_data_are_required(factories, capsys):
    run("--model", "my_net:net", status=2)
    error = capsys.readouterr().err
    assert error == "lyapcuda: error: the following arguments are required: --data\n"


def test_a_batch_goes_to_the_models_device():
    losses = []
    model = nn.Linear(2, 3, device="meta")
    found = problem.Problem(model, lambda *given: losses.append(given), [], 0.0, {}, "meta")
    found.closure((torch.zeros(4, 2), {"labels": [torch.zeros(4)], "name": "first"}))
    ((outputs, targets),) = losses
    assert outputs.device.type == targets["labels"][0].device.type == "meta"
    assert targets["name"] == "first"


def test_mean_squared_errors_are_against_labels_or_values():
    outputs = torch.randn(5, 3)
    values, labels = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    assert problem.mse(outputs, values) == (outputs - values).square().mean()
    assert problem.mse(outputs, labels) == (outputs - torch.eye(3)[labels]).square().mean()
