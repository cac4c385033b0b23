"""Optimizers in the wrappers of training frameworks: which to attach to, and what they optimize."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import optim
from torch.optim import Optimizer

from lyapcuda.arguments import described

__all__ = ["attachable", "loss_decays", "loss_groups", "unwrapped"]

#: Wrappers whose ``step(closure)`` hands the closure to the optimizer inside, their `.optimizer`.
#: Accelerate's own alone: what it derives for DeepSpeed and Megatron doesn't step it.
_EXACTLY = ("accelerate.optimizer.AcceleratedOptimizer",)
#: ... and classes derived from these, which Lightning makes as it wraps.
_DERIVED = (
    "lightning.pytorch.core.optimizer.LightningOptimizer",
    "pytorch_lightning.core.optimizer.LightningOptimizer",
    "lightning.fabric.wrappers._FabricOptimizer",
    "lightning_fabric.wrappers._FabricOptimizer",
)

#: Optimizers that add weight_decay·θ to the gradient: it belongs to the loss, ½·wd·‖θ‖². A group's
#: "decoupled_weight_decay" says otherwise (AdamW).
_COUPLED = (
    *(optim.SGD, optim.Adam, optim.NAdam, optim.RAdam, optim.Adamax, optim.Adagrad),
    *(optim.Adadelta, optim.RMSprop, optim.ASGD),
)
#: Optimizers that shrink θ apart from the gradient.
_DECOUPLED = (optim.AdamW, optim.Adafactor, optim.Muon)
#: What groups call it where it is apart from the gradient: torch's, pytorch_optimizer's.
_FLAGS = ("decoupled_weight_decay", "weight_decouple")


def _names(kinds: tuple[type, ...]) -> list[str]:
    return [f"{kind.__module__}.{kind.__qualname__}" for kind in kinds]


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside of wrappers that are known to hand a closure on to it."""
    kind = type(optimizer)
    while set(_names((kind,))) & {*_EXACTLY} or set(_names(kind.__mro__)) & {*_DERIVED}:
        optimizer = optimizer.optimizer
        kind = type(optimizer)
    return optimizer


def attachable(optimizer: Any) -> Optimizer:
    """The optimizer whose step hooks see every ``optimizer.step(closure)``, wrappers undone.

    Raises:
        TypeError: it is none, or a wrapper that takes no step hooks.
    """
    inner = unwrapped(optimizer)
    # A wrapper that never called Optimizer.__init__ has none; one with hooks of its own (timm's
    # Lookahead) may not call them before its first zero_grad().
    if isinstance(inner, Optimizer) and hasattr(inner, "_optimizer_step_pre_hooks"):
        inner._patch_step_function()
        return inner
    name = _inside(inner)
    if name is None:
        raise TypeError(
            f"optimizer={described(inner)}: expected a torch.optim.Optimizer to attach to"
        )
    raise TypeError(
        f"optimizer={described(inner)}: expected a torch.optim.Optimizer with step hooks, which "
        f"this isn't:\nattach to its `.{name}` ({type(getattr(inner, name)).__name__}); where that "
        "isn't stepped with a closure,\ncall tracker.backward(closure) in the loop instead"
    )


def _inside(wrapper: Any) -> str | None:
    """The attribute of a wrapper that is its optimizer."""
    if isinstance(wrapper, type):
        return None
    held = {"optimizer": getattr(wrapper, "optimizer", None), **getattr(wrapper, "__dict__", {})}
    return next((name for name, value in held.items() if isinstance(value, Optimizer)), None)


def loss_groups(optimizer: Any) -> list[dict[str, Any]]:
    """An optimizer's groups, with names where it has them, and the weight decay of the loss.

    Decoupled weight decay (AdamW) isn't a part of the loss: 0 there.

    Raises:
        ValueError: a weight decay of which one can't tell.
    """
    inner = unwrapped(optimizer)
    inner = getattr(inner, "_steps_along", inner)  # CDAT's says what its weight decay is
    return [_loss_group(inner, group) for group in optimizer.param_groups]


def loss_decays(optimizer: Any) -> dict[int, float]:
    """The weight decay of the loss, by the id of the parameter that it acts on.

    Raises:
        ValueError: as `loss_groups`.
    """
    inner = unwrapped(optimizer)
    return {
        id(p): _loss_group(inner, group)["weight_decay"]
        for group in inner.param_groups
        for p in group["params"]
    }


def _loss_group(optimizer: Any, group: Mapping[str, Any]) -> dict[str, Any]:
    members, names = group["params"], group.get("param_names")
    decay = group.get("weight_decay", 0.0)
    flags = [bool(group[flag]) for flag in _FLAGS if flag in group]
    if any(flags) or isinstance(optimizer, _DECOUPLED):
        decay = 0.0
    elif decay and (group.get("maximize") or not (flags or _is_coupled(optimizer))):
        raise ValueError(
            f"params={described(optimizer)}: can't tell whether its weight_decay belongs to the "
            "loss: pass optimizer.param_groups\nwhere it does (½·weight_decay·‖θ‖²), "
            "model.named_parameters() where it doesn't"
        )
    if names is not None:
        members = list(zip(names, members, strict=True))
    return {"params": members, "weight_decay": decay}


def _is_coupled(optimizer: Any) -> bool:
    # (LyapunovSGD says so itself.)
    return isinstance(optimizer, _COUPLED) or getattr(optimizer, "_decays_the_loss", False)
