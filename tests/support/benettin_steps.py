"""Steps of a panel whose sums are known, for the tests of benettin_ and benettin_refine_."""

from __future__ import annotations

import torch

from lyapcuda import ops
from ops_support import F64

N = 200
LOSSES = torch.tensor([0.3, 0.4], dtype=F64)
SIZE = 0.1  # Δq


def scalar(state, k, name):
    return float(ops.panel_field(state, k, name))


def orthonormal(k, seed=0, n=N):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=F64))[0].T * SIZE


class Step:
    """One step of a panel C with y = C·H (+ noise), as panel_ascent_ would sum it up."""

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
        self.state = ops.new_panel_state("cpu", k, **values)
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
        value = ops.panel_field(self.state, self.k, name)
        shape = ops.panel_fields(self.k)[name][1]
        return value.clone() if shape else float(value)
