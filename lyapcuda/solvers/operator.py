"""The Hessian of a loss as a symmetric linear operator, from gradient differences."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lyapcuda import ops
from lyapcuda.arguments import choice, positive
from lyapcuda.dynamics.perturbation import separation_size
from lyapcuda.objective.batches import Batches
from lyapcuda.objective.evaluator import Closure
from lyapcuda.objective.fixed_objective import Kept, gradients_at, second_derivative
from lyapcuda.objective.isolation import modules_of
from lyapcuda.objective.loss_graph import COARSE, has_kinks, loss_epsilon
from lyapcuda.objective.random_states import RandomStates
from lyapcuda.params.collect import Parameters, select_by_name
from lyapcuda.params.flat import FlatGroup, FlatLayout

__all__ = ["DIFFERENCES", "MODES", "HessianOperator"]

MODES = ("difference", "exact")
#: Gradients that one product needs (the forward one besides g(θ), which is computed once).
DIFFERENCES = {"forward": 1, "central": 2}


class _GroupBuffers:
    """What one group needs beside v and Hv: where to evaluate, and the gradient to subtract."""

    def __init__(self, group: FlatGroup, central: bool, streams: bool) -> None:
        self.group = group
        # A gradient that is added up over batches can't lie where its θ + q does.
        apart = streams or group.rounds
        self.copies = group.new_buffer(group.dtype) if apart else None
        self.minus = group.new_buffer(None if streams else group.dtype)
        self.minus_copies = self.minus
        if central and streams:
            self.minus_copies = group.new_buffer(group.dtype)


class HessianOperator:
    """H, the Hessian of the loss at θ (plus weight decay), without ever forming it.

    Products are differences of gradients, (g(θ + Δq·v) − g(θ))/Δq, divided by the displacement that
    the parameters' precision realised. H is one fixed matrix: every product sees the random states
    of this operator's making (so one dropout mask), the same module buffers and the same batches.
    After every call, and after an exception of the closure, parameters, their ``.grad``, buffers
    and random states are bitwise what they were.

    Vectors are flat, in the order of ``params``, of `dtype` and on `device`.

    Args:
        closure: takes nothing and returns the loss (or has called ``backward()`` itself). With
            ``data`` it takes a batch.
        params: tensors, (name, tensor) pairs, or groups, as for torch.optim. A group's
            "weight_decay" counts as part of the loss (½·wd·‖θ‖²).
        data: an iterable of batches, a DataLoader for instance. The loss is the mean over all of
            them, weighted by their sizes (the length of the first tensor in a batch).
        mode: "difference", or "exact" for double backward, to check against; that takes more memory
            and fails, or is silently wrong, beside functions without a second derivative. Within
            `keeping` it takes half the time.
        difference: "forward": one gradient a product; "central": two, more accurate; and once g(θ).
        perturbation: Δq, the norm of the separation. None chooses it from the parameters' size and
            precision, from ``difference``, and from whether the loss has kinks (ReLU), which take a
            larger one: it is known from the first product on.
        select: pattern or patterns of the names of the parameters that take part ("layer4.*").
        weight_decay: for parameters whose group names none.
        model: the modules whose buffers are put back. Without it: every module that holds one of
            the parameters, with its children.

    Raises:
        TypeError, ValueError: naming the argument and its value.
        NotImplementedError: DTensor parameters.
    """

    def __init__(
        self,
        closure: Closure,
        params: Parameters,
        *,
        data: Iterable[Any] | None = None,
        mode: str = "difference",
        difference: str = "forward",
        perturbation: float | None = None,
        select: str | Sequence[str] | None = None,
        weight_decay: float = 0.0,
        model: nn.Module | Iterable[nn.Module] | None = None,
    ) -> None:
        if not callable(closure):
            raise TypeError(f"closure={closure!r}: expected a callable that returns the loss")
        choice("mode", mode, MODES)
        choice("difference", difference, DIFFERENCES)
        positive("perturbation", perturbation)
        models = () if model is None else (model,) if isinstance(model, nn.Module) else tuple(model)
        for module in models:
            if not isinstance(module, nn.Module):
                raise TypeError(f"model={type(module).__name__}: expected torch.nn.Module")
        self.layout = FlatLayout(
            params if select is None else select_by_name(params, select), weight_decay
        )
        if self.layout.sharded:
            raise NotImplementedError(
                "params: DTensor parameters (FSDP2) are not supported yet by HessianOperator, "
                "eigsh, trace and spectral_density; CurvatureTracker takes them"
            )
        self.mode, self.difference = mode, difference
        #: Evaluations of the gradient so far (an exact product counts as two).
        self.gradient_evaluations = 0
        self.perturbation = perturbation
        self._fixed = perturbation is not None
        #: Whether the loss has kinks, as far as autograd's graph shows it; None before g(θ).
        self.kinked: bool | None = None
        #: ε of the coarsest type that the loss is computed in, 16 bits under autocast, or TF32; as
        #: far as the graph shows it, and at least the parameters' own.
        self.epsilon = self.layout.epsilon()
        self._warn_if_small(perturbation)
        self._closure = closure
        self._parameters = [p.tensor for p in self.layout.parameters]
        self._batches = None if data is None else Batches(data)
        self._context = {
            "names": [p.name for p in self.layout.parameters],
            "modules": [m for model in models for m in model.modules()]
            or modules_of(self._parameters),
            "states": RandomStates(
                (p.device for p in self._parameters),
                self._batches.generators if self._batches else (),
            ),
            "batches": self._batches,
        }
        self._kept: Kept | None = None
        self._buffers: list[_GroupBuffers] = []
        self._versions: list[int] | None = None  # of the parameters that g(θ) belongs to
        self._unit = torch.ones((), dtype=torch.float64, device=self.layout.device)
        self._first = torch.tensor([1.0, 0.0], dtype=torch.float64, device=self.layout.device)
        self._origin: list[Tensor] = []  # g(θ), in the order of the parameters

    def _warn_if_small(self, perturbation: float | None) -> None:
        if perturbation is None or self.mode == "exact":
            return
        advised = separation_size(self.layout, self.difference)
        if perturbation < advised / 30.0:
            warnings.warn(
                f"perturbation={perturbation:g} is small for the parameters' precision: the "
                f"difference of gradients will be rounding for a good part; {advised:.1g} is "
                "advised",
                stacklevel=3,
            )

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

    def matvec(self, v: Tensor) -> Tensor:
        """Hv.

        Args:
            v: (n,), in the order of the parameters.

        Raises:
            ValueError: another shape, or not real.
        """
        if not isinstance(v, Tensor) or v.shape != (self.layout.numel,) or v.is_complex():
            described = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
            raise ValueError(
                f"v: expected a real tensor of shape {self.shape[:1]}, got {described}"
            )
        vectors = [group.new_buffer() for group in self.layout.groups]
        self.layout.scatter(v.detach(), vectors)
        out = [group.new_buffer() for group in self.layout.groups]
        square = sum(
            ops.gram(buffer[None], buffer[None])[0, 0].to(self.device) for buffer in vectors
        )
        self.product(vectors, out, norm=square.sqrt())
        return self.layout.gather(out)

    def matmat(self, matrix: Tensor) -> Tensor:
        """H times the columns of an (n, m) matrix."""
        if not isinstance(matrix, Tensor) or matrix.dim() != 2:
            raise ValueError("matrix: expected a tensor of shape (n, m)")
        with self.keeping():
            columns = [self.matvec(column) for column in matrix.T]
        return torch.stack(columns, 1) if columns else matrix.new_empty(matrix.shape)

    def __matmul__(self, other: Tensor) -> Tensor:
        if isinstance(other, Tensor) and other.dim() == 2:
            return self.matmat(other)
        return self.matvec(other)

    def to_scipy(self) -> Any:
        """The same as a ``scipy.sparse.linalg.LinearOperator`` over NumPy arrays."""
        try:
            from scipy.sparse.linalg import LinearOperator
        except ImportError as error:
            raise ImportError("to_scipy() needs scipy: pip install scipy") from error

        def product(vector: Any) -> Any:
            tensor = torch.as_tensor(vector, dtype=self.dtype, device=self.device)
            return self.matvec(tensor.reshape(-1)).cpu().numpy()

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(self.shape, matvec=product, rmatvec=product, dtype=dtype)

    # --- over flat buffers -----------------------------------------------------------------------

    def product(
        self,
        vectors: Sequence[Tensor],
        out: Sequence[Tensor],
        length: float = 1.0,
        *,
        norm: Tensor | None = None,
    ) -> Tensor:
        """Writes Hv/length; both as one flat buffer a group. Nothing is synchronised.

        Args:
            vectors: v; not the same memory as ``out``.
            out: takes the product; NaN where a gradient wasn't finite, or where the displacement
                was too small for the parameters to show it.
            length: ‖v‖.
            norm: where the host doesn't know it: ‖v‖ (one float64 element on `device`), by which
                nothing is divided.

        Returns:
            The loss at the last evaluation, 0-dim.
        """
        for group in self.layout.groups:
            group.check()
        if self.mode == "exact":
            return self._exact(vectors, out, length)
        self.gradient()
        norm = torch.full_like(self._unit, length) if norm is None else norm
        step = torch.where(norm > 0, self.perturbation / norm, 0.0)
        copies = [
            buffer if part.copies is None else part.copies
            for part, buffer in zip(self._buffers, out, strict=True)
        ]
        sums = self._displace(copies, vectors, step)
        central = self.difference == "central"
        minus: Sequence[Tensor | None] = self._origin
        if central:
            others = [part.minus_copies for part in self._buffers]
            sums = sums - self._displace(others, vectors, -step) * self._first
            minus = self.layout.views([part.minus for part in self._buffers])
        # Divided by what was realised along v; 0 for v = 0.
        moved = sums[0] * length
        scale = torch.where(sums[1] > 0, sums[1] / moved, 0.0)

        def divided(plus: Sequence[Tensor | None], minus: Sequence[Tensor | None]) -> None:
            for group, v, y in zip(self.layout.groups, vectors, out, strict=True):
                decay = group.weight_decay
                ops.difference_(
                    y,
                    group.segments(group.own(plus)),
                    group.segments(group.own(minus)),
                    group.offsets,
                    scale.to(y.device),
                    weight_decay=decay / length if decay else 0.0,
                    v=v if decay else None,
                )

        if self._batches is None:
            # The last gradient is taken where it lies.
            plus = self.layout.views(copies)
            if central:
                points = [(plus, plus), (minus, lambda found: divided(plus, found))]
            else:
                points = [(plus, lambda found: divided(found, minus))]
        else:
            plus = self.layout.views(out)
            points = [(self.layout.views(copies), plus)]
            if central:
                points.append((self.layout.views(others), minus))
        losses = gradients_at(self._closure, self._parameters, points, **self._context)
        if self._batches is not None:
            divided(plus, minus)
        self.gradient_evaluations += len(points)
        return losses[-1]

    def gradient(self) -> list[Tensor]:
        """g(θ), one flat buffer a group (live: a central product writes there).

        Evaluated once; again where the parameters have been written to since.
        """
        if not self._buffers:
            central, streams = self.difference == "central", self._batches is not None
            self._buffers = [_GroupBuffers(g, central, streams) for g in self.layout.groups]
            self._origin = self.layout.views([part.minus for part in self._buffers])
        buffers = [part.minus for part in self._buffers]
        versions = [p._version for p in self._parameters]
        if versions == self._versions:
            return buffers

        def watched(*batch: Any) -> Tensor | float:
            loss = self._closure(*batch)
            if self.kinked is None:
                self.kinked = has_kinks(loss)
                self.epsilon = max(self.epsilon, loss_epsilon(loss))
            return loss

        gradients_at(watched, self._parameters, [(None, self._origin)], **self._context)
        self._versions = versions
        self.gradient_evaluations += 1
        if self.perturbation is None:
            self.perturbation = separation_size(
                self.layout, self.difference, self.kinked, self.epsilon
            )
        return buffers

    def release(self) -> None:
        """Frees the buffers and g(θ), which the next product would make anew."""
        self._buffers, self._origin, self._versions = [], [], None

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Inside, exact products over one batch keep autograd's graph from one to the next: about
        half of the time, for the memory of the activations, which are freed at the end.
        """
        outer, self._kept = self._kept, self._kept or Kept()
        try:
            yield
        finally:
            self._kept = outer

    def choose_difference(self, coarse: bool, length: float = math.inf) -> bool:
        """Takes central differences where forward ones are too ``coarse``; for 16-bit parameters
        or arithmetic, and for losses with kinks, they always are.

        Args:
            length: as for `separation_size`.

        Returns:
            Whether products are any finer now.
        """
        self.gradient()
        if not (coarse or self.kinked or self.epsilon > COARSE):
            return False
        was_central, before = self.difference == "central", self.perturbation
        self.difference = "central"
        if not self._fixed:
            self.perturbation = separation_size(
                self.layout, "central", self.kinked, self.epsilon, length
            )
        if self._batches is not None and not was_central:
            for part in self._buffers:
                part.minus_copies = part.group.new_buffer(part.group.dtype)
        return not was_central or self.perturbation < 0.7 * before

    @property
    def chooses(self) -> bool:
        """Whether Δq is this operator's to choose, and the smaller the truer but for rounding."""
        return self.mode == "difference" and not self._fixed and not self.kinked

    def _displace(
        self, copies: Sequence[Tensor], vectors: Sequence[Tensor], step: Tensor
    ) -> Tensor:
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for group, copy, v in zip(self.layout.groups, copies, vectors, strict=True):
            sums = ops.displace_(
                group.segments(group.views(copy)),
                v,
                group.segments(group.tensors),
                group.offsets,
                step.to(v.device),
            )
            total += sums.to(total.device)
        return total

    def _exact(self, vectors: Sequence[Tensor], out: Sequence[Tensor], length: float) -> Tensor:
        pieces = [
            v.to(p.dtype) for v, p in zip(self.layout.views(vectors), self._parameters, strict=True)
        ]
        loss = second_derivative(
            self._closure,
            self._parameters,
            pieces,
            self.layout.views(out),
            kept=self._kept,
            **self._context,
        )
        self.gradient_evaluations += 2
        for group, v, y in zip(self.layout.groups, vectors, out, strict=True):
            if group.weight_decay:
                y.add_(v, alpha=group.weight_decay)
            if length != 1.0:
                y.mul_(1.0 / length)
        return loss
