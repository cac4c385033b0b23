"""Whether a loss is a sum or a mean, and of how many numbers, as the end of its graph shows it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lyapcuda.objective.loss_graph import watching

__all__ = ["COUNTED", "SEVERAL", "Reading", "Term", "loss_terms", "reading"]

#: The losses of torch that know how much they counted: cross_entropy's and nll_loss's.
COUNTED = ("NllLoss",)
# Functions of one tensor that leave its one number what it is, up to its sign and type.
_SAME = (
    *("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "ToCopy", "Clone", "Alias"),
    *("Neg", "Expand", "Permute", "AsStrided"),
)
_MOST = 256
#: Stands for a loss of several backward passes.
SEVERAL = "several"


@dataclass(frozen=True)
class Term:
    """A part of a loss.

    Attributes:
        name: of the function that made it.
        kind: "mean"; "sum"; "ratio": a sum that was divided by constants; "unknown".
        count: what a mean or a ratio was divided by, None where that doesn't show. On a device it
            is a 0-dim tensor.
        scaled: a mean that was multiplied or divided by constants.
    """

    name: str
    kind: str
    count: float | Tensor | None = None
    scaled: bool = False

    @property
    def signature(self) -> tuple[str, str, bool]:
        return self.name, self.kind, self.scaled


def loss_terms(loss: Any, seen: dict[Any, float | Tensor] | None = None) -> tuple[Term, ...]:
    """The terms that a loss was added up from; one of them, "unknown", where nothing shows.

    Args:
        loss: what a closure returned.
        seen: counts by their node, of graphs that were freed since; those of this one are added.
    """
    start, seen = getattr(loss, "grad_fn", None), {} if seen is None else seen
    found: list[Term] = []
    # Nodes to look at, and what they were divided by: None where they weren't, NaN where that
    # doesn't show.
    nodes: list[tuple[Any, Any]] = [] if start is None else [(start, None)]
    while nodes:
        node, divisor = nodes.pop()
        if len(found) + len(nodes) > _MOST:
            return (Term("many", "unknown"),)
        name = node.name().partition("Backward")[0]
        inputs = [f for f, _ in node.next_functions if f is not None]
        if name in _SAME and len(inputs) == 1:
            nodes.append((inputs[0], divisor))
        elif name in ("Add", "Sub", "Rsub") and inputs:
            nodes += [(f, divisor) for f in inputs]
        elif name in ("Mul", "Div") and len(inputs) == 1:
            nodes.append((inputs[0], _divided(name, node, divisor, seen)))
        else:
            found.append(_term(name, node, divisor, seen))
    return tuple(found) or (Term("none", "unknown"),)


def _divided(name: str, node: Any, divisor: Any, seen: dict) -> float | Tensor:
    """The divisor, together with the constant that a node divides or multiplies by."""
    first = node.next_functions[0][0] is not None
    if name == "Div" and not first:  # a constant divided by the loss
        return math.nan
    by = _kept(node, "_saved_other" if first else "_saved_self", seen)
    if by is None or isinstance(by, float) and (by == 0.0 or math.isinf(by)) and name == "Mul":
        return math.nan
    by = by if name == "Div" else 1.0 / by
    return by if divisor is None else by * divisor


def _term(name: str, node: Any, divisor: Any, seen: dict) -> Term:
    reduction, scaled = getattr(node, "_saved_reduction", None), divisor is not None
    if (reduction == 2 or name in ("Sum", "Nansum")) and scaled:
        hidden = isinstance(divisor, float) and math.isnan(divisor)
        return Term(name, "ratio", None if hidden else abs(divisor))
    if reduction == 2 or name in ("Sum", "Nansum"):
        return Term(name, "sum")
    if reduction == 1 and name.startswith(COUNTED):
        count = _kept(node, "_saved_total_weight", seen)
        return Term(name, "mean" if count is not None else "unknown", count, scaled)
    if reduction == 1 or name == "Mean":
        count = _numbers(node)
        return Term(name, "mean" if count is not None else "unknown", count, scaled)
    return Term(name, "unknown", None, scaled)


def _numbers(node: Any) -> float | None:
    """How many numbers the function was given."""
    function, which = node.next_functions[0]
    try:
        return float(math.prod(function._input_metadata[which].shape))
    except (AttributeError, IndexError, TypeError, ValueError, RuntimeError):
        return None


def _kept(node: Any, name: str, seen: dict[Any, float | Tensor]) -> float | Tensor | None:
    """A number that a node has saved for its backward pass, which frees it."""
    if node in seen:
        return seen[node]
    try:
        value = getattr(node, name)
    except (AttributeError, RuntimeError):  # freed
        return None
    if isinstance(value, Tensor):
        if value.numel() != 1:
            return None
        value = value.detach().reshape(())
        value = value if value.device.type != "cpu" else float(value)
    seen[node] = value if isinstance(value, Tensor) else float(value)
    return seen[node]


@dataclass
class Reading:
    """What was seen while a closure ran.

    Attributes:
        roots: the terms of what it called ``backward()`` on.
    """

    roots: list[tuple[Term, ...]] = field(default_factory=list)
    _counts: dict[Any, float | Tensor] = field(default_factory=dict)
    # `watching` takes a `Sighting`, of which it sets these.
    smooth: bool = False
    shows_all: bool = False

    def begin(self) -> None:
        self.roots.clear()

    def see(self, loss: Any) -> None:
        """Reads a graph that is about to be freed."""
        self.roots.append(loss_terms(loss, self._counts))

    def terms(self, loss: Any) -> tuple[Term, ...]:
        """Those of what the closure returned, or of the one backward pass that it took itself."""
        if getattr(loss, "grad_fn", None) is not None and len(self.roots) <= 1:
            found = loss_terms(loss, self._counts)
            if len(self.roots) != 1 or any(term.kind != "unknown" for term in found):
                return found
        if len(self.roots) > 1:
            return (Term(SEVERAL, "unknown"),)
        return self.roots[0] if self.roots else (Term("none", "unknown"),)


@contextmanager
def reading() -> Iterator[Reading]:
    """Inside, backward passes are read before they free their graphs."""
    found = Reading()
    with watching(found):
        yield found
