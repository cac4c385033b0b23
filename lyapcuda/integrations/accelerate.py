"""Curvature in a loop of Hugging Face Accelerate: `backward`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lyapcuda.arguments import described
from lyapcuda.extras import require
from lyapcuda.tracker import CurvatureTracker

if TYPE_CHECKING:
    import accelerate
else:
    accelerate = require("accelerate", "lyapcuda.integrations.accelerate")

__all__ = ["backward"]


def backward(
    accelerator: accelerate.Accelerator,
    tracker: CurvatureTracker,
    closure: Callable[[], Tensor],
    **options: Any,
) -> Tensor:
    """Measures, and leaves the gradients that ``accelerator.backward(closure())`` leaves.

    Within ``accelerator.accumulate(model)`` it measures on the last micro-batch alone, for one
    gradient, and with accumulation two. The scaler of fp16 and the 1/N of accumulation are
    Accelerate's; the curvature is that of the loss that the closure returns.

    Args:
        accelerator: an Accelerator.
        tracker: of the prepared model, with ``optimizer=`` the prepared optimizer.
        closure: the forward pass; returns the loss.
        options: of `CurvatureTracker.backward`.

    Returns:
        The loss, detached.

    Raises:
        TypeError: naming the argument and its value.
        NotImplementedError: under DeepSpeed or Megatron-LM, whose engines take the gradients.

    Example:
        See docs/howto/accelerate.md.
    """
    if not isinstance(accelerator, accelerate.Accelerator):
        raise TypeError(f"accelerator={described(accelerator)}: expected an accelerate.Accelerator")
    if not isinstance(tracker, CurvatureTracker):
        raise TypeError(f"tracker={described(tracker)}: expected a CurvatureTracker")
    kinds = accelerate.DistributedType
    if accelerator.distributed_type in (kinds.DEEPSPEED, kinds.MEGATRON_LM):
        raise NotImplementedError(
            f"accelerator: {accelerator.distributed_type.value}'s engine takes the gradients"
        )

    def share() -> Tensor:
        loss = closure()
        accelerator.backward(loss)
        return loss

    if not accelerator.sync_gradients:
        return share().detach()
    return tracker.backward(share, scaler=accelerator.scaler, **options)
