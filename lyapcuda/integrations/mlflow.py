"""Curvature in MLflow: `MlflowWriter`, for a `CurvatureLog`."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lyapcuda.extras import require
from lyapcuda.integrations.watched import PREFIX
from lyapcuda.log import Row, Writer

if TYPE_CHECKING:
    import mlflow
else:
    mlflow = require("mlflow", "lyapcuda.integrations.mlflow")

__all__ = ["MlflowWriter"]

#: Metrics that the server takes in one request.
_MOST = 1000


class MlflowWriter(Writer):
    """Logs every measurement to a run of MLflow, at the tracker's step.

    Args:
        run_id: of the run. None for the active one, at the time of opening.
        prefix: of the names.
        client: an ``mlflow.MlflowClient``; None makes one.

    Raises:
        RuntimeError: when the log opens, without ``run_id`` and without an active run.

    Example:
        See docs/howto/logging.md.
    """

    def __init__(self, run_id: str | None = None, prefix: str = PREFIX, client: Any = None) -> None:
        self.run_id, self.prefix, self._client = run_id, prefix, client

    def prepare(self, columns: Sequence[str], step: int) -> int:
        if self.run_id is None:
            active = mlflow.active_run()
            if active is None:
                raise RuntimeError("run_id: there is no active run; mlflow.start_run() first")
            self.run_id = active.info.run_id
        return 0

    def open(self) -> None:
        if self._client is None:
            self._client = mlflow.MlflowClient()

    def write(self, rows: Sequence[Row]) -> None:
        now = int(time.time() * 1000)
        metrics = [
            mlflow.entities.Metric(self.prefix + name, float(value), now, int(row["step"]))
            for row in rows
            for name, value in row.items()
            if name != "step" and math.isfinite(value)
        ]
        for start in range(0, len(metrics), _MOST):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + _MOST])
