"""``python -m examples.paper train``."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from examples.paper.__main__ import main
from examples.paper.config import TrainConfig
from examples.paper.runlog import READ_EVERY
from examples.paper.train import train
from run_support import rows_of, snapshot, state_of

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")


def test_the_command_line_trains_resumes_and_reports(tmp_path, capsys):
    out = str(tmp_path / "out")
    arguments = ["train", "--model", "linear", "--schedule", "cyclic", "--no-progress"]
    assert main([*arguments, "--max-steps", "4", "--out", out, "--classes", "3,8"]) == 0
    printed = capsys.readouterr().out
    for name in ("run.csv", "run.png", "checkpoint.pt"):
        assert str(tmp_path / "out" / name) in printed
    assert re.search(
        r"step 4: loss \S+, test accuracy \S+%, h0 \S+ \(.* in \[\S+, \S+\]\), lr", printed
    )
    # Everything that isn't given comes from the checkpoint.
    resume = ["--resume", f"{out}/checkpoint.pt", "--no-progress"]
    assert main(["train", *resume, "--max-steps", "6"]) == 0
    assert len(rows_of(tmp_path / "out")) == 6
    config = state_of(tmp_path / "out")["config"]
    assert config["classes"] == (3, 8) and config["schedule"] == "cyclic"
    capsys.readouterr()
    for wrong in (["--data", str(tmp_path)], ["--schedule", "qn"], ["--every", "2"]):
        assert main(["train", *resume, *wrong]) == 2
        error = capsys.readouterr().err
        assert wrong[0][2:] in error and wrong[1] in error and "checkpoint.pt" in error


def test_the_progress_bar_shows_loss_curvature_and_rate(tmp_path, capsys):
    assert main(["train", "--out", str(tmp_path / "out"), "--max-steps", "25"]) == 0
    error = capsys.readouterr().err
    assert "25/25" in error and all(f"{name}=" in error for name in ("loss", "h0", "lr"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "vgg"], ["--model", "vgg"]),
        (["--lr", "fast"], ["--lr", "fast"]),
        (["--lr", "-1"], ["lr", "-1.0"]),
        (["--classes", "a,b"], ["--classes", "a,b"]),
        (["--classes", "0,10"], ["classes", "0,10"]),
        (["--data", "nowhere"], ["nowhere", "no such folder"]),
        (["--threads", "0"], ["threads", "0"]),
        (["--checkpoint-every", "0"], ["checkpoint_every", "0"]),
        (["--resume", "nothing.pt"], ["nothing.pt", "no such checkpoint"]),
        (["--device", "abacus"], ["device", "abacus"]),
        (["--out", "file"], ["out", "file"]),
        (["--nonsense"], ["--nonsense"]),
    ],
)
def test_user_errors_are_one_line_and_change_nothing(
    tmp_path, monkeypatch, capsys, arguments, words
):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    assert main(["train", "--no-progress", "--max-steps", "1", *arguments]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and error.startswith("examples.paper: error: ")
    assert all(word in error for word in words), error
    assert snapshot(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("module", ["matplotlib", "sklearn.datasets", "tqdm"])
def test_a_missing_package_is_one_line_naming_the_extra(tmp_path, monkeypatch, capsys, module):
    monkeypatch.setitem(sys.modules, module, None)  # import then raises ImportError
    assert main(["train", "--out", str(tmp_path / "out"), "--max-steps", "1"]) == 2
    error = capsys.readouterr().err
    extra = "plot" if module == "matplotlib" else "examples"
    assert error.count("\n") == 1 and f"lyapcuda[{extra}]" in error
    assert not (tmp_path / "out").exists()


def test_warnings_are_one_line_without_a_place_in_the_source(tmp_path, capsys):
    # A separation that rounding swallows: the tracker warns.
    arguments = ["--model", "linear", "--perturbation", "1e-9", "--max-steps", "1"]
    main(["train", "--no-progress", "--out", str(tmp_path / "out"), *arguments])
    error = capsys.readouterr().err
    assert error.startswith("examples.paper: warning: perturbation=1e-09") and ".py" not in error


def test_divergence_is_reported_with_its_own_status(tmp_path, capsys):
    arguments = ["--model", "linear", "--loss", "mse", "--lr", "1e6", "--no-progress"]
    assert main(["train", *arguments, "--out", str(tmp_path / "out")]) == 1
    assert "--lr" in capsys.readouterr().err


def test_ctrl_c_saves_a_run_that_resumes_bitwise(tmp_path):
    command = [
        sys.executable,
        "-m",
        "examples.paper",
        "train",
        "--model",
        "linear",
        "--no-progress",
    ]
    command += ["--no-progress", "--threads", "1", "--device", "cpu"]
    command += ["--checkpoint-every", "100000"]
    out = tmp_path / "a run"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen(
        [*command, "--epochs", "100000", "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        deadline = time.monotonic() + 60
        log = out / "run.csv"
        while time.monotonic() < deadline and process.poll() is None:
            if log.exists() and log.read_bytes().count(b"\n") > 2 * READ_EVERY:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert f"python -m examples.paper train --resume '{out / 'checkpoint.pt'}'" in error
    assert (out / "run.png").exists()
    steps = state_of(out)["step"]
    assert len(rows_of(out)) == steps > 2 * READ_EVERY - 1

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        config = TrainConfig(model="linear", epochs=100000, max_steps=steps + 5, device="cpu")
        train(config, out, resume=out / "checkpoint.pt")
        train(config, tmp_path / "whole", checkpoint_every=100000)
    finally:
        torch.set_num_threads(threads)
    assert log.read_bytes() == (tmp_path / "whole" / "run.csv").read_bytes()
