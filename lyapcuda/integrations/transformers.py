"""Curvature in a Hugging Face Trainer: `watch`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lyapcuda.arguments import described
from lyapcuda.extras import require
from lyapcuda.integrations.watched import PREFIX, readings, tracker_of
from lyapcuda.tracker import CurvatureTracker

if TYPE_CHECKING:
    import transformers
else:
    transformers = require("transformers", "lyapcuda.integrations.transformers")

__all__ = ["Watch", "watch"]

#: In every checkpoint of the Trainer.
FILE = "curvature_tracker.pt"


def watch(
    trainer: transformers.Trainer,
    tracker: CurvatureTracker | None = None,
    *,
    prefix: str = PREFIX,
    **options: Any,
) -> Watch:
    """Measures the curvature once every optimizer step of a Trainer, and logs it with the loss.

    Training stays bitwise what it was: under accumulation, clipping, mixed precision and activation
    checkpointing. Without accumulation a measurement costs one gradient; with it, two of the last
    micro-batch, whose curvature it is. The tracker's state is in the Trainer's checkpoints: a
    resumed run goes on where it was.

    Args:
        trainer: before its ``train()``.
        tracker: of the trainer's model. None makes one when training begins: of the parameters that
            train, as their optimizer sees them.
        prefix: of the names in the log: ``curvature/h``, ``h_low``, ``h_high`` and, where the
            optimizer's threshold is known, ``edge``.
        options: of that `CurvatureTracker`: ``every=10``, ``k=3``, ``tol=0.1``, …

    Returns:
        The watch, a TrainerCallback: its ``tracker``, and `Watch.remove`.

    Raises:
        TypeError, ValueError: naming the argument and its value.
        NotImplementedError: under DeepSpeed, whose engine takes the gradients.

    Example:
        See docs/howto/trainer.md.
    """
    if not isinstance(trainer, transformers.Trainer):
        raise TypeError(f"trainer={described(trainer)}: expected a transformers.Trainer")
    if tracker is not None and not isinstance(tracker, CurvatureTracker):
        raise TypeError(f"tracker={described(tracker)}: expected a CurvatureTracker or None")
    if tracker is not None and options:
        raise ValueError(
            f"{next(iter(options))}: an option of a tracker to be made, but one is given"
        )
    if trainer.is_deepspeed_enabled:
        raise NotImplementedError(
            "trainer: DeepSpeed's engine takes the gradients; nothing to watch"
        )
    return Watch(trainer, tracker, prefix, options)


class Watch(transformers.TrainerCallback):
    """What `watch` returns.

    Attributes:
        tracker: None before training begins, unless it was given.
    """

    def __init__(
        self,
        trainer: transformers.Trainer,
        tracker: CurvatureTracker | None,
        prefix: str,
        options: dict[str, Any],
    ) -> None:
        self.tracker, self._prefix, self._options = tracker, prefix, options
        self._trainer, self._resumed = trainer, None
        self._now: dict[str, Tensor] = {}
        ours = {"training_step": self._step, "log": self._log, "train": self._train}
        self._plain = {name: getattr(trainer, name) for name in ours}
        #: What stood in the trainer itself, and what stands there now.
        self._own = {name: vars(trainer)[name] for name in ours if name in vars(trainer)}
        self._ours = ours
        vars(trainer).update(ours)
        trainer.add_callback(self)

    def remove(self) -> None:
        """Leaves the trainer as it was before `watch`.

        Raises:
            RuntimeError: something else has taken the place of one of its methods since.
        """
        there = vars(self._trainer)
        for name, ours in self._ours.items():
            if there.get(name) is not ours:
                raise RuntimeError(
                    f"remove(): the trainer's {name} was replaced after watch(); undo that first"
                )
        for name in self._ours:
            del there[name]
        there.update(self._own)
        self._trainer.remove_callback(self)

    # --- in place of the trainer's own methods ---------------------------------------------------

    def _train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Notes which checkpoint training goes on from."""
        found = resume_from_checkpoint
        if found is True:
            found = transformers.trainer_utils.get_last_checkpoint(self._trainer.args.output_dir)
        self._resumed = Path(found) if found else None
        return self._plain["train"](resume_from_checkpoint, *args, **kwargs)

    def _step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The trainer's step of a micro-batch; before the optimizer's step it measures, too."""
        trainer, tracker = self._trainer, self.tracker
        parts = trainer.current_gradient_accumulation_steps

        def plain() -> Tensor:
            return self._plain["training_step"](model, dict(inputs), num_items_in_batch)

        if not trainer.accelerator.sync_gradients:
            return plain()
        if parts == 1:
            return tracker.backward(plain, scaler=trainer.accelerator.scaler)
        # Tokens of all micro-batches: the last one's loss is on the scale of the whole.
        count = None if num_items_in_batch is None else num_items_in_batch / parts

        def loss() -> Tensor:
            with trainer.compute_loss_context_manager():
                own = trainer._prepare_inputs(dict(inputs))
                return trainer.compute_loss(model, own, num_items_in_batch=count)

        model.train()
        tracker.step(loss)
        return plain()

    def _log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the readings to a row that has the training loss."""
        if "loss" in logs:
            now = {name: float(value) for name, value in self._now.items()}
            logs = {**logs, **{name: value for name, value in now.items() if math.isfinite(value)}}
        self._plain["log"](logs, *args, **kwargs)

    # --- as a callback ---------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes the tracker, or has it go on from a checkpoint."""
        if self.tracker is None:
            self.tracker = tracker_of(kwargs["model"], kwargs["optimizer"], self._options)
        saved = self._resumed / FILE if self._resumed else None
        if saved is not None and saved.exists():
            self.tracker.load_state_dict(torch.load(saved, map_location="cpu", weights_only=True))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the readings while the rate is that of this step: the edge is rate·h."""
        self._now = readings(self.tracker, self._prefix)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Puts the tracker's state beside the trainer's. Shards are for torch.distributed's
        checkpoints, see docs/distributed.md.
        """
        if self.tracker.layout.sharded or not args.should_save:
            return
        name = f"{transformers.trainer_utils.PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        folder = Path(self._trainer._get_output_dir(trial=None)) / name
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.tracker.state_dict(), folder / FILE)
