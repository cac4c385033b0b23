"""A tracker's state_dict: all that its next step depends on, taken over whole or not at all."""

from __future__ import annotations

from typing import Any

from lyapcuda.arguments import whole
from lyapcuda.dynamics.benettin import Benettin
from lyapcuda.dynamics.separation import Separation
from lyapcuda.params.saved_state import require_entries
from lyapcuda.readings import Readings

__all__ = ["TrackerState"]

_FORMAT = 4


class TrackerState(Readings):
    """What a tracker saves and loads, besides what it reads."""

    estimate: str
    _ends: list[tuple[str, int]]
    #: ε of the coarsest type seen in the loss; None once Δq has been adapted to it.
    _coarsest: float | None

    def _started(self) -> list[Separation | Benettin]:
        """The separations, made by now."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on; loads with
        ``torch.load(weights_only=True)``.
        """
        return {
            "format": _FORMAT,
            **self._kind(),
            "calls": self._calls,
            "separations": [separation.state_dict() for separation in self._separations],
            "history": None if self._history is None else self._history.state_dict(),
        }

    def _kind(self) -> dict[str, Any]:
        """What has to agree between a saved state and the tracker that takes it over."""
        return {
            "k": self.k,
            "which": self.which,
            "estimate": self.estimate,
            "sizes": [list(p.tensor.shape) for p in self._layout.parameters],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the saved tracker was.

        Raises:
            ValueError: it isn't a tracker's, or is of other parameters, another k, ``which`` or
                ``estimate``; nothing has changed then.
        """
        if not isinstance(state_dict, dict) or state_dict.get("format") != _FORMAT:
            raise ValueError("state_dict: not the state of a CurvatureTracker of this version")
        for name, mine in self._kind().items():
            saved = state_dict.get(name)
            if saved != mine:
                raise ValueError(f"state_dict: {name} is {saved!r}, but this tracker's is {mine!r}")
        require_entries(state_dict, "calls", "separations", "history")
        saved, calls = state_dict["separations"], state_dict["calls"]
        whole("state_dict: calls", calls, 0)
        if not isinstance(saved, list) or len(saved) not in (0, len(self._ends)):
            raise ValueError(
                f"state_dict: separations={saved!r:.40}: which={self.which!r} has {len(self._ends)}"
            )
        history = state_dict["history"]
        if self._history is not None and history is not None:
            self._history.check(history)
        present = self._separations
        before = [separation.state_dict() for separation in present]
        try:
            for separation, values in zip(self._started() if saved else [], saved, strict=True):
                separation.load_state_dict(values)
        except BaseException:
            for separation, values in zip(present, before, strict=True):
                separation.load_state_dict(values)
            self._separations = present
            raise
        if not saved:
            self._separations = []
        self._coarsest = None if saved else 0.0
        self._calls = int(calls)
        if self._history is not None:
            self._history.restart(self._calls)
            if history is not None:
                self._history.load_state_dict(history)
