"""What the tests of HessianOperator hold it against."""

from __future__ import annotations

import torch

import lyapcuda


def dense(operator):
    return operator @ torch.eye(operator.shape[0], dtype=operator.dtype)


def exact(closure, params, **options):
    return lyapcuda.HessianOperator(closure, params, mode="exact", **options)
