"""How separations grow and what is read off them: what a tracker's separations have in common."""

from __future__ import annotations

from dataclasses import dataclass

from lyapcuda import ops

__all__ = ["AUTO", "SIGNS", "GrowthOptions", "Tolerance"]

#: The sign of the map by the end of the spectrum that it finds: gradient ascent the largest
#: (algebraic) eigenvalue, descent the smallest.
SIGNS = {"LA": 1, "SA": -1}


#: The estimate that suits the loss: chosen at the first evaluation (`GrowthOptions.chosen`).
AUTO = "auto"


@dataclass(frozen=True)
class Tolerance:
    """When a step takes further gradients, and how many.

    Attributes:
        tol: residuals above tol·|h| ask for them.
        iterations: the most in a step.
    """

    tol: float
    iterations: int


@dataclass(frozen=True)
class GrowthOptions:
    """The options of a map θ ← θ ± βg(θ) whose copies part.

    Attributes:
        estimate: what h is read from, a key of `lyapcuda.ops.ESTIMATES`, or `AUTO`.
        perturbation: Δq, the norm of a separation; None to choose it.
        beta: a fixed rate; None for one that follows the curvature.
        momentum: m of the heavy-ball map, 0 for the plain one.
        ema: weight of the past in the average of h.
        seed: of the random first separations.
        tolerance: when a step takes further gradients; None: never.
        exact: products with the Hessian are taken, not differences of gradients: Δq is the norm of
            a separation, and no distance.
    """

    estimate: str = "rayleigh"
    perturbation: float | None = None
    beta: float | None = None
    momentum: float = 0.0
    ema: float = 0.9
    seed: int = 0
    tolerance: Tolerance | None = None
    exact: bool = False

    @property
    def first_rate(self) -> float:
        """The rate of the first step; 0 where the first gradients are to set it."""
        if self.beta is not None:
            return self.beta
        return 1.0 if self.estimate == "paper" else 0.0

    def suitable(self, sign: int, linear: bool, rounds: bool) -> int:
        """The number of the estimate.

        Args:
            sign: of the map.
            linear: y is known to be linear in q, but for its bend.
            rounds: the parameters are of 16 bits: then Δq is so large that one side of θ alone is
                off by ten percent, and the mean of both sides isn't.

        The Schwarz quotient is the nearest where it is. It counts what isn't (kinks) in full,
        ‖y‖/‖q‖ half of it. Both grow with the other end of the spectrum, which a descent has more
        of: there it is the outer end of [ρ − r, ρ + r].
        """
        if self.estimate != AUTO:
            return ops.ESTIMATES[self.estimate]
        if rounds and not self.exact:
            return ops.ESTIMATES["rayleigh"]
        return ops.ESTIMATES["outer" if sign < 0 else "schwarz" if linear else "secant"]

    @property
    def of_quotients(self) -> bool:
        """Whether h is read off q and y alone."""
        return self.estimate == AUTO or self.estimate in ops.OF_QUOTIENTS

    @property
    def one_sided(self) -> bool:
        """Whether h is of the last step alone, and so of one side of θ."""
        return self.estimate in (AUTO, *ops.OF_ONE_STEP)

    def of_ops(self, sign: int, rounds: bool) -> dict[str, object]:
        """As `lyapcuda.ops.benettin_` takes them; ``rounds``: as for `suitable`."""
        return {
            "sign": sign,
            "estimate": self.suitable(sign, self.exact, rounds),
            "momentum": self.momentum,
            "control": self.beta is None,
            # One side of θ and the other in turns: half the difference of two successive values is
            # then the error of the one-sided difference. The paper stays on one side.
            "alternate": self.estimate != "paper",
            "ema": self.ema,
        }
