"""A parameter group of LyapunovSGD: what its settings are called, which are right, and its gain."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lyapcuda.arguments import fraction, non_negative, positive

__all__ = ["check_group", "gain_as_lr", "gain_to_device"]


def gain_as_lr(group: dict[str, Any]) -> dict[str, Any]:
    """The group with its "gain" as "lr", which is what schedulers act on."""
    if not isinstance(group, dict) or "gain" not in group:
        return group
    if "lr" in group:
        raise ValueError("params: a group with both gain and lr, which are the same")
    return {**{name: v for name, v in group.items() if name != "gain"}, "lr": group["gain"]}


def check_group(group: dict[str, Any], gain: str = "lr") -> None:
    """Raises a ValueError naming the setting and its value; ``gain``: what "lr" is called there."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or not lr.is_floating_point():
            raise ValueError(
                f"{gain}: expected a number or a floating tensor of one element, got shape "
                f"{tuple(lr.shape)} {lr.dtype}"
            )
    else:
        if lr is None:
            raise ValueError(f"{gain}=None: expected a positive finite number")
        non_negative(gain, lr)
    if group["max_lr"] is None:
        raise ValueError("max_lr=None: expected a positive finite number")
    positive("max_lr", group["max_lr"])
    non_negative("weight_decay", group["weight_decay"])
    fraction("momentum", group["momentum"])
    if group["nesterov"] and not group["momentum"]:
        raise ValueError("nesterov=True: needs a momentum above 0")


def gain_to_device(group: dict[str, Any], device: torch.device) -> None:
    """Where a group is capturable, a float64 tensor of its own on ``device`` holds its gain."""
    if group["capturable"]:
        group["lr"] = torch.as_tensor(group["lr"]).to(device, torch.float64, copy=True)
