"""Eigenvalues of a loss's Hessian at one θ."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lyapcuda.arguments import choice, whole
from lyapcuda.arguments import seed as check_seed
from lyapcuda.solvers.basis import MAX_ROWS, Basis, Solution
from lyapcuda.solvers.convergence import (
    DIFFERENCE_ACCURACY,
    FORWARD_MARGIN,
    ConvergenceStatus,
    Criterion,
)
from lyapcuda.solvers.difference_error import TruncationError, truncation_along
from lyapcuda.solvers.initial_vectors import fill_, refill_, start_vector
from lyapcuda.solvers.lanczos import lanczos
from lyapcuda.solvers.operator import HessianOperator, accepts_closure
from lyapcuda.solvers.result import EigenResult, warn_unless_converged
from lyapcuda.solvers.ritz import WHICH
from lyapcuda.solvers.subspace_iteration import MAX_BLOCK, block_size, subspace_iteration

__all__ = ["METHODS", "eigsh"]

METHODS = ("lanczos", "lyapunov")

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

    Where the operator left ``difference`` open, forward differences are taken if the tolerance,
    the parameters' precision and the loss allow it. Central ones are taken for 16-bit parameters,
    for losses with kinks (ReLU), and for a tolerance below 1e-3 in float32, 4e-8 in float64. Where
    forward ones turn out too coarse for one of the values, it goes on with central ones from the
    vectors found so far. Where it is Δq that was too large, as is measured along the leading
    vector, central ones take a smaller one. Neither where ``maxiter`` ended a run. The operator
    itself stays what it is.

    Args:
        operator: the Hessian. Or, as the short form, a closure and its parameters, and further
            arguments of `HessianOperator` by name: ``eigsh(closure, params, k=5, data=loader)``. A
            ``perturbation`` given there measures the curvature at that scale.
        k: how many.
        which: "LA" largest (algebraic), "SA" smallest, "LM" largest magnitude, "BE" half from each
            end (one more from the high end where k is odd).
        tol: relative error of each eigenvalue.
        maxiter: iterations at most. Default 300.
        v0: (n,) start vector. Default: a random one, mixed half and half with g(θ), which is known
            anyway and lies in the leading eigenspace for a good part.
        method: "lanczos": fewest gradients, ``ncv + 1`` vectors of memory. "lyapunov": Benettin
            subspace iteration at a frozen θ, about 3k vectors and, for many values or close ones,
            some ten times the gradients; "LM" and "BE" run it twice, up and down. It can't tell
            what it has missed. Both need two vectors more, for gradients at θ and beside it.
        ncv: vectors that Lanczos keeps before it restarts. Default 2k + 6, or n up to 64. More save
            few gradients; fewer save memory, down to k + 2, at the price of more (docs/solvers.md).
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
    layout, before = operator.layout, operator.gradient_evaluations
    n = layout.numel
    if k > n:
        raise ValueError(f"k={k}: there are only {n} parameters")
    rows = _rows(k, ncv, n, method)
    start = None if v0 is None else start_vector(v0, operator)
    if operator.mode == "difference":
        coarse = operator.needs_central or tol < FORWARD_MARGIN * _accuracy(operator, "forward")
        if coarse and operator.chooses_difference:
            operator = operator.central()
    rounding = torch.finfo(layout.dtype).eps
    criterion = Criterion(k, which, tol, _accuracy(operator), rounding, n)
    basis = Basis.empty(layout, rows)
    limit = 300 if maxiter is None else maxiter
    spent: list[int] = []

    with operator.keeping_graph(), _progress_bar(limit if progress else None, k) as show:

        def report(status: ConvergenceStatus) -> None:
            spent.append(operator.gradient_evaluations - before)
            show(status, spent[-1])

        def solve(found: Basis | None = None) -> Solution:
            generators = [
                torch.Generator(group.device).manual_seed(seed + i)
                for i, group in enumerate(layout.groups)
            ]
            starts = 1 if method == "lanczos" else rows
            # Both ends take the same rows to start from.
            if found is None or (method == "lyapunov" and which in ("LM", "BE")):
                fill_(basis[:starts], start, operator, generators)
            else:
                refill_(basis, starts, found, generators, random=v0 is None)
            if method == "lyapunov":
                return subspace_iteration(
                    operator.product, basis, criterion, maxiter=limit, report=report
                )
            return lanczos(
                operator.product,
                basis,
                criterion,
                maxiter=limit,
                generators=generators,
                verify=verify,
                # What the found vectors miss, the run that found them has looked for.
                look=v0 is None and found is None,
                provisional=found is None and _may_refine(operator),
                report=report,
            )

        solution = solve()
        for reruns in range(_RERUNS + 1):
            by_itself = solution.iterations < limit or bool(solution.status.done.all())
            again = by_itself and reruns < _RERUNS and _may_refine(operator)
            length = _check_truncation(operator, solution, basis, criterion)
            finer = operator
            if again and solution.status.limited:
                finer = _finer(operator, length)
            if finer is operator:
                break
            operator, first = finer, solution
            expected = TruncationError(0.0, length).central(operator.perturbation)
            criterion = replace(criterion, accuracy=max(_accuracy(operator), expected))
            solution = solve(found=first.vectors)
            solution = replace(
                solution,
                history=[*first.history, *solution.history],
                iterations=first.iterations + solution.iterations,
            )
    gradients = operator.gradient_evaluations - before
    result = _result(solution, operator, criterion, method, gradients, spent)
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


def _rows(k: int, ncv: int | None, n: int, method: str) -> int:
    """Rows of the basis."""
    if method == "lyapunov":
        if k > MAX_BLOCK:
            raise ValueError(f"k={k}: method='lyapunov' takes at most {MAX_BLOCK}")
        return block_size(k, n)
    usual = 2 * k + 6 if n > 64 else n
    kept = min(n, MAX_ROWS, usual) if ncv is None else min(ncv, n)
    if kept > MAX_ROWS:
        raise ValueError(f"ncv={ncv}: at most {MAX_ROWS}")
    if not (k < kept or kept == n):
        advice = f"k={k}: at most {MAX_ROWS - 1}" if ncv is None else f"ncv={ncv}: more than k={k}"
        raise ValueError(f"{advice} is possible")
    return kept + 1


# --- finite differences: how good, and finer ones ------------------------------------------------


def _accuracy(operator: HessianOperator, difference: str | None = None) -> float:
    """Relative error of an eigenvalue that the operator's products have on a smooth loss."""
    if operator.mode == "exact":
        return torch.finfo(operator.dtype).eps
    factor, power = DIFFERENCE_ACCURACY[difference or operator.difference]
    return factor * operator.epsilon**power


def _may_refine(operator: HessianOperator) -> bool:
    """Whether differences that are too coarse may be made finer."""
    if operator.mode == "exact":
        return False
    if operator.difference == "forward":
        return operator.chooses_difference
    return operator.chooses


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
    needed = operator.chooses and bool(status.done.any())
    if not needed or criterion.is_zero(status.values, status.errors)[lead]:
        return math.inf
    apart = len(basis) > len(solution.vectors)
    spare = basis[len(basis) - 1 :] if apart else Basis.empty(basis.layout, 1)
    seen = truncation_along(
        operator, solution.vectors[lead : lead + 1], spare, float(status.values[lead])
    )
    spare.release()
    solution.status = criterion.coarser(status, seen.error)
    return seen.length


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
    solution: Solution,
    operator: HessianOperator,
    criterion: Criterion,
    method: str,
    gradients: int,
    spent: list[int],
) -> EigenResult:
    kind = "exact" if operator.mode == "exact" else operator.difference
    layout, status = operator.layout, solution.status
    shape = (len(status.values), layout.numel)
    vectors = torch.empty(shape, dtype=layout.dtype, device=layout.device)
    operator.release()
    for i, vector in enumerate(vectors):
        layout.gather(solution.vectors.row(i), out=vector)
        solution.vectors[i : i + 1].release()

    def tensor(values: Any) -> Tensor:
        return torch.as_tensor(values.copy(), device=layout.device)

    return EigenResult(
        eigenvalues=tensor(status.values),
        eigenvectors=vectors,
        residuals=tensor(status.residuals),
        difference_errors=tensor(status.errors),
        converged=tensor(status.converged),
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
        method=method,
        which=criterion.which,
        difference=kind,
        perturbation=None if kind == "exact" else operator.perturbation,
        tol=criterion.tol,
        _layout=layout,
    )
