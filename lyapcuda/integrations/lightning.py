"""Curvature in a Lightning Trainer: `CurvatureCallback`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from lyapcuda.extras import require
from lyapcuda.integrations.watched import PREFIX, readings, tracker_of
from lyapcuda.objective.lightning_logs import unheard
from lyapcuda.tracker import CurvatureTracker

if TYPE_CHECKING:
    import lightning.pytorch as lightning
else:
    lightning = require("lightning.pytorch", "lyapcuda.integrations.lightning")

__all__ = ["CurvatureCallback"]


class _NoLoss(Exception):
    """The training step returned None: Lightning skips the batch."""


class CurvatureCallback(lightning.Callback):
    """Measures the curvature once every optimizer step, and logs it as the module's own values.

    Training stays bitwise what it was: under accumulation, clipping, mixed precision; what the
    module logs and counts in metrics, too. A measurement costs two gradients of the batch before
    the optimizer's step, whose curvature it is. The tracker's state is in Lightning's checkpoints.

    Args:
        prefix: of the names in the log: ``curvature/h``, ``h_low``, ``h_high`` and, where the
            optimizer's threshold is known, ``edge``.
        prog_bar: whether the progress bar shows them.
        options: of `CurvatureTracker`: ``every=10``, ``k=3``, ``tol=0.1``, … It follows the
            parameters that train, as their optimizer sees them.

    Raises:
        RuntimeError: when training begins, of a module with manual optimization.

    Attributes:
        tracker: None before training begins.

    Example:
        >>> callback = CurvatureCallback(every=10)
        >>> trainer = lightning.Trainer(callbacks=[callback], logger=False, max_epochs=1)
    """

    def __init__(self, *, prefix: str = PREFIX, prog_bar: bool = False, **options: Any) -> None:
        self.tracker: CurvatureTracker | None = None
        self._prefix, self._prog_bar, self._options = prefix, prog_bar, options
        self._loaded: dict[str, Any] | None = None
        self._measured = False
        self._now: dict[str, Tensor] = {}

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Makes the tracker, or has it go on from a checkpoint."""
        if not module.automatic_optimization:
            raise RuntimeError(
                "CurvatureCallback: this module optimizes by hand (automatic_optimization=False). "
                "Make a CurvatureTracker, and call tracker.backward(closure) in training_step "
                "where manual_backward(loss) stands"
            )
        self.tracker = tracker_of(module, trainer.optimizers[0], self._options)
        if self._loaded is not None:
            self.tracker.load_state_dict(self._loaded)
            self._loaded = None

    def on_train_batch_start(
        self,
        trainer: lightning.Trainer,
        module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Measures on the batch that the optimizer's step follows."""
        count, of = batch_idx + 1, trainer.accumulate_grad_batches
        last = trainer.is_last_batch or count == trainer.num_training_batches
        self._measured = last or count % of == 0
        if not self._measured:
            return
        asks = lightning.utilities.signature_utils.is_param_in_hook_signature  # as the trainer does
        takes_index = asks(module.training_step, "batch_idx", min_args=2)
        arguments = (batch, batch_idx) if takes_index else (batch,)

        def loss() -> Tensor:
            found = trainer.strategy.training_step(*arguments)
            if found is None:
                raise _NoLoss
            return found["loss"] if isinstance(found, dict) else found

        with unheard(module):
            try:
                self.tracker.step(loss)
            except _NoLoss:
                self._measured = False
                return
        self._now = readings(self.tracker, self._prefix)  # the edge is that of this step's rate

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, *args: Any
    ) -> None:
        """Logs what was measured before this batch's step."""
        if self._measured:
            module.log_dict(self._now, on_step=True, on_epoch=False, prog_bar=self._prog_bar)

    def state_dict(self) -> dict[str, Any]:
        """The tracker's state, for Lightning's checkpoints."""
        return {} if self.tracker is None else {"tracker": self.tracker.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps a saved state until training begins."""
        self._loaded = state_dict.get("tracker")
