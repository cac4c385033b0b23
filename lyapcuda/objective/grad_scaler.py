"""Gradients scaled by a torch.amp.GradScaler, with the scale taken out of them again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from lyapcuda.params.ranks import Ranks
from lyapcuda.params.shards import local

__all__ = ["Unscaled", "found_inf"]


def _divide(gradients: Sequence[Tensor], inverse: Tensor) -> dict[torch.device, Tensor]:
    """Multiplies by ``inverse`` in place; for every device a float32 1 where any isn't finite."""
    of: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for gradient in map(local, gradients):
        of[gradient.device, gradient.dtype].append(gradient)
    found: dict[torch.device, Tensor] = {}
    for (device, _), members in of.items():
        if device not in found:
            found[device] = torch.zeros((), dtype=torch.float32, device=device)
        torch._amp_foreach_non_finite_check_and_unscale_(
            members, found[device], inverse.to(device, non_blocking=True)
        )
    return found


def found_inf(
    gradients: Sequence[Tensor], device: torch.device, ranks: Ranks | None = None
) -> Tensor:
    """A float32 number on ``device``, above 0 where a gradient isn't finite, on any of the ranks
    that share them; changes none.
    """
    one = torch.ones((), dtype=torch.float32, device=device)
    found = sum(
        (value.to(device, non_blocking=True) for value in _divide(gradients, one).values()),
        torch.zeros_like(one),
    )
    return found if ranks is None else ranks.sum(found.double()).float()


class Unscaled:
    """A GradScaler's scale, taken out of the gradients of one measurement.

    All gradients of a measurement are divided by one and the same scale.

    Args:
        scaler: enabled.
        parameters: those that are measured.
        ranks: that share them.
        optimizer: whose gradients these are, where `finish_` is to unscale them; what overflows in
            any of the gradients is then reported to the scaler, so that its `step` skips and its
            `update` lowers the scale.

    Raises:
        RuntimeError: the optimizer's gradients were unscaled, or its step taken, since the last
            ``scaler.update()``.
    """

    in_results = True

    def __init__(
        self,
        scaler: Any,
        parameters: Sequence[Tensor],
        ranks: Ranks | None = None,
        optimizer: Optimizer | None = None,
    ) -> None:
        self._scaler, self._parameters, self._ranks = scaler, parameters, ranks
        self._entry = None if optimizer is None else scaler._per_optimizer_states[id(optimizer)]
        if self._entry is not None and self._entry["stage"] is not OptState.READY:
            raise RuntimeError(
                "scaler: scaler.update() has to follow every scaler.step(optimizer), and one "
                "measurement has to have all gradients of a step (see batches)"
            )
        self._scale: tuple[Tensor, int] | None = None
        self._inverse: Tensor | None = None
        self._found: dict[torch.device, Tensor] = {}

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to call ``backward()`` on, where the closure left that to us."""
        return self._scaler.scale(loss)

    def divide_(self, gradients: Sequence[Tensor | None]) -> None:
        """Divides by the scale in place, and takes down what overflowed."""
        present = [gradient for gradient in gradients if gradient is not None]
        if any(gradient.dtype == torch.float16 for gradient in present):
            raise ValueError("scaler: float16 gradients can't be unscaled; use autocast")
        for device, value in _divide(present, self._inverse).items():
            before = self._found.get(device)
            self._found[device] = value if before is None else before + value

    def finish_(self) -> None:
        """Does what ``scaler.unscale_(optimizer)`` would: divides what is in ``.grad``, and tells
        the scaler what overflowed in any of the measurement's gradients.
        """
        self.divide_([p.grad for p in self._parameters])
        if self._ranks is not None:
            for device, value in self._found.items():
                self._found[device] = self._ranks.sum(value.double()).float()
        self._entry["found_inf_per_device"] = self._found
        self._entry["stage"] = OptState.UNSCALED

    @property
    def gives_way(self) -> bool:
        """A closure may scale a share of its loss; not where the scaler is told what overflows."""
        return self._entry is None

    def take(self) -> None:
        """After a backward pass: the scale of the first one; the same tensor at the same version in
        the others.

        Raises:
            RuntimeError: the scale has changed, or the gradients aren't scaled.
        """
        scale = self._scaler._get_scale_async()
        if scale is None:
            raise RuntimeError(
                "scaler: the closure called backward() itself, but not on scaler.scale(loss)"
            )
        now = (scale, scale._version)
        if self._scale is None:
            self._scale, self._inverse = now, scale.double().reciprocal().float()
        elif now[0] is not self._scale[0] or now[1] != self._scale[1]:
            raise RuntimeError(
                "scaler: its scale changed between the gradients of a measurement; call "
                "scaler.update() after the step, not in the closure"
            )
