"""Steps of a panel whose sums are known, and benettin_ held against its oracle on them."""

from __future__ import annotations

import math

import torch

from lyapcuda import ops
from lyapcuda.ops import reference
from op_inputs import F64, assert_same_bits
from op_table import assert_close_states

N = 200
LOSSES = torch.tensor([0.3, 0.4], dtype=F64)
SIZE = 0.1  # Δq


def scalar(state, k, name):
    return float(ops.state_field(state, k, name))


def orthonormal(k, seed=0, n=N):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=F64))[0].T * SIZE


class Step:
    """One step of a panel C with y = C·H (+ noise), as ascent_ would sum it up."""

    def __init__(
        self, k, *, seed=0, carried=None, curvature=None, sign=1, momentum=0.0, realised=False,
        noise=0.0, **state,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(seed + 1)

        def normal():
            return torch.randn(k, N, generator=generator, dtype=F64)

        self.k, self.sign, self.momentum, self.realised = k, sign, momentum, realised
        self.c = orthonormal(k, seed) if carried is None else carried
        self.h = torch.linspace(-3, 7, N, dtype=F64) if curvature is None else curvature
        self.m = self.c + 1e-4 * SIZE * normal() if realised else self.c
        self.y = self.m * self.h + noise * SIZE * normal()
        values = {"perturbation": SIZE, "beta": 0.17, **state}
        self.state = ops.new_state("cpu", k, **values)
        self.rate = sign * float(values["beta"])
        w = self.y + momentum * SIZE * normal() if momentum else self.y
        self.d = self.c + self.rate * w
        stack = [self.c, self.y] + [self.m] * realised + [self.d] * (momentum > 0)
        self.gram = torch.cat(stack) @ torch.cat(stack).T
        self.gram = (self.gram + self.gram.T) / 2

    def options(self, **more):
        known = {"sign": self.sign, "momentum": self.momentum, "realised": self.realised}
        return {**known, **more}

    def run(self, losses=LOSSES, **options):
        ops.benettin_(self.state, self.gram, losses, self.k, **self.options(**options))
        return self

    def __getitem__(self, name):
        value = ops.state_field(self.state, self.k, name)
        shape = ops.state_fields(self.k)[name][1]
        return value.clone() if shape else float(value)


def random_step(rng, k):
    """A step of any state, momentum and noise."""
    first = rng.random() < 0.3
    values = {
        "beta": rng.choice([0.0, 1.0, 10 ** rng.uniform(-4, 0)]),
        "guard": rng.choice([0.0, 10 ** rng.uniform(-1, 2)]),
        "bound": rng.choice([0.0, 10 ** rng.uniform(-1, 2)]),
        "steps": float(rng.randrange(100)),
        "accepted": float(rng.random() < 0.5),
        "rayleigh": math.nan if first else rng.uniform(-3, 3),
        "residual": math.nan if first else rng.random(),
        "h_ema": math.nan if first else rng.uniform(-3, 3),
        "exponent": math.nan if first else rng.uniform(-1, 1),
        "refined": float(rng.random() < 0.3),
        "first": rng.random(),  # as `Benettin.replace` leaves it where the step was refined
    }
    return Step(
        k,
        seed=rng.randrange(1000),
        sign=rng.choice([1, -1]),
        momentum=rng.choice([0.0, 0.9]),
        realised=rng.random() < 0.5,
        noise=rng.choice([0.0, 0.3]),
        **values,
    )


def check(step, losses=LOSSES, **options):
    """Holds the op against the oracle; returns the fields after it."""
    k = step.k
    options = step.options(**options)
    expected = reference.benettin_(step.state, step.gram, losses, k, **options)
    gram, before = step.gram.clone(), losses.clone()
    ops.benettin_(step.state, step.gram, losses, k, **options)
    assert_same_bits(step.gram, gram)
    assert_same_bits(losses, before)
    assert_close_states(step.state, expected, k)
    return step
