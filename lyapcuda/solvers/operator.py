"""The Hessian of a loss as a symmetric linear operator; solvers' short form."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast, overload

import numpy as np
import torch
from torch import Tensor, nn

from lyapcuda.arguments import choice, described, positive, users_level
from lyapcuda.basis import Basis
from lyapcuda.dynamics.perturbation import FINE, separation_size
from lyapcuda.objective.batch_weights import Sizes
from lyapcuda.objective.double_backward import DoubleBackwardError
from lyapcuda.objective.entry import entry_point
from lyapcuda.objective.evaluator import Closure
from lyapcuda.objective.fixed_objective import FixedObjective
from lyapcuda.objective.isolation import chosen_modules
from lyapcuda.objective.loss_graph import COARSE
from lyapcuda.params.collect import Parameters, chosen_by_name
from lyapcuda.params.flat import FlatLayout
from lyapcuda.solvers.agreement import (
    BEND,
    NOT_FINITE,
    Agreement,
    asymmetry_allowed,
    believed,
    both_sides,
    failed,
    is_own,
    known_wrong,
    unbelieved,
)
from lyapcuda.solvers.convergence import accuracy_of
from lyapcuda.solvers.products import Products
from lyapcuda.solvers.result import jumping
from lyapcuda.solvers.symmetric import SymmetricOperator, chosen_groups
from lyapcuda.stability.metric import Metric, Source

__all__ = ["DIFFERENCES", "MODES", "HessianOperator", "accepts_closure"]

MODES = ("auto", "exact", "difference")
#: Gradients that one product needs (the forward one besides g(θ), which is computed once).
DIFFERENCES = {"forward": 1, "central": 2}


@dataclass
class _Choice:
    """Which products mode="auto" takes, and why; None before the first one."""

    mode: str | None = None
    reason: str = ""


class HessianOperator(SymmetricOperator):
    """H, the Hessian of the loss at θ (plus weight decay), without ever forming it.

    Products are exact, by double backward, where that works and agrees with differences of
    gradients. Elsewhere they are those differences, (g(θ + Δq·v) − g(θ))/Δq, divided by the
    displacement that the parameters' precision realised. `mode` says which, and `reason` why.

    H is one fixed matrix: every product sees the random states of this operator's making (so one
    dropout mask), the same module buffers and the same batches. After every call, and after an
    exception of the closure, parameters, their ``.grad``, buffers and random states are bitwise
    what they were.

    Vectors are flat, in the order of ``params``, of `dtype` and on `device`.

    Args:
        closure: takes nothing and returns the loss (or has called ``backward()`` itself). With
            ``data`` it takes a batch.
        params: tensors, (name, tensor) pairs, or groups, as for torch.optim. A group's
            "weight_decay" counts as part of the loss (½·wd·‖θ‖²). Or a module, or an optimizer, as
            for `CurvatureTracker`.
        data: an iterable of batches, a DataLoader for instance. The loss is that of all of them
            together: the mean of the batches' losses, weighted by how much each counts, or their
            sum.
        sizes: how much each batch counts: a number a batch, a function of a batch that returns one
            (a device's is waited for once the batch was evaluated), or "sum" for losses that are
            sums: these are added up. None reads it off the loss: a batch counts as many samples, or
            unpadded tokens, as its loss averages over, and sums are added up. Where a loss doesn't
            show it, the length of a batch's first tensor is taken. `weighted_by` says what was.
        mode: "exact": by double backward. "difference": differences of gradients, which need first
            derivatives alone, and see kinks (ReLU) at their scale Δq. "auto": exact, unless that
            fails (fused attention, compiled parts), is wrong (weight_norm, functions that are
            differentiable once) or would leave ranks apart (DDP); which of both the first product
            decides, for four gradients more; a ``difference`` or ``perturbation`` that is given
            asks for "difference". Within `keeping_graph` exact products share the forward pass,
            for the memory of the activations: over one batch, or a few where memory allows.
        difference: "forward": one gradient a product, and once g(θ); "central": two, more accurate.
            None is "forward", and leaves it to `eigsh` to go on with central ones where forward
            ones are too coarse.
        perturbation: Δq, the norm of the separation. None chooses it from the parameters' size and
            precision, from ``difference``, and from whether the loss has kinks (ReLU), which take a
            larger one: it is known from the first product on.
        select: pattern or patterns of the names of the parameters that take part ("layer4.*").
        exclude: pattern or patterns of those that don't ("*.bias").
        weight_decay: for parameters whose group names none.
        model: the modules whose buffers are put back. Without it: every module that holds one of
            the parameters, with its children.
        preconditioner: P, diagonal: the operator is P^(-1/2)·H·P^(-1/2), whose eigenvalues are
            those of P⁻¹H, which an adaptive optimizer meets. An optimizer (SGD, Adam, AdamW, NAdam,
            RMSprop, Adagrad) after its first step, whose groups' rates and thresholds are taken
            in where they differ; a function of a parameter that returns its P; or a sequence of
            such tensors, in the order of ``params``. It is read once, here. None for H itself.
        debug: evaluate g(θ) before every product, and raise a RuntimeError where it isn't what it
            was: the closure is another function then.

    Raises:
        TypeError, ValueError: naming the argument and its value.
        NotImplementedError: DTensor parameters.
        RuntimeError: a ``preconditioner`` that hasn't taken a step.

    Example:
        >>> p = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
        >>> H = HessianOperator(lambda: (p**2).prod(), [p])
        >>> (H @ torch.eye(2, dtype=torch.float64)).round(decimals=4)
        tensor([[8., 8.],
                [8., 2.]], dtype=torch.float64)
    """

    @entry_point
    def __init__(
        self,
        closure: Closure,
        params: Parameters,
        *,
        data: Iterable[Any] | None = None,
        sizes: Sizes | None = None,
        mode: str = "auto",
        difference: str | None = None,
        perturbation: float | None = None,
        select: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        weight_decay: float = 0.0,
        model: nn.Module | Iterable[nn.Module] | None = None,
        preconditioner: Source | None = None,
        debug: bool = False,
    ) -> None:
        if not callable(closure):
            raise TypeError(
                f"closure={described(closure)}: expected a callable that returns the loss"
            )
        choice("mode", mode, MODES)
        if difference is not None:
            choice("difference", difference, DIFFERENCES)
        positive("perturbation", perturbation)
        modules = chosen_modules(model)
        self.layout = FlatLayout(chosen_by_name(params, select, exclude), weight_decay)
        if self.layout.sharded:
            raise NotImplementedError(
                "params: DTensor parameters (FSDP2) are not supported yet by HessianOperator, "
                "eigsh, trace and spectral_density; CurvatureTracker takes them"
            )
        self._mode, self._difference, self.debug = mode, difference or "forward", debug
        self._perturbation: float | None = None
        options = {"data": data, "sizes": sizes, "mode": mode, "difference": difference}
        options |= {"perturbation": perturbation, "model": model, "debug": debug}
        self._made_of = {
            "closure": closure,
            "options": {**options, "preconditioner": preconditioner},
        }
        self._choice = _Choice(*((mode, "as asked for") if mode != "auto" else ()))
        #: Whether `difference` was left to the solvers.
        self.chooses_difference = difference is None
        self.perturbation = perturbation
        self._fixed = perturbation is not None
        self._warned = False
        self._warn_if_small(perturbation)
        self.objective = FixedObjective.over(closure, self.layout.parameters, modules, data, sizes)
        #: What `preconditioner` was made of: ``metric.edge_of(eigenvalues)`` tells how near the
        #: edge of stability they are. None without one.
        self.metric: Metric | None = None
        if preconditioner is not None:
            self.metric = Metric(
                self.layout,
                preconditioner,
                argument="preconditioner",
                without="preconditioner=None",
            )
            self.metric.refresh()
        scale = self.metric.buffers if self.metric is not None else None
        self.products = Products(self.layout, self.objective, debug, scale or None)
        self._unit = torch.ones((), dtype=torch.float64, device=self.layout.device)
        if mode == "auto" and (difference is not None or perturbation is not None):
            self.settle("difference", "a difference was asked for")
        if mode == "auto" and self.objective.is_replicated:
            self.settle("difference", "DistributedDataParallel averages first gradients alone")

    @property
    def difference(self) -> str:
        """Of differences, which: "forward" or "central"."""
        return self._difference

    @difference.setter
    def difference(self, value: str) -> None:
        self._difference = value

    @property
    def perturbation(self) -> float | None:
        """Δq; None until the first difference has chosen it. With exact products, that of the
        differences they were compared with.
        """
        return self._perturbation

    @perturbation.setter
    def perturbation(self, value: float | None) -> None:
        self._perturbation = value

    # --- which products --------------------------------------------------------------------------

    @property
    def mode(self) -> str:
        """Which products these are: "exact" or "difference"; "auto" before the first one."""
        return self._choice.mode or "auto"

    @property
    def reason(self) -> str:
        """Why, in one sentence; empty before the first product."""
        return self._choice.reason

    @property
    def weighted_by(self) -> str:
        """What a batch of ``data`` counts, in words; empty before the first product."""
        weights = self.objective.weights
        return weights.by if self.objective.batches is not None and weights.taken else ""

    @property
    def weights(self) -> list[float]:
        """How much each batch of ``data`` counted in the last pass; empty before the first one."""
        return list(self.objective.weights.taken)

    def settle(self, mode: str, reason: str) -> None:
        """Has mode="auto" take these products from now on."""
        self._choice.mode, self._choice.reason = mode, reason

    def exactly(self) -> HessianOperator:
        """Returns the same Hessian by exact products; this operator stays what it is.

        The two share their buffers and the count of gradients.
        """
        other = copy.copy(self)
        other._choice = _Choice("exact", self.reason)
        return other

    @property
    def gradient_evaluations(self) -> int:
        """Evaluations of the gradient so far (an exact product counts as two)."""
        return self.products.gradient_evaluations

    @property
    def kinked(self) -> bool | None:
        """Whether the gradient was seen to jump beside θ (ReLU); None before that was looked at."""
        return self.products.jumps

    @property
    def changed(self) -> str | None:
        """How two evaluations at one θ differed; None where they didn't, as far as was seen."""
        return self.products.changed

    @property
    def epsilon(self) -> float:
        """Machine epsilon of the coarsest type that the loss was seen to be computed in."""
        return self.products.epsilon

    def _warn_if_small(self, perturbation: float | None) -> None:
        if perturbation is None or self._mode == "exact":
            return
        advised = separation_size(self.layout, self.difference)
        if perturbation < advised / 30.0:
            warnings.warn(
                f"perturbation={perturbation:g} is small for the parameters' precision: the "
                f"difference of gradients will be rounding for a good part; {advised:.1g} is "
                "advised",
                stacklevel=users_level(),
            )

    def __repr__(self) -> str:
        n, metric = self.layout.numel, ", preconditioned" if self.metric is not None else ""
        return f"HessianOperator({n:,} parameters, {self.mode}{metric}, {self.dtype})"

    # --- as a matrix -----------------------------------------------------------------------------

    @overload
    def matvec(self, v: Tensor, *, perturbation: float | None = None) -> Tensor: ...
    @overload
    def matvec(self, v: np.ndarray, *, perturbation: float | None = None) -> np.ndarray: ...
    @overload
    def matvec(self, v: Sequence[Tensor], *, perturbation: float | None = None) -> list[Tensor]: ...
    @entry_point
    def matvec(self, v: Any, *, perturbation: float | None = None) -> Any:
        """Returns Hv, of the kind that v is.

        Args:
            v: (n,), in the order of the parameters; or a list of tensors of their shapes.
            perturbation: Δq of this product; None for the operator's own.

        Warns:
            RuntimeWarning: once, where the closure turned out to be another function each time.

        Raises:
            ValueError: another shape, or not real.
        """
        product = super().matvec(v, perturbation=perturbation)
        if self.changed is not None and not self._warned:
            self._warned = True
            warnings.warn(f"closure: {self.changed}", RuntimeWarning, stacklevel=users_level())
        return product

    def _columns(self, columns: list[Tensor]) -> list[Tensor]:
        """The products; exact ones over several batches for one pass over the data."""
        found: list[Tensor] = []
        while len(found) < len(columns) and (self.mode != "exact" or self.objective.is_one_batch):
            found.append(self.matvec(columns[len(found)]))
        rest = columns[len(found) :]
        if self.debug and rest:
            self.products.check_unchanged()
        vectors = [self.scattered(v) for v in rest]
        products = [self._new_buffers() for _ in rest]
        if rest:
            self.products.exact(vectors, products, 1.0)
        return found + [self.layout.gather(product) for product in products]

    def start(self, out: Sequence[Tensor]) -> None:
        """Writes g(θ): it lies in the leading eigenspace for a good part."""
        self.products.start(out, exact=self.mode == "exact")

    def coordinates(self, displacement: Tensor) -> Tensor:
        """P^(1/2)·x of a displacement x of the parameters: the vector z of this operator that
        stands for it. x itself without a `preconditioner`.
        """
        if not self.products.is_scaled:
            return displacement
        buffers = self.scattered(displacement)
        self.products.unscale_(buffers)
        return self.layout.gather(buffers)

    def displace_(self, vectors: Sequence[Tensor]) -> bool:
        """P^(-1/2)·z in place, the displacement of the parameters that z stands for. Returns
        whether there is a `preconditioner`.
        """
        self.products.scale_(vectors)
        return self.products.is_scaled

    def block(self, select: str | Sequence[str]) -> HessianOperator:
        """Returns the Hessian of the parameters whose names match, the others fixed.

        Args:
            select: pattern or patterns of names ("layer4.*").

        Raises:
            ValueError: a pattern matches none.
        """
        return HessianOperator(
            self._made_of["closure"], chosen_groups(self.layout, select), **self._made_of["options"]
        )

    @property
    def accuracy(self) -> float:
        """How far products may be off, relative to the Hessian's norm, on a smooth loss."""
        return self.accuracy_of(self.difference)

    def accuracy_of(self, difference: str) -> float:
        """The same, of "forward" or "central" differences where differences are taken."""
        return accuracy_of(
            "exact" if self.mode == "exact" else difference, self.epsilon, self.dtype
        )

    @property
    def doubts(self) -> tuple[str, ...]:
        """What speaks against all products, a sentence each."""
        if self.changed is not None:
            return (f"closure: {self.changed}",)
        if self.mode == "difference" and self.kinked:
            return (jumping(self.epsilon),)
        return ()

    # --- over flat buffers -----------------------------------------------------------------------

    def product(
        self,
        vectors: Sequence[Tensor],
        out: Sequence[Tensor],
        length: float = 1.0,
        *,
        norm: Tensor | None = None,
        perturbation: float | None = None,
    ) -> Tensor:
        """Writes Hv/length; both as one flat buffer a group.

        Nothing is synchronised, but by the first product, which chooses.

        Args:
            vectors: v; not the same memory as ``out``.
            out: takes the product; NaN where a gradient wasn't finite, or where the displacement
                was too small for the parameters to show it.
            length: ‖v‖.
            norm: where the host doesn't know it: ‖v‖ (one float64 element on `device`), by which
                nothing is divided.
            perturbation: Δq of this product; None for the operator's own.

        Returns:
            The loss at the last evaluation, 0-dim.
        """
        for group in self.layout.groups:
            group.check()
        if self.debug:
            self.products.check_unchanged()
        if self.mode == "auto":
            return self._decided(vectors, out, length, norm)
        if self.mode == "exact":
            return self.products.exact([vectors], [out], length)
        self.look()
        norm = torch.full_like(self._unit, length) if norm is None else norm
        norm = self.products.length_of(vectors, norm)
        size = self.perturbation if perturbation is None else perturbation
        step = torch.where(norm > 0, size / norm, 0.0)
        return self.products.difference(vectors, out, step, length, self.difference == "central")

    def _decided(
        self, vectors: Sequence[Tensor], out: Sequence[Tensor], length: float, norm: Tensor | None
    ) -> Tensor:
        """The first product of mode="auto": both ways, to see which of them to take."""
        u, hu = (Basis(self.layout, [b[None] for b in buffers]) for buffers in (vectors, out))
        try:
            loss = self.products.exact([vectors], [out], 1.0)
        except DoubleBackwardError as error:
            self.turn_away(failed(error))
        else:
            if self.products.wrong is not None:
                self.turn_away(known_wrong(self.products.wrong))
            elif not math.isfinite(float(hu.gram(hu)[0, 0])):
                self.turn_away(NOT_FINITE)
        if self.mode == "difference":
            return self.product(vectors, out, length, norm=norm)
        norm = torch.full_like(self._unit, length) if norm is None else norm
        if not float(norm) > 0:
            return loss
        found = self.compared(u, hu, norm)
        # Among jumps, a product that is wrong shows in nothing but that H isn't symmetric.
        asymmetric = found.agrees and found.is_rough() and not self._symmetric(u, hu)
        reason = unbelieved(found, asymmetric, self.products.custom)
        if reason is None:
            self.settle("exact", believed(found))
            self.perturbation = found.size
            for buffer in out:
                buffer.mul_(1.0 / length)
            return loss
        self.turn_away(reason)
        return self.product(vectors, out, length, norm=norm)

    def turn_away(self, reason: str) -> None:
        """Has mode="auto" take differences, as if exact products hadn't been tried."""
        self.settle("difference", reason)
        self.objective.drop_graph()
        self.products.forget()

    def compared(
        self,
        u: Basis,
        hu: Basis | None,
        norm: Tensor,
        residual: float = 0.0,
        least: float = 0.0,
        size: float | None = None,
    ) -> Agreement:
        """Returns how differences on both sides of θ agree with Hu, for two gradients and g(θ).

        Arguments as for `lyapcuda.solvers.agreement.both_sides`.
        """
        self.products.gradient()
        size = self.usual_perturbation if size is None else size
        return both_sides(self.products, u, hu, norm, size, residual, least)

    @property
    def usual_perturbation(self) -> float:
        """Δq of a forward difference on a smooth loss. After g(θ)."""
        return self._advised("forward", kinked=False)

    @property
    def kinks_hide(self) -> bool:
        """Whether the graph shows all of the loss, torch's own functions alone, and kinks among
        them that rounding keeps differences from telling apart: they can't show an error of exact
        products then. After g(θ).
        """
        products = self.products
        return bool(products.kinks_named) and products.custom is None and self.epsilon > FINE

    def is_own_gradient(self, scale: float) -> bool:
        """Whether the loss changes along g(θ) by as much as that says, for two forward passes.

        Args:
            scale: a lower bound of ‖H‖.
        """
        products, size = self.products, self.usual_perturbation
        products.gradient()
        seen, expected, moved = products.losses_along_gradient(size)
        return is_own(seen, expected, moved**2 * scale, self.epsilon * abs(float(products.loss)))

    def _symmetric(self, u: Basis, hu: Basis) -> bool:
        """Whether exact products of u and of a random vector are those of a symmetric matrix."""
        other, product = Basis.empty(self.layout, 1), Basis.empty(self.layout, 1)
        generators = [
            torch.Generator(g.device).manual_seed(i) for i, g in enumerate(self.layout.groups)
        ]
        other.randomise_(0, generators)
        self.products.exact([other.row(0)], [product.row(0)], 1.0)
        pairs = ((other, hu), (u, product), (hu, hu))
        here, there, square = (float(a.gram(b)[0, 0]) for a, b in pairs)
        # A random vector's part along Hu is about ‖Hu‖.
        return abs(here - there) <= asymmetry_allowed(self.epsilon) * math.sqrt(square)

    def gradient(self) -> list[Tensor]:
        """Returns g(θ), one flat buffer a group (live: a central product writes there).

        Evaluated once, and once more to see that it is the same; again where the parameters, or the
        buffers, have been written to since.
        """
        return self.products.gradient()

    def look(self) -> None:
        """Evaluates g(θ), unless that was seen at this θ, and chooses Δq."""
        self.products.look()
        if self.perturbation is None:
            # What has kinks by name may be far from all of them.
            if self.products.kinks_named and self.products.jumps is None:
                self.products.jumps = self._jumps()
            self.perturbation = self._advised(self.difference)

    def _jumps(self) -> bool:
        """Whether the gradient jumps where θ moves along it, for two gradients, or four."""
        found = self.along_gradient()
        return found.is_rough() and self.along_gradient(0.25).spread > BEND * found.spread

    def along_gradient(self, share: float = 1.0) -> Agreement:
        """Returns how differences on both sides of θ agree along g(θ), for two gradients.

        Args:
            share: of the usual Δq.
        """
        u = Basis.empty(self.layout, 1)
        self.products.start(u.row(0), exact=False)
        norm = u.gram(u)[0, 0].sqrt()
        norm = torch.where(norm > 0, norm, 1.0)
        size = share * self.usual_perturbation
        return both_sides(self.products, u, None, norm, size)

    def _advised(
        self, difference: str, length: float = math.inf, kinked: bool | None = None
    ) -> float:
        products = self.products
        kinked = bool(products.jumps) if kinked is None else kinked
        return separation_size(
            self.layout, difference, kinked, products.epsilon, length, products.extent
        )

    def release(self) -> None:
        """Frees the buffers and g(θ), which the next product would make anew."""
        self.products.release()
        self.objective.drop_graph()

    def keeping_graph(self) -> AbstractContextManager[None]:
        """Returns a context in which exact products over one batch share autograd's graph.

        That takes about half of the time, for the memory of the activations, which are freed at
        the end.
        """
        return self.objective.keeping_graph()

    def central(self, length: float = math.inf) -> HessianOperator:
        """Returns the same Hessian by central differences; this operator stays what it is.

        The two share their buffers, g(θ) and the count of gradients.

        Args:
            length: where it is known, the distance over which the curvature changes by as much as
                it is: Δq is smaller for a small one, unless it was given.
        """
        self.look()
        finer = copy.copy(self)
        finer.difference = "central"
        if finer.mode != "difference":
            finer._choice = _Choice("difference", "as asked for")
        if not self._fixed:
            finer.perturbation = finer._advised("central", length)
        return finer

    @property
    def needs_central(self) -> bool:
        """Whether forward differences are too coarse whatever the tolerance: 16 bits, or kinks."""
        self.look()
        return bool(self.kinked) or self.epsilon > COARSE

    @property
    def chooses(self) -> bool:
        """Whether Δq is this operator's to choose."""
        return self.mode == "difference" and not self._fixed


_Operator = TypeVar("_Operator", contravariant=True)
_Options = ParamSpec("_Options")
_Result = TypeVar("_Result", covariant=True)


class _Solver(Protocol[_Operator, _Options, _Result]):
    """A solver as its callers see it: the two forms of `accepts_closure`."""

    @overload
    def __call__(
        self, operator: _Operator, /, *args: _Options.args, **kwargs: _Options.kwargs
    ) -> _Result: ...
    @overload
    def __call__(
        self, closure: Closure, /, params: Parameters, *args: Any, **options: Any
    ) -> _Result: ...


def accepts_closure(
    solver: Callable[Concatenate[_Operator, _Options], _Result],
) -> _Solver[_Operator, _Options, _Result]:
    """Lets a solver of an operator take a closure and its parameters too: the short form.

    ``solver(closure, params, …)`` is ``solver(HessianOperator(closure, params, …), …)``: arguments
    that the solver doesn't know are the operator's.
    """
    known = inspect.signature(solver).parameters

    @entry_point
    @functools.wraps(solver)
    def solve(operator: SymmetricOperator | Closure, *arguments: Any, **options: Any) -> Any:
        if isinstance(operator, SymmetricOperator):
            return solver(operator, *arguments, **options)
        if not callable(operator):
            raise TypeError(
                f"closure={described(operator)}: {solver.__name__} expects an operator, as "
                "HessianOperator, or a callable that returns the loss"
            )
        if arguments:
            params, arguments = arguments[0], arguments[1:]
        elif "params" in options:
            params = options.pop("params")
        else:
            raise TypeError(
                f"{solver.__name__}(closure): params is missing: the parameters to differentiate by"
            )
        own = {name: value for name, value in options.items() if name in known}
        rest = {name: value for name, value in options.items() if name not in known}
        return solver(HessianOperator(operator, params, **rest), *arguments, **own)

    return cast("_Solver[_Operator, _Options, _Result]", solve)
