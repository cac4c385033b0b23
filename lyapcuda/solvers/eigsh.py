"""Eigenvalues of a loss's Hessian at one θ."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lyapcuda.arguments import choice, proper_fraction, whole
from lyapcuda.arguments import seed as check_seed
from lyapcuda.basis import MAX_ROWS
from lyapcuda.extras import require
from lyapcuda.params.flat import FlatLayout
from lyapcuda.solvers.agreement import UNCOMPARED
from lyapcuda.solvers.convergence import ConvergenceStatus
from lyapcuda.solvers.eigen_run import EigenOutcome, EigenRequest, EigenRun
from lyapcuda.solvers.initial_vectors import start_vectors
from lyapcuda.solvers.operator import accepts_closure
from lyapcuda.solvers.result import EigenResult, warn_unless_converged
from lyapcuda.solvers.ritz import WHICH
from lyapcuda.solvers.subspace_iteration import MAX_BLOCK, block_size
from lyapcuda.solvers.symmetric import SymmetricOperator

__all__ = ["METHODS", "eigsh"]

METHODS = ("lanczos", "lyapunov")

# Vectors that Lanczos keeps by default, at most, and the bytes they may take together; k + 1, and
# more where these make it slow, where they are larger.
_ROWS, _SMALL = 64, 2**22


@accepts_closure
def eigsh(
    operator: SymmetricOperator,
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

    With the operator's ``preconditioner`` P these are eigenvalues and eigenvectors of P⁻¹H.

    Args:
        operator: the Hessian. Or, as the short form, a closure and its parameters, and further
            arguments of `HessianOperator` by name: ``eigsh(closure, params, k=5, data=loader)``. A
            ``perturbation`` given there measures the curvature at that scale.
        k: how many.
        which: "LA" largest (algebraic), "SA" smallest, "LM" largest magnitude, "BE" half from each
            end (one more from the high end where k is odd).
        tol: relative error of each eigenvalue.
        maxiter: iterations at most. Default 300.
        v0: (n,) start vector, a displacement of the parameters, (m, n) several, or a
            `CurvatureTracker` of the same parameters, whose separations are near the eigenvectors
            already. Default: a random one, mixed half and half with g(θ), which is known anyway and
            lies in the leading eigenspace for a good part.
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
        >>> H = lyapcuda.HessianOperator(lambda: (p * torch.tensor([1.0, 2.0, 5.0]) * p).sum(), [p])
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
    request = EigenRequest(k, which, tol, limit, method, rows, room, starts, seed, verify)
    with operator.keeping_graph(), _progress_bar(limit if progress else None, k) as show:
        run = EigenRun(operator, request, show)
        outcome = run.outcome()
    result = _result(outcome, run)
    warn_unless_converged(result)
    return result


# --- arguments -----------------------------------------------------------------------------------


def _check(k: Any, which: Any, tol: Any, maxiter: Any, method: Any, ncv: Any, seed: Any) -> None:
    whole("k", k, 1)
    choice("which", which, WHICH)
    choice("method", method, METHODS)
    proper_fraction("tol", tol)
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


# --- progress, result ----------------------------------------------------------------------------


@contextmanager
def _progress_bar(limit: int | None, k: int) -> Iterator[Any]:
    """Gives a function that shows the status of an iteration and the gradients spent so far."""
    if limit is None:
        yield lambda status, gradients: None
        return
    tqdm = require("tqdm", "progress=True").tqdm
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


def _result(outcome: EigenOutcome, run: EigenRun) -> EigenResult:
    operator, solution, request = outcome.operator, outcome.solution, run.request
    exact = operator.mode == "exact"
    layout, status = operator.layout, solution.status
    shape = (len(status.values), layout.numel)
    vectors = torch.empty(shape, dtype=layout.dtype, device=layout.device)
    operator.release()
    for i, vector in enumerate(vectors):
        changed = operator.displace_(solution.vectors.row(i))
        layout.gather(solution.vectors.row(i), out=vector)
        if changed:
            norm = torch.linalg.vector_norm(vector, dtype=torch.float64)
            vector.div_(torch.where(norm > 0, norm, 1.0))
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
        gradient_evaluations=run.gradients,
        history=[
            {
                "eigenvalues": values.tolist(),
                "residuals": residuals.tolist(),
                "gradient_evaluations": count,
            }
            for (values, residuals), count in zip(solution.history, run.spent, strict=True)
        ],
        method=request.method,
        which=request.which,
        mode=operator.mode,
        reason=run.operator.reason or UNCOMPARED,
        difference="exact" if exact else operator.difference,
        perturbation=operator.perturbation,
        tol=request.tol,
        doubts=tuple(outcome.doubts),
        epsilon=operator.epsilon,
        _layout=layout,
    )
