"""One fixed function at any number of points: a closure, its data and its random states, frozen.

Every evaluation starts from the same random states and module buffers, over the same batches, so
that differences of gradients belong to one symmetric Hessian.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lyapcuda.objective.batch_weights import BatchWeights, Sizes, Undecided, Weighed, Weighing
from lyapcuda.objective.batches import Batches
from lyapcuda.objective.double_backward import GradientGraph
from lyapcuda.objective.evaluator import Closure, Evaluator
from lyapcuda.objective.first_evaluation import FirstEvaluation
from lyapcuda.objective.gauss_newton import Direction, GaussNewtonGraph, OutputsAndLoss
from lyapcuda.objective.isolation import Snapshot, modules_of
from lyapcuda.objective.random_states import RandomStates
from lyapcuda.params.collect import TrackedParameter
from lyapcuda.params.memory import free_bytes

__all__ = ["FixedObjective", "Point"]

#: What is handed the gradients where they lie, None where a parameter gets none, and the loss.
Take = Callable[[Sequence[Tensor | None], Tensor], None]
#: What products are taken from.
Graph = GradientGraph | GaussNewtonGraph
#: Where to evaluate (None: at the parameters themselves), and the tensors that take the gradient.
Point = tuple[Sequence[Tensor] | None, Sequence[Tensor] | Take]

# Graphs of several batches are kept where there are at most so many, and they take at most this
# share of the free memory, and so many bytes.
_MANY, _SHARE, _MOST = 64, 0.125, 2**31


def _decided(method: Callable[..., Any]) -> Callable[..., Any]:
    """Has a method begin again where it met batches whose weights weren't known yet."""

    @functools.wraps(method)
    def again(self: FixedObjective, *arguments: Any, **options: Any) -> Any:
        while True:
            try:
                return method(self, *arguments, **options)
            except Undecided as error:
                undecided = error.with_traceback(None)  # whose frames hold graphs
            self.drop_graph()
            with self._as_it_was():
                self.weights.decide(undecided, self.evaluator, self.closure, self._generators)

    return again


@dataclass(frozen=True)
class Buffer:
    """A module's buffer before a forward pass.

    Attributes:
        held, name: where it is held.
        value: a copy of it.
        version: autograd's, which counts what is written to it in the open (BatchNorm doesn't).
    """

    held: dict[str, Any]
    name: str
    value: Tensor
    version: int

    @property
    def was_written(self) -> bool:
        """Whether it was since, so that autograd refuses graphs that have saved it."""
        now = self.held.get(self.name)
        return now is not None and now.is_floating_point() and now._version != self.version


class KeptGraph:
    """A graph that further products are taken from.

    It may have saved buffers, which are put back between two products.

    Args:
        graph: of one batch.
        start: the buffers before its forward pass. Those that it changed are kept as it left them.
        weight: how much the batch counts.
    """

    def __init__(self, graph: Graph, start: Sequence[Buffer], weight: float = 1.0) -> None:
        self._graph, self.weight, self.versions = graph, weight, graph.versions
        now = [(b.held.get(b.name), b.value) for b in start]
        self._left = [
            (buffer, buffer.detach().clone())
            for buffer, value in now
            if buffer is not None and not torch.equal(buffer, value)
        ]

    @torch.no_grad()
    def again(self) -> Graph:
        """The graph, with the buffers that it has seen; without a new version of them."""
        for buffer, value in self._left:
            buffer.data.copy_(value)
        return self._graph


class FixedObjective:
    """A closure as one function of the parameters: every evaluation starts from the same states.

    After every call, and after an exception, everything is as it was, gradients and random states
    included.

    Args:
        evaluator: of the parameters.
        closure: returns the loss; with ``batches`` it takes a batch.
        batches: losses and gradients are averaged over them, or added up.
        weights: how much each batch counts. Default: what the losses say.
        pair: the closure's own two parts, where products are those of Gauss and Newton, of
            `Direction`s; None for the Hessian's, of tensors of the parameters' shapes.

    Example:
        >>> p = torch.tensor([3.0], requires_grad=True)
        >>> objective = FixedObjective(Evaluator([p], ["p"]), lambda: p.square().sum())
        >>> out = [torch.empty(1)]
        >>> objective.gradients_at([([torch.tensor([5.0])], out)])
        [tensor(25.)]
        >>> out
        [tensor([10.])]
    """

    def __init__(
        self,
        evaluator: Evaluator,
        closure: Closure,
        batches: Batches | None = None,
        weights: BatchWeights | None = None,
        pair: OutputsAndLoss | None = None,
    ) -> None:
        self.evaluator, self.closure, self.batches = evaluator, closure, batches
        self._pair = pair
        self.weights = BatchWeights() if weights is None else weights
        self._generators = batches.generators if batches else ()
        self._devices = {p.device for p in evaluator.parameters}
        self._states = RandomStates(self._devices, self._generators)
        #: Of one batch, from one product to the next, inside `keeping_graph`.
        self._graph: KeptGraph | None = None
        self._keeps = False
        #: The same of several batches, where there is memory for all of them.
        self._graphs: list[KeptGraph] = []

    @classmethod
    def over(
        cls,
        closure: Closure,
        parameters: Sequence[TrackedParameter],
        modules: Sequence[nn.Module] | None,
        data: Iterable[Any] | None = None,
        sizes: Sizes | None = None,
        pair: OutputsAndLoss | None = None,
    ) -> FixedObjective:
        """Returns the objective of what a user passes to an operator.

        Args:
            closure, pair: as of the class.
            parameters: θ.
            modules: whose buffers are put back; None for those that hold the parameters.
            data, sizes: the batches, and how much each counts; None for a closure of no batch.

        Raises:
            TypeError, ValueError: naming data or sizes.
        """
        if data is None and sizes is not None:
            raise ValueError("sizes: there are no batches to weight; pass them as data=")
        weights = BatchWeights(sizes)
        batches = None if data is None else Batches(data, lengths=sizes is None)
        if batches is not None and batches.count is not None:
            weights.check_count(batches.count)
        tensors, names = [p.tensor for p in parameters], [p.name for p in parameters]
        evaluator = Evaluator(tensors, names, modules or modules_of(tensors))
        return cls(evaluator, closure, batches, weights, pair)

    @property
    def is_replicated(self) -> bool:
        """Whether a DistributedDataParallel runs the closure: it averages first gradients alone."""
        return any(isinstance(m, DistributedDataParallel) for m in self.evaluator.modules)

    @_decided
    def gradients_at(self, points: Sequence[Point], closure: Closure | None = None) -> list[Tensor]:
        """Evaluates the gradient at each of the points.

        Args:
            points: where to evaluate, and tensors of the parameters' shapes that receive the
                gradient, zeros where a parameter gets none. Both may be the same memory, except
                with batches, whose gradients are added up there. A function may stand in their
                place: it is handed the gradients as they are, which without batches saves a copy,
                and the loss; without batches it may write to where they were evaluated.
            closure: stands in for the objective's own, of which it is a wrapper.

        Returns:
            The losses (0-dim, detached), in the points' order.
        """
        closure = self.closure if closure is None else closure
        before = self._snapshot()
        losses = []
        try:
            for where, gradient in points:
                if losses:
                    before.restore()
                self._states.restore()
                with nullcontext() if where is None else self.evaluator.pointing_to(where):
                    losses.append(self._average(closure, gradient, before))
        finally:
            before.restore()
            before.restore_gradients()
        return losses

    @_decided
    def loss_at(self, where: Sequence[Tensor], graph: bool = True) -> Tensor:
        """Returns the loss at other values of the parameters, by a forward pass alone; without
        autograd's ``graph`` the closure mustn't call ``backward()``.
        """
        evaluator = self.evaluator
        with self._as_it_was() as before, evaluator.pointing_to(where):
            if self.batches is None:
                with evaluator.looking(self.closure, before):
                    return evaluator.loss(self.closure, graph)

            def one(found: Weighed) -> Tensor:
                with evaluator.looking(self.closure, before):
                    return evaluator.loss(partial(found.loss, self.closure), graph)

            return self._mean(one, ())

    def _snapshot(self) -> Snapshot:
        written = not self.evaluator.knows(self.closure)
        return self.evaluator.snapshot(self._generators, written=written)

    def _average(
        self, closure: Closure, total: Sequence[Tensor] | Take, before: Snapshot
    ) -> Tensor:
        """One evaluation into ``total``; over batches, their weighted mean, or sum."""
        if self.batches is not None and callable(total):
            sums = [torch.zeros_like(p) for p in self.evaluator.parameters]
            loss = self._average(closure, sums, before)
            total(sums, loss)
            return loss
        if self.batches is None:
            with self.evaluator.looking(self.closure, before):
                loss, gradients = self.evaluator.evaluate(closure, before, of=self.closure)
            if callable(total):
                total(gradients, loss)
                return loss
            return _into(total, loss, gradients)
        for out in total:
            out.zero_()

        def add(one: Weighed) -> Tensor:
            with self.evaluator.looking(self.closure, before):
                loss, rows = self.evaluator.evaluate(
                    partial(one.loss, closure), before, of=self.closure
                )
            weight = one.weight()
            for out, row in zip(total, rows, strict=True):
                if row is not None and weight:
                    out.add_(row.detach(), alpha=weight)
            return loss

        return self._mean(add, total)

    def _mean(
        self,
        add: Callable[[Weighed], Tensor],
        sums: Sequence[Tensor],
    ) -> Tensor:
        """Takes ``add`` for every batch, and divides the ``sums`` that it adds to.

        Returns:
            The mean of the losses that it returns, weighted as the batches are; their sum, where
            losses are sums.

        Raises:
            Undecided: what a batch counts isn't known yet.
        """
        weighing = Weighing(self.weights, single=self.is_one_batch)
        loss_sum = torch.zeros((), dtype=torch.float64)
        for batch, length in self.batches:
            one = weighing(batch, length)
            if one.is_void:
                continue
            loss = add(one)
            if one.weight():  # what counts nothing may be NaN
                loss_sum = loss_sum.to(loss.device) + one.weight() * loss.double()
        return _divided(sums, loss_sum, weighing.finish())

    # --- exact products --------------------------------------------------------------------------

    @contextmanager
    def keeping_graph(self) -> Iterator[None]:
        """Inside, exact products keep autograd's graph from one to the next.

        That saves about half of a product's time, for the memory of the activations. Those of
        several batches are kept where they take a small part of the free memory.
        """
        outer, self._keeps = self._keeps, True
        try:
            yield
        finally:
            self._keeps = outer
            if not outer:
                self.drop_graph()

    def hessian_product(
        self,
        vector: Sequence[Tensor],
        total: Sequence[Tensor],
        closure: Closure | None = None,
    ) -> Tensor:
        """Writes the exact product of the Hessian and a vector, by double backward, to ``total``.

        The closure must not call ``backward()`` itself.

        Returns:
            The loss, 0-dim, detached.

        Raises:
            DoubleBackwardError: something in the loss has no second derivative in torch.
        """
        return self.hessian_products([vector], [total], closure)

    @_decided
    def hessian_products(
        self,
        vectors: Sequence[Sequence[Tensor] | Direction],
        totals: Sequence[Sequence[Tensor]],
        closure: Closure | None = None,
    ) -> Tensor:
        """Those of several vectors, for one forward pass over each batch."""
        closure = self.closure if closure is None else closure
        with self._as_it_was() as before:
            if self.is_one_batch:
                graph = self._graph_at(closure, before)
                for vector, total in zip(vectors, totals, strict=True):
                    keep = self._keeps or vector is not vectors[-1]
                    graph.product(vector, total, keep=keep)
                return graph.loss
            for total in totals:
                for out in total:
                    out.zero_()
            sums = [out for total in totals for out in total]
            kept, loss_sum = self._kept_graphs(), 0.0
            for one in kept:
                graph = one.again()
                for vector, total in zip(vectors, totals, strict=True):
                    graph.product(vector, total, keep=True, weight=one.weight)
                loss_sum = loss_sum + one.weight * graph.loss.double()
            if kept:
                return _divided(sums, loss_sum, self.weights.divisor)
            graphs: list[KeptGraph] = []
            keeps = self._keeps

            def add(one: Weighed) -> Tensor:
                nonlocal keeps
                graph, start = self._new_graph(partial(one.loss, closure), before)
                weight = one.weight()
                if not weight:
                    return graph.loss
                # A graph that saved a buffer can't outlive the next batch's writing to it.
                if keeps and any(b.was_written for b in start):
                    keeps = False
                    graphs.clear()
                if keeps and (graphs or self._affords(graph)):
                    graphs.append(KeptGraph(graph, start, weight))
                for vector, total in zip(vectors, totals, strict=True):
                    keep = bool(graphs) or vector is not vectors[-1]
                    graph.product(vector, total, keep=keep, weight=weight)
                return graph.loss

            loss = self._mean(add, sums)
            self._graphs = graphs
            return loss

    def graph_gradient(
        self, take: Callable[[Sequence[Tensor | None]], None], closure: Closure | None = None
    ) -> Tensor:
        """Hands the gradient at θ over, out of the graph that exact products of one batch are then
        taken from, within `keeping_graph`.

        Returns:
            The loss, 0-dim, detached.
        """
        with self._as_it_was() as before:
            self._graph = None
            closure = self.closure if closure is None else closure
            return self._graph_at(closure, before, take).loss

    def drop_graph(self) -> None:
        """Lets go of what is kept within `keeping_graph`."""
        self._graph, self._graphs = None, []

    def _kept_graphs(self) -> list[KeptGraph]:
        """Those of all batches, where they are kept and the parameters are what they were."""
        versions = [p._version for p in self.evaluator.parameters]
        if any(kept.versions != versions for kept in self._graphs):
            self._graphs = []
        return self._graphs

    def _affords(self, graph: Graph) -> bool:
        """Whether there is memory for graphs like this one of all batches."""
        count, device = self.batches.count, self.evaluator.parameters[0].device
        if count is None or count > _MANY:
            return False
        return count * graph.held_bytes() <= min((free_bytes(device) or 0) * _SHARE, _MOST)

    @property
    def is_one_batch(self) -> bool:
        """Whether a pass over the data is one batch, so that one graph holds all of it."""
        return self.batches is None or self.batches.count == 1

    def _graph_at(
        self,
        closure: Closure,
        before: Snapshot,
        take: Callable[[Sequence[Tensor | None]], None] | None = None,
    ) -> Graph:
        """The graph at θ: the one kept, or a new one."""
        parameters = self.evaluator.parameters
        if self._graph is not None and self._graph.versions == [p._version for p in parameters]:
            return self._graph.again()
        self._graph = None  # before there is another one
        if self.batches is not None:
            (batch, _), *_ = self.batches
            closure = partial(closure, batch)
        graph, start = self._new_graph(closure, before, take)
        if self._keeps:
            self._graph = KeptGraph(graph, start)
        return graph

    def _new_graph(
        self,
        closure: Closure,
        before: Snapshot,
        take: Callable[[Sequence[Tensor | None]], None] | None = None,
    ) -> tuple[Graph, list[Buffer]]:
        """A graph, and where anything needs them the buffers before its forward pass."""
        parameters, pair = self.evaluator.parameters, self._pair
        start = self._buffers() if self._keeps or pair is not None else []
        with self.evaluator.looking(self.closure, before) as seen:
            look = None if seen is None else partial(_shown, seen)
            if pair is None:
                return GradientGraph(closure, parameters, take, look), start
            at = partial(self._at, start, RandomStates(self._devices, self._generators))
            return GaussNewtonGraph(closure, pair, parameters, at, look), start

    def _buffers(self) -> list[Buffer]:
        """The buffers of all modules as they are."""
        modules = {id(m): m for module in self.evaluator.modules for m in module.modules()}
        return [
            Buffer(module._buffers, name, buffer.detach().clone(), buffer._version)
            for module in modules.values()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    @contextmanager
    def _at(
        self,
        buffers: Sequence[Buffer],
        states: RandomStates,
        values: Sequence[Tensor],
    ) -> Iterator[None]:
        """Inside, the parameters are others; from these buffers, of which copies are used, and
        these random states. Afterwards both are what they were.
        """
        after = RandomStates(self._devices, self._generators)
        own = [(b.held, b.name, b.held.get(b.name)) for b in buffers]
        torch.clear_autocast_cache()  # inside the user's autocast it has weights of other values
        states.restore()
        try:
            for b in buffers:
                b.held[b.name] = b.value.clone()
            with self.evaluator.pointing_to(values):
                yield
        finally:
            for held, name, value in own:
                held[name] = value
            after.restore()
            torch.clear_autocast_cache()

    @contextmanager
    def _as_it_was(self) -> Iterator[Snapshot]:
        """From the same states as every evaluation; afterwards everything is as it was."""
        before = self._snapshot()
        try:
            self._states.restore()
            yield before
        finally:
            before.restore()
            before.restore_gradients()


def _divided(sums: Sequence[Tensor], loss_sum: Tensor, divisor: float) -> Tensor:
    for out in sums if divisor != 1.0 else ():
        out.div_(divisor)
    return loss_sum / divisor


def _into(total: Sequence[Tensor], loss: Tensor, rows: Sequence[Tensor | None]) -> Tensor:
    for out, row in zip(total, rows, strict=True):
        out.zero_() if row is None else out.copy_(row.detach())
    return loss


def _shown(seen: FirstEvaluation, loss: Tensor) -> Sequence[Tensor]:
    """For `GradientGraph`: shows what watches the loss; there are no further leaves."""
    seen.see([loss])
    return ()
