"""Every family of problems that bench/hard_truth.py asks, in the order of its table."""

from __future__ import annotations

from hard import autocast, backward, kinks, noise, spectra
from hard.problem import Family

FAMILIES: tuple[Family, ...] = (
    *(f for f in backward.FAMILIES if f.kind == "smooth"),
    *kinks.FAMILIES,
    *(f for f in backward.FAMILIES if f.kind != "smooth"),
    *noise.FAMILIES,
    *spectra.FAMILIES,
    *autocast.FAMILIES,
)
