"""RunningPeak: the recent largest of a value, which rises at once and falls slowly."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lyapcuda.arguments import described, proper_fraction
from lyapcuda.params.saved_state import require_entries

__all__ = ["RunningPeak"]


class RunningPeak:
    """A peak detector with decay: p ← max(x, decay·p + (1 − decay)·x), on the device.

    A learning rate c/p falls as soon as the curvature x rises, and comes back by at most 1/decay an
    update. Nothing waits for the device, and the peak keeps its place in memory: a CUDA graph may
    hold updates.

    Args:
        shape: of the values; each has a peak of its own.
        device: where they lie.
        decay: of the peak, an update; in (0, 1).

    Raises:
        ValueError: decay outside (0, 1).

    Example:
        >>> peak = RunningPeak(decay=0.9)
        >>> xs = (1.0, 5.0, float("nan"), -2.0, 1.0)
        >>> [round(float(peak.update(torch.tensor(x))), 3) for x in xs]
        [1.0, 5.0, 5.0, 5.0, 4.6]
    """

    def __init__(
        self,
        shape: tuple[int, ...] = (),
        device: torch.device | str | None = None,
        decay: float = 0.98,
    ) -> None:
        proper_fraction("decay", decay)
        self.decay = decay
        self._peak = torch.full(shape, math.nan, dtype=torch.float64, device=device)

    @property
    def value(self) -> Tensor:
        """The peaks, a copy (float64); NaN where no value has counted yet."""
        return self._peak.clone()

    @torch.no_grad()
    def update(self, x: Tensor) -> Tensor:
        """Takes values in, and returns `value`.

        Args:
            x: of the peaks' shape. What isn't finite, or isn't above 0, leaves its peak as it is.
        """
        x = x.to(self._peak)
        fallen = self.decay * self._peak + (1.0 - self.decay) * x
        counts = x.isfinite() & (x > 0)
        self._peak.copy_(torch.where(counts, torch.fmax(x, fallen), self._peak))
        return self.value

    def restart(self) -> None:
        """Forgets all values."""
        self._peak.fill_(math.nan)

    def state_dict(self) -> dict[str, Any]:
        """Returns the peaks, as a copy; the decay is a setting and isn't among them."""
        return {"peak": self.value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from saved peaks, into the same memory.

        Raises:
            ValueError: no state of a RunningPeak, or of another shape; nothing has changed then.
        """
        require_entries(state_dict, "peak", of="a RunningPeak")
        saved = state_dict["peak"]
        if not isinstance(saved, Tensor) or saved.shape != self._peak.shape:
            raise ValueError(
                f"state_dict: peak={described(saved)}: expected a tensor of shape "
                f"{tuple(self._peak.shape)}"
            )
        self._peak.copy_(saved)
