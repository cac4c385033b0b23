"""The generalised Gauss-Newton matrix and the empirical Fisher matrix of a model, as operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lyapcuda.arguments import choice, described, positive
from lyapcuda.basis import Basis
from lyapcuda.dynamics.perturbation import separation_size
from lyapcuda.objective.batch_weights import Sizes
from lyapcuda.objective.double_backward import DoubleBackwardError
from lyapcuda.objective.entry import entry_point
from lyapcuda.objective.fixed_objective import FixedObjective
from lyapcuda.objective.gauss_newton import Direction, OutputsAndLoss
from lyapcuda.objective.isolation import chosen_modules
from lyapcuda.objective.loss_graph import loss_epsilon
from lyapcuda.params.collect import Parameters, chosen_by_name
from lyapcuda.params.flat import FlatLayout
from lyapcuda.solvers.agreement import failed
from lyapcuda.solvers.convergence import accuracy_of
from lyapcuda.solvers.operator import MODES
from lyapcuda.solvers.products import displace
from lyapcuda.solvers.symmetric import SymmetricOperator, chosen_groups

__all__ = ["EmpiricalFisherOperator", "GGNOperator"]

# Products by double backward aren't believed where differences are so far off, relative: these see
# kinks at their scale (some per cent), what double backward leaves out is larger.
_APART = 0.1
# Two evaluations at one θ may differ by so many ε, relative to the loss.
_SAME = 64.0


class _GaussNewtonOperator(SymmetricOperator):
    """Jᵀ·M·J over batches: one fixed matrix, as `HessianOperator` is."""

    def __init__(
        self,
        pair: OutputsAndLoss,
        params: Parameters,
        data: Iterable[Any] | None,
        sizes: Sizes | None,
        mode: str,
        perturbation: float | None,
        select: str | Sequence[str] | None,
        exclude: str | Sequence[str] | None,
        model: nn.Module | Iterable[nn.Module] | None,
    ) -> None:
        choice("mode", mode, MODES)
        positive("perturbation", perturbation)
        modules = chosen_modules(model)
        self.layout = FlatLayout(chosen_by_name(params, select, exclude))
        if self.layout.sharded:
            raise NotImplementedError(
                f"params: DTensor parameters (FSDP2) are not supported by {type(self).__name__}"
            )
        self._pair = pair
        self.objective = FixedObjective.over(
            self._watched, self.layout.parameters, modules, data, sizes, pair
        )
        if self.objective.is_replicated:
            raise NotImplementedError(
                f"params: of a DistributedDataParallel, which averages {type(self).__name__}'s "
                "products no more than other forward passes; pass the model inside, .module"
            )
        self._mode = mode
        self._reason = "" if mode == "auto" else "as asked for"
        self._perturbation, self._epsilon = perturbation, self.layout.epsilon()
        self._count, self._changed, self._sides = 0, "", []
        self._seen: list[int] | None = None  # the parameters' versions at the first product
        self._options = {"data": data, "sizes": sizes, "mode": mode, "perturbation": perturbation}
        self._options["model"] = model

    def _watched(self, *batch: Any) -> Tensor:
        loss = self._pair(*batch)
        seen = map(loss_epsilon, (loss, *self._pair.outputs))
        self._epsilon = max(self._epsilon, *seen)
        return loss

    # --- what it is ------------------------------------------------------------------------------

    @property
    def mode(self) -> str:
        """Where J·v comes from: "exact", "difference"; "auto" before the first product."""
        return self._mode

    @property
    def reason(self) -> str:
        """Why, in one sentence; empty before the first product."""
        return self._reason

    @property
    def gradient_evaluations(self) -> int:
        """So far, a product counted as two: J·v and Jᵀ."""
        return self._count

    @property
    def epsilon(self) -> float:
        """Machine epsilon of the coarsest type that the loss was seen to be computed in."""
        return self._epsilon

    @property
    def accuracy(self) -> float:
        """How far products may be off, relative to the matrix's norm."""
        kind = "exact" if self.mode == "exact" else "central"
        return accuracy_of(kind, self.epsilon, self.dtype)

    @property
    def doubts(self) -> tuple[str, ...]:
        """What speaks against all products, a sentence each."""
        return (self._changed,) if self._changed else ()

    @property
    def perturbation(self) -> float | None:
        """Δq of the differences of outputs; None until the first one has chosen it."""
        return self._perturbation

    @property
    def weighted_by(self) -> str:
        """What a batch of ``data`` counts, in words; empty before the first product."""
        weights = self.objective.weights
        return weights.by if self.objective.batches is not None and weights.taken else ""

    def keeping_graph(self) -> AbstractContextManager[None]:
        """Returns a context in which products over one batch share the forward pass."""
        return self.objective.keeping_graph()

    def release(self) -> None:
        """Frees the buffers and the graph, which the next product would make anew."""
        self._sides = []
        self.objective.drop_graph()

    def __repr__(self) -> str:
        n, kind = self.layout.numel, type(self).__name__
        return f"{kind}({n:,} parameters, {self.mode}, {self.dtype})"

    # --- products --------------------------------------------------------------------------------

    def product(
        self,
        vectors: Sequence[Tensor],
        out: Sequence[Tensor],
        length: float = 1.0,
        *,
        norm: Tensor | None = None,
    ) -> None:
        """Writes the product over length; as of `SymmetricOperator`."""
        for group in self.layout.groups:
            group.check()
        versions = [p.tensor._version for p in self.layout.parameters]
        if self._seen != versions:
            self._seen = versions
            self._look_twice()
        if norm is None:
            row = Basis(self.layout, [v[None] for v in vectors])
            norm = row.gram(row)[0, 0].sqrt()
        if self.mode == "auto":
            self._decide(vectors, out, norm)
        elif self.mode == "exact":
            self._take(Direction(self._parts(vectors)), out)
        else:
            self._take(self._sided(vectors, norm), out)
        if length != 1.0:
            for y in out:
                y.mul_(1.0 / length)

    def _look_twice(self) -> None:
        """Whether the loss is one function of θ: two forward passes."""
        at = [p.tensor.detach().clone() for p in self.layout.parameters]
        one, other = (float(self.objective.loss_at(at)) for _ in range(2))
        self._pair.take()  # lets go of their graph
        self._changed = ""
        if one != one or abs(one - other) > _SAME * self.epsilon * max(abs(one), abs(other)):
            self._changed = (
                f"outputs: two evaluations at the same θ gave the losses {one:.9g} and "
                f"{other:.9g}: take the minibatch from the loader outside of them"
            )

    def _decide(self, vectors: Sequence[Tensor], out: Sequence[Tensor], norm: Tensor) -> None:
        """The first product of mode="auto": both ways, to see which of them to take."""
        by_difference = Basis.empty(self.layout, 1)
        self._take(self._sided(vectors, norm), by_difference.row(0))
        try:
            self._take(Direction(self._parts(vectors)), out)
        except DoubleBackwardError as error:
            self.objective.drop_graph()
            self._mode, self._reason = "difference", failed(error)
        else:
            exact = Basis(self.layout, [y[None] for y in out])
            panels = zip(exact.panels, by_difference.panels, strict=True)
            apart = Basis(self.layout, [y - other for y, other in panels])
            size, other, far = (
                float(basis.gram(basis)[0, 0].sqrt()) for basis in (exact, by_difference, apart)
            )
            if size == other == 0.0:
                return  # says nothing: the next product decides
            far /= max(size, other)
            if far <= max(_APART, 4.0 * accuracy_of("central", self.epsilon, self.dtype)):
                self._mode = "exact"
                self._reason = "double backward works, and agrees with differences of outputs"
                return
            self.objective.drop_graph()
            self._mode = "difference"
            self._reason = (
                f"double backward and differences of outputs are {far:.0%} apart, so it is wrong, "
                "or kinks are near"
            )
        for y, d in zip(out, by_difference.panels, strict=True):
            y.copy_(d[0])

    def _take(self, direction: Direction, out: Sequence[Tensor]) -> None:
        self.objective.hessian_products([direction], [self.layout.views(out)])
        self._count += 2

    def _parts(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """v, shaped like the parameters and of their types."""
        views = self.layout.views(vectors)
        return [v.to(p.tensor.dtype) for v, p in zip(views, self.layout.parameters, strict=True)]

    def _sided(self, vectors: Sequence[Tensor], norm: Tensor) -> Direction:
        """v with θ ± h·v beside it."""
        if not self._sides:
            groups = self.layout.groups
            self._sides = [[g.new_buffer(g.dtype) for g in groups] for _ in range(2)]
        if self._perturbation is None:
            self._perturbation = separation_size(self.layout, "central", False, self.epsilon)
        step = torch.where(norm > 0, self._perturbation / norm, 0.0)
        plus, minus = (
            displace(self.layout, side, vectors, sign * step)
            for side, sign in zip(self._sides, (1.0, -1.0), strict=True)
        )
        moved = plus[0] - minus[0]
        scale = torch.where(moved != 0, plus[1] / moved, 0.0)
        views = [self.layout.views(side) for side in self._sides]
        return Direction(self._parts(vectors), (views[0], views[1]), scale)


class GGNOperator(_GaussNewtonOperator):
    """The generalised Gauss-Newton matrix G = Jᵀ·M·J of a loss ℓ(f(θ)), without ever forming it.

    J is the Jacobian of the model's outputs f, M the Hessian of ℓ by them. For losses that are
    convex in the outputs (cross-entropy, squared error) G is positive semidefinite. With
    cross-entropy it is the Fisher matrix, with squared error a multiple of it. It is the Hessian
    without the part of the outputs' own curvature.

    J·v comes from double backward, or from a difference of two forward passes where that fails or
    is wrong (fused attention, compiled parts, custom functions): `mode` says which, and `reason`
    why. Products see one fixed function, and leave no trace, as those of `HessianOperator`.

    Args:
        outputs: the model's outputs: takes nothing (with ``data`` a batch), returns a tensor, or a
            tuple, a dict and the like of tensors.
        loss: of the outputs; with ``data`` of the outputs and the batch. Returns the loss.
        params: as for `HessianOperator`. A weight decay isn't part of G.
        data, sizes, select, exclude, model: as for `HessianOperator`.
        mode: "exact": J·v by double backward. "difference": by forward passes at both sides of θ.
            "auto": exact, unless that fails or differs; the first product decides.
        perturbation: Δq of differences; None chooses it.

    Raises:
        TypeError, ValueError: naming the argument and its value.
        NotImplementedError: DTensor parameters; parameters of a DistributedDataParallel.

    Example:
        >>> model = torch.nn.Linear(2, 3)
        >>> x, y = torch.ones(4, 2), torch.tensor([0, 1, 2, 0])
        >>> G = GGNOperator(
        ...     lambda: model(x), lambda out: torch.nn.functional.cross_entropy(out, y),
        ...     model.named_parameters(),
        ... )
        >>> lyapcuda.eigsh(G).converged  # of a linear model it is the Hessian
        tensor([True])
    """

    @entry_point
    def __init__(
        self,
        outputs: Callable[..., Any],
        loss: Callable[..., Tensor],
        params: Parameters,
        *,
        data: Iterable[Any] | None = None,
        sizes: Sizes | None = None,
        mode: str = "auto",
        perturbation: float | None = None,
        select: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        model: nn.Module | Iterable[nn.Module] | None = None,
    ) -> None:
        for name, given in {"outputs": outputs, "loss": loss}.items():
            if not callable(given):
                raise TypeError(f"{name}={described(given)}: expected a callable")
        self._made_of = outputs, loss
        super().__init__(
            OutputsAndLoss(outputs, loss),
            *(params, data, sizes, mode, perturbation, select, exclude, model),
        )

    def block(self, select: str | Sequence[str]) -> GGNOperator:
        """Returns the same of the parameters whose names match, the others fixed."""
        return GGNOperator(*self._made_of, chosen_groups(self.layout, select), **self._options)


class EmpiricalFisherOperator(_GaussNewtonOperator):
    """The empirical Fisher matrix F = (1/n)·Σ gᵢ·gᵢᵀ, of the gradients of n samples' losses.

    It is positive semidefinite, and of the labels in the data: not the Fisher matrix, whose labels
    are drawn from the model (`GGNOperator` with cross-entropy has that one). Per-sample gradients
    are never formed: a product is J·v and Jᵀ of the vector of losses, for the price of two
    gradients. Samples must not depend on each other (BatchNorm in train mode), or gᵢ isn't theirs.

    Args:
        losses: takes nothing (with ``data`` a batch), returns a tensor of one loss a sample, as of
            ``cross_entropy(..., reduction="none")``.
        params, data, sizes, select, exclude, model, mode, perturbation: as for `GGNOperator`.

    Raises:
        TypeError, ValueError: naming the argument and its value.
        NotImplementedError: DTensor parameters; parameters of a DistributedDataParallel.

    Example:
        >>> p = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        >>> F = EmpiricalFisherOperator(lambda: (x @ p).square(), [p])
        >>> F @ torch.eye(2, dtype=torch.float64)  # gradients (2, 0) and (0, 4)
        tensor([[2., 0.],
                [0., 8.]], dtype=torch.float64)
    """

    @entry_point
    def __init__(
        self,
        losses: Callable[..., Tensor],
        params: Parameters,
        *,
        data: Iterable[Any] | None = None,
        sizes: Sizes | None = None,
        mode: str = "auto",
        perturbation: float | None = None,
        select: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        model: nn.Module | Iterable[nn.Module] | None = None,
    ) -> None:
        if not callable(losses):
            raise TypeError(f"losses={described(losses)}: expected a callable")
        self._losses = losses
        super().__init__(
            OutputsAndLoss(losses),
            *(params, data, sizes, mode, perturbation, select, exclude, model),
        )

    def block(self, select: str | Sequence[str]) -> EmpiricalFisherOperator:
        """Returns the same of the parameters whose names match, the others fixed."""
        groups = chosen_groups(self.layout, select)
        return EmpiricalFisherOperator(self._losses, groups, **self._options)
