"""Products with the Hessian at θ out of the graph of the training gradient, by double backward.

One forward pass gives the loss, the gradient that training goes on with, and every product. That
gradient has to be what ``loss.backward()`` leaves, to the bit. Most functions of torch compute the
same whether or not autograd records their backward pass; SiLU, Mish, GroupNorm and RNNs don't. So
the first few times that a graph is seen, a ``backward()`` of its own is run beside it. Where the
two differ, it is run every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lyapcuda.objective.double_backward import DoubleBackwardError, GradientGraph
from lyapcuda.objective.evaluator import (
    NO_GRADIENT,
    Add,
    Closure,
    Evaluator,
    Further,
    Gradients,
    check_same,
    copied,
    moved,
)
from lyapcuda.objective.heard_passes import Marks
from lyapcuda.objective.interrupts import allowed
from lyapcuda.objective.isolation import Snapshot, States, TrackedGradients
from lyapcuda.objective.loss_graph import graph_nodes, unproven
from lyapcuda.objective.pointing import aside
from lyapcuda.objective.same_function import Fingerprint

__all__ = ["ONE_PROCESS", "ExactEvaluator"]

#: Why there are no exact products on several ranks.
ONE_PROCESS = (
    "mode='exact': DistributedDataParallel, FSDP2 and other process groups average first "
    "gradients alone, so every rank would have a Hessian of its own; mode='difference' works there"
)
#: How often both gradients of a graph have to agree, until one is enough.
_AGREEMENTS = 3


class ExactEvaluator(Evaluator):
    """An `Evaluator` that takes exact products H·q_j in place of gradients at θ + q_j.

    Evaluations without copies are the plain ones.

    Args:
        parameters, names, modules: as for `Evaluator`.

    Raises:
        NotImplementedError: a DistributedDataParallel is among the modules.

    Example:
        >>> p = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> found = ExactEvaluator([p], ["p"]).gradients(lambda: (p**3).sum(), [[torch.ones(2)]])
        >>> found.g0[0].tolist(), found.copies[0][0].tolist(), p.grad
        ([3.0, 12.0], [6.0, 12.0], None)
    """

    def __init__(
        self, parameters: Sequence[Tensor], names: Sequence[str], modules: Sequence[nn.Module] = ()
    ) -> None:
        if any(isinstance(module, DistributedDataParallel) for module in modules):
            raise NotImplementedError(ONE_PROCESS)
        super().__init__(parameters, names, modules)
        self._seen = _Seen(parameters, names)

    def gradients(
        self,
        closure: Closure,
        copies: Sequence[Sequence[Tensor]] = (),
        *,
        leave: bool = False,
        add: Add = False,
        check: bool = False,
        further: Further | None = None,
    ) -> Gradients:
        """Evaluates the closure once, at θ, and takes the product with every one of ``copies``.

        Args:
            closure: returns the loss; must not call ``backward()`` itself.
            copies: vectors of the parameters' shapes, dtypes and devices; come back holding H times
                them.
            leave, add, check, further: as for `Evaluator.gradients`; the probe takes vectors too.

        Raises:
            DoubleBackwardError: the closure called ``backward()``, parameters have hooks, or double
                backward fails or is known to be wrong. Everything is as it was then.
            TypeError, ValueError, RuntimeError: as `Evaluator.gradients`.
        """
        if not copies:
            return super().gradients(closure, leave=leave, add=add, check=check, further=further)
        before = self.snapshot(written=not self.knows(closure))
        # The closure leaves backward() to us.
        kept = TrackedGradients(self.parameters, self.modules) if add is True and leave else None
        marks = Marks(self.parameters, kept) if kept is not None and kept.any else None
        try:
            once = None
            if check:
                with aside(), self.looking(closure, before, again=True):
                    self.evaluate(closure, before)
                before.restore()
                once = self._checked(closure, before)
            training = _Training(self._seen, self.modules, before)
            with allowed(), self.looking(closure, before):
                marked = closure if marks is None else marks.around(closure)
                graph = GradientGraph(marked, self.parameters, training.take, training.look)
            g0 = [p.grad for p in self.parameters]
            if all(g is None for g in g0):
                raise ValueError(NO_GRADIENT)
            self._check_dense(g0)
            if once is not None:
                check_same(once, Fingerprint.of(graph.loss, g0), self.manner(closure).epsilon)
            found = []
            for number, copy in enumerate(copies, 1):
                with allowed():
                    last = number == len(copies) and further is None
                    parts = graph.parts(copy, keep=not last)
                found.append(moved(parts, copy))
                del parts
            if self.is_scaled:
                g0 = copied(g0)
                for parts in (*found, g0):
                    self.scale_(parts)
            result = Gradients(g0, found, graph.loss, [graph.loss] * len(copies))
            if further is not None:
                further(result, _ExactProbe(self, graph, g0))
            training.after.restore()
        except BaseException:
            before.restore()
            before.restore_gradients()
            raise
        if not leave:
            before.restore()
            before.restore_gradients()
        if marks is not None and not kept.cleared:
            return replace(result, leave=kept.accumulate)
        return result


class _ExactProbe:
    """Takes further products out of a graph, from which there is nothing to subtract.

    Args:
        evaluator: that scales.
        graph: which it keeps.
        g0: the gradients at θ.
    """

    def __init__(self, evaluator: Evaluator, graph: GradientGraph, g0: list[Tensor | None]) -> None:
        self._evaluator, self._graph, self._g0 = evaluator, graph, g0
        self.gradients: list[Tensor | None] = []

    def gradient(self) -> list[Tensor | None]:
        return self._g0

    def __call__(self, copy: Sequence[Tensor]) -> Tensor:
        """Returns the loss; ``copy`` comes back holding H times it."""
        with allowed():
            parts = self._graph.parts(copy, keep=True)
        self.gradients = moved(parts, copy)
        if self._evaluator.is_scaled:
            self._evaluator.scale_(self.gradients)
        return self._graph.loss


@dataclass
class _Seen:
    """What was seen of the graphs so far, each told by the names of its functions."""

    parameters: Sequence[Tensor]
    names: Sequence[str]
    #: How often both gradients of a graph agreed; below 0: they don't.
    agreed: dict[int, int] = field(default_factory=dict)

    def judge(self, loss: Tensor) -> tuple[int, list[Tensor]]:
        """Returns which graph this is, and its leaves that aren't tracked.

        Raises:
            DoubleBackwardError: its products can't be taken, or would be wrong.
        """
        tracked, functions, others = {id(p) for p in self.parameters}, [], []
        for node in graph_nodes(loss):
            functions.append(node.name())
            if functions[-1].endswith("AccumulateGrad") and id(node.variable) not in tracked:
                others.append(node.variable)
        for leaf in (*self.parameters, *others):
            if leaf._backward_hooks or leaf._post_accumulate_grad_hooks:
                raise DoubleBackwardError(
                    f"mode='exact': {self._name(leaf)} has hooks (register_hook, "
                    "register_post_accumulate_grad_hook); exact products are those of the loss "
                    "without them. mode='difference' takes gradients as the hooks leave them"
                )
        key = hash(tuple(functions))
        if key not in self.agreed:
            self._believe(loss)
            self.agreed[key] = 0
        return key, others

    def _believe(self, loss: Tensor) -> None:
        wrong, custom = unproven(loss)
        if wrong is not None:
            raise DoubleBackwardError(
                f"mode='exact': the double backward of {wrong} is wrong in torch, or missing; "
                "gradient differences (mode='difference') don't need it"
            )
        if custom is not None:
            # A kernel of the user's own, which autograd sees nothing of, would count as constant.
            raise DoubleBackwardError(
                f"mode='exact': whether the double backward of {custom}, a custom function, is "
                "right can't be seen here; HessianOperator compares it with gradient differences, "
                "which mode='difference' takes"
            )

    def _name(self, leaf: Tensor) -> str:
        names = (n for p, n in zip(self.parameters, self.names, strict=True) if p is leaf)
        return next(names, "a parameter that isn't tracked")


@dataclass
class _Training:
    """Leaves the gradient of one evaluation in ``.grad``, as ``loss.backward()`` would."""

    seen: _Seen
    modules: Sequence[nn.Module]
    #: Takes on other leaves.
    before: Snapshot
    #: Leaves beside the parameters, which backward() gives a gradient too, and what they had.
    others: list[Tensor] = field(default_factory=list)
    kept: list[Tensor | None] = field(default_factory=list)
    key: int = 0
    #: What it leaves beside gradients: checkpointed parts are computed again in later passes.
    after: States | None = None

    def look(self, loss: Tensor) -> Sequence[Tensor]:
        """For `GradientGraph`: refuses what can't be, and runs a backward() of its own where that
        is needed; returns the other leaves.
        """
        self.key, self.others = self.seen.judge(loss)
        for leaf in self.others:
            self.before.notice(leaf)
        agreed = self.seen.agreed[self.key]
        if agreed >= _AGREEMENTS:
            return self.others
        if agreed >= 0:  # to be compared: without what was there before
            self.kept = [leaf.grad for leaf in self.others]
            for leaf in self.others:
                leaf.grad = None
        loss.backward(retain_graph=True)
        self.after = States(self.seen.parameters, self.modules)
        return self.others if agreed >= 0 else ()

    def take(self, gradients: Sequence[Tensor | None]) -> None:
        """For `GradientGraph`: takes the gradients of the parameters and of the other leaves."""
        agreed, leaves = self.seen.agreed[self.key], [*self.seen.parameters, *self.others]
        if agreed < 0:
            return
        if agreed >= _AGREEMENTS:
            self.after = States(self.seen.parameters, self.modules)
            pairs = [(p, g) for p, g in zip(leaves, gradients, strict=True) if g is not None]
            if pairs:
                # Into memory of their own, laid out like the leaves, or added to what is there.
                torch.autograd.backward(*zip(*pairs, strict=True))
            return
        same = _alike([leaf.grad for leaf in leaves], gradients)
        self.seen.agreed[self.key] = agreed + 1 if same else -1
        for leaf, kept in zip(self.others, self.kept, strict=True):
            if kept is not None:
                if leaf.grad is not None:
                    kept.detach().add_(leaf.grad)
                leaf.grad = kept


@torch.no_grad()
def _alike(some: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> bool:
    """Whether they are equal to the bit, NaNs among them. Reads back."""
    for a, b in zip(some, others, strict=True):
        if a is None or b is None:
            if a is not b:
                return False
        elif a.layout != torch.strided or not bool(((a == b) | ((a != a) & (b != b))).all()):
            return False
    return True
