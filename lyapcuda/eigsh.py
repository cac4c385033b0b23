"""Eigenvalues of a loss's Hessian at one θ: the standalone solver."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from lyapcuda import panel_ops
from lyapcuda.arguments import choice, whole
from lyapcuda.basis import MAX_ROWS, Basis, Solution
from lyapcuda.evaluate import Closure
from lyapcuda.flat import FlatLayout
from lyapcuda.lanczos import lanczos
from lyapcuda.lobpcg import lobpcg, sizes
from lyapcuda.operator import DIFFERENCES, HessianOperator
from lyapcuda.parameters import Parameters
from lyapcuda.ritz import WHICH, Goal, Verdict
from lyapcuda.subspace import MAX_COPIES, climb, copies

__all__ = ["ConvergenceWarning", "EigenResult", "eigsh"]

METHODS = ("lanczos", "lobpcg", "lyapunov")

# Relative error of an eigenvalue that differences have on smooth losses, in ε^power of the
# parameters' dtype: at most so much on the nets of the tests.
_ACCURACY = {"forward": (1.5, 1 / 2), "central": (5.0, 2 / 3)}
# Forward differences do for tolerances of at least so many times their accuracy.
_MARGIN = 1.9


class ConvergenceWarning(RuntimeWarning):
    """Some of the returned eigenvalues aren't known to the tolerance."""


@dataclass(frozen=True)
class EigenResult:
    """Eigenpairs of the Hessian, in the order of ``which``: LA and BE descend, SA ascends, LM goes
    by magnitude.

    Attributes:
        eigenvalues: (k,) float64.
        eigenvectors: (k, n), a vector a row, of norm 1, in the order of the parameters.
        residuals: (k,) float64, ‖Hu − ρu‖ of the map that was measured: were that symmetric, an
            eigenvalue of it would lie within so much. Rigorous.
        difference_errors: (k,) float64, an estimate of how far the differences' map and the Hessian
            are apart along u: from the asymmetry of the projected matrix, and at least what
            differences of this kind and precision have on smooth losses.
        converged: (k,) bool. The error of the eigenvalue, estimated from the residuals and the gaps
            between values (R²/gap), and one and a half times that of the differences are within the
            tolerance together; and the residual, which bounds the error rigorously where a gap can
            mislead (a close pair not yet told apart), is within five times of it. Or the value is
            zero within the differences' error. Lanczos asks for more: the residual within half of
            the tolerance where values are crowded, and without ``v0`` that an overlooked eigenvalue
            would have shown by now, unless its vector has less than a twentieth of the usual part
            in the start vector, or it lies closer to a found one than ``tol`` or a tenth of their
            usual distance (`lyapcuda.hidden`).
        iterations: of the method.
        gradient_evaluations: of the whole data (an exact product counts as two).
        history: per iteration ``{"eigenvalues": [...], "residuals": [...],
            "gradient_evaluations": so far}``.
        method, which, difference, perturbation, tol: how it was measured ("exact": no difference).
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    residuals: Tensor
    difference_errors: Tensor
    converged: Tensor
    iterations: int
    gradient_evaluations: int
    history: list[dict[str, Any]] = field(repr=False)
    method: str
    which: str
    difference: str
    perturbation: float | None
    tol: float
    _layout: FlatLayout = field(repr=False, compare=False)

    @property
    def interval(self) -> Tensor:
        """(k, 2) float64: eigenvalue ± (residual + three times the differences' error). Each holds
        an eigenvalue of the Hessian, as far as the estimate of that error is right.
        """
        width = self.residuals + 3.0 * self.difference_errors
        return torch.stack([self.eigenvalues - width, self.eigenvalues + width], 1)

    def unflatten(self, i: int) -> list[Tensor]:
        """Eigenvector i as views shaped like the parameters, in their order."""
        if not isinstance(i, Integral) or not -len(self.eigenvectors) <= i < len(self.eigenvectors):
            raise IndexError(f"i={i!r}: there are {len(self.eigenvectors)} eigenvectors")
        return self._layout.split(self.eigenvectors[i])


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
            such as ReLU, and for a tolerance below 1e-3 in float32, 4e-8 in float64), and central
            all over again where forward ones turn out too coarse for one of the values (not where
            ``maxiter`` ended them).

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
    start = None if v0 is None else _start_vector(v0, operator)
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

        def solve(goal: Goal) -> Solution:
            generators = [
                torch.Generator(group.device).manual_seed(seed + i)
                for i, group in enumerate(layout.groups)
            ]
            _fill_start(basis[:starts], start, operator, generators)
            if method == "lyapunov":
                return climb(operator.product, basis, goal, maxiter=limit, report=report)
            options = dict(maxiter=limit, generators=generators, report=report)
            if method == "lobpcg":
                return lobpcg(operator.product, basis, goal, **options)
            return lanczos(operator.product, basis, goal, verify=verify, look=v0 is None, **options)

        solution = solve(goal)
        by_itself = solution.iterations < limit or bool(solution.verdict.done.all())
        if difference is None and kind == "forward" and by_itself and solution.verdict.limited:
            operator.choose_difference(coarse=True)
            kind = operator.difference
            before, goal = solution, replace(goal, accuracy=_accuracy(operator, kind))
            solution = solve(goal)
            solution.history[:0] = before.history
            solution.iterations += before.iterations
    result = _result(solution, operator, goal, method, kind, spent)
    _warn(result)
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


def _start_vector(v0: Any, operator: HessianOperator) -> Tensor:
    if not isinstance(v0, Tensor) or v0.shape != operator.shape[:1] or v0.is_complex():
        described = tuple(v0.shape) if isinstance(v0, Tensor) else type(v0).__name__
        raise ValueError(
            f"v0: expected a real tensor of shape {operator.shape[:1]}, got {described}"
        )
    norm = float(v0.detach().double().norm())
    if not 0 < norm < math.inf:
        raise ValueError(f"v0: its norm is {norm}, expected a finite vector other than 0")
    return v0.detach().double() / norm


def _fill_start(
    basis: Basis,
    start: Tensor | None,
    operator: HessianOperator,
    generators: Sequence[torch.Generator],
) -> None:
    """Random vectors in every row, the start vector in the first."""
    for i in range(len(basis)):
        basis.randomise_(i, generators)
    first = basis[:1]
    if start is not None:
        operator.layout.scatter(start, basis.row(0))
    elif operator.mode == "difference":
        # Half of it is known to matter, half makes sure that nothing is left out.
        gradient = operator.gradient()
        square = sum(_square(part).to(operator.device) for part in gradient)
        random = first.gram(first)[0, 0]
        scale = torch.where(square > 0, (random / square).sqrt(), 0.0)
        for row, part in zip(basis.row(0), gradient, strict=True):
            row.addcmul_(part.to(row.dtype), scale.to(row.device, row.dtype))
    first.orthogonalise_(0)


def _square(part: Tensor) -> Tensor:
    if part.dtype in (torch.float32, torch.float64):
        return panel_ops.gram(part[None], part[None])[0, 0]
    return torch.linalg.vector_norm(part, dtype=torch.float64).square()


# --- running, result -----------------------------------------------------------------------------


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


def _warn(result: EigenResult) -> None:
    missing = result.eigenvalues.numel() - int(result.converged.sum())
    if not missing:
        return
    size = result.eigenvalues.abs()
    limited = (result.difference_errors > result.tol * size) & ~result.converged
    limited = limited.any() and result.difference != "exact"
    advice = (
        f"the differences themselves ({result.difference}, perturbation="
        f"{result.perturbation:.2g}) aren't good for more: difference='central' or a larger tol; "
        "on a loss with kinks (ReLU) the curvature belongs to its scale, see finite_scale"
        if limited
        else "more maxiter, a larger ncv or tol"
    )
    warnings.warn(
        f"{missing} of {result.eigenvalues.numel()} eigenvalues aren't known to tol={result.tol:g} "
        f"after {result.iterations} iterations (see .interval); {advice}",
        ConvergenceWarning,
        stacklevel=3,
    )
