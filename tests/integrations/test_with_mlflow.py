"""`MlflowWriter` with the real package, into a folder."""

from __future__ import annotations

import mlflow
import pytest
import torch

import lyapcuda
from lyapcuda.integrations.mlflow import MlflowWriter


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    mlflow.set_experiment("curvature")


def test_every_measurement_is_there_at_its_step():
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    tracker = lyapcuda.CurvatureTracker([p], every=2)
    with mlflow.start_run() as run, lyapcuda.CurvatureLog(tracker, MlflowWriter(), every=3):
        for _ in range(9):
            tracker.step(lambda: (p**4).sum())
    found = mlflow.MlflowClient().get_metric_history(run.info.run_id, "curvature/h")
    assert [metric.step for metric in found] == [1, 3, 5, 7, 9]
    assert [metric.value for metric in found] == tracker.history().h.tolist()


def test_without_a_run_it_says_so_before_anything_is_written(tmp_path):
    tracker = lyapcuda.CurvatureTracker([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(RuntimeError, match="no active run"):
        lyapcuda.CurvatureLog(tracker, MlflowWriter(), tmp_path / "run.csv")
    assert not (tmp_path / "run.csv").exists()
