"""Eigenvalues of a loss's Hessian at one θ."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lyapcuda.arguments import choice, whole
from lyapcuda.arguments import seed as check_seed
from lyapcuda.objective.double_backward import DoubleBackwardError
from lyapcuda.objective.loss_graph import COARSE
from lyapcuda.params.flat import FlatLayout
from lyapcuda.solvers.agreement import (
    Agreement,
    believed,
    both_sides,
    failed,
    hidden,
    known_wrong,
    one_side,
    unbelieved,
)
from lyapcuda.solvers.basis import MAX_ROWS, Basis, Solution
from lyapcuda.solvers.convergence import (
    DIFFERENCE_ACCURACY,
    EXACT_ACCURACY,
    FORWARD_MARGIN,
    ConvergenceStatus,
    Criterion,
)
from lyapcuda.solvers.difference_error import TruncationError, truncation_along
from lyapcuda.solvers.initial_vectors import fill_, refill_, start_vectors
from lyapcuda.solvers.lanczos import lanczos
from lyapcuda.solvers.operator import HessianOperator, accepts_closure
from lyapcuda.solvers.result import (
    KINKS,
    NOT_ITS_OWN,
    PRECISION,
    EigenResult,
    warn_unless_converged,
)
from lyapcuda.solvers.ritz import WHICH
from lyapcuda.solvers.subspace_iteration import MAX_BLOCK, block_size, subspace_iteration

__all__ = ["METHODS", "eigsh"]

METHODS = ("lanczos", "lyapunov")

# Vectors that Lanczos keeps by default, at most, and the bytes they may take together; k + 1, and
# more where these make it slow, where they are larger.
_ROWS, _SMALL = 64, 2**22
# Runs with finer differences, where the first was too coarse.
_RERUNS = 1


@accepts_closure
def eigsh(
    operator: HessianOperator,
    k: int = 1,
    which: str = "LA",
    *,
    tol: float = 1e-3,
    maxiter: int | None = None,
    v0: Tensor | None = None,
    method: str = "lanczos",
    ncv: int | None = None,
    seed: int = 0,
    verify: bool = False,
    progress: bool = False,
) -> EigenResult:
    """Returns eigenvalues and eigenvectors of the Hessian of a loss, from gradients alone.

    Products are exact where double backward works, else differences of gradients: the operator's
    `mode`; ``mode`` and ``reason`` of the result say which, and why. Exact ones are compared with
    differences along the leading vector at the end, and aren't believed where these disagree.

    Where differences are taken, and the operator left ``difference`` open, they are forward ones if
    the tolerance, the parameters' precision and the loss allow it. Central ones are taken for
    16-bit parameters, for losses whose gradient jumps (ReLU), and for a tolerance below 1e-3 in
    float32, 4e-8 in float64. Where forward ones turn out too coarse for one of the values, it goes
    on with central ones from the vectors found so far. Where it is Δq that was too large, as is
    measured along the leading vector, central ones take a smaller one. Neither where ``maxiter``
    ended a run. The operator itself stays what it is.

    Args:
        operator: the Hessian. Or, as the short form, a closure and its parameters, and further
            arguments of `HessianOperator` by name: ``eigsh(closure, params, k=5, data=loader)``. A
            ``perturbation`` given there measures the curvature at that scale.
        k: how many.
        which: "LA" largest (algebraic), "SA" smallest, "LM" largest magnitude, "BE" half from each
            end (one more from the high end where k is odd).
        tol: relative error of each eigenvalue.
        maxiter: iterations at most. Default 300.
        v0: (n,) start vector, (m, n) several, or a `CurvatureTracker` of the same parameters, whose
            separations are near the eigenvectors already. Default: a random one, mixed half and
            half with g(θ), which is known anyway and lies in the leading eigenspace for a good
            part.
        method: "lanczos": fewest gradients, ``ncv + 1`` vectors of memory. "lyapunov": Benettin
            subspace iteration at a frozen θ, about 3k vectors and, for many values or close ones,
            some ten times the gradients; "LM" and "BE" run it twice, up and down. It can't tell
            what it has missed. Both need two vectors more, for gradients at θ and beside it.
        ncv: vectors that Lanczos keeps before it restarts. Default: as many as take 4 MB, up to
            64; of larger ones k + 1, and one more, up to 2k + 6, whenever these make it slow. More
            save gradients; fewer save memory, at the price of more (docs/solvers.md).
        seed: of the random vectors; the global random states are not touched.
        verify: before believing, put in a random vector orthogonal to everything found. Lanczos
            sees one copy of a multiple eigenvalue, and can miss one that the start vector has no
            part in; this costs as many gradients again.
        progress: show a progress bar (needs tqdm).

    Warns:
        ConvergenceWarning: where ``converged`` is not all True.

    Raises:
        TypeError, ValueError: naming the argument and its value.
        FloatingPointError: a gradient that isn't finite.

    Example:
        >>> p = torch.ones(3, dtype=torch.float64, requires_grad=True)
        >>> H = HessianOperator(lambda: (p * torch.tensor([1.0, 2.0, 5.0]) * p).sum(), [p])
        >>> eigsh(H, k=2).eigenvalues.round(decimals=4)
        tensor([10.,  4.], dtype=torch.float64)
    """
    _check(k, which, tol, maxiter, method, ncv, seed)
    n = operator.layout.numel
    if k > n:
        raise ValueError(f"k={k}: there are only {n} parameters")
    rows = _rows(k, ncv, operator.layout, method)
    starts = None if v0 is None else start_vectors(v0, operator)
    limit = 300 if maxiter is None else maxiter
    room = rows - 1 if ncv is not None else _few_vectors(k, operator.layout)
    request = _Request(k, which, tol, limit, method, rows, room, starts, seed, verify)
    with operator.keeping_graph(), _progress_bar(limit if progress else None, k) as show:
        run = _Run(operator, request, show)
        outcome = run.by_exact_products() if operator.mode != "difference" else None
        if outcome is None:
            outcome = run.by_differences()
    result = run.result(outcome)
    warn_unless_converged(result)
    return result


# --- arguments -----------------------------------------------------------------------------------


def _check(k: Any, which: Any, tol: Any, maxiter: Any, method: Any, ncv: Any, seed: Any) -> None:
    whole("k", k, 1)
    choice("which", which, WHICH)
    choice("method", method, METHODS)
    if not isinstance(tol, Real) or isinstance(tol, bool) or not 0 < tol < 1:
        raise ValueError(f"tol={tol!r}: expected a number in (0, 1)")
    if maxiter is not None:
        whole("maxiter", maxiter, 1)
    if ncv is not None:
        whole("ncv", ncv, 2)
        if method != "lanczos":
            raise ValueError(f"ncv={ncv}: only for method='lanczos'")
    check_seed("seed", seed)


def _rows(k: int, ncv: int | None, layout: FlatLayout, method: str) -> int:
    """Rows of the basis."""
    n = layout.numel
    if method == "lyapunov":
        if k > MAX_BLOCK:
            raise ValueError(f"k={k}: method='lyapunov' takes at most {MAX_BLOCK}")
        return block_size(k, n)
    usual = n
    if n > 64:
        # Rows that are never touched take memory on devices alone.
        more = 2 * k + (6 if layout.device.type == "cpu" else 1)
        usual = max(more, _few_vectors(k, layout))
    kept = min(n, MAX_ROWS, usual) if ncv is None else min(ncv, n)
    if kept > MAX_ROWS:
        raise ValueError(f"ncv={ncv}: at most {MAX_ROWS}")
    if not (k < kept or kept == n):
        advice = f"k={k}: at most {MAX_ROWS - 1}" if ncv is None else f"ncv={ncv}: more than k={k}"
        raise ValueError(f"{advice} is possible")
    return kept + 1


def _few_vectors(k: int, layout: FlatLayout) -> int:
    """How many vectors Lanczos keeps at first: many small ones, which save products and take next
    to no memory, and few large ones.
    """
    return max(k + 1, min(_ROWS, _SMALL // (layout.numel * layout.dtype.itemsize)))


# --- runs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Request:
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
class _Outcome:
    """What a run ended with: whose products, and what speaks against every one of its values."""

    operator: HessianOperator
    solution: Solution
    doubts: list[str]


class _Run:
    """One call of `eigsh`: by exact products, by differences, or by one after the other."""

    def __init__(self, operator: HessianOperator, request: _Request, show: Any) -> None:
        self.operator, self.request, self.show = operator, request, show
        self.before = operator.gradient_evaluations
        self.spent: list[int] = []
        #: What exact products have shown to speak against those of any kind.
        self.doubts: list[str] = []

    def by_exact_products(self) -> _Outcome | None:
        """Solves by double backward; None where ``mode="auto"`` then takes differences."""
        asked = self.operator.mode == "exact"
        operator = self.operator if asked else self.operator.exactly()
        try:
            basis = self._start(operator)
            if operator.products.wrong is not None and not asked:
                self.operator.settle("difference", known_wrong(operator.products.wrong))
                return None
            criterion = self._criterion(operator, _accuracy(operator))
            solution = self._solve(operator, basis, criterion)
        except DoubleBackwardError as error:
            if asked:
                raise
            self.operator.settle("difference", failed(error))
            return None
        operator.objective.drop_graph()
        basis[len(solution.vectors) :].release()
        doubts, reason = _doubts(operator), None
        if solution.status.done.any():
            found, own = self._compared(operator, solution)
            doubts = _doubts(operator)
            reason = self._unbelieved(operator, solution.status, found)
            if operator.products.hides:
                reason = hidden()
            operator.perturbation = operator.usual_perturbation
            if found is not None:
                if not found.is_rough(criterion.tol):  # (kinks would be that bias)
                    solution.status = criterion.coarser(solution.status, found.bias)
            if reason is None and not own and not doubts:
                doubts.append(NOT_ITS_OWN)
            if reason is None and not asked:
                self.operator.settle("exact", believed(found))
                self.operator.perturbation = operator.perturbation
        if reason is not None and not doubts:
            if not asked:
                self.operator.settle("difference", reason)
                self.spent.clear()
                if not own:
                    self.doubts.append(NOT_ITS_OWN)
                return None
            doubts.append(reason)
        return _Outcome(operator, solution, doubts)

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
        # The extremes of a matrix that isn't symmetric aren't its eigenvalues.
        lead = int(np.abs(status.values).argmax())
        slack = max(4.0 * operator.epsilon**0.5, self.request.tol)
        skewed = bool(status.errors[lead] > slack * status.scale)
        return unbelieved(found, skewed, operator.products.custom)

    def by_differences(self) -> _Outcome:
        """Solves by differences of gradients: finer ones where the first are too coarse."""
        operator, tol = self.operator, self.request.tol
        coarse = operator.needs_central or tol < FORWARD_MARGIN * _accuracy(operator, "forward")
        if coarse and operator.chooses_difference:
            operator = operator.central()
        basis = self._start(operator)
        criterion = self._criterion(operator, _accuracy(operator))
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
            criterion = replace(criterion, accuracy=max(_accuracy(operator), expected))
        solution = replace(solution, history=history, iterations=iterations)
        doubts = _doubts(operator) + self.doubts
        if not doubts and operator.kinked:
            doubts.append(KINKS if operator.epsilon <= COARSE else PRECISION)
        return _Outcome(operator, solution, doubts)

    # --- parts -----------------------------------------------------------------------------------

    def _criterion(self, operator: HessianOperator, accuracy: float) -> Criterion:
        request, layout = self.request, operator.layout
        rounding = torch.finfo(layout.dtype).eps
        return Criterion(request.k, request.which, request.tol, accuracy, rounding, layout.numel)

    def _generators(self, operator: HessianOperator) -> list[torch.Generator]:
        return [
            torch.Generator(group.device).manual_seed(self.request.seed + i)
            for i, group in enumerate(operator.layout.groups)
        ]

    def _start(self, operator: HessianOperator) -> Basis:
        """A basis that holds the start vectors."""
        request = self.request
        basis = Basis.empty(operator.layout, request.rows)
        starts = 1 if request.method == "lanczos" else request.rows
        generators = self._generators(operator)
        if request.starts is None:
            fill_(basis[:starts], operator, generators)
        else:
            operator.products.start(basis.row(0), exact=operator.mode == "exact")
            refill_(basis, starts, request.starts, generators, random=False)
        return basis

    def _solve(
        self,
        operator: HessianOperator,
        basis: Basis,
        criterion: Criterion,
        found: Basis | None = None,
    ) -> Solution:
        request, generators = self.request, self._generators(operator)

        def report(status: ConvergenceStatus) -> None:
            self.spent.append(operator.gradient_evaluations - self.before)
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

    def result(self, outcome: _Outcome) -> EigenResult:
        """What the user gets."""
        gradients = self.operator.gradient_evaluations - self.before
        return _result(outcome, self.request, self.operator.reason, gradients, self.spent)


def _doubts(operator: HessianOperator) -> list[str]:
    return [] if operator.changed is None else [f"closure: {operator.changed}"]


# --- finite differences: how good, and finer ones ------------------------------------------------


def _accuracy(operator: HessianOperator, difference: str | None = None) -> float:
    """Relative error of an eigenvalue that the operator's products have on a smooth loss."""
    if operator.mode == "exact":
        coarse = operator.epsilon > COARSE
        return EXACT_ACCURACY * operator.epsilon if coarse else torch.finfo(operator.dtype).eps
    factor, power = DIFFERENCE_ACCURACY[difference or operator.difference]
    return factor * operator.epsilon**power


def _may_refine(operator: HessianOperator) -> bool:
    """Whether differences that are too coarse may be made finer."""
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


# --- progress, result ----------------------------------------------------------------------------


@contextmanager
def _progress_bar(limit: int | None, k: int) -> Iterator[Any]:
    """Gives a function that shows the status of an iteration and the gradients spent so far."""
    if limit is None:
        yield lambda status, gradients: None
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from error

    with tqdm(total=limit, unit="iteration", dynamic_ncols=True) as bar:

        def show(status: ConvergenceStatus, gradients: int) -> None:
            bar.set_postfix(
                gradients=gradients,
                converged=f"{int(status.converged.sum())}/{k}",
                first=f"{status.values[0]:.6g}",
                refresh=False,
            )
            bar.update()

        yield show


def _result(
    outcome: _Outcome, request: _Request, reason: str, gradients: int, spent: list[int]
) -> EigenResult:
    operator, solution = outcome.operator, outcome.solution
    exact = operator.mode == "exact"
    layout, status = operator.layout, solution.status
    shape = (len(status.values), layout.numel)
    vectors = torch.empty(shape, dtype=layout.dtype, device=layout.device)
    operator.release()
    for i, vector in enumerate(vectors):
        layout.gather(solution.vectors.row(i), out=vector)
        solution.vectors[i : i + 1].release()

    def tensor(values: Any) -> Tensor:
        return torch.as_tensor(values.copy(), device=layout.device)

    converged = tensor(status.converged)
    return EigenResult(
        eigenvalues=tensor(status.values),
        eigenvectors=vectors,
        residuals=tensor(status.residuals),
        difference_errors=tensor(status.errors),
        converged=torch.zeros_like(converged) if outcome.doubts else converged,
        iterations=solution.iterations,
        gradient_evaluations=gradients,
        history=[
            {
                "eigenvalues": values.tolist(),
                "residuals": residuals.tolist(),
                "gradient_evaluations": count,
            }
            for (values, residuals), count in zip(solution.history, spent, strict=True)
        ],
        method=request.method,
        which=request.which,
        mode=operator.mode,
        reason=reason,
        difference="exact" if exact else operator.difference,
        perturbation=operator.perturbation,
        tol=request.tol,
        doubts=tuple(outcome.doubts),
        epsilon=operator.epsilon,
        _layout=layout,
    )
