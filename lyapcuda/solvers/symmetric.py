"""Symmetric linear operators over a model's parameters: what solvers take; how they compose."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from numbers import Real
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from torch import Tensor

from lyapcuda import ops
from lyapcuda.arguments import described
from lyapcuda.basis import Basis
from lyapcuda.extras import require
from lyapcuda.objective.entry import entry_point
from lyapcuda.params.collect import select_by_name
from lyapcuda.params.flat import FlatLayout

if TYPE_CHECKING:
    from lyapcuda.solvers.result import EigenResult

__all__ = ["SymmetricOperator"]


class SymmetricOperator(ABC):
    """A symmetric matrix over the parameters of a model, known by its products alone.

    `eigsh`, `trace` and `spectral_density` take any. Operators over the same parameters add up,
    and are scaled: ``A + B``, ``A - B``, ``2.0 * A``, ``A / n``, ``-A``. `shifted` adds a multiple
    of the identity, `deflated` takes eigenvectors out, `block` is the part of some parameters.

    Vectors are flat, in the order of the parameters, of `dtype` and on `device`. Wherever one is
    taken, a NumPy array is, too, and a list of tensors shaped like the parameters; what comes back
    is of the same kind.

    Attributes:
        layout: of the parameters.
    """

    layout: FlatLayout

    # --- what an operator is ---------------------------------------------------------------------

    @abstractmethod
    def product(
        self,
        vectors: Sequence[Tensor],
        out: Sequence[Tensor],
        length: float = 1.0,
        *,
        norm: Tensor | None = None,
    ) -> Any:
        """Writes Av/length; both as one flat buffer a group.

        Args:
            vectors: v; not the same memory as ``out``.
            out: takes the product.
            length: ‖v‖.
            norm: where the host doesn't know it: ‖v‖ (one float64 element on `device`), by which
                nothing is divided.
        """

    @property
    @abstractmethod
    def mode(self) -> str:
        """How products are taken: "exact" or "difference"; "auto" before that is decided."""

    @property
    @abstractmethod
    def reason(self) -> str:
        """Why, in one sentence; empty before the first product."""

    @property
    @abstractmethod
    def gradient_evaluations(self) -> int:
        """Evaluations of the gradient so far (an exact product counts as two)."""

    @property
    @abstractmethod
    def epsilon(self) -> float:
        """Machine epsilon of the coarsest type that products were seen to be computed in."""

    @property
    @abstractmethod
    def accuracy(self) -> float:
        """How far products may be off, relative to the operator's norm; after the first of them."""

    @property
    @abstractmethod
    def doubts(self) -> tuple[str, ...]:
        """What speaks against all products, a sentence each; after the first of them."""

    @abstractmethod
    def block(self, select: str | Sequence[str]) -> SymmetricOperator:
        """Returns the principal submatrix of the parameters whose names match.

        Args:
            select: pattern or patterns of names ("layer4.*").

        Raises:
            ValueError: a pattern matches none.
        """

    def keeping_graph(self) -> AbstractContextManager[Any]:
        """Returns a context in which products share what they can, for the memory of it."""
        return nullcontext()

    def release(self) -> None:
        """Frees what the next product would make anew."""
        return

    @property
    def difference(self) -> str:
        """Of differences, which: "forward" or "central"."""
        return "central"

    @property
    def perturbation(self) -> float | None:
        """Δq of differences; None where there is no single one."""
        return None

    def start(self, out: Sequence[Tensor]) -> None:
        """Writes a vector that is known to lie in the leading eigenspace for a good part; zeros
        where there is none. One flat buffer a group.
        """
        for buffer in out:
            buffer.zero_()

    def coordinates(self, displacement: Tensor) -> Tensor:
        """The vector that stands for a displacement of the parameters: itself, mostly."""
        return displacement

    def displace_(self, vectors: Sequence[Tensor]) -> bool:
        """The inverse of `coordinates`, in place; one flat buffer a group. Returns whether it is
        anything but the identity.
        """
        return False

    # --- as a matrix -----------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        return self.layout.numel, self.layout.numel

    @property
    def dtype(self) -> torch.dtype:
        return self.layout.dtype

    @property
    def device(self) -> torch.device:
        return self.layout.device

    @overload
    def matvec(self, v: Tensor, **options: Any) -> Tensor: ...
    @overload
    def matvec(self, v: np.ndarray, **options: Any) -> np.ndarray: ...
    @overload
    def matvec(self, v: Sequence[Tensor], **options: Any) -> list[Tensor]: ...
    @entry_point
    def matvec(self, v: Any, **options: Any) -> Any:
        """Returns Av, of the kind that v is.

        Args:
            v: (n,), in the order of the parameters; or a list of tensors of their shapes.
            options: of `product`.

        Raises:
            ValueError: another shape, or not real.
        """
        flat, back = self._flat("v", v)
        if flat.dim() != 1:
            raise ValueError(f"v: expected shape {self.shape[:1]}, got {described(v)}")
        vectors, out = self.scattered(flat), self._new_buffers()
        square = sum(
            ops.gram(buffer[None], buffer[None])[0, 0].to(self.device) for buffer in vectors
        )
        self.product(vectors, out, norm=square.sqrt(), **options)
        return back(self.layout.gather(out))

    @overload
    def matmat(self, matrix: Tensor) -> Tensor: ...
    @overload
    def matmat(self, matrix: np.ndarray) -> np.ndarray: ...
    @entry_point
    def matmat(self, matrix: Any) -> Any:
        """A times the columns of an (n, m) matrix, of the kind that that is."""
        flat, back = self._flat("matrix", matrix)
        if flat.dim() != 2:
            raise ValueError(
                f"matrix: expected shape ({self.shape[0]}, m), got {described(matrix)}"
            )
        with self.keeping_graph():
            columns = self._columns(list(flat.T))
        return back(torch.stack(columns, 1) if columns else flat.new_empty(flat.shape))

    def _columns(self, columns: list[Tensor]) -> list[Tensor]:
        return [self.matvec(column) for column in columns]

    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, other: np.ndarray) -> np.ndarray: ...
    @overload
    def __matmul__(self, other: Sequence[Tensor]) -> list[Tensor]: ...
    def __matmul__(self, other: Any) -> Any:
        return self.matmat(other) if getattr(other, "ndim", 1) == 2 else self.matvec(other)

    #: NumPy leaves ``array @ operator`` and ``number * operator`` to us.
    __array_priority__ = 1000.0

    def _flat(self, name: str, v: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        """A vector or matrix as a tensor, and what makes a result of its kind of such a one."""
        n, given = self.layout.numel, v
        if isinstance(v, np.ndarray):
            if v.dtype.kind not in "fiub":
                raise ValueError(f"{name}: expected real numbers, got {described(v)} of {v.dtype}")
            v = torch.as_tensor(v, dtype=self.dtype, device=self.device)
            back = _as_array
        elif isinstance(v, list | tuple):
            shapes = [p.tensor.shape for p in self.layout.parameters]
            if [getattr(part, "shape", None) for part in v] != shapes:
                raise ValueError(
                    f"{name}: expected a tensor of shape ({n},), or {len(shapes)} tensors shaped "
                    f"like the parameters, got {described(v)}"
                )
            parts = [part.detach().to(self.device, self.dtype).reshape(-1) for part in v]
            return torch.cat(parts), self.layout.split
        else:
            back = _as_it_is
        if not isinstance(v, Tensor) or v.dim() not in (1, 2) or len(v) != n or v.is_complex():
            raise ValueError(
                f"{name}: expected a real tensor of shape ({n},) or ({n}, m), got "
                f"{described(given)}"
            )
        return v, back

    def _new_buffers(self) -> list[Tensor]:
        return [group.new_buffer() for group in self.layout.groups]

    def scattered(self, v: Tensor) -> list[Tensor]:
        """A vector as one flat buffer a group."""
        buffers = self._new_buffers()
        self.layout.scatter(v.detach(), buffers)
        return buffers

    def to_scipy(self) -> Any:
        """The same as a ``scipy.sparse.linalg.LinearOperator`` over NumPy arrays."""
        LinearOperator = require("scipy.sparse.linalg", "to_scipy()").LinearOperator

        def product(vector: np.ndarray) -> np.ndarray:
            return self.matvec(vector.reshape(-1))

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(self.shape, matvec=product, rmatvec=product, dtype=dtype)

    # --- composed --------------------------------------------------------------------------------

    def __add__(self, other: SymmetricOperator) -> SymmetricOperator:
        return Sum(self, other) if _is_operator(other) else NotImplemented

    def __sub__(self, other: SymmetricOperator) -> SymmetricOperator:
        return Sum(self, -other) if _is_operator(other) else NotImplemented

    def __mul__(self, factor: float) -> SymmetricOperator:
        return Scaled(self, factor) if _is_number(factor) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, factor: float) -> SymmetricOperator:
        return self * (1.0 / factor) if _is_number(factor) else NotImplemented

    def __neg__(self) -> SymmetricOperator:
        return self * -1.0

    def shifted(self, value: float) -> SymmetricOperator:
        """Returns A + value·I.

        Raises:
            TypeError, ValueError: naming value.
        """
        return Shifted(self, value)

    def deflated(self, vectors: EigenResult | Tensor) -> SymmetricOperator:
        """Returns (I − QQᵀ)·A·(I − QQᵀ), where Q spans the vectors: eigenvalues of eigenvectors
        that were found become 0.

        Args:
            vectors: a result of `eigsh`, or (m, n), a vector a row.

        Raises:
            TypeError, ValueError: naming vectors.
        """
        return Deflated(self, vectors)

    def blocks(self) -> dict[str, SymmetricOperator]:
        """Returns the `block` of every module that has parameters of its own, by its name."""
        names: dict[str, list[str]] = {}
        for parameter in self.layout.parameters:
            names.setdefault(parameter.name.rpartition(".")[0], []).append(parameter.name)
        return {module: self.block([_literal(n) for n in own]) for module, own in names.items()}


def _literal(name: str) -> str:
    """The pattern that matches a name alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _is_operator(other: Any) -> bool:
    return isinstance(other, SymmetricOperator)


def _is_number(factor: Any) -> bool:
    return isinstance(factor, Real) and not isinstance(factor, bool)


def _as_it_is(result: Tensor) -> Tensor:
    return result


def _as_array(result: Tensor) -> np.ndarray:
    return result.cpu().numpy()


def chosen_groups(layout: FlatLayout, select: str | Sequence[str]) -> list[Any]:
    """The parameters whose names match, as groups with their weight decay, for a `block`."""
    groups: list[Any] = [
        {"params": [(p.name, p.tensor)], "weight_decay": p.weight_decay} for p in layout.parameters
    ]
    return select_by_name(groups, select)


def orthonormal_rows(layout: FlatLayout, vectors: Tensor) -> Basis:
    """A basis of the span of (m, n) vectors, as flat rows, orthonormal to float64's rounding.

    Raises:
        ValueError: they are linearly dependent, or not finite.
    """
    columns = torch.linalg.qr(vectors.detach().double().T)
    size = columns.R.diagonal().abs()
    if not bool(torch.isfinite(size).all()) or not float(size.min()) > 1e-10 * float(size.max()):
        raise ValueError("vectors: not finite, or linearly dependent")
    basis = Basis.empty(layout, len(vectors))
    for i, column in enumerate(columns.Q.T):
        layout.scatter(column.to(layout.dtype), basis.row(i))
    return basis


# --- compositions ---------------------------------------------------------------------------------


class _Composed(SymmetricOperator):
    """An operator made of others over the same parameters."""

    def __init__(self, *parts: SymmetricOperator) -> None:
        self._parts, self.layout = parts, parts[0].layout

    @property
    def mode(self) -> str:
        modes = {part.mode for part in self._parts}
        return next(mode for mode in ("auto", "difference", "exact") if mode in modes)

    @property
    def reason(self) -> str:
        return "; ".join(dict.fromkeys(part.reason for part in self._parts if part.reason))

    @property
    def gradient_evaluations(self) -> int:
        return sum({id(p): p.gradient_evaluations for p in self._leaves()}.values())

    def _leaves(self) -> list[SymmetricOperator]:
        """The operators at the bottom: one that is in several parts counts once."""
        return [
            leaf
            for part in self._parts
            for leaf in (part._leaves() if isinstance(part, _Composed) else [part])
        ]

    @property
    def epsilon(self) -> float:
        return max(part.epsilon for part in self._parts)

    @property
    def accuracy(self) -> float:
        return sum(part.accuracy for part in self._parts)

    @property
    def doubts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(doubt for part in self._parts for doubt in part.doubts))

    def keeping_graph(self) -> AbstractContextManager[Any]:
        stack = ExitStack()
        for part in {id(p): p for p in self._parts}.values():
            stack.enter_context(part.keeping_graph())
        return stack

    def release(self) -> None:
        for part in self._parts:
            part.release()

    def coordinates(self, displacement: Tensor) -> Tensor:
        return self._parts[0].coordinates(displacement)

    def displace_(self, vectors: Sequence[Tensor]) -> bool:
        return self._parts[0].displace_(vectors)


class Sum(_Composed):
    """A + B.

    Raises:
        ValueError: they are over other parameters, or of preconditioners that differ.
    """

    def __init__(self, one: SymmetricOperator, other: SymmetricOperator) -> None:
        super().__init__(one, other)
        mine, theirs = ([id(p.tensor) for p in part.layout.parameters] for part in (one, other))
        if mine != theirs:
            raise ValueError(
                f"operators: of {len(mine)} and of {len(theirs)} parameters that aren't the same; "
                "pass both the same params"
            )
        # Without preconditioners it comes back as it is; it takes no memory.
        probe = torch.ones((), dtype=self.dtype, device=self.device).expand(self.layout.numel)
        here, there = one.coordinates(probe), other.coordinates(probe)
        if here is not there and not torch.equal(here, there):
            raise ValueError("operators: their preconditioners differ; pass both the same")
        self._spare: list[Tensor] = []

    def product(
        self,
        vectors: Sequence[Tensor],
        out: Sequence[Tensor],
        length: float = 1.0,
        *,
        norm: Tensor | None = None,
    ) -> None:
        self._spare = self._spare or self._new_buffers()
        one, other = self._parts
        one.product(vectors, out, length, norm=norm)
        other.product(vectors, self._spare, length, norm=norm)
        for y, more in zip(out, self._spare, strict=True):
            y.add_(more)

    def release(self) -> None:
        super().release()
        self._spare = []

    def block(self, select: str | Sequence[str]) -> SymmetricOperator:
        one, other = (part.block(select) for part in self._parts)
        return one + other

    def __repr__(self) -> str:
        return f"{self._parts[0]!r} + {self._parts[1]!r}"


class Scaled(_Composed):
    """c·A.

    Raises:
        ValueError: c isn't finite.
    """

    def __init__(self, operator: SymmetricOperator, factor: float) -> None:
        super().__init__(operator)
        self._factor = _finite("factor", factor)

    def product(
        self,
        vectors: Sequence[Tensor],
        out: Sequence[Tensor],
        length: float = 1.0,
        *,
        norm: Tensor | None = None,
    ) -> None:
        self._parts[0].product(vectors, out, length, norm=norm)
        for y in out:
            y.mul_(self._factor)

    def block(self, select: str | Sequence[str]) -> SymmetricOperator:
        return self._factor * self._parts[0].block(select)

    def __repr__(self) -> str:
        return f"{self._factor:g} * ({self._parts[0]!r})"


class Shifted(_Composed):
    """A + c·I.

    Raises:
        TypeError, ValueError: c is no finite number.
    """

    def __init__(self, operator: SymmetricOperator, value: float) -> None:
        super().__init__(operator)
        self._value = _finite("value", value)

    def product(
        self,
        vectors: Sequence[Tensor],
        out: Sequence[Tensor],
        length: float = 1.0,
        *,
        norm: Tensor | None = None,
    ) -> None:
        self._parts[0].product(vectors, out, length, norm=norm)
        for y, v in zip(out, vectors, strict=True):
            y.add_(v, alpha=self._value / length)

    def block(self, select: str | Sequence[str]) -> SymmetricOperator:
        return self._parts[0].block(select).shifted(self._value)

    def __repr__(self) -> str:
        return f"({self._parts[0]!r}).shifted({self._value:g})"


class Deflated(_Composed):
    """(I − QQᵀ)·A·(I − QQᵀ). Memory: Q, and two vectors.

    Raises:
        TypeError, ValueError: naming vectors.
    """

    def __init__(self, operator: SymmetricOperator, vectors: EigenResult | Tensor) -> None:
        super().__init__(operator)
        rows, n = getattr(vectors, "eigenvectors", vectors), self.layout.numel
        if not isinstance(rows, Tensor) or rows.dim() != 2 or rows.shape[1] != n or not len(rows):
            raise ValueError(
                f"vectors: expected an EigenResult or (m, {n}), got {described(vectors)}"
            )
        rows = torch.stack([operator.coordinates(row.to(self.dtype)) for row in rows])
        self._found = orthonormal_rows(self.layout, rows)

    def product(
        self,
        vectors: Sequence[Tensor],
        out: Sequence[Tensor],
        length: float = 1.0,
        *,
        norm: Tensor | None = None,
    ) -> None:
        inside = [v.clone() for v in vectors]
        self._take_out_(inside)
        row = Basis(self.layout, [v[None] for v in inside])
        norm = row.gram(row)[0, 0].sqrt()
        self._parts[0].product(inside, out, norm=norm)
        self._take_out_(out)
        for y in out:
            y.mul_(1.0 / length)

    def _take_out_(self, vectors: Sequence[Tensor]) -> None:
        """v ← (I − QQᵀ)·v, twice, so that rounding leaves nothing of Q."""
        row = Basis(self.layout, [v[None] for v in vectors])
        for _ in range(2):
            shares = self._found.gram(row)[:, 0]
            for panel, v in zip(self._found.panels, vectors, strict=True):
                v.addmv_(panel.T, shares.to(panel), alpha=-1.0)

    def block(self, select: str | Sequence[str]) -> SymmetricOperator:
        """Isn't there: take the block first, and deflate that."""
        raise NotImplementedError("block: of a deflated operator; take the block, then deflate it")

    def __repr__(self) -> str:
        return f"({self._parts[0]!r}).deflated({len(self._found)} vectors)"


def _finite(name: str, value: Any) -> float:
    if not _is_number(value):
        raise TypeError(f"{name}={described(value)}: expected a number")
    if not math.isfinite(value):
        raise ValueError(f"{name}={value}: expected a finite number")
    return float(value)
