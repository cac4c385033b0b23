"""What all trainers need: a tracker of a model and its optimizer, and its readings by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lyapcuda.log import PREFIX
from lyapcuda.stability.rules import known_rule
from lyapcuda.tracker import CurvatureTracker

__all__ = ["PREFIX", "readings", "tracker_of"]


def tracker_of(model: nn.Module, optimizer: Any, options: dict[str, Any]) -> CurvatureTracker:
    """Returns a tracker of the model's trainable parameters, as their optimizer sees them.

    Args:
        model: the module that trains.
        optimizer: its optimizer, wrapped or not. One whose preconditioner isn't known is left out:
            the eigenvalues are then those of the Hessian itself, and there is no edge.
        options: of `CurvatureTracker`; an "optimizer" among them stands.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if "optimizer" not in options and known_rule(optimizer) is not None:
        options = {**options, "optimizer": optimizer}
    return CurvatureTracker(trained, **options)


def readings(tracker: CurvatureTracker, prefix: str = PREFIX) -> dict[str, Tensor]:
    """Returns what a step of training logs, by name: 0-dim tensors on the device, not waited for.

    Args:
        tracker: h, its interval and, where there is one, the edge are read.
        prefix: of the names. With k > 1 they are ``h_0``, ``h_1``, …

    Example:
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> tracker = CurvatureTracker([p])
        >>> _ = tracker.step(lambda: p.square().sum())
        >>> {name: round(float(value), 3) for name, value in readings(tracker).items()}
        {'curvature/h': 2.0, 'curvature/h_low': 2.0, 'curvature/h_high': 2.0}
    """
    h, interval = tracker.h, tracker.interval
    found = {"h": h, "h_low": interval[..., 0], "h_high": interval[..., 1]}
    if tracker.has_edge:
        found["edge"] = tracker.edge
    named: dict[str, Tensor] = {}
    for name, value in found.items():
        if value.dim() == 0:
            named[prefix + name] = value
        else:
            named |= {f"{prefix}{name}_{i}": one for i, one in enumerate(value.unbind(0))}
    return named
