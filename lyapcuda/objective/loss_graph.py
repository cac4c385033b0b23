"""How finely a loss was computed, and how smooth it is, as far as autograd's graph shows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lyapcuda.objective import tf32
from lyapcuda.objective.backward_passes import listening

__all__ = [
    "COARSE",
    "Sighting",
    "graph_nodes",
    "has_kinks",
    "is_smooth",
    "leaves_of",
    "loss_epsilon",
    "precomputed",
    "unproven",
    "watching",
]

#: A larger ε than this is that of a 16-bit type, or of TF32.
COARSE = 1e-4
# Functions whose derivative jumps.
_KINKS = (
    *("Relu", "LeakyRelu", "Prelu", "Rrelu", "Threshold", "Hardtanh", "Hardswish", "Hardsigmoid"),
    *("MaxPool", "AdaptiveMaxPool", "FractionalMaxPool", "Maximum", "Minimum", "Abs", "L1Loss"),
)
# Functions whose derivative jumps or not, by their arguments: a mask's doesn't, that of a ReLU
# written by hand does.
_UNCLEAR = (
    *("Where", "Clamp", "MaskedFill", "Max", "Min", "Amax", "Amin", "Fmax", "Fmin", "Sort", "Topk"),
    *("Median", "Kthvalue", "Cummax", "Cummin", "Softshrink", "Hardshrink", "HingeEmbedding"),
    *("MultiMargin", "MultilabelMargin", "Aminmax", "Mode", "Nanmedian"),
)

# Functions of torch whose double backward is wrong (weight_norm treats a part as constant), or
# missing without an error wherever nothing else needs it.
_WRONG = ("WeightNormInterface", "CompiledFunction", "CheckpointFunction")


def graph_nodes(loss: Any) -> Iterator[Any]:
    """Every node of autograd's graph of a loss, or of an edge (none, where it has no graph)."""
    start = loss.node if isinstance(loss, GradientEdge) else getattr(loss, "grad_fn", None)
    nodes, seen = [start] if start is not None else [], set()
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        nodes += [following for following, _ in node.next_functions if following is not None]


def leaves_of(loss: Any) -> list[Tensor]:
    """The tensors that a backward pass of a loss accumulates a gradient in."""
    return [n.variable for n in graph_nodes(loss) if hasattr(n, "variable") and _is_leaf(n)]


def _is_leaf(node: Any) -> bool:
    return node.name().endswith("AccumulateGrad")


def precomputed(
    loss: Any,
    parameters: Sequence[Tensor],
    start: int,
    earlier: Sequence[Tensor] | None = None,
) -> bool:
    """Whether a part of a loss that depends on the parameters was computed before.

    Args:
        start: the sequence number that autograd had for this thread's next function.
        earlier: tensors that were there before; only what they were computed by then counts. For
            graphs that other threads have a share in, which have numbers of their own: of several
            devices, and of gradients on an accelerator, where each device has a thread.
    """
    there = None if earlier is None else {n for tensor in earlier for n in graph_nodes(tensor)}
    nodes = [
        n
        for n in graph_nodes(loss)
        if not _is_leaf(n) and (n._sequence_nr() < start if there is None else n in there)
    ]
    ours, seen = {id(p) for p in parameters}, set(nodes)
    while nodes:
        for following, _ in nodes.pop().next_functions:
            if following is None or following in seen:
                continue
            if _is_leaf(following) and id(following.variable) in ours:
                return True
            seen.add(following)
            nodes.append(following)
    return False


def loss_epsilon(loss: Any) -> float:
    """Machine epsilon of the coarsest type that a loss was computed in; 0.0 where nothing shows.

    Under autocast that is bfloat16 or float16 beside float32 parameters; on CUDA it is TF32 where
    products take it (`lyapcuda.objective.tf32`). Seen are the results of the forward pass's
    functions and what compiled parts saved for the backward pass (before that has freed it); not
    which 16-bit types a checkpointed part or a custom function used inside. On CUDA what is hidden
    counts as products, which take TF32 where it is allowed.
    """
    coarsest = 0.0
    for node in graph_nodes(loss):
        dtypes = [made.dtype for made in getattr(node, "_input_metadata", ())]
        if node.name().startswith("CompiledFunction"):
            try:
                dtypes += [saved.dtype for saved in node.saved_tensors]
            except RuntimeError:  # freed by a backward() of the closure's own
                pass
        floats = (torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)
        coarsest = max((coarsest, tf32.node_epsilon(node), *floats))
    return coarsest


def has_kinks(loss: Any) -> bool:
    """Whether the loss was computed with functions whose derivative jumps, as far as one can see:
    autograd's graph doesn't show the inside of compiled or checkpointed parts.
    """
    return any(node.name().startswith(_KINKS) for node in graph_nodes(loss))


def _shows_all(nodes: Sequence[Any]) -> bool:
    """Whether nodes hide nothing: no compiled or checkpointed part, no custom function, nothing of
    which it depends on the numbers whether its derivative jumps.
    """
    for node in nodes:
        name = node.name()
        custom = isinstance(node, torch.autograd.function.BackwardCFunction)
        unclear = name.startswith(_UNCLEAR) and not name.startswith(_KINKS)
        if unclear or custom and not name.startswith(tf32.EMPTY):
            return False
    return bool(nodes)


def is_smooth(loss: Any) -> bool:
    """Whether the graph shows the whole of the loss, and no function whose derivative jumps: not
    where a compiled or checkpointed part or a custom function hides what is inside.
    """
    return _shows_all(list(graph_nodes(loss))) and not has_kinks(loss)


def unproven(loss: Any) -> tuple[str | None, str | None]:
    """The name of a function in the loss whose double backward is known to be wrong, and of one of
    the user's own, of which it isn't known to be right; None where the graph shows none.
    """
    wrong = custom = None
    for node in graph_nodes(loss):
        name = node.name()
        if name.startswith(_WRONG):
            wrong = name
        elif isinstance(node, torch.autograd.function.BackwardCFunction):
            custom = custom if name.startswith(tf32.EMPTY) else name
    return wrong, custom


@dataclass
class Sighting:
    """What was seen of a loss in its backward passes.

    Attributes:
        epsilon: of the coarsest type, as of `loss_epsilon`.
        smooth: all of it was seen, and no kinks.
        shows_all: all of it was seen, kinks or none.
    """

    epsilon: float = 0.0
    smooth: bool = False
    shows_all: bool = False

    def begin(self) -> None:
        """Nothing was seen yet that speaks against a smooth loss in full precision."""
        self.epsilon, self.smooth, self.shows_all = 0.0, True, True

    def see(self, loss: Any) -> None:
        """Adds what the graph of a loss shows."""
        whole = _shows_all(list(graph_nodes(loss)))
        self.epsilon = max(self.epsilon, loss_epsilon(loss))
        self.shows_all = self.shows_all and whole
        self.smooth = self.smooth and whole and not has_kinks(loss)


@dataclass(eq=False)
class _Watcher:
    sighting: Sighting
    roots: int = 0

    def before(self, roots: Sequence[Any]) -> None:
        for loss in roots:
            self.roots += 1
            self.sighting.see(loss)

    def after(self, *, failed: bool = False) -> None:
        pass


@contextmanager
def watching(sighting: Sighting) -> Iterator[None]:
    """Inside, every backward pass adds what its graph shows to ``sighting``.

    The graph is seen before it is freed, whatever the closure returns: a float, a detached loss. So
    are the inner graphs of reentrant checkpoints. Another thread's passes are taken for ours.
    """
    watcher = _Watcher(sighting)
    sighting.begin()
    with listening(watcher):
        yield
    if not watcher.roots:  # gradients of torch.autograd.grad's, or another engine's
        sighting.smooth = sighting.shows_all = False
