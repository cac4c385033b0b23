"""Thick-restart Lanczos over flat buffers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lyapcuda.basis import MAX_ROWS, Basis
from lyapcuda.solvers.convergence import INVARIANT, KRYLOV_STEPS, Criterion
from lyapcuda.solvers.missed import KrylovGrowth
from lyapcuda.solvers.ritz import Ritz, order
from lyapcuda.solvers.solution import Product, Report, Solution, finite

__all__ = ["lanczos"]


# Where at the present rate, measured over so many products, residuals will be small enough after so
# many more, further vectors aren't worth their memory.
_SPAN, _SOON = 3, 12
# Products in which noisy residuals have to become less.
_PATIENCE = 40


class _Lanczos:
    """The basis V, f beside it, and T with HV = VT + f·coupling + errors.

    The rows are V's members times any number: ``squares`` are their squared norms.
    ``lost`` is, per column, the norm of what random vectors have displaced from that equation,
    ``skewed`` of what restarts have, which a symmetric H would not have had.
    """

    def __init__(self, basis: Basis, generators: Sequence[torch.Generator]) -> None:
        self.basis, self.generators = basis, generators
        self.ncv = len(basis) - 1
        self.squares = np.ones(self.ncv + 1)
        self.matrix = np.zeros((self.ncv, self.ncv))
        self.coupling, self.lost, self.skewed = np.zeros((3, self.ncv))
        self.size = 0
        #: What of the basis has grown from the last random vector, and how many there were.
        self.fresh = np.zeros(self.ncv + 1, dtype=bool)
        self.injected = 0
        #: Products since then.
        self.since = 0
        self.growth = KrylovGrowth()

    def extend(self, product: Product) -> None:
        """One product more."""
        m = self.size
        product(self.basis.row(m), self.basis.row(m + 1), float(np.sqrt(self.squares[m])))
        host = finite(self.basis.orthogonalise_(m + 1, self.squares))
        self.matrix[: m + 1, m] = host[: m + 1]
        self.coupling[m] = np.sqrt(host[-1])
        # What was lost of a column turns up again in its row.
        found = (self.lost[:m] > 0) & (self.matrix[m, :m] == 0)
        self.matrix[m, :m][found] = host[:m][found]
        left = np.maximum(self.lost[:m] ** 2 - host[:m] ** 2, 0.0)
        self.lost[:m][found] = np.sqrt(left[found])
        self.size, self.since = m + 1, self.since + 1
        if self.size == self.basis.layout.numel or host[-1] < 0.25 * host[-2]:
            self.coupling[m] = 0.0
        self.growth.product(host[: m + 1], self.coupling[m])

    def left(self, ritz: Ritz) -> float:
        """The size of what the last product led out of the basis, relative to H.

        0 where that is nothing but rounding: the basis spans an invariant subspace.
        """
        last = self.coupling[self.size - 1]
        return last / np.abs(ritz.values).max() if last > 0 else 0.0

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
        self.growth.restart(s)
        self.rotate(s)
        for panel in self.basis.panels:
            panel[p].copy_(panel[m])
        self.squares[p] = self.squares[m]
        self.size = p
        self.fresh[:p] = (s[self.fresh[:m]] ** 2).sum(0) > 0.5

    def rotate(self, s: np.ndarray) -> Basis:
        """The first rows become these combinations (columns) of the members, which are returned."""
        m, p = s.shape
        scales = np.divide(1.0, self.squares[:m], out=np.zeros(m), where=self.squares[:m] > 0)
        matrix = np.ascontiguousarray(np.sqrt(scales)[:, None] * s)
        device = self.basis.panels[0].device
        self.basis[:p].combine_(self.basis[:m], torch.as_tensor(matrix, device=device))
        self.squares[:p] = 1.0
        return self.basis[:p]

    def couple(self, random: bool) -> None:
        """f becomes a member of the basis, the next to be multiplied.

        ``random``: it is noise, of which everything outside of the basis has a part.
        """
        if random:
            self._forget()
        self._take_in(1.0)

    def inject(self) -> bool:
        """The mean of f and a random vector becomes a member; False where nothing is left."""
        m, n = self.size, self.basis.layout.numel
        if not self.coupling[:m].any():  # f is rounding
            if not self._randomise(m):
                return False
        elif m + 1 < n and self._randomise(m + 1):
            halves = np.sqrt(0.5 / self.squares[m : m + 2])[:, None]
            matrix = torch.as_tensor(halves, device=self.basis.panels[0].device)
            self.basis[m : m + 1].combine_(self.basis[m : m + 2], matrix)
            self.squares[m] = 1.0
        self._forget()
        self._take_in(np.sqrt(0.5))
        return True

    def _forget(self) -> None:
        """A random vector comes in: what has grown is to be counted from here."""
        self.fresh[:], self.injected, self.since = False, self.injected + 1, 0

    def _randomise(self, row: int) -> bool:
        """A random vector orthogonal to the rows before it; False where there is none."""
        for _ in range(3):
            self.basis.randomise_(row, self.generators)
            squares = finite(self.basis.orthogonalise_(row, self.squares))[-3:]
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


def _room(
    room: int,
    most: int,
    restarts: list[tuple[int, float]],
    iteration: int,
    residual: float,
    enough: float,
) -> int:
    """How many vectors are kept from here on, when there is no room for another one.

    Args:
        room, most: so far, and at most.
        restarts: iterations and residuals at those before, to which this one is added.
        iteration, residual: now.
        enough: what the residual has to become.
    """
    earlier = [entry for entry in restarts if entry[0] <= iteration - _SPAN]
    restarts.append((iteration, residual))
    if room == most or not earlier:
        return room
    before, last = earlier[-1]
    rate = (residual / last) ** (1.0 / (iteration - before)) if last > 0 else 0.0
    return room + 1 if residual * rate**_SOON > enough else room


def lanczos(
    product: Product,
    basis: Basis,
    criterion: Criterion,
    *,
    maxiter: int,
    generators: Sequence[torch.Generator],
    verify: bool,
    look: bool,
    provisional: bool,
    report: Report,
    room: int = MAX_ROWS,
) -> Solution:
    """Thick-restart Lanczos with full reorthogonalisation.

    Args:
        product: H.
        basis: rows for the vectors kept (ncv) and one more; row 0 holds the start vector, norm 1.
        criterion: what is wanted; k is below ncv, or ncv the number of parameters.
        maxiter: products at most.
        generators: for random vectors, one a group: taken in wherever the basis spans an invariant
            subspace, for that is how further copies of a multiple eigenvalue are found.
        verify: take one in before believing the first convergence as well.
        look: the start vector is random for a good part: values beside which another one can hide
            don't count as found.
        provisional: a finer run follows where it's the differences that fall short, and it will
            start from what is found here.
        report: called after every product.
        room: vectors kept at first, at most as many as the basis has; more where that is slow.
    """
    state, n = _Lanczos(basis, generators), basis.layout.numel
    noise = max(INVARIANT, 20 * criterion.accuracy)
    history: list[tuple[np.ndarray, np.ndarray]] = []
    believed: np.ndarray | None = None
    room, restarts = min(room, state.ncv), []
    least: list[float] = []
    for iteration in range(1, maxiter + 1):
        state.extend(product)
        ritz = state.ritz()
        left = state.left(ritz)
        grown = state.fresh[: state.size]
        # (Products are counted, not rows: a restart leaves few of those.)
        new = state.injected and state.since < KRYLOV_STEPS
        fresh = (ritz.vectors[grown] ** 2).sum(0) > 0.5 if new else None
        status = criterion.judge(ritz, fresh)
        # Looked for only beside values that would be believed, or built upon: where the differences
        # themselves aren't good for the tolerance (kinks), no further product makes them so. And
        # only where this may be the last product.
        last = bool(status.done.all()) or iteration == maxiter or left == 0
        hidden = look and not state.injected and 1 < state.size < n
        matter = status.done if provisional else status.converged
        if hidden and last and matter.any():
            status = criterion.without_hidden(status, ritz.values, state.growth)
        history.append((status.values, status.residuals))
        report(status)
        enough = len(status.indices) == criterion.k and bool(status.done.all())
        # What was put in has to have had the time to show something.
        if state.injected and state.since < KRYLOV_STEPS and left > noise:
            enough = False
        # An invariant subspace holds one copy of a multiple eigenvalue: before values out of one
        # are believed, a random vector has to leave them as they are.
        # So where two of them are equal, rounding has brought one in, and there may be more. And
        # where one is zero: it has as many copies as there are directions that do nothing.
        doubtful = verify or left <= noise or state.injected > 0
        doubtful = doubtful or criterion.repeats(status) or criterion.may_repeat_zero(status)
        if enough and doubtful:
            known, believed = believed, status.values
            slack = criterion.tol * np.abs(believed) + status.errors
            enough = known is not None and bool((np.abs(believed - known) <= slack).all())
            doubtful = not enough
        else:
            doubtful = False
        if state.size == n or enough or iteration == maxiter:
            break
        # Residuals that are the products' noise don't become less.
        least.append(min(float(status.residuals.max()), least[-1] if least else np.inf))
        stalled = iteration > _PATIENCE and least[-1] > 0.7 * least[-1 - _PATIENCE]
        if stalled and status.hopeless(criterion.tol):
            break
        if state.size == room:
            worst, asked = float(status.residuals.max()), criterion.bound(status)
            room = _room(room, state.ncv, restarts, iteration, worst, asked)
        whole, takes_in = state.size == room, left == 0 or doubtful
        if whole or takes_in:
            kept = order(ritz.values, criterion.which, criterion.k)
            if takes_in:
                # Half of every residual is lost by what is taken in, and comes back slowly: what
                # has a large one would hide what is looked for.
                small = ritz.outside <= criterion.bound(status)
                small[status.indices] = True
                kept = kept[small[kept]]
            if whole:
                kept = kept[: min(criterion.k + (room - criterion.k) // 2, room - 1)]
            if len(kept) < state.size:
                state.restart(ritz, kept)
        if not takes_in:
            state.couple(random=left <= noise)
        elif not state.inject():
            break
    vectors = state.rotate(ritz.vectors[:, status.indices])
    basis[len(vectors) :].release()
    return Solution(status, vectors, iteration, history)
