"""How far products of a Hessian may be off, as traces and densities count it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import Tensor

from lyapcuda.arguments import users_level
from lyapcuda.solvers.agreement import ASYMMETRIC, asymmetry_allowed, is_rough
from lyapcuda.solvers.operator import HessianOperator
from lyapcuda.solvers.result import NOT_ITS_OWN, ConvergenceWarning, jumping
from lyapcuda.solvers.symmetric import SymmetricOperator

__all__ = ["ProductError", "product_error", "with_asymmetry"]

# Of differences, products in a basis may be so far from symmetric, relative to them.
_SKEWED = 0.02
# What differences at one separation are off by, in what they change to one of four times the size:
# where it halves (ReLU nets, bench/kinks.py), the rest is about as much again. Thrice is allowed.
_REST = 3.0


@dataclass(frozen=True)
class ProductError:
    """Of one product Hv, as it stands for others along random vectors.

    Attributes:
        along: of v·Hv.
        across: of the whole product, its norm.
        doubts: what speaks against all products, a sentence each.
    """

    along: float
    across: float
    doubts: tuple[str, ...]

    def warn(self, name: str) -> None:
        """A `ConvergenceWarning` where there are doubts, for the caller's caller's caller."""
        if self.doubts:
            warnings.warn(
                f"{name}: not known as well as its standard error says; " + "; ".join(self.doubts),
                ConvergenceWarning,
                stacklevel=users_level(),
            )


def with_asymmetry(off: ProductError, operator: SymmetricOperator, inside: Tensor) -> ProductError:
    """The same, and what the asymmetry of H in a basis says about its trace.

    Args:
        inside: (m, m) products of the basis and of H times the basis. A symmetric H makes it
            symmetric: what isn't is error, and the diagonal has as much of it.
    """
    size, half = float(inside.norm()), float((inside - inside.T).norm()) / 2.0
    exact = operator.mode == "exact"
    if not half > (asymmetry_allowed(operator.epsilon) if exact else _SKEWED) * size:
        return off
    reason = ASYMMETRIC if exact else jumping(operator.epsilon)
    doubts = off.doubts if reason in off.doubts else (*off.doubts, reason)
    return ProductError(off.along + half * len(inside) ** 0.5, off.across, doubts)


def product_error(operator: SymmetricOperator, v: Tensor, hv: Tensor) -> ProductError:
    """Measures it along v: by a second g(θ), and of differences by others at four times the Δq. Of
    other operators than a Hessian it is what such products usually have.

    Args:
        v, hv: (n,), and Hv as the operator gave it.
    """
    v, hv = v.double(), hv.double()
    if not isinstance(operator, HessianOperator):
        across = operator.accuracy * float(hv.norm())
        along = across * float(v.norm()) / len(v) ** 0.5
        return ProductError(along, across, operator.doubts)
    if operator.mode == "exact":
        operator.products.look(gradient=False)
        across = operator.epsilon * float(hv.norm())
        along, doubts = across * float(v.norm()) / len(v) ** 0.5, []
    else:
        wide = 4.0 * operator.perturbation
        size = float(hv.norm()) or 1.0
        other = operator.matvec(v.to(operator.dtype), perturbation=wide).double()
        back = operator.matvec(v.to(operator.dtype), perturbation=-operator.perturbation).double()
        along = max(abs(float(v @ (y - hv))) for y in (other, back)) * _REST
        across = max(float((y - hv).norm()) for y in (other, back))
        moved = float(operator.products.length_of(operator.scattered(v), v.norm()))
        noise = operator.products.rounding * moved / operator.perturbation
        jumps = across > 0.0 and is_rough(across / size, noise / size)
        doubts = [jumping(operator.epsilon)] if jumps else []
    if operator.changed is not None:
        doubts.insert(0, f"closure: {operator.changed}")
    elif not operator.is_own_gradient(across / max(float(v.norm()), 1e-300)):
        doubts.append(NOT_ITS_OWN)
    return ProductError(along, across, tuple(doubts))
