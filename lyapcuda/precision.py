"""How finely a loss was computed, as far as autograd's graph shows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["COARSE", "graph_nodes", "loss_epsilon"]

#: Types with a larger ε than this are 16-bit.
COARSE = 1e-4


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

    Under autocast that is bfloat16 or float16 beside float32 parameters. Seen are the results of
    the forward pass's functions and what compiled parts saved for the backward pass (before that
    has freed it); not what a checkpointed part or a custom function did inside.
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
        coarsest = max((coarsest, *floats))
    return coarsest
