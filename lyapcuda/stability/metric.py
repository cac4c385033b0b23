"""P^(-1/2) as flat buffers: the metric in which an optimizer sees the Hessian."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lyapcuda.arguments import described
from lyapcuda.params.flat import FlatLayout
from lyapcuda.params.wrapped_optimizers import unwrapped
from lyapcuda.stability.edge import Edge
from lyapcuda.stability.given import Given
from lyapcuda.stability.held import Held, held_by, several
from lyapcuda.stability.rules import Rule, known_rule, one_each, rule_of

__all__ = ["Metric", "Source", "unscale_"]

#: Where a diagonal P comes from: an optimizer, a function of a parameter, or a tensor a parameter.
Source = Optimizer | Callable[[Tensor], Tensor] | Sequence[Tensor]


def unscale_(vector: Tensor, scales: Tensor) -> None:
    """vector ← vector/S; 0 where S is."""
    vector.div_(scales).masked_fill_(scales == 0, 0.0)


class Metric:
    """S = P^(-1/2), so that S·H·S has the eigenvalues of P⁻¹H.

    Where rates or thresholds differ between an optimizer's groups, S holds them too: S² is then
    (rate/threshold)/(those of a reference)/P.

    Args:
        layout: the tracked parameters.
        source: what P is taken from.
        optimizer: whose rates and thresholds tell how near the edge, where ``source`` is no
            optimizer. One without a rule leaves the edge unknown.
        argument: what the user passed an optimizer as, for messages.
        without: what measures H itself, for messages: the name of the user's argument and a value.

    Raises:
        TypeError: an optimizer whose P isn't known; no optimizer, function or sequence.
        ValueError: ``maximize=True``; parameters that the optimizer doesn't hold, or holds in
            groups of different kinds; ``eps`` of 0; a sequence of another length.

    Example:
        >>> from lyapcuda.params.flat import FlatLayout
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.RMSprop([weight], lr=0.1, alpha=0.0)
        >>> weight.grad = torch.tensor([4.0, 0.25])
        >>> optimizer.step()
        >>> metric = Metric(FlatLayout([weight]), optimizer)
        >>> metric.refresh()
        >>> metric.buffers[0][:2]  # 1/√4 and 1/√0.25
        tensor([0.5000, 2.0000])
        >>> float(metric.edge_of(torch.tensor(10.0)))  # 0.1·10/2
        0.5
    """

    def __init__(
        self,
        layout: FlatLayout,
        source: Source,
        optimizer: Any = None,
        *,
        argument: str = "optimizer",
        without: str = "preconditioned=False",
    ) -> None:
        self._layout = layout
        self._argument = argument
        self._given: Given | None = None
        self._positions = {id(p.tensor): i for i, p in enumerate(layout.parameters)}
        if isinstance(unwrapped(source), Optimizer):
            optimizer, self._rule = source, rule_of(source, argument, without)
        else:
            self._given = Given(source, layout.parameters, without.partition("=")[0])
            self._rule = known_rule(optimizer)
        self._optimizer = unwrapped(optimizer) if self._rule is not None else None
        if self._rule is not None:
            self._check(self._rule)
        self._buffers: list[Tensor] = []
        self._views: list[Tensor] = []
        if self.trivial:
            self.refresh()  # SGD has a P from the start; whether it is trivial, its rates tell

    def _check(self, rule: Rule) -> None:
        """Raises ValueError where the optimizer's groups don't give one P."""
        parameters, held = self._layout.parameters, list(held_by(self._optimizer, self._positions))
        what = f"{self._argument}={described(self._optimizer)}: it"
        missing = set(range(len(parameters))).difference(*(part.positions for part in held))
        if missing:
            names = several([parameters[i].name for i in sorted(missing)])
            raise ValueError(
                f"{what} doesn't hold {names}, which "
                f"{'is' if len(missing) == 1 else 'are'} tracked: pass what it optimizes as params "
                "(params=optimizer)"
            )
        for part in held:
            name = parameters[part.positions[0]].name
            if part.group.get("maximize"):
                raise ValueError(
                    f"{what} has maximize=True for {name}: it climbs, so there is no edge; "
                    "minimise −loss instead"
                )
            for flag in rule.flags:
                mine, first = part.group.get(flag), held[0].group.get(flag)
                if mine != first:
                    other = parameters[held[0].positions[0]].name
                    raise ValueError(
                        f"{what} holds parameters in groups of different kinds: {flag}={first} for "
                        f"{other}, {flag}={mine} for {name}; track the ones or the others"
                    )
            least = min(torch.finfo(g.buffer_dtype).tiny for g in self._layout.groups)
            if self._given is None and part.group.get("eps", 1.0) < least:
                raise ValueError(
                    f"{what} has eps={part.group['eps']} for {name}: P would be 0 where a gradient "
                    "is; give it an eps above 0"
                )

    def _started(self) -> list[Held]:
        """The optimizer's groups, with those of their parameters that have a P."""
        found = [
            part.where(self._rule.started) for part in held_by(self._optimizer, self._positions)
        ]
        found = [part for part in found if part.positions]
        if not found:
            raise RuntimeError(
                f"{self._argument}={described(self._optimizer)}: it hasn't taken a step, so it has "
                "no P yet"
            )
        return found

    @property
    def ready(self) -> bool:
        """Whether there is a P: an optimizer's is there from its first step on."""
        return self._rule is None or any(
            self._rule.started(state)
            for part in held_by(self._optimizer, self._positions)
            for state in part.states
        )

    @property
    def trivial(self) -> bool:
        """Whether S is 1 everywhere, so that there are no buffers: SGD with one rate.

        A `refresh` that finds other rates in other groups makes it False for good.
        """
        return not self._buffers and self._given is None and self._rule.keyed is None

    @property
    def buffers(self) -> list[Tensor]:
        """S at the latest `refresh`, a flat buffer a group: 0 between the segments, and where a
        parameter has no P. None at all while `trivial`.
        """
        return self._buffers

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes P, rates and thresholds as they are at present. Nothing is read back.

        Raises:
            RuntimeError: before the optimizer's first step.
            TypeError, ValueError: what a user gave as P is none.
        """
        if self._rule is None:
            self._write([], None)
            return
        held = self._started()
        edge = Edge(self._rule, held, self._layout.device)
        if not (self.trivial and edge.uniform):
            self._write(held, edge)

    def _write(self, held: list[Held], edge: Edge | None) -> None:
        if not self._buffers:
            self._buffers = [group.new_buffer() for group in self._layout.groups]
            self._views = self._layout.views(self._buffers)
        if self._given is not None:
            self._given.write_(self._views)
        else:
            for part in held:
                self._rule.write_(part, [self._views[i] for i in part.positions])
        positions = range(len(self._views))
        if edge is not None:
            positions = [i for part in held for i in part.positions]
        views = [self._views[i] for i in positions]
        torch._foreach_rsqrt_(views)
        if edge is not None and not edge.uniform:
            torch._foreach_mul_(views, one_each(edge.factors.sqrt(), views))
        for i in set(range(len(self._views))).difference(positions):
            self._views[i].zero_()

    # --- the edge --------------------------------------------------------------------------------

    @property
    def has_edge(self) -> bool:
        """Whether rates and thresholds are known."""
        return self._rule is not None

    @property
    def reference_rate(self) -> Tensor:
        """The rate that `edge_of` multiplies with; 0-dim float64."""
        return self._present_edge().rate

    @property
    def reference_threshold(self) -> Tensor:
        """The threshold that `edge_of` divides by; 0-dim float64."""
        return self._present_edge().threshold

    def edge_of(self, h: Tensor) -> Tensor:
        """How near the edge of stability: rate·h/threshold at the present rates; 1 is the edge.

        Args:
            h: the largest eigenvalue of S·H·S; of any shape.

        Raises:
            RuntimeError: no optimizer with known rates and thresholds, or one before its first
                step.
        """
        return self._present_edge().of(h)

    def _present_edge(self) -> Edge:
        if self._rule is None:
            raise RuntimeError(
                "there is no edge without an optimizer whose rates and thresholds are known"
            )
        return Edge(self._rule, self._started(), self._layout.device)
