"""How a product agrees with differences of gradients, on both sides of θ.

On a smooth loss the differences on the two sides, y₊ and y₋, are the product but for their bend and
their rounding, which both set them apart from each other as well. Where the gradient jumps (ReLU,
max-pooling, routing) each side counts jumps of its own: measured on ReLU nets, the two sides lie as
far from each other as their mean from the exact product (0.8 to 1.3 times, bench/kinks.py), and
that is 10 to 1400 % of it in float32. A double backward that is wrong shows as a mean that is off
while the two sides agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lyapcuda.basis import Basis
from lyapcuda.solvers.products import Buffers, Products
from lyapcuda.solvers.solution import on_host

__all__ = [
    "ASYMMETRIC",
    "BEND",
    "NOT_FINITE",
    "OTHER_GRADIENT",
    "UNCOMPARED",
    "Agreement",
    "asymmetry_allowed",
    "believed",
    "both_sides",
    "failed",
    "is_own",
    "is_rough",
    "known_wrong",
    "one_side",
    "unbelieved",
]

# Exact products are believed where differences are off by at most so many times their own spread.
_BELIEVED = 2.5
# Rounding sets the two sides apart by at most so many times its estimate (twice, on smooth nets).
_ROUNDING = 8.0
# A spread of so many tolerances isn't yet seen in an eigenvalue: one that is kinks' is off by up to
# half of it.
_SPREAD = 5.0
# The tolerance where none is asked for.
_TOLERANCE = 1e-3
#: Why exact products aren't taken where one is infinite, or not a number.
NOT_FINITE = "double backward fails here: a product isn't finite"
#: Why exact products were taken where a run ended before any value was known.
UNCOMPARED = "double backward works; nothing was known well enough to compare it with"
#: Why they aren't believed where the graph they come from hasn't the gradient of backward().
OTHER_GRADIENT = "double backward is wrong here: its gradient isn't that of backward()"
#: Why they aren't believed where they are those of a matrix that isn't symmetric.
ASYMMETRIC = "double backward is wrong here: its products aren't those of a symmetric matrix"
#: What of a spread is left at a quarter of the separation: where it is no more than this, it is
# bend. Kinks show more at smaller separations, not less.
BEND = 0.45
# The gradient is the loss's own where the loss changes along it by as much as it says, to so much.
_OWN = 0.05


@dataclass(frozen=True)
class Agreement:
    """Of a product Hu and differences of gradients along u.

    Norms are relative to ‖Hu‖, or to ‖H‖·‖u‖ where that is known.

    Attributes:
        offset: how far the mean of y₊ and y₋ is from Hu.
        spread: half of the distance of y₊ and y₋.
        noise: about what rounding sets them apart by.
        along: the curvature along u as either side sees it.
        bias: how far their mean is from that of Hu, relative, less what they are apart.
        own: whether the loss changes along u as its gradient says.
        size: Δq, at which the differences were taken.
        residual: by how much what was taken for Hu is known to be off.
    """

    offset: float
    spread: float
    noise: float
    along: tuple[float, float]
    bias: float
    own: bool
    size: float
    residual: float = 0.0

    @property
    def agrees(self) -> bool:
        """Whether differences are off by no more than they themselves are uncertain."""
        slack = _BELIEVED * self.spread + _ROUNDING * self.noise + 1.5 * self.residual
        return self.offset <= slack

    def is_rough(self, tol: float = _TOLERANCE) -> bool:
        """Whether the two sides are further apart than rounding leaves them, and than an eigenvalue
        to ``tol`` allows: by kinks, or by bend.
        """
        return is_rough(self.spread, self.noise, tol)


def is_rough(spread: float, noise: float, tol: float = _TOLERANCE) -> bool:
    """The same, of a spread and of rounding's."""
    return spread > max(_SPREAD * tol, _ROUNDING * noise)


def asymmetry_allowed(epsilon: float) -> float:
    """How far exact products computed to ``epsilon`` may be from symmetric, relative to H."""
    return 4.0 * math.sqrt(epsilon)


def is_own(seen: float, expected: float, bend: float, rounding: float) -> bool:
    """Whether a loss changes by what its gradient says.

    Args:
        seen, expected: from θ − Δ to θ + Δ along a vector.
        bend: what its curvature may add, where kinks make it another one on the two sides.
        rounding: of the loss.
    """
    return abs(seen - expected) <= _OWN * abs(expected) + bend + 16.0 * rounding


def believed(found: Agreement | None) -> str:
    """Why exact products are taken, in one sentence; None: nothing was compared, for kinks."""
    if found is None or found.is_rough():
        return "double backward works; differences of gradients see kinks here, or a sharp bend"
    return "double backward works, and agrees with differences of gradients"


def unbelieved(found: Agreement | None, asymmetric: bool, custom: str | None = None) -> str | None:
    """Why exact products aren't taken, in one sentence; None where they are.

    Args:
        asymmetric: whether they are those of a matrix that isn't symmetric.
        custom: the name of a function in the loss whose double backward torch doesn't know.
    """
    if asymmetric:
        return ASYMMETRIC
    if found is None:
        return None
    if not found.agrees:
        return f"double backward is wrong here: {found.offset:.1g} off differences of gradients"
    if custom is not None and found.is_rough():
        return f"kinks hide whether the double backward of {custom} is right"
    return None


def known_wrong(name: str) -> str:
    """Why exact products aren't taken where such a function is in the loss."""
    return f"the double backward of {name} is wrong in torch, or missing"


def failed(error: Exception) -> str:
    """Why exact products can't be taken, in one sentence."""
    if isinstance(error, FloatingPointError):
        return NOT_FINITE
    cause = " ".join(str(error.__cause__ or error).split())
    return f"double backward fails here: {cause[:150]}"


def both_sides(
    products: Products,
    u: Basis,
    hu: Basis | float | None,
    norm: Tensor,
    size: float,
    residual: float = 0.0,
    least: float = 0.0,
) -> Agreement:
    """Measures it with two gradients beside θ.

    Args:
        products: of the objective (`lyapcuda.solvers.products.Products`).
        u, hu: one row each, and Hu; the curvature where Hu is that times u, None for the mean of
            both sides.
        norm: ‖u‖, 0-dim float64; not 0.
        size: Δq of θ, at which the differences are taken.
        residual: by how much what stands for Hu is known to be off.
        least: what norms are relative to where ‖Hu‖ is smaller: a lower bound of ‖H‖·‖u‖.

    Raises:
        FloatingPointError: a gradient isn't finite.
    """
    layout, moved = products.layout, products.length_of(u.row(0), norm)
    step = size / moved
    gradient = products.gradient()
    slope = _dot(gradient, products.scaled(u.row(0)), layout.device)
    plus, minus = Basis.empty(layout, 1), Basis.empty(layout, 1)
    above = products.difference(u.row(0), plus.row(0), step, 1.0, False).double()
    below = products.difference(u.row(0), minus.row(0), -step, 1.0, False).double()
    pairs = [(plus, plus), (minus, minus), (plus, minus), (u, plus), (u, minus)]
    if isinstance(hu, Basis):
        pairs += [(hu, hu), (hu, plus), (hu, minus), (hu, u)]
    losses = [x.reshape(()).to(layout.device) for x in (above, below, products.loss.double())]
    grams = [a.gram(b)[0, 0] for a, b in pairs]
    host = on_host(torch.stack([slope, norm, moved, *losses, *grams])).tolist()
    slope, length, moved, above, below, loss, pp, mm, pm, up, um, *exact = host
    mean, middle = (pp + mm + 2.0 * pm) / 4.0, (up + um) / 2.0
    if isinstance(hu, float):
        exact = [hu * hu * length**2, hu * up, hu * um, hu * length**2]
    hh, hp, hm, uh = exact or (mean, mean, mean, middle)
    scale = max(math.sqrt(max(hh, 0.0)), least) or math.sqrt(max(pp, mm)) or 1.0
    spread = math.sqrt(max(pp + mm - 2.0 * pm, 0.0)) / 2.0
    offset = math.sqrt(max(mean - hp - hm + hh, 0.0))
    noise = products.rounding / size * moved
    # L(θ + Δu) − L(θ − Δu): twice the slope but for third derivatives, kinks and rounding.
    move = size / moved
    expected, seen = 2.0 * move * slope, above - below
    own = is_own(seen, expected, move**2 * abs(up - um), products.epsilon * abs(loss))
    along = (up / length**2, um / length**2)
    bias = (
        max(abs(middle - uh) - abs(up - um), 0.0) / (max(abs(uh), least * length) or 1.0)
        if exact
        else 0.0
    )
    return Agreement(
        offset / scale, spread / scale, noise / scale, along, bias, own, size, residual / scale
    )


def one_side(
    products: Products, u: Basis, value: float, size: float, residual: float, least: float
) -> Agreement:
    """Measures, with one gradient beside θ, what `both_sides` would on a smooth loss.

    Offset and spread are both that of y₊ from value·u.

    Args:
        u: one row, norm 1.
        value: the curvature along it, where Hu is that times u.
        size, residual, least: as for `both_sides`.
    """
    layout, plus = products.layout, Basis.empty(products.layout, 1)
    products.gradient()
    one = torch.ones((), dtype=torch.float64, device=layout.device)
    moved = products.length_of(u.row(0), one)
    products.difference(u.row(0), plus.row(0), size / moved, 1.0, False)
    sums = torch.stack([moved, u.gram(plus)[0, 0], plus.gram(plus)[0, 0]])
    moved, up, pp = on_host(sums).tolist()
    scale = max(abs(value), least) or math.sqrt(pp) or 1.0
    offset = math.sqrt(max(pp - 2.0 * value * up + value**2, 0.0)) / scale
    noise, bias = products.rounding / size * moved / scale, abs(up - value) / scale
    return Agreement(offset, offset, noise, (up, up), bias, True, size, residual / scale)


def _dot(a: Buffers, b: Buffers, device: torch.device) -> Tensor:
    """Of vectors that are one flat buffer a group, whatever their dtypes."""
    parts = [(x.double() * y.double()).sum().to(device) for x, y in zip(a, b, strict=True)]
    return torch.stack(parts).sum()
