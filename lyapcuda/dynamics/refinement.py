"""More gradients where a step needs them: the separations' span grows until their values are good.

A step of `lyapcuda.dynamics.benettin` knows the Hessian on the span of its separations. Where the
leading eigenvector turns fast, as at the edge of stability, that isn't enough, and the residuals
say so. The largest of them then joins the span, for one gradient more, and so on. The Ritz vectors
of the larger span take the separations' place, and the step goes on from there. The minibatch is
the same for all of it, so this is a Krylov method, started anew at every step from what the steps
before have left.

Where an eigenvector has come up that the separations have no part of, residuals don't show it. The
gradient may: at the edge of stability it has much of what θ swings along. So it is a column too,
from time to time, and at once where it has just proved to bring much (`GradientTurns`). The last
training step does the same at the edge, for a buffer more. On minibatches both bring less than
residuals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lyapcuda import ops
from lyapcuda.basis import MAX_ROWS, Basis
from lyapcuda.dynamics.benettin import NOISY, Benettin, realised
from lyapcuda.dynamics.options import Tolerance
from lyapcuda.objective.evaluator import Probe
from lyapcuda.params.flat import FlatLayout
from lyapcuda.params.memory import free_bytes
from lyapcuda.stability.metric import Metric

__all__ = ["Block", "Refinement", "check_room"]

#: A residual of which less than this share (squared) lies outside of the span is rounding.
_NEW = 1e-8
#: Steps without the gradient as a column after which one is taken for it, on smooth losses.
_AGAIN = 5
#: A value that grew by more than this share, by the gradient beside a residual, calls it a success.
_BROUGHT = 0.02
#: A direction that is less than this share (squared) of the vectors that have it is rounding too.
_DEPENDENT = 1e-6
#: Products of vectors that are this near to those of orthonormal ones will do.
_ORTHONORMAL = 1e-4
#: With kinks, a column that leaves more than this share of a residual is not used.
_STALLED = 0.67
#: Sums over all ranks, of sums over this one's elements and of a loss.
Exchange = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def check_room(layout: FlatLayout, k: int, tolerance: Tolerance) -> None:
    """Raises a ValueError where k separations and so many columns are too many vectors, by the ops
    or by the memory that is free.
    """
    count = tolerance.iterations
    most = min(MAX_ROWS, layout.numel) - k
    if count > most:
        raise ValueError(
            f"iterations={count}: at most {max(most, 0)} beside k={k} of {layout.numel} parameters"
        )
    needed: dict[torch.device, int] = {}
    for group in layout.groups:
        size = 2 * (k + count) * group.length * group.buffer_dtype.itemsize
        needed[group.device] = needed.get(group.device, 0) + size
    for device, size in needed.items():
        free = free_bytes(device)
        if free is not None and size > free:
            raise ValueError(
                f"iterations={count}: with k={k} they need {size / 1e9:.2g} GB on {device}, where "
                f"{free / 1e9:.2g} GB are free; fewer need less"
            )


class Block:
    """The Ritz pairs of a span, by its Gram matrices.

    Args:
        rows: vectors that the span may have.
    """

    def __init__(self, rows: int) -> None:
        self.size = 0
        # Products of the vectors v with each other, with y = Hv, and of the y.
        self.vv, self.vy, self.yy = (np.zeros((rows, rows)) for _ in range(3))

    def start(self, vv: np.ndarray, vy: np.ndarray, yy: np.ndarray) -> None:
        """Takes the Gram matrices of the first vectors."""
        m = self.size = len(vv)
        for whole, part in zip((self.vv, self.vy, self.yy), (vv, vy, yy), strict=True):
            whole[:m, :m] = part

    def add(self, vv: np.ndarray, vy: np.ndarray, yv: np.ndarray, yy: np.ndarray) -> None:
        """Takes the products of all vectors (v, v, y, y) with the next one (v, y, v, y)."""
        m = self.size
        self.size = m + 1
        self.vv[: m + 1, m] = self.vv[m, : m + 1] = vv
        self.vy[: m + 1, m], self.vy[m, : m + 1] = vy, yv
        self.yy[: m + 1, m] = self.yy[m, : m + 1] = yy

    def rayleigh(self, parts: np.ndarray) -> float:
        """The Rayleigh quotient of a combination of the vectors."""
        m = len(parts)
        square = parts @ self.vv[:m, :m] @ parts
        return float(parts @ self.vy[:m, :m] @ parts / square) if square > 0.0 else math.nan

    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the Ritz values, ascending, their vectors as columns, and their residuals.

        There are fewer than vectors where those aren't independent: both ends of the spectrum start
        from the same random ones.
        """
        m = self.size
        vv, vy, yy = (matrix[:m, :m] for matrix in (self.vv, self.vy, self.yy))
        lengths = np.sqrt(vv.diagonal())
        squares, turn = np.linalg.eigh(vv / np.outer(lengths, lengths))
        kept = squares > _DEPENDENT * squares[-1]
        basis = turn[:, kept] / lengths[:, None] / np.sqrt(squares[kept])
        values, z = np.linalg.eigh(basis.T @ ((vy + vy.T) / 2) @ basis)
        s = basis @ z
        # Which side of θ a column lies on isn't left to LAPACK.
        s *= np.where(np.take_along_axis(s, np.abs(s).argmax(0)[None], 0) < 0.0, -1.0, 1.0)
        squares = np.einsum("ij,ij->j", s, yy @ s) - values**2
        return values, s, np.sqrt(np.maximum(squares, 0.0))


class GradientTurns:
    """Which column of a step is the gradient.

    At every second step that adds columns, the second one, to see what it brings; and where it
    wasn't one for `_AGAIN` steps, it is the one column of a step whose residuals ask for none: they
    can be small on the wrong vector. Where a value grows by it, the next step begins with it.

    Attributes:
        turn: which of two steps that add columns the next is.
        first: whether the next step begins with it.
        waited: steps since it was a column.
    """

    def __init__(self) -> None:
        self.turn, self.first, self.waited = False, False, 0

    @property
    def due(self) -> bool:
        """Whether this step takes it, whatever the residuals."""
        return self.first or self.waited >= _AGAIN

    def column(self, asked: bool) -> int | None:
        """Which it is in a step that adds columns, from 0; None: none.

        Args:
            asked: residuals asked for that.
        """
        if not asked or self.first:
            return 0
        return None if self.turn else 1

    def tried(self, brought: bool) -> None:
        """After it was a column; ``brought``: a wanted value grew by it."""
        # As the first column it grows by what residuals would have brought as well.
        self.first, self.waited = brought and not self.first, 0

    def tick(self) -> None:
        """After every step."""
        self.waited += 1

    def state(self) -> list[float]:
        """Plain numbers, for a checkpoint."""
        return [float(self.turn), float(self.first), float(self.waited)]

    def load(self, saved: list[float]) -> None:
        """Takes over a `state`."""
        self.turn, self.first = map(bool, saved[:2])
        self.waited = int(saved[2])


class Refinement:
    """The block of vectors around all separations of a tracker.

    Memory: 2·(k + iterations) vectors of N floats; for 16-bit parameters one of theirs more.

    Args:
        layout: of the parameters.
        ends: the sign of the map (1: ascent) and the number of separations, of every end.
        tolerance: when to take further columns.
        exact: products are exact, of the columns themselves.
        metric: as of `Benettin`: columns and products are in the coordinates z, too.

    Attributes:
        gradients: further ones that the last step took.
        awaited: sums and losses of the exchange that comes next.
        along_gradient: g·Hg/‖g‖² of the last step, NaN where the gradient g was no column.
    """

    def __init__(
        self,
        layout: FlatLayout,
        ends: Sequence[tuple[int, int]],
        tolerance: Tolerance,
        exact: bool = False,
        metric: Metric | None = None,
    ) -> None:
        self._layout, self._ends, self.tolerance = layout, tuple(ends), tolerance
        self._exact = exact
        self._scales = [None] * len(layout.groups) if metric is None else metric.buffers
        self.k = sum(k for _, k in ends)
        rows = self.k + tolerance.iterations
        self._vectors, self._products = Basis.empty(layout, rows), Basis.empty(layout, rows)
        # 16-bit copies can't lie where their products do.
        self._rounded = [
            group.new_buffer(group.dtype) if group.rounds else None for group in layout.groups
        ]
        self.gradients = self.awaited = 0
        self.along_gradient = math.nan
        self.turns = GradientTurns()

    @property
    def due(self) -> bool:
        """Whether the next step takes the gradient as a column, whatever the residuals."""
        return self.turns.due and self._climbs(0)

    def _climbs(self, pair: int) -> bool:
        """Whether a wanted pair is of the upper end, which the gradient may have something of."""
        sign, k = self._ends[0]
        return sign > 0 and pair < k

    def _rows(self, end: int) -> slice:
        first = sum(k for _, k in self._ends[:end])
        return slice(first, first + self._ends[end][1])

    def copies(self, end: int) -> list[Tensor | None]:
        """Panels, one a group, for the copies of an end to lie in; None where they can't."""
        return [
            None if group.rounds else panel[self._rows(end)]
            for group, panel in zip(self._layout.groups, self._products.panels, strict=True)
        ]

    # --- a step ----------------------------------------------------------------------------------

    @torch.no_grad()
    def refine(
        self,
        separations: Sequence[Benettin],
        probe: Probe,
        exchange: Exchange,
        noise: float = 0.0,
    ) -> tuple[list[Tensor], Tensor] | None:
        """Adds columns until the wanted residuals are small; puts the Ritz vectors in the place of
        the separations.

        Args:
            separations: of every end, after `Benettin.measure`; the gradients lie in their copies.
            probe: evaluates the gradient at a further copy.
            exchange: called once after every evaluation.
            noise: of a gradient difference, its norm.

        Returns:
            The products with which every end concludes its step, and the losses at the columns;
            None where there was nothing to add.
        """
        self.awaited = self.k**2 - 1  # what the first Gram matrix has of a message
        gradient, size = probe.gradient(), separations[0].value("perturbation")
        for end, separation in enumerate(separations):
            separation.export(self._vectors[self._rows(end)], size)
            scales = 1.0 / (size * separation.displacements)
            self._difference(self._rows(end), separation.gradients, gradient, scales)
        block = Block(len(self._vectors))
        vectors, products = self._vectors[: self.k], self._products[: self.k]
        pairs = ((vectors, vectors), (vectors, products), (products, products))
        block.start(*(a.gram(b).cpu().numpy() for a, b in pairs))
        mix = self._orthonormal(block)
        linear = all(separation.linear for separation in separations)
        floor = NOISY * noise / float(size)
        losses: list[Tensor] = []
        first, brought = block.size, None
        worst = self._worst(block, floor)
        turn = self.turns.column(worst is not None)
        for m in range(first, first + self.tolerance.iterations):
            if worst is None and (m > first or not self.due):
                break
            parts = None
            if m - first == turn and (worst is None or self._climbs(worst)):
                parts = self._add_gradient(m, gradient)
            by_gradient = parts is not None
            if not by_gradient and (worst is None or not self._add_residual(m, block, worst)):
                break
            away = self._distance(m, size)
            copy = self._displace(m, away)
            self.awaited = 4 * (m + 1) + 1
            loss = probe(copy)
            self.gradients += 1
            self._difference(slice(m, m + 1), [probe.gradients], gradient, 1.0 / away)
            sums, loss = exchange(self._sums(m), loss.to(size).reshape(1))
            host = torch.cat([sums, loss]).cpu().numpy()
            # (A 16-bit copy may not have moved at all: the column is nothing then.)
            if not np.isfinite(host).all() or not host[m] > 0.0:
                break
            before, _, left = self._wanted(block)
            block.add(*host[:-1].reshape(4, m + 1))
            after, _, now = self._wanted(block)
            if by_gradient:
                self.along_gradient = block.rayleigh(parts)
                brought = bool((np.abs(after - before) > _BROUGHT * np.abs(after)).any())
            if not linear and worst is not None and now[worst] > _STALLED * left[worst]:
                block.size -= 1
                break
            losses.append(loss)
            worst = self._worst(block, floor)
        if brought is not None:
            self.turns.tried(brought)
        self.turns.turn = not self.turns.turn
        if not losses:
            return None
        return self._replace(separations, block, size, mix), torch.cat(losses)

    def _orthonormal(self, block: Block) -> np.ndarray:
        """Makes the first vectors orthonormal, as `lyapcuda.basis.Basis.orthogonalise_` takes them;
        returns the matrix, of which the columns are the new ones.

        Those of one end were random at first; those of the other are no part of their basis.
        """
        k = block.size
        if np.abs(block.vv[:k, :k] - np.eye(k)).max() < _ORTHONORMAL:
            return np.eye(k)
        matrix = block.pairs()[1]
        count = matrix.shape[1]
        times = torch.as_tensor(matrix.copy(), device=self._layout.device)
        for basis in (self._vectors, self._products):
            basis[:count].combine_(basis[:k], times)
        block.start(*(matrix.T @ x[:k, :k] @ matrix for x in (block.vv, block.vy, block.yy)))
        return matrix

    def _wanted(self, block: Block) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pairs of all ends, in the order of their separations."""
        values, s, residuals = block.pairs()
        picked: list[int] = []
        for sign, k in self._ends:
            picked += list(range(len(values)))[::-sign][:k]
        return values[picked], s[:, picked], residuals[picked]

    def _worst(self, block: Block, floor: float) -> int | None:
        """Which wanted pair's residual exceeds what is allowed the most; None: none does."""
        values, _, residuals = self._wanted(block)
        allowed = np.hypot(self.tolerance.tol * np.hypot(values, residuals), floor)
        excess = residuals - allowed
        worst = int(excess.argmax())
        return worst if excess[worst] > 0.0 else None

    # --- columns ---------------------------------------------------------------------------------

    def _add_residual(self, m: int, block: Block, pair: int) -> bool:
        """Makes a wanted pair's residual column m; False where that is in the span already."""
        u = self._wanted(block)[1][:, pair]
        matrix = torch.as_tensor(u[:, None].copy(), device=self._layout.device)
        self._vectors[m : m + 1].combine_(self._products[:m], matrix)
        return self._orthogonalise(m) is not None

    def _add_gradient(self, m: int, gradient: Sequence[Tensor | None]) -> np.ndarray | None:
        """Makes the gradient, that of the weight decay included, column m; returns what it has of
        every column so far, None where it is in their span already.
        """
        groups = zip(self._layout.groups, self._vectors.panels, self._scales, strict=True)
        for group, vectors, scales in groups:
            theta, decay = group.segments(group.tensors), group.weight_decay
            slopes = group.segments(group.own(gradient))
            for here, slope, offset in zip(theta, slopes, group.offsets, strict=True):
                row = vectors[m, offset : offset + here.numel()]
                row.copy_(slope.reshape(-1))
                if decay:
                    row.add_(here.reshape(-1), alpha=decay)
            if scales is not None:
                vectors[m].mul_(scales)
        return self._orthogonalise(m)

    def _orthogonalise(self, m: int) -> np.ndarray | None:
        """Makes column m orthonormal to those before; returns what it had of them and, last, of
        itself; None where that is rounding.
        """
        inside = self._vectors.orthogonalise_(m)
        whole = float((inside[:m] ** 2).sum() + inside[m])
        if not inside[-1] > _NEW * whole:
            return None
        return np.append(inside[:m], math.sqrt(inside[-1]))

    def _distance(self, m: int, size: Tensor) -> Tensor:
        """What column v, or S·v, is multiplied with to be Δq long, on the device."""
        if self._scales[0] is None:
            return size
        row = self._vectors[m : m + 1]
        return size / row.gram(row, self._scales).sqrt().reshape(1)

    def _displace(self, m: int, away: Tensor) -> list[Tensor]:
        """Writes θ + away·v for column v (S·v with a metric); returns it, in the order of
        `FlatLayout.parameters`.
        """
        where = []
        for group, vectors, products, rounded, scales in zip(
            self._layout.groups,
            self._vectors.panels,
            self._products.panels,
            self._rounded,
            self._scales,
            strict=True,
        ):
            here = away.to(group.device)
            copy = products[m] if rounded is None else rounded
            theta = group.zeros() if self._exact else group.segments(group.tensors)
            row = vectors[m] if scales is None else vectors[m] * scales
            ops.displace_(group.segments(group.views(copy)), row, theta, group.offsets, here)
            if rounded is not None:  # the column is what was realised of it
                for origin, offset in zip(theta, group.offsets, strict=True):
                    span = slice(offset, offset + origin.numel())
                    by = here.to(row) if scales is None else scales[span] * here.to(row)
                    vectors[m, span] = realised(origin.reshape(-1), copy[span], by)
            where.append(copy)
        return self._layout.views(where)

    def _difference(
        self,
        rows: slice,
        gradients: Sequence[Sequence[Tensor | None]],
        origin: Sequence[Tensor | None],
        scales: Tensor,
    ) -> None:
        """Writes the products of columns, from the gradients at their copies and at θ (``origin``);
        exact ones lie there. ``scales``: one over how many times a column every copy is away.
        """
        for number, group in enumerate(self._layout.groups):
            minus = group.zeros() if self._exact else group.segments(group.own(origin))
            vectors, products = self._vectors.panels[number], self._products.panels[number]
            metric, times = self._scales[number], scales.to(group.device).split(1)
            for row, there, by in zip(range(rows.start, rows.stop), gradients, times, strict=True):
                v = vectors[row] if group.weight_decay else None
                ops.difference_(
                    products[row],
                    group.segments(group.own(there)),
                    minus,
                    group.offsets,
                    by.contiguous(),
                    weight_decay=group.weight_decay,
                    v=v if v is None or metric is None else v * metric,
                )
                if metric is not None:
                    products[row].mul_(metric)

    def _sums(self, m: int) -> Tensor:
        """What `Block.add` takes, of column m: over this rank's elements."""
        new = slice(m, m + 1)
        v, y = self._vectors[new], self._products[new]
        vectors, products = self._vectors[: m + 1], self._products[: m + 1]
        pairs = ((vectors, v), (vectors, y), (products, v), (products, y))
        return torch.cat([a.partial_gram(b)[:, 0] for a, b in pairs])

    def _replace(
        self, separations: Sequence[Benettin], block: Block, size: Tensor, mix: np.ndarray
    ) -> list[Tensor]:
        """Puts the wanted Ritz vectors in the separations' place; returns their products.

        ``mix``: of `_orthonormal`.
        """
        _, s, _ = self._wanted(block)
        # On the side of θ where they were, as the next step takes the other.
        s = s * np.where((mix @ s[: mix.shape[1]]).diagonal() < 0.0, -1.0, 1.0)
        m, device = block.size, size.device
        matrix = (torch.as_tensor(s, device=device) * size).contiguous()
        for basis in (self._vectors, self._products):
            basis[: self.k].combine_(basis[:m], matrix)
        grams, before = [], mix @ s[: mix.shape[1]]
        for end, separation in enumerate(separations):
            rows = self._rows(end)
            u = s[:, rows]
            sums = [u.T @ whole[:m, :m] @ u for whole in (block.vv, block.vy, block.yy)]
            grams.append(
                separation.replace(
                    self._vectors[rows],
                    self._products[rows],
                    torch.as_tensor(before[rows, rows].copy(), device=device),
                    *(torch.as_tensor(x, device=device) * size**2 for x in sums),
                )
            )
        return grams
