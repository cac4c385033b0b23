"""A tracker inside an optimizer's own step: its closure is measured first."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lyapcuda.objective.evaluator import Closure, at_a_copy

__all__ = ["measure_within"]


def measure_within(
    optimizer: Optimizer,
    measured: Callable[[Closure], Tensor | None],
    notice: Callable[[Iterable[Tensor]], None],
) -> RemovableHandle:
    """Puts ``measured(closure)`` where every ``optimizer.step(closure)`` evaluates first.

    Args:
        optimizer: any of torch.optim.
        measured: evaluates the closure, measures, leaves the gradient, and returns the loss.
        notice: told at every step which parameters the optimizer has now.

    Returns:
        A handle; ``handle.remove()`` ends it.
    """

    def measure_first(optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        notice(p for group in optimizer.param_groups for p in group["params"])
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            raise ValueError(
                "optimizer.step() was called without a closure: an attached CurvatureTracker "
                "needs optimizer.step(closure); or call tracker.step(closure) yourself"
            )
        done = False

        def measured_closure() -> Tensor | float | None:
            nonlocal done
            # A line search evaluates again, another tracker's copy elsewhere: not for us.
            if done or at_a_copy():
                return closure()
            done = True
            return measured(closure)

        # Hooks see the optimizer as args[0].
        others = {name: value for name, value in kwargs.items() if name != "closure"}
        return (optimizer, measured_closure, *args[2:]), others

    return optimizer.register_step_pre_hook(measure_first)
