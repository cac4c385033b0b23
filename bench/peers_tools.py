"""The tools that bench/peers.py compares, each with the one knob that trades accuracy for time.

Every tool is asked for the k largest eigenvalues by magnitude ("LM": the only kind that all of them
can find; in the problems these are also the k largest). Its settings go from loose to tight.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lyapcuda
from peers_problems import Problem, attention

#: Each tool's own tolerance, which means something else to each of them.
TOLERANCES = (0.3, 0.1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5)
#: Products of a Lanczos run.
PRODUCTS = (*range(3, 21), 23, 26, 30, 35, 40, 50)
#: (vectors kept, tolerance) of ARPACK: few vectors restart early.
ARPACK = tuple((ncv, tol) for ncv in (None, 10) for tol in (0.1, 1e-2, 1e-3, 1e-4))

#: The mode of eigsh's own choice.
DEFAULT = inspect.signature(lyapcuda.HessianOperator).parameters["mode"].default

Setting = Any
Run = Callable[[Problem, int, Setting, int], Sequence[float]]


@dataclass(frozen=True)
class Tool:
    """One way to get eigenvalues.

    Attributes:
        title: for the report.
        packages: that have to be installed.
        settings: from loose to tight.
        describe: a setting, in words.
        run: (problem, k, setting, seed) → the k values, largest magnitude first.
        ours: lyapcuda.
        least: the settings, numbers of products, that are fewer than 2k are passed over.
        usual: on a loss with kinks, where a tool that takes differences doesn't get nearer to the
            reference with better settings, this one is measured. None: exact products.
        only: the problem that it is for.
    """

    title: str
    packages: tuple[str, ...]
    settings: Sequence[Setting]
    describe: Callable[[Setting], str]
    run: Run
    ours: bool = False
    least: bool = False
    usual: Setting = None
    only: str | None = None

    def versions(self) -> str | None:
        """Of its packages; None where one isn't installed."""
        try:
            return ", ".join(f"{package} {version(package)}" for package in self.packages)
        except PackageNotFoundError:
            return None


# --- peers ----------------------------------------------------------------------------------------


def _pyhessian(problem: Problem, k: int, tol: float, seed: int) -> Sequence[float]:
    from pyhessian import hessian

    torch.manual_seed(seed)
    data = (problem.inputs, problem.targets)
    solver = hessian(problem.model, problem.criterion, data=data, cuda=False)
    return solver.eigenvalues(maxIter=500, tol=tol, top_n=k)[0]


def _eigenthings(method: str) -> Run:
    def run(problem: Problem, k: int, products: int, seed: int) -> Sequence[float]:
        import hessian_eigenthings as het

        operator = het.HessianOperator(
            problem.model,
            [(problem.inputs, problem.targets)],
            het.supervised_loss(problem.criterion),
            method=method,
        )
        return het.lanczos(operator, k=k, max_iter=products, which="LM", seed=seed).eigenvalues

    return run


def _plainly(run: Run) -> Run:
    """With attention by its plain formula, which has a second derivative."""

    def plain(problem: Problem, k: int, setting: Setting, seed: int) -> Sequence[float]:
        with attention(problem.name, math=True):
            return run(problem, k, setting, seed)

    return plain


def _arpack(operator: Any, dtype: Any, k: int, setting: Setting, seed: int) -> Sequence[float]:
    from scipy.sparse.linalg import eigsh

    ncv, tol = setting
    ncv = None if ncv is None else max(ncv, 2 * k + 1)
    start = np.random.default_rng(seed).standard_normal(operator.shape[0]).astype(dtype)
    return eigsh(operator, k, which="LM", tol=tol, ncv=ncv, v0=start)[0]


def _curvlinops(problem: Problem, k: int, setting: Setting, seed: int) -> Sequence[float]:
    from curvlinops import HessianLinearOperator

    operator = HessianLinearOperator(
        problem.model,
        problem.criterion,
        problem.parameters,
        [(problem.inputs, problem.targets)],
    )
    return _arpack(operator.to_scipy(np.float32), np.float32, k, setting, seed)


# --- lyapcuda -------------------------------------------------------------------------------------


def _scipy_over_ours(problem: Problem, k: int, setting: Setting, seed: int) -> Sequence[float]:
    operator = lyapcuda.HessianOperator(
        problem.loss, problem.parameters, model=problem.model, mode="difference"
    )
    if operator.needs_central:
        operator = operator.central()
    return _arpack(operator.to_scipy(), np.float32, k, setting, seed)


def _ours(problem: Problem, k: int, seed: int, **options: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lyapcuda.ConvergenceWarning)
        found = lyapcuda.eigsh(
            problem.loss,
            problem.parameters,
            k,
            "LM",
            seed=seed,
            # As the peers are told it. Without it, looking for modules with buffers takes some
            # tens of milliseconds.
            model=problem.model,
            **options,
        )
    return found.eigenvalues


def _by_tolerance(problem: Problem, k: int, tol: float, seed: int) -> Tensor:
    return _ours(problem, k, seed, tol=tol)


def _by_count(*, lean: bool = False, **options: Any) -> Run:
    """``lean``: keeping the fewest vectors that do."""

    def run(problem: Problem, k: int, count: int, seed: int) -> Tensor:
        kept = {"ncv": k + 2} if lean else {}
        return _ours(problem, k, seed, maxiter=count, **kept, **options)

    return run


def _tol(tol: float) -> str:
    return f"tol={tol:g}"


def _products(count: int) -> str:
    return f"{count} products"


def _ncv(setting: Setting) -> str:
    ncv, tol = setting
    return f"tol={tol:g}" + ("" if ncv is None else f", ncv={ncv} (2k + 1 at least)")


_EIGENTHINGS = "hessian-eigenthings"
TOOLS = {
    "default": Tool(
        "**lyapcuda**, stopped by its tol",
        (),
        TOLERANCES,
        _tol,
        _by_tolerance,
        True,
        # Exact products, where they are its choice, have no scale of their own.
        usual=1e-3 if DEFAULT == "difference" else None,
    ),
    "lanczos": Tool(
        "**lyapcuda**, lanczos",
        (),
        PRODUCTS,
        _products,
        _by_count(mode="difference"),
        True,
        True,
        usual=16,
    ),
    "lean": Tool(
        "**lyapcuda**, lanczos, ncv=k + 2",
        (),
        PRODUCTS,
        _products,
        _by_count(lean=True, mode="difference"),
        True,
        True,
        usual=16,
    ),
    "exact": Tool(
        "**lyapcuda**, lanczos, exact", (), PRODUCTS, _products, _by_count(mode="exact"), True, True
    ),
    "exact_lean": Tool(
        "**lyapcuda**, lanczos, exact, ncv=k + 2",
        (),
        PRODUCTS,
        _products,
        _by_count(mode="exact", lean=True),
        True,
        True,
    ),
    "ours_scipy": Tool(
        "scipy eigsh over lyapcuda's operator",
        ("scipy",),
        ARPACK,
        _ncv,
        _scipy_over_ours,
        True,
        usual=(None, 1e-2),
    ),
    "pyhessian": Tool("PyHessian", ("pyhessian",), TOLERANCES, _tol, _pyhessian),
    "het_exact": Tool(
        "hessian-eigenthings, exact",
        (_EIGENTHINGS,),
        PRODUCTS,
        _products,
        _eigenthings("autograd"),
        least=True,
    ),
    "het_fd": Tool(
        "hessian-eigenthings, finite differences",
        (_EIGENTHINGS,),
        PRODUCTS,
        _products,
        _eigenthings("finite_difference"),
        least=True,
        usual=16,
    ),
    "curvlinops": Tool(
        "scipy eigsh over curvlinops",
        ("curvlinops-for-pytorch", "scipy"),
        ARPACK,
        _ncv,
        _curvlinops,
    ),
    "pyhessian_plain": Tool(
        "PyHessian, attention by its plain formula",
        ("pyhessian",),
        TOLERANCES,
        _tol,
        _plainly(_pyhessian),
        only="gpt",
    ),
    "het_plain": Tool(
        "hessian-eigenthings, exact, attention by its plain formula",
        (_EIGENTHINGS,),
        PRODUCTS,
        _products,
        _plainly(_eigenthings("autograd")),
        least=True,
        only="gpt",
    ),
}


# --- the truth ------------------------------------------------------------------------------------


def reference(problem: Problem, k: int, tol: float = 1e-4) -> dict[str, Any]:
    """The k largest by magnitude: ARPACK on exact products (double backward; attention by its plain
    formula), see `Problem.double`. Residuals are at most ``tol`` of the values, so the values' own
    errors are of the order of tol².
    """
    from scipy.sparse.linalg import LinearOperator, eigsh

    problem.double()
    parameters = problem.parameters
    sizes = [p.numel() for p in parameters]
    with attention(problem.name, math=True):
        gradient = torch.autograd.grad(problem.loss(), parameters, create_graph=True)
    count = 0

    def product(vector: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        pieces = torch.from_numpy(vector.reshape(-1)).to(gradient[0].dtype).split(sizes)
        parts = [v.view_as(p) for v, p in zip(pieces, parameters, strict=True)]
        rows = torch.autograd.grad(gradient, parameters, parts, retain_graph=True)
        return torch.cat([row.reshape(-1) for row in rows]).double().numpy()

    flat = torch.cat([g.detach().reshape(-1) for g in gradient]).double()
    noise = torch.randn(len(flat), dtype=flat.dtype, generator=torch.Generator().manual_seed(1234))
    start = (flat / flat.norm() + noise / noise.norm()).numpy()
    operator = LinearOperator((len(flat),) * 2, matvec=product, dtype=np.float64)
    values, vectors = eigsh(operator, k, which="LM", tol=tol, v0=start, ncv=max(20, 3 * k))
    order = np.argsort(-np.abs(values))
    residuals = [np.linalg.norm(product(vectors[:, i]) - values[i] * vectors[:, i]) for i in order]
    return {
        "values": values[order].tolist(),
        "residuals": [float(r) for r in residuals],
        "products": count,
    }
