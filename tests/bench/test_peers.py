"""bench/peers.py: what it takes, what it reports, and a run of it over our own solver alone."""

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import lyapcuda
import peers  # noqa: E402
import peers_problems  # noqa: E402
import peers_tools  # noqa: E402
import peers_worker  # noqa: E402
import resident_memory  # noqa: E402
from peers_report import markdown  # noqa: E402


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.pt"
    peers_problems.prepare("small", None, path)
    return peers_problems.load("small", path)


def test_a_quick_run_finds_the_top_values_and_says_what_is_not_installed(tmp_path, monkeypatch):
    absent = peers_tools.Tool("A peer", ("no-such-package",), (0,), str, lambda *_: [])
    monkeypatch.setitem(peers_tools.TOOLS, "pyhessian", absent)
    out = tmp_path / "report"
    peers.main(
        ["--quick", "--tools", "lanczos", "pyhessian", "-k", "1", "--rounds", "1"]
        + ["--threads", "1", "--out", str(out)]
    )
    report = json.loads(out.with_suffix(".json").read_text())
    (problem,) = report["problems"]
    found = problem["tools"]["lanczos"]["1"]
    assert found["status"] == "reached" and found["error"] <= 1e-3
    assert found["backward"] < 15 and found["forward"] == found["backward"]
    assert found["time"] > 0 and min(problem["gradient"]["seconds"]) > 0
    if sys.platform == "linux":
        assert 0 < found["peak"] < 100e6
    assert problem["tools"]["pyhessian"]["1"]["status"] == "not installed"
    text = out.with_suffix(".md").read_text()
    assert "| A peer | not installed |" in text and "**lyapcuda**, lanczos | " in text
    paths = [tmp_path / f"{name}.json" for name in ("small", "other", "again")]
    for path, name in zip(paths, ("small", "gpt", "gpt"), strict=True):
        spec = {**problem["spec"], "title": path.stem}
        renamed = {**problem, "name": name, "spec": spec}
        path.write_text(json.dumps({**report, "problems": [renamed]}))
    peers.main(["--merge", *map(str, reversed(paths[:2])), str(paths[2]), "--out", str(out)])
    both = out.with_suffix(".md").read_text()
    head, body = text.split("## ")
    assert both.startswith(head) and [part.split("\n")[0] for part in both.split("## ")[1:]] == [
        "again",
        "small",
    ]
    assert body.split("\n", 1)[1].strip() in both
    report["threads"] += 1
    paths[0].write_text(json.dumps(report))
    with pytest.raises(ValueError, match="threads"):
        peers.main(["--merge", *map(str, paths), "--out", str(out)])


def test_the_reference_is_the_dense_hessians(small):
    truth = peers_tools.reference(small, 3)
    loss, parameters = small.loss(), small.parameters  # float64 from here on
    size = sum(p.numel() for p in parameters)
    u = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # Against power iteration, which knows nothing of ARPACK: enough for the first.
    gradient = torch.cat(
        [g.reshape(-1) for g in torch.autograd.grad(loss, parameters, create_graph=True)]
    )
    for _ in range(60):
        rows = torch.autograd.grad(gradient, parameters, u, retain_graph=True)
        image = torch.cat([row.reshape(-1) for row in rows])
        value, u = float(u @ image / (u @ u)), image / image.norm()
    assert truth["values"][0] == pytest.approx(value, rel=1e-9)
    assert max(truth["residuals"]) <= 1e-4 * truth["values"][2]


def test_what_a_tool_raises_is_its_answer(small, monkeypatch):
    def broken(*_):
        raise RuntimeError("derivative not implemented\nand more")

    tool = peers_tools.Tool("Broken", (), (0,), str, broken)
    monkeypatch.setitem(peers_tools.TOOLS, "lanczos", tool)
    passes = peers_worker.Passes(small.model)
    answer = peers_worker._attempt(
        small, "lanczos", passes, False, {"k": 1, "setting": 0, "seed": 0}
    )
    assert answer == {"error": "RuntimeError: derivative not implemented"}


class Scripted:
    """A worker whose values are off by 10^-setting, and by ten times that for the second seed."""

    broken = False

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def answer(self, end):
        return {"ready": True}

    def ask(self, end, k, setting, seed):
        if self.broken:
            return {"error": "ValueError: no"}
        off = 1.0 + 0.99 * 10.0 ** (seed - setting)
        values = [value * off for value in (5.0, -4.0)[:k]]
        return {"values": values, "forward": 1, "backward": setting, "peak": 8 * setting + seed}


def bench(tmp_path, **options):
    return peers.Bench("small", tmp_path, 1, (1, 2), 2, [5.0, -4.0], 1e9, 1e9, **options)


def test_the_search_takes_the_loosest_setting_that_does_for_every_start_vector(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(peers, "Worker", Scripted)
    tool = peers_tools.Tool("T", (), range(8), str, None)
    monkeypatch.setitem(peers_tools.TOOLS, "lanczos", tool)
    for found in bench(tmp_path).search("lanczos").values():
        assert found.status == "reached" and found.setting == 4 and found.peak == 33
        assert found.error == pytest.approx(0.99e-3) and len(found.tried) == 5
    short = peers_tools.Tool("T", (), range(3), str, None)
    monkeypatch.setitem(peers_tools.TOOLS, "lanczos", short)
    found = bench(tmp_path).search("lanczos")[1]
    assert found.status == "not reached" and found.setting == 2
    monkeypatch.setattr(Scripted, "broken", True)
    found = bench(tmp_path).search("lanczos")
    assert {f.status for f in found.values()} == {"failed"} and found[2].message == "ValueError: no"


def test_an_answer_is_waited_for_no_longer_than_there_is_time(small, tmp_path):
    with (
        pytest.raises(peers.OutOfTime),
        peers_worker.Worker("gradient", "small", tmp_path / "small.pt", 1) as worker,
    ):
        worker.answer(0.0)


def test_errors_are_those_of_the_worst_value():
    assert peers.relative_error([5.0, -4.4], [5.0, -4.0]) == pytest.approx(0.1)
    assert peers.relative_error([5.0], [5.0, -4.0]) == float("inf")
    assert peers.relative_error([float("nan")], [5.0]) == float("inf")


def test_the_report_says_which_goals_were_met():
    def outcome(time, peak):
        return {
            **{"status": "reached", "setting": 0, "description": "", "message": ""},
            **{"error": 1e-4, "forward": 1, "backward": 2, "time": time, "peak": peak},
        }

    problem = {
        "name": "mlp_gelu",
        "spec": {"title": "MLP", "steps": 1, "smooth": True, "ks": [1, 5]},
        "about": {"data": "made up", "parameters": 10, "loss": 1.0, "input": [2, 3]},
        "reference": {"values": [1.0], "residuals": [1e-6]},
        "gradient": {"seconds": [0.1], "peak": 5},
        "tools": {
            "lanczos": {"1": outcome(0.7, 100)},
            "lean": {"1": outcome(0.9, 40)},
            "pyhessian": {"1": outcome(2.0, 50)},
            "curvlinops": {"1": {**outcome(None, None), "status": "failed", "message": "E: no"}},
        },
    }
    text = markdown({"problems": [problem], "k": [1], "target": 1e-3}, "")
    assert "lyapcuda, lanczos takes 7.0 gradient-times (aim 8: met)" in text
    assert "PyHessian, takes 2.9 times as long (aim 3: not met)" in text
    assert "least memory 0.0 MB beside 0.0 MB of PyHessian (aim less: met)" in text
    assert "| scipy eigsh over curvlinops | fails: E: no |" in text


def _lanczos(connection, mode):
    """In a process of its own: the peak of a Lanczos run, in vectors."""
    resident_memory.be_frugal()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Linear(3000, 2000)
    inputs, targets = torch.randn(8, 3000), torch.randn(8, 2000)

    def loss():
        return (torch.tanh(model(inputs)) - targets).square().mean()

    def solve(count):
        warnings.simplefilter("ignore", lyapcuda.ConvergenceWarning)
        return lyapcuda.eigsh(
            loss,
            model.parameters(),
            5,
            mode=mode,
            ncv=8,
            maxiter=count,
            tol=1e-9,
            model=model,
        )

    solve(1)
    with resident_memory.peak_memory() as peak:
        solve(12)
    connection.send(peak.bytes / (4 * 6_002_000))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("mode", "least", "most"), [("difference", 10.5, 11.7), ("exact", 9, 10.6)]
)
def test_the_memory_of_lanczos_is_that_of_the_vectors_it_needs(mode, least, most):
    """A basis of ncv + 1 rows; g(θ) and the gradient beside it, or what double backward adds up;
    not the result beside the basis.
    """
    connection, other = peers_worker._SERVER.Pipe()
    process = peers_worker._SERVER.Process(target=_lanczos, args=(other, mode))
    process.start()
    assert connection.poll(120)
    assert least < connection.recv() < most
    process.join()


def test_memory_is_given_back_in_whole_pages():
    from lyapcuda.basis import release_pages

    rows = torch.ones(3, 5000)
    release_pages(rows[1])
    assert bool((rows[0] == 1).all()) and bool((rows[2] == 1).all())
    if sys.platform == "linux":
        assert int((rows[1] == 0).sum()) >= 5000 - 2 * 1024
