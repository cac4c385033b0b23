"""Whether a closure is the same function every time it is called at one θ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ADVICE", "Fingerprint"]

#: What to do about a closure that isn't.
ADVICE = (
    "take the minibatch from the loader outside of the closure, and random numbers from torch's, "
    "NumPy's and Python's global generators, which are put back"
)

# Sums that a tensor is cut into.
_SUMS = 64


@dataclass(frozen=True)
class Fingerprint:
    """A loss and its gradient in few numbers, to be compared with those of another evaluation.

    Attributes:
        loss: 0-dim float64.
        square: the squared norm of the gradient, 0-dim float64.
        sums: of interleaved parts of each gradient, float64. The squares of what two of them are
            apart add up to about the squared distance of the two gradients.
        present: which parameters got a gradient.
        epsilon: machine epsilon of the gradients' coarsest dtype.
    """

    loss: Tensor
    square: Tensor
    sums: Tensor
    present: tuple[bool, ...]
    epsilon: float

    @classmethod
    def of(cls, loss: Tensor, gradients: Sequence[Tensor | None]) -> Fingerprint:
        """Returns that of one evaluation. Nothing is synchronised."""
        found = [g.detach() for g in gradients if g is not None]
        device = loss.device
        squares = [torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in found]
        return cls(
            loss.detach().double(),
            sum((s.to(device) for s in squares), torch.zeros((), dtype=torch.float64)),
            torch.cat([_sums(g).to(device) for g in found]) if found else loss.new_zeros(0),
            tuple(g is not None for g in gradients),
            max((torch.finfo(g.dtype).eps for g in found), default=0.0),
        )

    def differs(self, other: Fingerprint, epsilon: float = 0.0) -> str | None:
        """Returns how the two differ by more than rounding, in words; None where they don't.

        Args:
            other: another evaluation at the same θ.
            epsilon: machine epsilon of a coarser type that the loss is computed in. Rounding that
                isn't the same every time (atomics on a GPU) is of its size.
        """
        if self.present != other.present:
            return "some parameter a gradient once only"
        first, second = float(self.loss), float(other.loss)
        norm = math.sqrt(max(float(self.square), float(other.square)))
        apart = float((self.sums - other.sums).square().sum().sqrt())
        # Rounding of the gradients' own type stays far below the root of ε.
        rounding = max(4.0 * epsilon, math.sqrt(self.epsilon))
        same = math.isclose(first, second, rel_tol=rounding)
        same = same or math.isnan(first) and math.isnan(second)
        if same and not apart > rounding * norm:
            return None
        return (
            f"losses {first:.9g} and {second:.9g}, gradients {apart:.3g} apart of norm {norm:.3g}"
        )


def _sums(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    whole = flat.numel() // _SUMS * _SUMS
    sums = flat[:whole].view(-1, _SUMS).sum(0, dtype=torch.float64)
    return torch.cat([sums, flat[whole:].sum(dtype=torch.float64)[None]])
