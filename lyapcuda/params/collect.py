"""Which parameters take part: what a user passed as `params`, checked and chosen by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lyapcuda import _C
from lyapcuda.arguments import described, non_negative
from lyapcuda.params.wrapped_optimizers import loss_decays, loss_groups

__all__ = [
    "BACKENDS",
    "BUFFER_DTYPES",
    "Parameters",
    "TrackedParameter",
    "chosen_by_name",
    "collect",
    "entries_of",
    "require_iterable",
    "select_by_name",
]

#: Device types that this build has ops for.
BACKENDS = tuple(_C.build_info()["backend"].split(", "))

#: What `params` may be, as in torch.optim: tensors, (name, tensor) pairs, or groups of either; a
#: module or an optimizer stands for its own.
Parameters = (
    Iterable[Tensor]
    | Iterable[tuple[str, Tensor]]
    | Iterable[Mapping[str, Any]]
    | nn.Module
    | Optimizer
)

#: Of the flat buffers, by the parameters' dtype.
BUFFER_DTYPES = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


@dataclass(frozen=True)
class TrackedParameter:
    """One parameter: its name for messages, the tensor, and the weight decay that acts on it."""

    name: str
    tensor: Tensor
    weight_decay: float = 0.0
    #: Which of the user's groups it came in; 0 where there are none.
    group: int = 0


def entries_of(params: Any) -> Any:
    """The parameters or groups that a module or an optimizer stands for; anything else as it is."""
    if isinstance(params, nn.Module):
        return params.named_parameters()
    if isinstance(getattr(params, "param_groups", None), list):
        return loss_groups(params)
    return params


def require_iterable(params: Any) -> None:
    """Raises a TypeError where `params` can't be gone through."""
    if isinstance(params, Tensor):
        raise TypeError("params: expected an iterable of tensors, got one tensor; pass [tensor]")
    if not isinstance(params, Iterable):
        raise TypeError(f"params={described(params)}: expected an iterable of tensors")


def collect(
    params: Parameters,
    weight_decay: float = 0.0,
    *,
    all_frozen: bool = False,
    optimizer: Optimizer | None = None,
) -> list[TrackedParameter]:
    """The parameters that take part: each once, frozen ones of any kind left out, the others
    checked.

    Args:
        params: tensors, (name, tensor) pairs, or mappings with a "params" entry (and perhaps a
            "weight_decay" of their own), as for torch.optim; a module, an optimizer.
        weight_decay: for parameters whose group has none.
        all_frozen: allow that none requires a gradient.
        optimizer: whose groups say what weight decay is part of the loss, whatever ``params`` say.

    Raises:
        TypeError: something that is no tensor, a trainable parameter of an integer or complex
            dtype, or a sparse one.
        ValueError: no parameter at all, none that requires a gradient, one without a shape yet, a
            non-leaf one, or one that is in several groups.
    """
    params = entries_of(params)
    require_iterable(params)
    found: dict[int, TrackedParameter] = {}
    group_of: dict[int, int] = {}
    decays = {} if optimizer is None else loss_decays(optimizer)
    seen = 0
    for number, entry in enumerate(params):
        group = entry if isinstance(entry, Mapping) else {"params": [entry]}
        if "params" not in group:
            raise ValueError(f"params: a group without 'params', only {described(list(group))}")
        members = group["params"]
        names = iter(group.get("param_names") or ())  # torch.optim keeps them apart
        for member in [members] if isinstance(members, Tensor) else members:
            name = next(names, f"parameter {seen}")
            name, tensor = member if isinstance(member, tuple) else (name, member)
            seen += 1
            decay = group.get("weight_decay", weight_decay)
            non_negative("weight_decay", decay)
            if _check_parameter(name, tensor):
                # As in torch.optim. Tied weights of one group (or of none) count once.
                if isinstance(entry, Mapping) and group_of.setdefault(id(tensor), number) != number:
                    raise ValueError(f"params: {name} appears in more than one group")
                of = number if isinstance(entry, Mapping) else 0
                decay = float(decays.get(id(tensor), decay))
                found.setdefault(id(tensor), TrackedParameter(name, tensor, decay, of))
    if not seen:
        used = " (a generator gives its tensors once)" if isinstance(params, Iterator) else ""
        raise ValueError(f"params: empty, there is nothing to measure{used}")
    if not found and not all_frozen:
        raise ValueError(f"params: none of the {seen} parameters requires a gradient")
    return list(found.values())


def chosen_by_name(
    params: Parameters,
    select: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None = None,
) -> Any:
    """`params` as they are, or those of them that are selected, without those that are excluded.

    Raises:
        TypeError, ValueError: as `select_by_name`; nothing is left.
    """
    if select is not None:
        params = select_by_name(params, select)
    if exclude is not None:
        params = select_by_name(params, exclude, argument="exclude")
        if not params:
            raise ValueError(f"exclude={described(exclude)}: no parameter is left")
    return params


def select_by_name(
    params: Parameters, select: str | Sequence[str], argument: str = "select"
) -> list[Any]:
    """Those of `params` whose names match: the same (name, tensor) pairs or groups, fewer of them.

    Args:
        params: (name, tensor) pairs, or groups of those.
        select: a shell pattern ("layer4.*"), or several.
        argument: "select", or "exclude": those whose names don't match.

    Raises:
        TypeError: parameters without names.
        ValueError: a pattern that matches none.
    """
    several = list(select) if isinstance(select, Iterable) else []
    patterns = [select] if isinstance(select, str) else several
    given = f"{argument}={described(select)}"
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"{given}: expected a pattern or a list of patterns")
    matched: set[str] = set()

    def chosen(member: Any) -> bool:
        if not isinstance(member, tuple):
            raise TypeError(f"{given}: needs names; pass model.named_parameters() as params")
        hits = {pattern for pattern in patterns if fnmatchcase(member[0], pattern)}
        matched.update(hits)
        return bool(hits) == (argument == "select")

    kept: list[Any] = []
    for entry in entries_of(params):
        if not isinstance(entry, Mapping):
            kept += [entry] if chosen(entry) else []
            continue
        members = entry["params"]
        members = [m for m in ([members] if isinstance(members, Tensor) else members) if chosen(m)]
        kept += [{**entry, "params": members}] if members else []
    for pattern in patterns:
        if pattern not in matched:
            raise ValueError(f"{argument}: no parameter's name matches {described(pattern)}")
    return kept


def _check_parameter(name: str, tensor: Any) -> bool:
    """Raises for what can't be tracked; False for a frozen parameter, which just takes no part."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"params: {name} is a {type(tensor).__name__}, expected a tensor")
    if is_lazy(tensor):
        raise ValueError(
            f"params: {name} has no shape yet: it belongs to a lazy module; run one forward pass "
            "first"
        )
    if not tensor.requires_grad:
        return False  # of whatever kind: quantised, integer, sparse
    what = f"params: {name} of shape {tuple(tensor.shape)}"
    if tensor.is_inference():
        raise ValueError(
            f"{what} was made inside of torch.inference_mode, where autograd doesn't see it:\nmake "
            "the model outside, or take copy.deepcopy(model) outside (pass model.parameters() of "
            "that)"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{what} has layout {tensor.layout}, expected a dense (strided) tensor")
    if tensor.dtype not in BUFFER_DTYPES:
        raise TypeError(
            f"{what} has dtype {tensor.dtype}, expected float32, float64, bfloat16 or float16"
        )
    if not tensor.is_leaf:
        raise ValueError(f"{what} is not a leaf: it was computed, so it never gets a .grad")
    if tensor.device.type not in BACKENDS:
        raise ValueError(f"{what} is on {tensor.device}; this build serves {', '.join(BACKENDS)}")
    layout = zip(tensor.stride(), tensor.shape, strict=True)
    if any(stride == 0 and size > 1 for stride, size in layout):
        raise ValueError(f"{what} is expanded: its elements share memory")
    return True
