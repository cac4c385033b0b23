"""The Hessian of a loss as a symmetric linear operator, from gradient differences."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lyapcuda import ops
from lyapcuda.arguments import choice, positive
from lyapcuda.dynamics.perturbation import separation_size
from lyapcuda.objective.batches import Batches
from lyapcuda.objective.evaluator import Closure, Evaluator
from lyapcuda.objective.fixed_objective import FixedObjective
from lyapcuda.objective.isolation import chosen_modules, modules_of
from lyapcuda.objective.loss_graph import COARSE, has_kinks, loss_epsilon
from lyapcuda.params.collect import Parameters, select_by_name
from lyapcuda.params.flat import FlatGroup, FlatLayout

__all__ = ["DIFFERENCES", "MODES", "HessianOperator", "accepts_closure"]

MODES = ("difference", "exact")
#: Gradients that one product needs (the forward one besides g(θ), which is computed once).
DIFFERENCES = {"forward": 1, "central": 2}


class _GroupBuffers:
    """What one group needs beside v and Hv: where to evaluate, and the gradient to subtract."""

    def __init__(self, group: FlatGroup, streams: bool) -> None:
        self.group = group
        # A gradient that is added up over batches can't lie where its θ + q does.
        apart = streams or group.rounds
        self.copies = group.new_buffer(group.dtype) if apart else None
        self.minus = group.new_buffer(None if streams else group.dtype)
        self._minus_copies = None if streams else self.minus

    @property
    def minus_copies(self) -> Tensor:
        """Where θ − q lies, for central differences."""
        if self._minus_copies is None:
            self._minus_copies = self.group.new_buffer(self.group.dtype)
        return self._minus_copies


class _Shared:
    """What operators of one objective have in common: g(θ), its buffers, what was seen of the loss.

    Attributes:
        buffers: none before the first product.
        origin: g(θ), in the order of the parameters; views of the buffers.
        versions: of the parameters that the loss was last seen at.
        holds_gradient: False once a central product has written over g(θ).
        gradient_evaluations: so far.
        kinked: whether the loss has kinks, as far as autograd's graph shows it; None before g(θ).
        epsilon: of the coarsest type that the loss is computed in, 16 bits under autocast, or TF32;
            as far as the graph shows it, and at least the parameters' own.
    """

    def __init__(self, epsilon: float) -> None:
        self.buffers: list[_GroupBuffers] = []
        self.origin: list[Tensor] = []
        self.versions: list[int] | None = None
        self.holds_gradient = False
        self.gradient_evaluations = 0
        self.kinked: bool | None = None
        self.epsilon = epsilon


class HessianOperator:
    """H, the Hessian of the loss at θ (plus weight decay), without ever forming it.

    Products are differences of gradients, (g(θ + Δq·v) − g(θ))/Δq, divided by the displacement that
    the parameters' precision realised. H is one fixed matrix: every product sees the random states
    of this operator's making (so one dropout mask), the same module buffers and the same batches.
    After every call, and after an exception of the closure, parameters, their ``.grad``, buffers
    and random states are bitwise what they were.

    Vectors are flat, in the order of ``params``, of `dtype` and on `device`.

    Args:
        closure: takes nothing and returns the loss (or has called ``backward()`` itself). With
            ``data`` it takes a batch.
        params: tensors, (name, tensor) pairs, or groups, as for torch.optim. A group's
            "weight_decay" counts as part of the loss (½·wd·‖θ‖²).
        data: an iterable of batches, a DataLoader for instance. The loss is the mean over all of
            them, weighted by their sizes (the length of the first tensor in a batch).
        mode: "difference", or "exact" for double backward, to check against; that takes more memory
            and fails, or is silently wrong, beside functions without a second derivative. Within
            `keeping_graph` it takes half the time.
        difference: "forward": one gradient a product, and once g(θ); "central": two, more accurate.
            None is "forward", and leaves it to `eigsh` to go on with central ones where forward
            ones are too coarse.
        perturbation: Δq, the norm of the separation. None chooses it from the parameters' size and
            precision, from ``difference``, and from whether the loss has kinks (ReLU), which take a
            larger one: it is known from the first product on.
        select: pattern or patterns of the names of the parameters that take part ("layer4.*").
        weight_decay: for parameters whose group names none.
        model: the modules whose buffers are put back. Without it: every module that holds one of
            the parameters, with its children.

    Raises:
        TypeError, ValueError: naming the argument and its value.
        NotImplementedError: DTensor parameters.

    Example:
        >>> p = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
        >>> H = HessianOperator(lambda: (p**2).prod(), [p])
        >>> (H @ torch.eye(2, dtype=torch.float64)).round(decimals=4)
        tensor([[8., 8.],
                [8., 2.]], dtype=torch.float64)
    """

    def __init__(
        self,
        closure: Closure,
        params: Parameters,
        *,
        data: Iterable[Any] | None = None,
        mode: str = "difference",
        difference: str | None = None,
        perturbation: float | None = None,
        select: str | Sequence[str] | None = None,
        weight_decay: float = 0.0,
        model: nn.Module | Iterable[nn.Module] | None = None,
    ) -> None:
        if not callable(closure):
            raise TypeError(f"closure={closure!r}: expected a callable that returns the loss")
        choice("mode", mode, MODES)
        if difference is not None:
            choice("difference", difference, DIFFERENCES)
        positive("perturbation", perturbation)
        modules = chosen_modules(model)
        self.layout = FlatLayout(
            params if select is None else select_by_name(params, select), weight_decay
        )
        if self.layout.sharded:
            raise NotImplementedError(
                "params: DTensor parameters (FSDP2) are not supported yet by HessianOperator, "
                "eigsh, trace and spectral_density; CurvatureTracker takes them"
            )
        self.mode, self.difference = mode, difference or "forward"
        #: Whether `difference` was left to the solvers.
        self.chooses_difference = difference is None
        #: Δq; None until the first product has chosen it.
        self.perturbation = perturbation
        self._fixed = perturbation is not None
        self._warn_if_small(perturbation)
        tensors = [p.tensor for p in self.layout.parameters]
        names = [p.name for p in self.layout.parameters]
        evaluator = Evaluator(tensors, names, modules or modules_of(tensors))
        batches = None if data is None else Batches(data)
        self.objective = FixedObjective(evaluator, closure, batches)
        self._shared = _Shared(self.layout.epsilon())
        self._unit = torch.ones((), dtype=torch.float64, device=self.layout.device)
        self._first = torch.tensor([1.0, 0.0], dtype=torch.float64, device=self.layout.device)

    @property
    def gradient_evaluations(self) -> int:
        """Evaluations of the gradient so far (an exact product counts as two)."""
        return self._shared.gradient_evaluations

    @property
    def kinked(self) -> bool | None:
        """Whether the loss has kinks, as far as autograd's graph shows it; None before g(θ)."""
        return self._shared.kinked

    @property
    def epsilon(self) -> float:
        """Machine epsilon of the coarsest type that the loss was seen to be computed in."""
        return self._shared.epsilon

    def _warn_if_small(self, perturbation: float | None) -> None:
        if perturbation is None or self.mode == "exact":
            return
        advised = separation_size(self.layout, self.difference)
        if perturbation < advised / 30.0:
            warnings.warn(
                f"perturbation={perturbation:g} is small for the parameters' precision: the "
                f"difference of gradients will be rounding for a good part; {advised:.1g} is "
                "advised",
                stacklevel=3,
            )

    # --- as a matrix -----------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        return self.layout.numel, self.layout.numel

    @property
    def dtype(self) -> torch.dtype:
        return self.layout.dtype

    @property
    def device(self) -> torch.device:
        return self.layout.device

    def matvec(self, v: Tensor, *, perturbation: float | None = None) -> Tensor:
        """Returns Hv.

        Args:
            v: (n,), in the order of the parameters.
            perturbation: Δq of this product; None for the operator's own.

        Raises:
            ValueError: another shape, or not real.
        """
        if not isinstance(v, Tensor) or v.shape != (self.layout.numel,) or v.is_complex():
            described = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
            raise ValueError(
                f"v: expected a real tensor of shape {self.shape[:1]}, got {described}"
            )
        vectors = [group.new_buffer() for group in self.layout.groups]
        self.layout.scatter(v.detach(), vectors)
        out = [group.new_buffer() for group in self.layout.groups]
        square = sum(
            ops.gram(buffer[None], buffer[None])[0, 0].to(self.device) for buffer in vectors
        )
        self.product(vectors, out, norm=square.sqrt(), perturbation=perturbation)
        return self.layout.gather(out)

    def matmat(self, matrix: Tensor) -> Tensor:
        """H times the columns of an (n, m) matrix."""
        if not isinstance(matrix, Tensor) or matrix.dim() != 2:
            raise ValueError("matrix: expected a tensor of shape (n, m)")
        with self.keeping_graph():
            columns = [self.matvec(column) for column in matrix.T]
        return torch.stack(columns, 1) if columns else matrix.new_empty(matrix.shape)

    def __matmul__(self, other: Tensor) -> Tensor:
        if isinstance(other, Tensor) and other.dim() == 2:
            return self.matmat(other)
        return self.matvec(other)

    def to_scipy(self) -> Any:
        """The same as a ``scipy.sparse.linalg.LinearOperator`` over NumPy arrays."""
        try:
            from scipy.sparse.linalg import LinearOperator
        except ImportError as error:
            raise ImportError("to_scipy() needs scipy: pip install scipy") from error

        def product(vector: Any) -> Any:
            tensor = torch.as_tensor(vector, dtype=self.dtype, device=self.device)
            return self.matvec(tensor.reshape(-1)).cpu().numpy()

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(self.shape, matvec=product, rmatvec=product, dtype=dtype)

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
        """Writes Hv/length; both as one flat buffer a group. Nothing is synchronised.

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
        if self.mode == "exact":
            return self._exact(vectors, out, length)
        central, shared, objective = self.difference == "central", self._shared, self.objective
        if central:
            self._look()
        else:
            self.gradient()
        norm = torch.full_like(self._unit, length) if norm is None else norm
        size = self.perturbation if perturbation is None else perturbation
        step = torch.where(norm > 0, size / norm, 0.0)
        copies = [
            buffer if part.copies is None else part.copies
            for part, buffer in zip(shared.buffers, out, strict=True)
        ]
        sums = self._displace(copies, vectors, step)
        minus: Sequence[Tensor | None] = shared.origin
        if central:
            shared.holds_gradient = False
            others = [part.minus_copies for part in shared.buffers]
            sums = sums - self._displace(others, vectors, -step) * self._first
            minus = self.layout.views([part.minus for part in shared.buffers])
        # Divided by what was realised along v; 0 for v = 0.
        moved = sums[0] * length
        scale = torch.where(sums[1] > 0, sums[1] / moved, 0.0)

        def divided(plus: Sequence[Tensor | None], minus: Sequence[Tensor | None]) -> None:
            for group, v, y in zip(self.layout.groups, vectors, out, strict=True):
                decay = group.weight_decay
                ops.difference_(
                    y,
                    group.segments(group.own(plus)),
                    group.segments(group.own(minus)),
                    group.offsets,
                    scale.to(y.device),
                    weight_decay=decay / length if decay else 0.0,
                    v=v if decay else None,
                )

        if objective.batches is None:
            # The last gradient is taken where it lies.
            plus = self.layout.views(copies)
            if central:
                points = [(plus, plus), (minus, lambda found: divided(plus, found))]
            else:
                points = [(plus, lambda found: divided(found, minus))]
        else:
            plus = self.layout.views(out)
            points = [(self.layout.views(copies), plus)]
            if central:
                points.append((self.layout.views(others), minus))
        losses = objective.gradients_at(points)
        if objective.batches is not None:
            divided(plus, minus)
        shared.gradient_evaluations += len(points)
        return losses[-1]

    def gradient(self) -> list[Tensor]:
        """Returns g(θ), one flat buffer a group (live: a central product writes there).

        Evaluated once; again where the parameters, or the buffers, have been written to since.
        """
        self._look(gradient=True)
        return [part.minus for part in self._shared.buffers]

    def _look(self, gradient: bool = False) -> None:
        """Evaluates g(θ), unless the loss was seen at this θ already (and g(θ) isn't asked for)."""
        shared, objective = self._shared, self.objective
        if not shared.buffers:
            streams = objective.batches is not None
            shared.buffers = [_GroupBuffers(group, streams) for group in self.layout.groups]
            shared.origin = self.layout.views([part.minus for part in shared.buffers])
        versions = [p._version for p in objective.evaluator.parameters]
        if versions == shared.versions and (shared.holds_gradient or not gradient):
            return

        def watched(*batch: Any) -> Tensor | float:
            loss = objective.closure(*batch)
            if shared.kinked is None:
                shared.kinked = has_kinks(loss)
                shared.epsilon = max(shared.epsilon, loss_epsilon(loss))
            return loss

        objective.gradients_at([(None, shared.origin)], closure=watched)
        shared.versions, shared.holds_gradient = versions, True
        shared.gradient_evaluations += 1
        if self.perturbation is None:
            self.perturbation = self._advised()

    def _advised(self, length: float = math.inf) -> float:
        shared = self._shared
        return separation_size(self.layout, self.difference, shared.kinked, shared.epsilon, length)

    def release(self) -> None:
        """Frees the buffers and g(θ), which the next product would make anew."""
        self._shared.buffers, self._shared.origin = [], []
        self._shared.versions, self._shared.holds_gradient = None, False

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
        self._look()
        finer = copy.copy(self)
        finer.difference = "central"
        if not self._fixed:
            finer.perturbation = finer._advised(length)
        return finer

    @property
    def needs_central(self) -> bool:
        """Whether forward differences are too coarse whatever the tolerance: 16 bits, or kinks."""
        self._look()
        return bool(self.kinked) or self.epsilon > COARSE

    @property
    def chooses(self) -> bool:
        """Whether Δq is this operator's to choose, and the smaller the truer but for rounding."""
        return self.mode == "difference" and not self._fixed and not self.kinked

    def _displace(
        self, copies: Sequence[Tensor], vectors: Sequence[Tensor], step: Tensor
    ) -> Tensor:
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for group, where, v in zip(self.layout.groups, copies, vectors, strict=True):
            sums = ops.displace_(
                group.segments(group.views(where)),
                v,
                group.segments(group.tensors),
                group.offsets,
                step.to(v.device),
            )
            total += sums.to(total.device)
        return total

    def _exact(self, vectors: Sequence[Tensor], out: Sequence[Tensor], length: float) -> Tensor:
        parameters = self.objective.evaluator.parameters
        pieces = [
            v.to(p.dtype) for v, p in zip(self.layout.views(vectors), parameters, strict=True)
        ]
        loss = self.objective.hessian_product(pieces, self.layout.views(out))
        self._shared.gradient_evaluations += 2
        for group, v, y in zip(self.layout.groups, vectors, out, strict=True):
            if group.weight_decay:
                y.add_(v, alpha=group.weight_decay)
            if length != 1.0:
                y.mul_(1.0 / length)
        return loss


def accepts_closure(solver: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a solver of an operator take a closure and its parameters too: the short form.

    ``solver(closure, params, …)`` is ``solver(HessianOperator(closure, params, …), …)``: arguments
    that the solver doesn't know are the operator's.
    """
    known = inspect.signature(solver).parameters

    @functools.wraps(solver)
    def solve(operator: HessianOperator | Closure, *arguments: Any, **options: Any) -> Any:
        if isinstance(operator, HessianOperator):
            return solver(operator, *arguments, **options)
        if not callable(operator):
            raise TypeError(
                f"closure={operator!r}: {solver.__name__} expects a HessianOperator, or a callable "
                "that returns the loss"
            )
        if arguments:
            params, *arguments = arguments
        elif "params" in options:
            params = options.pop("params")
        else:
            raise TypeError(
                f"{solver.__name__}(closure): params is missing: the parameters to differentiate by"
            )
        own = {name: value for name, value in options.items() if name in known}
        rest = {name: value for name, value in options.items() if name not in known}
        return solver(HessianOperator(operator, params, **rest), *arguments, **own)

    return solve
