"""Eigenvalues of a loss's Hessian at one θ: the standalone solver."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lyapcuda.arguments import choice, whole
from lyapcuda.objective.evaluator import Closure
from lyapcuda.params.collect import Parameters
from lyapcuda.solvers.basis import MAX_ROWS, Basis, Solution
from lyapcuda.solvers.difference_error import Truncation, measure
from lyapcuda.solvers.initial_vectors import fill_, refill_, start_vector
from lyapcuda.solvers.lanczos import lanczos
from lyapcuda.solvers.lobpcg import lobpcg, sizes
from lyapcuda.solvers.operator import DIFFERENCES, HessianOperator
from lyapcuda.solvers.result import EigenResult, warn_unless_converged
from lyapcuda.solvers.ritz import WHICH, Goal, Verdict
from lyapcuda.solvers.subspace_iteration import MAX_COPIES, climb, copies

__all__ = ["eigsh"]

METHODS = ("lanczos", "lobpcg", "lyapunov")

# Relative error of an eigenvalue that differences have on smooth losses, in ε^power of the
# parameters' dtype: at most so much on the nets of the tests.
_ACCURACY = {"forward": (1.5, 1 / 2), "central": (5.0, 2 / 3)}
# Runs with finer differences, where the first was too coarse.
_RERUNS = 1
# Forward differences do for tolerances of at least so many times their accuracy.
_MARGIN = 1.9


def eigsh(
    closure: Closure,
    params: Parameters,
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
    data: Iterable[Any] | None = None,
    select: str | Sequence[str] | None = None,
    mode: str = "difference",
    difference: str | None = None,
    perturbation: float | None = None,
    weight_decay: float = 0.0,
    model: nn.Module | Iterable[nn.Module] | None = None,
) -> EigenResult:
    """Eigenvalues and eigenvectors of the Hessian of a loss, from gradients alone.

    Args:
        closure, params, data, select, mode, perturbation, weight_decay, model: as for
            `HessianOperator`. A fixed ``perturbation`` measures the curvature at that scale.
        k: how many.
        which: "LA" largest (algebraic), "SA" smallest, "LM" largest magnitude, "BE" half from each
            end (one more from the high end where k is odd).
        tol: relative error of each eigenvalue.
        maxiter: iterations at most. Default 300.
        v0: (n,) start vector. Default: a random one, mixed half and half with g(θ), which is known
            anyway and lies in the leading eigenspace for a good part.
        method: "lanczos": fewest gradients, ``ncv + 1`` vectors of memory. "lobpcg": 6k + 6 vectors
            (twice as many with "LM", which follows k values of each end until it is known which of
            them can't win).
            "lyapunov": k copies that climb side by side (Benettin) at a frozen θ, about 3k vectors
            and, for many values or close ones, some ten times the gradients; "LM" and "BE" climb
            twice, up and down. These two can't tell what they have overlooked. All of them need two
            vectors more, for gradients at θ and beside it (docs/solvers.md).
        ncv: vectors that Lanczos keeps before it restarts. Default 2k + 6, or n up to 64. More save
            few gradients; fewer save memory, down to k + 2, at the price of more (docs/solvers.md).
        seed: of the random vectors; the global random states are not touched.
        verify: before believing, put in a random vector orthogonal to everything found. Lanczos
            sees one copy of a multiple eigenvalue, and can miss one that the start vector has no
            part in; this costs as many gradients again.
        progress: show a progress bar (needs tqdm).
        difference: "forward", "central", or None: forward where the tolerance, the parameters'
            precision and the loss allow it (central for 16-bit parameters, for losses with kinks
            such as ReLU, and for a tolerance below 1e-3 in float32, 4e-8 in float64), and central,
            from the vectors found so far, where forward ones turn out too coarse for one of the
            values. Where it is Δq that was too large, as is measured along the leading vector,
            central ones take a smaller one (neither where ``maxiter`` ended a run).

    Warns:
        ConvergenceWarning: where ``converged`` is not all True.

    Raises:
        TypeError, ValueError: naming the argument and its value.
        FloatingPointError: a gradient that isn't finite.
    """
    _check(k, which, tol, maxiter, method, ncv, seed)
    if difference is not None:
        choice("difference", difference, DIFFERENCES)
    operator = HessianOperator(
        closure,
        params,
        data=data,
        mode=mode,
        difference=difference or "forward",
        perturbation=perturbation,
        select=select,
        weight_decay=weight_decay,
        model=model,
    )
    layout = operator.layout
    n = layout.numel
    if k > n:
        raise ValueError(f"k={k}: there are only {n} parameters")
    rows = _rows(k, which, ncv, n, method)
    start = None if v0 is None else start_vector(v0, operator)
    if difference is None and mode == "difference":
        operator.choose_difference(coarse=tol < _MARGIN * _accuracy(operator, "forward"))
    elif mode == "difference":
        operator.gradient()  # which shows the precision of the loss
    kind = "exact" if mode == "exact" else operator.difference
    rounding = torch.finfo(layout.dtype).eps
    accuracy = rounding if kind == "exact" else _accuracy(operator, kind)
    goal = Goal(k, which, tol, accuracy, rounding, n)
    basis = Basis.empty(layout, rows)
    starts = {"lanczos": 1, "lobpcg": sizes(which, k, n)[0], "lyapunov": rows}[method]
    limit = 300 if maxiter is None else maxiter
    spent: list[int] = []
    with _reporter(progress, limit, operator, goal) as show, operator.keeping():

        def report(verdict: Verdict) -> None:
            spent.append(operator.gradient_evaluations)
            show(verdict)

        def solve(goal: Goal, found: Basis | None = None) -> Solution:
            generators = [
                torch.Generator(group.device).manual_seed(seed + i)
                for i, group in enumerate(layout.groups)
            ]
            # Copies that climb up and ones that climb down take the same rows to start from.
            if found is None or (method == "lyapunov" and which in ("LM", "BE")):
                fill_(basis[:starts], start, operator, generators)
            else:
                refill_(basis, starts, found, generators, random=v0 is None)
            if method == "lyapunov":
                return climb(operator.product, basis, goal, maxiter=limit, report=report)
            options = dict(maxiter=limit, generators=generators, report=report)
            if method == "lobpcg":
                return lobpcg(operator.product, basis, goal, **options)
            # What the found vectors overlook, the run that found them has looked for.
            options["look"] = v0 is None and found is None
            options["provisional"] = found is None and _may_refine(operator, difference)
            return lanczos(operator.product, basis, goal, verify=verify, **options)

        solution = solve(goal)
        by_itself = solution.iterations < limit or bool(solution.verdict.done.all())
        for reruns in range(_RERUNS + 1):
            again = by_itself and reruns < _RERUNS and _may_refine(operator, difference)
            length = _check_truncation(operator, solution, basis, goal)
            if not (again and solution.verdict.limited):
                break
            if not operator.choose_difference(coarse=True, length=length):
                break
            before, kind = solution, operator.difference
            expected = Truncation(0.0, length).central(operator.perturbation)
            goal = replace(goal, accuracy=max(_accuracy(operator, kind), expected))
            solution = solve(goal, found=before.vectors)
            by_itself = solution.iterations < limit or bool(solution.verdict.done.all())
            solution.history[:0] = before.history
            solution.iterations += before.iterations
    result = _result(solution, operator, goal, method, kind, spent)
    warn_unless_converged(result)
    return result


# --- arguments -----------------------------------------------------------------------------------


def _accuracy(operator: HessianOperator, difference: str) -> float:
    factor, power = _ACCURACY[difference]
    return factor * operator.epsilon**power


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
    whole("seed", seed, 0)
    if seed >= 2**63:
        raise ValueError(f"seed={seed!r}: expected a whole number in 0..2**63-1")


def _rows(k: int, which: str, ncv: int | None, n: int, method: str) -> int:
    """Rows of the basis."""
    if method == "lobpcg":
        if 3 * k > MAX_ROWS:
            raise ValueError(f"k={k}: method='lobpcg' takes at most {MAX_ROWS // 3}")
        return sizes(which, k, n)[1]
    if method == "lyapunov":
        if k > MAX_COPIES:
            raise ValueError(f"k={k}: method='lyapunov' takes at most {MAX_COPIES}")
        return copies(k, n)
    usual = 2 * k + 6 if n > 64 else n
    kept = min(n, MAX_ROWS, usual) if ncv is None else min(ncv, n)
    if kept > MAX_ROWS:
        raise ValueError(f"ncv={ncv}: at most {MAX_ROWS}")
    if not (k < kept or kept == n):
        advice = f"k={k}: at most {MAX_ROWS - 1}" if ncv is None else f"ncv={ncv}: more than k={k}"
        raise ValueError(f"{advice} is possible")
    return kept + 1


# --- running, result -----------------------------------------------------------------------------


def _may_refine(operator: HessianOperator, difference: str | None) -> bool:
    """Whether differences that are too coarse may be made finer."""
    if operator.mode == "exact" or difference == "forward":
        return False
    return operator.difference == "forward" or operator.chooses


def _check_truncation(
    operator: HessianOperator, solution: Solution, basis: Basis, goal: Goal
) -> float:
    """Measures what the differences are worth along the leading vector, and lowers the verdict to
    that; unless the solver isn't done with any value.

    Returns:
        What `choose_difference` takes for a length.
    """
    verdict = solution.verdict
    lead = int(np.abs(verdict.values).argmax())
    needed = operator.chooses and bool(verdict.done.any())
    if not needed or goal.is_zero(verdict.values, verdict.errors)[lead]:
        return math.inf
    apart = len(basis) > len(solution.vectors)
    spare = basis[len(basis) - 1 :] if apart else Basis.empty(basis.layout, 1)
    seen = measure(operator, solution.vectors[lead : lead + 1], spare, float(verdict.values[lead]))
    spare.release()
    solution.verdict = goal.coarser(verdict, seen.error)
    return seen.length


@contextmanager
def _reporter(progress: bool, limit: int, operator: HessianOperator, goal: Goal) -> Iterator[Any]:
    if not progress:
        yield lambda verdict: None
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from error

    with tqdm(total=limit, unit="iteration", dynamic_ncols=True) as bar:

        def report(verdict: Verdict) -> None:
            bar.set_postfix(
                gradients=operator.gradient_evaluations,
                converged=f"{int(verdict.converged.sum())}/{goal.k}",
                first=f"{verdict.values[0]:.6g}",
                refresh=False,
            )
            bar.update()

        yield report


def _result(
    solution: Solution,
    operator: HessianOperator,
    goal: Goal,
    method: str,
    kind: str,
    spent: list[int],
) -> EigenResult:
    layout, verdict = operator.layout, solution.verdict
    shape = (len(verdict.values), layout.numel)
    vectors = torch.empty(shape, dtype=layout.dtype, device=layout.device)
    operator.release()
    for i, vector in enumerate(vectors):
        layout.gather(solution.vectors.row(i), out=vector)
        solution.vectors[i : i + 1].release()

    def tensor(values: Any) -> Tensor:
        return torch.as_tensor(values.copy(), device=layout.device)

    return EigenResult(
        eigenvalues=tensor(verdict.values),
        eigenvectors=vectors,
        residuals=tensor(verdict.residuals),
        difference_errors=tensor(verdict.errors),
        converged=tensor(verdict.converged),
        iterations=solution.iterations,
        gradient_evaluations=operator.gradient_evaluations,
        history=[
            {
                "eigenvalues": values.tolist(),
                "residuals": residuals.tolist(),
                "gradient_evaluations": count,
            }
            for (values, residuals), count in zip(solution.history, spent, strict=True)
        ],
        method=method,
        which=goal.which,
        difference=kind,
        perturbation=None if kind == "exact" else operator.perturbation,
        tol=goal.tol,
        _layout=layout,
    )
