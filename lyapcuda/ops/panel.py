"""The ops that take a panel as a matrix: Gram matrices, combinations of its rows, projections.

A panel is a contiguous (k, n) tensor in float32 or float64, here of up to 128 rows. Small matrices
are float64. Sums run in an order fixed by the sizes alone: reruns are bit-identical on any number
of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lyapcuda.ops.library import compiled, fake, mark_written

__all__ = ["combine_", "gram", "project_"]


def gram(
    a: Tensor, b: Tensor, *, gate: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Returns ``a·bᵀ``, float64 (ka, kb). Symmetric where b is a.

    Args:
        a: (ka, n).
        b: (kb, n).
        gate: float64, one element; where it is 0 the result is zeros and nothing is read.
        weights: (n,) in the dtype of ``a``: every row of both is taken times them, and rounded.
    """
    return compiled("gram")(a, b, gate=gate, weights=weights)


fake(
    "gram",
    lambda a, b, **options: a.new_empty(a.shape[0], b.shape[0], dtype=torch.float64),
)


def combine_(out: Tensor, panel: Tensor, matrix: Tensor, *, gate: Tensor | None = None) -> None:
    """Writes ``out_j = Σ_i panel_i·matrix[i][j]``.

    Args:
        out: (ko, n), written. May start where ``panel`` does if it has no more rows; any other
            overlap is an error.
        panel: (ki, n).
        matrix: float64 (ki, ko).
        gate: float64, one element; where it is 0 ``out`` stays.
    """
    mark_written(out)
    compiled("combine_")(out, panel, matrix, gate=gate)


def project_(w: Tensor, v: Tensor, coefficients: Tensor) -> Tensor:
    """Writes ``w −= Σ_i coefficients[i]·v_i``; returns the products of the new w.

    Args:
        w: (n,), written.
        v: (m, n); m may be 0.
        coefficients: float64 (m,).

    Returns:
        float64 (m + 1,): the products of w with every row of v, then w·w.
    """
    mark_written(w)
    return compiled("project_")(w, v, coefficients)


fake("project_", lambda w, v, coefficients: coefficients.new_empty(v.shape[0] + 1))
