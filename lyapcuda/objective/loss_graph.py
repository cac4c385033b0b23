"""How finely a loss was computed, and how smooth it is, as far as autograd's graph shows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lyapcuda.objective import tf32

__all__ = ["COARSE", "graph_nodes", "has_kinks", "is_smooth", "loss_epsilon", "unproven"]

#: A larger ε than this is that of a 16-bit type, or of TF32.
COARSE = 1e-4
# Functions whose derivative jumps.
_KINKS = (
    *("Relu", "LeakyRelu", "Prelu", "Rrelu", "Threshold", "Hardtanh", "Hardswish", "Hardsigmoid"),
    *("MaxPool", "AdaptiveMaxPool", "FractionalMaxPool", "Maximum", "Minimum", "Abs", "L1Loss"),
)

# Functions of torch whose double backward is wrong (weight_norm treats a part as constant).
_WRONG = ("WeightNormInterface",)


def graph_nodes(loss: Any) -> Iterator[Any]:
    """Every node of autograd's graph of a loss (none, where it is no tensor or has no graph)."""
    start = getattr(loss, "grad_fn", None)
    nodes, seen = [start] if start is not None else [], set()
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        nodes += [following for following, _ in node.next_functions if following is not None]


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


def is_smooth(loss: Any) -> bool:
    """Whether the graph shows the whole of the loss, and no function whose derivative jumps: not
    where a compiled or checkpointed part or a custom function hides what is inside.
    """
    nodes = list(graph_nodes(loss))
    hidden = any(isinstance(node, torch.autograd.function.BackwardCFunction) for node in nodes)
    return bool(nodes) and not hidden and not has_kinks(loss)


def unproven(loss: Any) -> tuple[str | None, str | None]:
    """The name of a function in the loss whose double backward is known to be wrong, and of one of
    the user's own, of which it isn't known to be right; None where the graph shows none.
    """
    wrong = custom = None
    for node in graph_nodes(loss):
        if node.name().startswith(_WRONG):
            wrong = node.name()
        elif isinstance(node, torch.autograd.function.BackwardCFunction):
            custom = node.name()
    return wrong, custom
