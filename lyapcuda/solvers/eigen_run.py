"""One call of `eigsh`: by exact products, by differences of gradients, or by one after the other.

Exact products are compared with differences at the end, along the leading vector. Where they can't
be had, or aren't believed, the call starts again with differences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from lyapcuda.basis import Basis
from lyapcuda.objective.double_backward import DoubleBackwardError
from lyapcuda.solvers.agreement import (
    ASYMMETRIC,
    OTHER_GRADIENT,
    UNCOMPARED,
    Agreement,
    asymmetry_allowed,
    believed,
    both_sides,
    failed,
    known_wrong,
    one_side,
    unbelieved,
)
from lyapcuda.solvers.convergence import FORWARD_MARGIN, ConvergenceStatus, Criterion
from lyapcuda.solvers.difference_error import TruncationError, truncation_along
from lyapcuda.solvers.initial_vectors import fill_, refill_
from lyapcuda.solvers.lanczos import lanczos
from lyapcuda.solvers.operator import HessianOperator
from lyapcuda.solvers.result import NOT_ITS_OWN, jumping
from lyapcuda.solvers.solution import Solution
from lyapcuda.solvers.subspace_iteration import subspace_iteration
from lyapcuda.solvers.symmetric import SymmetricOperator

__all__ = ["EigenOutcome", "EigenRequest", "EigenRun"]

# Runs with finer differences, where the first was too coarse.
_RERUNS = 1


@dataclass(frozen=True)
class EigenRequest:
    """What a user asked for."""

    k: int
    which: str
    tol: float
    maxiter: int
    method: str
    rows: int
    room: int
    starts: Basis | None
    seed: int
    verify: bool


@dataclass
class EigenOutcome:
    """What a run ended with: whose products, and what speaks against every one of its values."""

    operator: SymmetricOperator
    solution: Solution
    doubts: list[str]


class EigenRun:
    """One call of `eigsh`: by exact products, by differences, or by one after the other.

    Args:
        operator: the Hessian.
        request: what was asked for.
        show: called with the status of every iteration, and the gradients spent so far.

    Attributes:
        spent: the gradients spent, by iteration of what `outcome` ended with.
    """

    def __init__(self, operator: SymmetricOperator, request: EigenRequest, show: Any) -> None:
        self.operator, self.request, self.show = operator, request, show
        self.before = operator.gradient_evaluations
        self.spent: list[int] = []

    def outcome(self) -> EigenOutcome:
        """Solves, by the products that ``mode`` says."""
        if not isinstance(self.operator, HessianOperator):
            return self._as_it_is()
        found = self._by_exact_products() if self.operator.mode != "difference" else None
        return self._by_differences() if found is None else found

    def _as_it_is(self) -> EigenOutcome:
        """Solves by the products that the operator has. Nothing is known to compare them with."""
        operator = self.operator
        basis = self._start(operator)
        # The first product decides how they are taken.
        spare = Basis.empty(operator.layout, 1)
        operator.product(basis.row(0), spare.row(0))
        criterion = self._criterion(operator, operator.accuracy)
        solution = self._solve(operator, basis, criterion)
        doubts, status = list(operator.doubts), solution.status
        if operator.mode == "exact" and _is_skewed(operator, status, self.request.tol):
            doubts.append(ASYMMETRIC)
        return EigenOutcome(operator, solution, doubts)

    def _by_exact_products(self) -> EigenOutcome | None:
        """Solves by double backward; None where ``mode="auto"`` then takes differences."""
        asked = self.operator.mode == "exact"
        operator = self.operator if asked else self.operator.exactly()
        try:
            basis = self._start(operator)
            if operator.products.wrong is not None and not asked:
                return self._turn_away(known_wrong(operator.products.wrong))
            criterion = self._criterion(operator, operator.accuracy)
            solution = self._solve(operator, basis, criterion)
        except (DoubleBackwardError, FloatingPointError) as error:
            if asked:
                raise
            return self._turn_away(failed(error))
        operator.objective.drop_graph()
        basis[len(solution.vectors) :].release()
        operator.perturbation = operator.usual_perturbation
        doubts, reason = _doubts(operator), None
        if solution.status.done.any():
            found, own = self._compared(operator, solution)
            reason = self._unbelieved(operator, solution.status, found)
            if operator.changed is not None and not operator.products.is_really_changed():
                reason = OTHER_GRADIENT
            doubts = _doubts(operator)
            if found is not None and not found.is_rough(criterion.tol):  # (kinks are a bias too)
                solution.status = criterion.coarser(solution.status, found.bias)
            if reason is None and not own and not doubts:
                doubts.append(NOT_ITS_OWN)
            if reason is None and not asked:
                changed = operator.changed is not None
                self.operator.settle("exact", UNCOMPARED if changed else believed(found))
                self.operator.perturbation = operator.perturbation
        if reason is not None and not doubts:
            if not asked:
                return self._turn_away(reason)
            doubts.append(reason)
        return EigenOutcome(operator, solution, doubts)

    def _turn_away(self, reason: str) -> None:
        """Has ``mode="auto"`` take differences, as if nothing had been tried."""
        self.operator.turn_away(reason)
        self.spent.clear()

    def _compared(
        self, operator: HessianOperator, solution: Solution
    ) -> tuple[Agreement | None, bool]:
        """How differences agree along the leading vector (None where kinks would hide it), and
        whether the loss changes as its gradient says.
        """
        status, products = solution.status, operator.products
        own = operator.is_own_gradient(status.scale)
        if operator.kinks_hide:
            return None, own
        lead = int(np.abs(status.values).argmax())
        value, residual = float(status.values[lead]), float(status.residuals[lead])
        u, tol = solution.vectors[lead : lead + 1], self.request.tol
        size = operator.usual_perturbation
        found = one_side(products, u, value, size, residual, status.scale)
        if found.is_rough(tol) or found.bias > tol:
            one = torch.ones((), dtype=torch.float64, device=operator.device)
            found = both_sides(products, u, value, one, size, residual, status.scale)
            own = own and found.own
        else:
            found = replace(found, bias=0.0)
        return found, own

    def _unbelieved(
        self, operator: HessianOperator, status: ConvergenceStatus, found: Agreement | None
    ) -> str | None:
        """Why exact products aren't believed; None where they are."""
        skewed = _is_skewed(operator, status, self.request.tol)
        return unbelieved(found, skewed, operator.products.custom)

    def _by_differences(self) -> EigenOutcome:
        """Solves by differences of gradients: finer ones where the first are too coarse."""
        operator, tol = self.operator, self.request.tol
        coarse = operator.needs_central or tol < FORWARD_MARGIN * operator.accuracy_of("forward")
        if coarse and operator.chooses_difference:
            operator = operator.central()
        basis = self._start(operator)
        criterion = self._criterion(operator, operator.accuracy)
        found: Basis | None = None
        history, iterations = [], 0
        for reruns in range(_RERUNS + 1):
            solution = self._solve(operator, basis, criterion, found)
            history, iterations = history + solution.history, iterations + solution.iterations
            by_itself = solution.iterations < self.request.maxiter or solution.status.done.all()
            again = bool(by_itself) and reruns < _RERUNS and _may_refine(operator)
            length = _check_truncation(operator, solution, basis, criterion)
            finer = operator
            if again and solution.status.limited:
                finer = _finer(operator, length)
            if finer is operator:
                break
            expected = TruncationError(0.0, length).central(finer.perturbation)
            operator, found = finer, solution.vectors
            criterion = replace(criterion, accuracy=max(operator.accuracy, expected))
        solution = replace(solution, history=history, iterations=iterations)
        doubts = _doubts(operator)
        if not doubts and operator.kinked:
            doubts.append(jumping(operator.epsilon))
        if not doubts and solution.status.done.any():
            if not operator.is_own_gradient(solution.status.scale):
                doubts.append(NOT_ITS_OWN)
        return EigenOutcome(operator, solution, doubts)

    # --- parts -----------------------------------------------------------------------------------

    def _criterion(self, operator: SymmetricOperator, accuracy: float) -> Criterion:
        request, layout = self.request, operator.layout
        rounding = torch.finfo(layout.dtype).eps
        return Criterion(request.k, request.which, request.tol, accuracy, rounding, layout.numel)

    def _generators(self, operator: SymmetricOperator) -> list[torch.Generator]:
        return [
            torch.Generator(group.device).manual_seed(self.request.seed + i)
            for i, group in enumerate(operator.layout.groups)
        ]

    def _start(self, operator: SymmetricOperator) -> Basis:
        """A basis that holds the start vectors."""
        request = self.request
        basis = Basis.empty(operator.layout, request.rows)
        starts = 1 if request.method == "lanczos" else request.rows
        generators = self._generators(operator)
        if request.starts is None:
            fill_(basis[:starts], operator, generators)
        else:
            operator.start(basis.row(0))
            refill_(basis, starts, request.starts, generators, random=False)
        return basis

    def _solve(
        self,
        operator: SymmetricOperator,
        basis: Basis,
        criterion: Criterion,
        found: Basis | None = None,
    ) -> Solution:
        request, generators = self.request, self._generators(operator)

        def report(status: ConvergenceStatus) -> None:
            self.spent.append(self.gradients)
            self.show(status, self.spent[-1])

        if found is not None:
            starts = 1 if request.method == "lanczos" else request.rows
            # Both ends take the same rows to start from.
            if request.method == "lyapunov" and request.which in ("LM", "BE"):
                fill_(basis[:starts], operator, generators)
            else:
                refill_(basis, starts, found, generators, random=request.starts is None)
        if request.method == "lyapunov":
            return subspace_iteration(
                operator.product, basis, criterion, maxiter=request.maxiter, report=report
            )
        return lanczos(
            operator.product,
            basis,
            criterion,
            maxiter=request.maxiter,
            generators=generators,
            verify=request.verify,
            # What the found vectors miss, the run that found them has looked for.
            look=request.starts is None and found is None,
            provisional=found is None and _may_refine(operator),
            report=report,
            room=request.room,
        )

    @property
    def gradients(self) -> int:
        """Evaluations of the gradient so far."""
        return self.operator.gradient_evaluations - self.before


def _doubts(operator: HessianOperator) -> list[str]:
    return [] if operator.changed is None else [f"closure: {operator.changed}"]


# --- products: how good, and finer ones -----------------------------------------------------------


def _is_skewed(operator: SymmetricOperator, status: ConvergenceStatus, tol: float) -> bool:
    """Whether products aren't those of a symmetric matrix, whose extremes are its eigenvalues."""
    lead = int(np.abs(status.values).argmax())
    slack = max(asymmetry_allowed(operator.epsilon), tol)
    return bool(status.errors[lead] > slack * status.scale)


def _may_refine(operator: SymmetricOperator) -> bool:
    """Whether differences that are too coarse may be made finer."""
    if not isinstance(operator, HessianOperator):
        return False
    if operator.mode == "exact" or operator.changed is not None:
        return False
    if operator.difference == "forward":
        return operator.chooses_difference
    return operator.chooses and not operator.kinked


def _finer(operator: HessianOperator, length: float) -> HessianOperator:
    """The operator by central differences, at a smaller Δq; itself where that is no finer."""
    finer = operator.central(length)
    was_central = operator.difference == "central"
    if was_central and finer.perturbation >= 0.7 * operator.perturbation:
        return operator
    return finer


def _check_truncation(
    operator: HessianOperator, solution: Solution, basis: Basis, criterion: Criterion
) -> float:
    """Measures what the differences are worth along the leading vector, and lowers the status to
    that; unless the solver isn't done with any value.

    Returns:
        The length that `HessianOperator.central` takes.
    """
    status = solution.status
    lead = int(np.abs(status.values).argmax())
    if not status.done.any() or status.values[lead] == 0.0:
        return math.inf
    apart = len(basis) > len(solution.vectors)
    spare = basis[len(basis) - 1 :] if apart else Basis.empty(basis.layout, 1)
    seen = truncation_along(
        operator,
        solution.vectors[lead : lead + 1],
        spare,
        float(status.values[lead]),
        float(status.residuals[lead]),
        criterion.tol,
    )
    spare.release()
    if seen.jumps:
        operator.products.jumps = True
    if operator.chooses or seen.jumps:
        # Jumps are as large along any vector.
        least = seen.error * abs(float(status.values[lead])) if seen.jumps else 0.0
        solution.status = criterion.coarser(status, seen.error, least)
    return math.inf if seen.jumps else seen.length
