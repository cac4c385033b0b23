"""What torch's optimizers do to a gradient: θ ← θ − rate·P⁻¹·(an average of gradients).

P is diagonal: √v + ε. At the onset of instability x = θ − θ* changes its sign at every step, with
the same size. The average of gradients is then a fixed multiple c of the present one, and
2x = rate·c·P⁻¹Hx: the largest eigenvalue of rate·P⁻¹H is at its threshold, 2/c.

Adam with β₁ has c = (1 − β₁)/(1 + β₁); see Cohen et al., "Adaptive Gradient Methods at the Edge of
Stability", arXiv 2207.14484. Decoupled weight decay shrinks θ by a part of rate·weight_decay
beside, which the thresholds leave out. So is the bias correction of Adam's average of gradients,
which makes its first steps longer (by 1.5 at the tenth, with β₁ = 0.9).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, optim

from lyapcuda.arguments import described
from lyapcuda.params.wrapped_optimizers import unwrapped
from lyapcuda.stability.held import Held

__all__ = ["Number", "Rule", "known_rule", "one_each", "rule_of"]

#: A number; or a tensor that isn't read back: 0-dim, or a vector with one a parameter.
Number = float | Tensor


def one_each(numbers: Tensor, views: Sequence[Tensor]) -> list[Any]:
    """A number for every view, as torch._foreach_ operations take them; nothing waits for a
    device.

    Args:
        numbers: as many as there are views.
        views: what the numbers multiply or divide.
    """
    if numbers.device.type == "cpu" and any(view.device.type != "cpu" for view in views):
        return numbers.tolist()  # numbers of the host: one kernel takes them all
    pairs = zip(numbers.unbind(), views, strict=True)
    return [number.to(view.device, non_blocking=True) for number, view in pairs]


class Rule:
    """What one kind of optimizer does to a gradient. This one is SGD, where P is 1.

    Attributes:
        flags: entries of a group that choose another formula.
        keyed: the entry of a parameter's state that tells that it had a step; None where P needs
            no state.
    """

    flags: tuple[str, ...] = ("nesterov",)
    keyed: str | None = None

    def started(self, state: Mapping[str, Any]) -> bool:
        """Whether a parameter has a P: it had a step, or needs none."""
        return self.keyed is None or self.keyed in state

    def write_(self, held: Held, views: list[Tensor]) -> None:
        """Writes each parameter's P; in the views' type, whatever type the states have.

        Args:
            held: the parameters; all have started.
            views: where to, shaped like this rank's part of each.
        """
        torch._foreach_zero_(views)
        torch._foreach_add_(views, 1.0)

    def rate(self, held: Held) -> Number:
        """What multiplies P⁻¹·(the average of gradients) in the latest step."""
        return held.group["lr"]

    def threshold(self, held: Held) -> Number:
        """The largest eigenvalue of rate·P⁻¹H from which a step grows."""
        group = held.group
        momentum = group["momentum"]
        if not momentum:
            return 2.0
        if group["nesterov"]:
            return (2 + 2 * momentum) / (1 + 2 * momentum)
        passed = 1 - group["dampening"]
        return (2 + 2 * momentum) / passed if passed else math.inf


class _Adaptive(Rule):
    """Optimizers that divide by √v + ε, with v an average of squared gradients."""

    flags = ()
    keyed = "exp_avg_sq"

    def squares(self, group: Mapping[str, Any]) -> str:
        """The entry of the state that holds v."""
        return self.keyed

    def mean(self, group: Mapping[str, Any]) -> str | None:
        """The entry whose square is taken off v, None for nothing."""
        return None

    def filled(self, held: Held) -> Number:
        """How much of an average over all time v has by now: it is divided by that."""
        return 1.0

    def write_(self, held: Held, views: list[Tensor]) -> None:
        torch._foreach_copy_(views, held.tensors(self.squares(held.group)))
        mean = self.mean(held.group)
        if mean is not None:
            for view, average in zip(views, held.tensors(mean), strict=True):
                average = average.to(view.dtype)
                view.addcmul_(average, average, value=-1.0)
        filled = self.filled(held)
        if isinstance(filled, Tensor):
            torch._foreach_div_(views, one_each(filled, views))
        torch._foreach_sqrt_(views)
        torch._foreach_add_(views, held.group["eps"])


class _Adam(_Adaptive):
    flags = ("amsgrad", "decoupled_weight_decay")

    def squares(self, group: Mapping[str, Any]) -> str:
        return "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"

    def filled(self, held: Held) -> Number:
        return 1 - held.group["betas"][1] ** held.numbers("step")

    def threshold(self, held: Held) -> Number:
        beta = held.group["betas"][0]
        return (2 + 2 * beta) / (1 - beta)


class _NAdam(_Adaptive):
    flags = ("decoupled_weight_decay",)

    def filled(self, held: Held) -> Number:
        return 1 - held.group["betas"][1] ** held.numbers("step")

    def threshold(self, held: Held) -> Number:
        group, step = held.group, held.numbers("step")
        beta = group["betas"][0]
        mu, mu_next = (
            beta * (1 - 0.5 * 0.96 ** (at * group["momentum_decay"])) for at in (step, step + 1)
        )
        product = held.numbers("mu_product")
        # Of the gradient, and of the average m, which is (1 − β₁)/(1 + β₁) of it.
        present = (1 - mu) / (1 - product)
        averaged = mu_next / (1 - product * mu_next) * ((1 - beta) / (1 + beta))
        return 2 / (present + averaged)


class _RMSprop(_Adaptive):
    flags = ("centered",)
    keyed = "square_avg"

    def mean(self, group: Mapping[str, Any]) -> str | None:
        return "grad_avg" if group["centered"] else None

    def threshold(self, held: Held) -> Number:
        return 2 + 2 * held.group["momentum"]


class _Adagrad(_Adaptive):
    keyed = "sum"

    def started(self, state: Mapping[str, Any]) -> bool:
        # Its states are there from the beginning. A step on the device, which would have to be
        # read back, comes from a saved state only: torch keeps this optimizer's on the CPU.
        step = state.get("step")
        return step is not None and (torch.as_tensor(step).device.type != "cpu" or step > 0)

    def rate(self, held: Held) -> Number:
        return held.group["lr"] / (1 + (held.numbers("step") - 1) * held.group["lr_decay"])

    def threshold(self, held: Held) -> Number:
        return 2.0


#: The first that an optimizer is an instance of. AdamW is an Adam.
_RULES: tuple[tuple[type, Rule], ...] = (
    (optim.SGD, Rule()),
    (optim.Adam, _Adam()),
    (optim.NAdam, _NAdam()),
    (optim.RMSprop, _RMSprop()),
    (optim.Adagrad, _Adagrad()),
)


def known_rule(optimizer: Any) -> Rule | None:
    """The rule of an optimizer, wrapped or not; None where there is none."""
    inner = unwrapped(optimizer)
    return next((rule for kind, rule in _RULES if isinstance(inner, kind)), None)


def rule_of(optimizer: Any, argument: str, without: str) -> Rule:
    """The rule of an optimizer.

    Args:
        optimizer: it, or a wrapper of it that is known.
        argument: what the user passed it as, for messages.
        without: what measures H itself, for messages: "preconditioned=False".

    Raises:
        TypeError: there is no rule for it.
    """
    rule = known_rule(optimizer)
    if rule is None:
        raise TypeError(
            f"{argument}={described(unwrapped(optimizer))}: it has no diagonal metric that is "
            f"known here: {without} measures H itself;\nor pass {without.partition('=')[0]}=a "
            "function of a parameter that returns its diagonal P"
        )
    return rule
