"""Curvature in Weights & Biases: `WandbWriter`, for a `CurvatureLog`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lyapcuda.arguments import described
from lyapcuda.extras import require
from lyapcuda.integrations.watched import PREFIX, readings
from lyapcuda.log import Row, Writer

if TYPE_CHECKING:
    import wandb
else:
    wandb = require("wandb", "lyapcuda.integrations.wandb")

__all__ = ["WandbWriter", "readings"]


class WandbWriter(Writer):
    """Logs every measurement to a run of Weights & Biases, as a row of its own.

    A log reads measurements back in blocks, later than they were taken. So they are drawn over a
    metric of their own, ``curvature/step``.

    W&B's step counts these rows, too, and W&B drops what comes for an earlier step. Where you pass
    ``step=`` to ``run.log`` yourself, log `readings` in your own rows instead:
    ``run.log({"loss": loss, **readings(tracker)}, step=step)``.

    Args:
        run: from ``wandb.init()``. It stays yours to finish.
        prefix: of the names.

    Raises:
        TypeError: naming the argument and its value.

    Example:
        See docs/howto/logging.md.
    """

    def __init__(self, run: wandb.Run, prefix: str = PREFIX) -> None:
        if not hasattr(run, "define_metric"):
            raise TypeError(f"run={described(run)}: expected the run that wandb.init() returns")
        self.run, self.prefix = run, prefix

    def open(self) -> None:
        self.run.define_metric(self.prefix + "*", step_metric=self.prefix + "step")

    def write(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self.run.log({self.prefix + name: value for name, value in row.items()})
