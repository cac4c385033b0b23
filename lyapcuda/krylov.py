"""Krylov solvers over flat buffers: thick-restart Lanczos, and LOBPCG in constant memory.

They see H through a product alone, of vectors that are one flat buffer a `FlatGroup`; a basis is a
panel a group. Small matrices are NumPy in float64. Products are differences of gradients, so the
projected matrix isn't quite symmetric: its whole is kept, and what is not symmetric in it tells how
good the differences are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lyapcuda import panel_ops
from lyapcuda.flat import FlatLayout
from lyapcuda.ritz import Goal, Ritz, Verdict, order

__all__ = ["MAX_ROWS", "Basis", "Solution", "lanczos", "lobpcg", "on_host", "rayleigh_ritz"]

#: Rows of a panel that the ops take.
MAX_ROWS = 128

# Less than this, relative to H, is what is left of a product when the basis spans an invariant
# subspace: rounding, amplified by each product since.
_NOISE = 1e-3

# From so many products on, what has grown from a random vector shows its extreme values.
_GROWN = 6

#: Writes H times the first (norm 1) to the second; returns a loss.
Product = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
#: Called with the verdict of every iteration.
Report = Callable[[Verdict], None]


class Basis:
    """Vectors as the rows of one panel a group."""

    def __init__(self, layout: FlatLayout, panels: list[Tensor]) -> None:
        self.layout, self.panels = layout, panels

    @classmethod
    def empty(cls, layout: FlatLayout, rows: int) -> Basis:
        """Zeros: the gaps between segments stay so."""
        return cls(layout, [group.new_panel(rows) for group in layout.groups])

    def __getitem__(self, rows: slice) -> Basis:
        return Basis(self.layout, [panel[rows] for panel in self.panels])

    def __len__(self) -> int:
        return len(self.panels[0])

    def row(self, i: int) -> list[Tensor]:
        """One vector: a flat buffer a group."""
        return [panel[i] for panel in self.panels]

    def gram(self, other: Basis) -> Tensor:
        """(rows, rows of the other) float64, on the first group's device."""
        pairs = zip(self.panels, other.panels, strict=True)
        return _sum([panel_ops.gram(a, b) for a, b in pairs])

    def combine_(self, panel: Basis, matrix: Tensor) -> None:
        """Rows of self = matrixᵀ · rows of ``panel``, which may start at the same memory."""
        for out, rows in zip(self.panels, panel.panels, strict=True):
            panel_ops.combine_(out, rows, matrix.to(rows.device))

    def orthogonalise_(self, i: int) -> Tensor:
        """Row i made orthogonal to the rows before it, and of norm 1 (or zero).

        Returns:
            (i + 3,) float64 on the device: the i products with the rows before, and the squared
            norm of what was left after one, two and three passes (as many as it took).
        """
        before = slice(0, i)
        if i:
            total = self[before].gram(self[i : i + 1])[:, 0]
        else:
            total = torch.zeros(0, dtype=torch.float64, device=self.panels[0].device)
        # Every pass reads the whole basis, and sees what the one before has left: mostly rounding.
        enough = 100.0 * torch.finfo(self.panels[0].dtype).eps
        coefficients, squares = total, []
        while True:
            result = _sum(
                [
                    panel_ops.project_(p[i], p[before], coefficients.to(p.device))
                    for p in self.panels
                ]
            )
            coefficients = result[:-1]
            squares.append(result[-1])
            left = coefficients.cpu().abs().max() if i else 0.0
            if len(squares) == 3 or bool(left <= enough * squares[-1].sqrt().cpu()):
                break
            total = total + coefficients
        squares += squares[-1:] * (3 - len(squares))
        inverse = torch.where(squares[-1] > 0, squares[-1].rsqrt(), 0.0).reshape(1, 1)
        self[i : i + 1].combine_(self[i : i + 1], inverse)
        return torch.cat([total, torch.stack(squares)])

    def randomise_(self, i: int, generators: Sequence[torch.Generator]) -> None:
        for group, panel, generator in zip(
            self.layout.groups, self.panels, generators, strict=True
        ):
            for view in group.views(panel[i]):
                view.normal_(generator=generator)


def _sum(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device)
    return total


@dataclass
class Solution:
    """What a solver ended with: the verdict, the eigenvectors, and how it went."""

    verdict: Verdict
    vectors: Basis
    iterations: int
    #: Values and residuals of every iteration.
    history: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)


def on_host(tensor: Tensor) -> np.ndarray:
    """Dot products of an iteration; FloatingPointError where one isn't finite."""
    values = tensor.cpu().numpy()
    if not np.isfinite(values).all():
        raise FloatingPointError(
            "a gradient beside θ isn't finite (or the parameters' precision doesn't show a "
            "displacement of this size: try a larger perturbation)"
        )
    return values


# --- Lanczos -------------------------------------------------------------------------------------


class _Lanczos:
    """The basis V, f beside it, and T with HV = VT + f·coupling + errors.

    ``lost`` is, per column, the norm of what random vectors have displaced from that equation,
    ``skewed`` of what restarts have, which a symmetric H would not have had.
    """

    def __init__(self, basis: Basis, generators: Sequence[torch.Generator]) -> None:
        self.basis, self.generators = basis, generators
        self.ncv = len(basis) - 1
        self.matrix = np.zeros((self.ncv, self.ncv))
        self.coupling, self.lost, self.skewed = np.zeros((3, self.ncv))
        self.size = 0
        #: What of the basis has grown from the last random vector, and how many there were.
        self.fresh = np.zeros(self.ncv + 1, dtype=bool)
        self.injected = 0

    def extend(self, product: Product) -> float:
        """One product more; returns the size of what it led out of the basis, relative to H.

        0 where that is nothing but rounding: the basis spans an invariant subspace.
        """
        m = self.size
        product(self.basis.row(m), self.basis.row(m + 1))
        host = on_host(self.basis.orthogonalise_(m + 1))
        self.matrix[: m + 1, m] = host[: m + 1]
        self.coupling[m] = np.sqrt(host[-1])
        # What was lost of a column turns up again in its row.
        found = (self.lost[:m] > 0) & (self.matrix[m, :m] == 0)
        self.matrix[m, :m][found] = host[:m][found]
        left = np.maximum(self.lost[:m] ** 2 - host[:m] ** 2, 0.0)
        self.lost[:m][found] = np.sqrt(left[found])
        self.size = m + 1
        if self.size == self.basis.layout.numel or host[-1] < 0.25 * host[-2]:
            self.coupling[m] = 0.0
        scale = np.linalg.norm(self.matrix[: m + 1, : m + 1], 2)
        return self.coupling[m] / scale if self.coupling[m] > 0 else 0.0

    def ritz(self) -> Ritz:
        m = self.size
        whole = self.matrix[:m, :m]
        symmetric = (whole + whole.T) / 2
        values, vectors = np.linalg.eigh(symmetric)
        outside = (self.coupling[:m] @ vectors) ** 2 + self.lost[:m] ** 2 @ vectors**2
        inside = np.linalg.norm((whole - symmetric) @ vectors, axis=0)
        asymmetry = np.sqrt(inside**2 + self.skewed[:m] ** 2 @ vectors**2)
        return Ritz(values, vectors, np.sqrt(outside), asymmetry)

    def restart(self, ritz: Ritz, kept: np.ndarray) -> None:
        """The basis shrinks to the Ritz vectors ``kept``; f stays."""
        m, p = self.size, len(kept)
        s = ritz.vectors[:, kept]
        moved = self.matrix[:m, :m] @ s
        inside = s.T @ moved
        left = np.linalg.norm(moved - s @ inside, axis=0)
        lost = np.sqrt(self.lost[:m] ** 2 @ s**2)
        skewed = np.sqrt(left**2 + self.skewed[:m] ** 2 @ s**2)
        coupling = self.coupling[:m] @ s
        for array, value in (
            (self.coupling, coupling),
            (self.lost, lost),
            (self.skewed, skewed),
        ):
            array[:] = 0.0
            array[:p] = value
        self.matrix[:] = 0.0
        self.matrix[:p, :p] = inside
        device = self.basis.panels[0].device
        self.basis[:p].combine_(self.basis[:m], torch.as_tensor(s.copy(), device=device))
        for panel in self.basis.panels:
            panel[p].copy_(panel[m])
        self.size = p
        self.fresh[:p] = (s[self.fresh[:m]] ** 2).sum(0) > 0.5

    def couple(self, random: bool) -> None:
        """f becomes a member of the basis, the next to be multiplied.

        ``random``: it is noise, of which everything outside of the basis has a part.
        """
        if random:
            self.fresh[:], self.injected = False, self.injected + 1
        self._take_in(1.0)

    def inject(self) -> bool:
        """The mean of f and a random vector becomes a member; False where nothing is left."""
        m, n = self.size, self.basis.layout.numel
        if not self.coupling[:m].any():  # f is rounding
            if not self._randomise(m):
                return False
        elif m + 1 < n and self._randomise(m + 1):
            half = torch.full((2, 1), 0.5, dtype=torch.float64, device=self.basis.panels[0].device)
            self.basis[m : m + 1].combine_(self.basis[m : m + 2], half.sqrt())
        self.fresh[:], self.injected = False, self.injected + 1
        self._take_in(np.sqrt(0.5))
        return True

    def _randomise(self, row: int) -> bool:
        """A random vector orthogonal to the rows before it; False where there is none."""
        for _ in range(3):
            self.basis.randomise_(row, self.generators)
            squares = on_host(self.basis.orthogonalise_(row))[-3:]
            if squares[-1] > 0.25 * squares[-2]:
                return True
        return False

    def _take_in(self, share: float) -> None:
        """``share``: the product of f and the new member. What else f held is lost."""
        m = self.size
        self.matrix[m, :m] = share * self.coupling[:m]
        self.lost[:m] = np.hypot(self.lost[:m], np.sqrt(1.0 - share**2) * self.coupling[:m])
        self.coupling[:m] = 0.0
        self.fresh[m] = self.injected > 0


def lanczos(
    product: Product,
    basis: Basis,
    goal: Goal,
    *,
    maxiter: int,
    generators: Sequence[torch.Generator],
    verify: bool,
    report: Report,
) -> Solution:
    """Thick-restart Lanczos with full reorthogonalisation.

    Args:
        product: H.
        basis: rows for the vectors kept (ncv) and one more; row 0 holds the start vector, norm 1.
        goal: what is wanted; k is below ncv, or ncv the number of parameters.
        maxiter: products at most.
        generators: for random vectors, one a group: taken in wherever the basis spans an invariant
            subspace, for that is how further copies of a multiple eigenvalue are found.
        verify: take one in before believing the first convergence as well.
        report: called after every product.
    """
    state, n = _Lanczos(basis, generators), basis.layout.numel
    noise = max(_NOISE, 20 * goal.accuracy)
    history: list[tuple[np.ndarray, np.ndarray]] = []
    believed: np.ndarray | None = None
    for iteration in range(1, maxiter + 1):
        left = state.extend(product)
        ritz = state.ritz()
        grown = state.fresh[: state.size]
        fresh = (ritz.vectors[grown] ** 2).sum(0) > 0.5 if grown.sum() < _GROWN else None
        verdict = goal.judge(ritz, fresh)
        history.append((verdict.values, verdict.residuals))
        report(verdict)
        enough = len(verdict.indices) == goal.k and bool(verdict.done.all())
        # An invariant subspace holds one copy of a multiple eigenvalue: before values out of one
        # are believed, a random vector has to leave them as they are.
        # So where two of them are equal, rounding has brought one in, and there may be more.
        doubtful = verify or left <= noise or state.injected > 0 or goal.repeats(verdict)
        if enough and doubtful:
            known, believed = believed, verdict.values
            slack = goal.tol * np.abs(believed) + verdict.errors
            enough = known is not None and bool((np.abs(believed - known) <= slack).all())
            doubtful = not enough
        else:
            doubtful = False
        if state.size == n or enough or iteration == maxiter:
            break
        if state.size == state.ncv:
            kept = min(goal.k + (state.ncv - goal.k) // 2, state.ncv - 1)
            state.restart(ritz, order(ritz.values, goal.which, goal.k)[:kept])
        if left > 0 and not doubtful:
            state.couple(random=left <= noise)
        elif not state.inject():
            break
    m, k = state.size, len(verdict.indices)
    vectors = basis[:k]  # nothing else of the basis is needed any more
    s = torch.as_tensor(ritz.vectors[:, verdict.indices].copy(), device=basis.panels[0].device)
    vectors.combine_(basis[:m], s)
    return Solution(verdict, vectors, iteration, history)


# --- LOBPCG --------------------------------------------------------------------------------------


def lobpcg(
    product: Product,
    basis: Basis,
    goal: Goal,
    *,
    maxiter: int,
    generators: Sequence[torch.Generator],
    report: Report,
) -> Solution:
    """LOBPCG with an orthonormal basis [X, P, W]: memory for 3k vectors and their products.

    Arguments as for `lanczos`; ``basis`` has min(3k, n) rows, of which the first holds a start
    vector. Every iteration costs a product for each value that hasn't converged.
    """
    k, n = goal.k, basis.layout.numel
    products = Basis.empty(basis.layout, len(basis))
    device = basis.panels[0].device
    squares = torch.stack([basis.orthogonalise_(i)[-1] for i in range(k)])
    if bool((squares <= 0).any()):
        raise FloatingPointError("g(θ) isn't finite, or the random start vectors are zero")
    size, done_to, history = k, 0, []
    for iteration in range(1, maxiter + 1):
        for i in range(done_to, size):
            product(basis.row(i), products.row(i))
        rows = slice(0, size)
        host = on_host(
            torch.cat([basis[rows].gram(products[rows]), products[rows].gram(products[rows])])
        )
        ritz = rayleigh_ritz(host[:size], host[size:])
        verdict = goal.judge(ritz, block=True)
        history.append((verdict.values, verdict.residuals))
        report(verdict)
        if bool(verdict.done.all()) or size == n or iteration == maxiter:
            break
        # X: the wanted Ritz vectors. P: what of them isn't in the old X, made orthonormal to X.
        x = ritz.vectors[:, verdict.indices]
        directions = x.copy()
        directions[:k] = 0.0
        p = _orthonormal(directions, x)[:, : n - k] if size > k else np.zeros((size, 0))
        small = torch.as_tensor(np.concatenate([x, p], 1), device=device)
        kept = small.shape[1]
        for panel in (basis, products):
            panel[:kept].combine_(panel[rows], small)
        # W: the residuals HX − Xθ of those that haven't converged; X itself goes with the basis.
        active = [i for i in range(k) if not verdict.done[i]][: n - kept]
        left = []
        for number, i in enumerate(active):
            row = kept + number
            for target, source in zip(basis.panels, products.panels, strict=True):
                target[row].copy_(source[i])
            left.append(basis.orthogonalise_(row)[-2:])
        squares = torch.stack(left).cpu().numpy()
        size = kept
        for number, (before, after) in enumerate(squares):
            # A residual that the others already span: a random direction serves as well.
            if after <= 0.25 * before:
                basis.randomise_(kept + number, generators)
                if not float(basis.orthogonalise_(kept + number)[-1]) > 0:
                    break
            size += 1
        done_to = kept
    vectors = basis[: len(verdict.indices)]
    chosen = torch.as_tensor(ritz.vectors[:, verdict.indices].copy(), device=device)
    vectors.combine_(basis[:size], chosen)
    return Solution(verdict, vectors, iteration, history)


def rayleigh_ritz(whole: np.ndarray, square: np.ndarray) -> Ritz:
    """From S·(HS)ᵀ and HS·(HS)ᵀ, S orthonormal."""
    symmetric = (whole + whole.T) / 2
    values, vectors = np.linalg.eigh(symmetric)
    inside = np.linalg.norm(whole @ vectors, axis=0) ** 2
    outside = np.maximum(np.einsum("ij,ij->j", vectors, square @ vectors) - inside, 0.0)
    asymmetry = np.linalg.norm((whole - symmetric) @ vectors, axis=0)
    return Ritz(values, vectors, np.sqrt(outside), asymmetry)


def _orthonormal(columns: np.ndarray, beside: np.ndarray) -> np.ndarray:
    """An orthonormal basis of what ``columns`` span outside of ``beside`` (orthonormal)."""
    found: list[np.ndarray] = []
    for column in columns.T:
        norm = np.linalg.norm(column)
        for _ in range(2):
            column = column - beside @ (beside.T @ column)
            for other in found:
                column = column - other * (other @ column)
        if np.linalg.norm(column) > 1e-8 * max(norm, 1e-300):
            found.append(column / np.linalg.norm(column))
    return np.stack(found, 1) if found else np.zeros((len(columns), 0))
