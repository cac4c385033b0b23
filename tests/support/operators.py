"""What the tests of HessianOperator hold it against."""

from __future__ import annotations

import weakref

import torch

import lyapcuda


def dense(operator):
    return operator @ torch.eye(operator.shape[0], dtype=operator.dtype)


def exact(closure, params, **options):
    return lyapcuda.HessianOperator(closure, params, mode="exact", **options)


class Counted:
    """A closure that counts its calls; ``graph`` is that of the last one, while it is alive."""

    def __init__(self, closure):
        self.closure, self.calls, self.graph = closure, 0, None

    def __call__(self, *batch):
        self.calls += 1
        loss, mark = self.closure(*batch), Counted(None)
        # Of the last layer's result, which the gradient's own graph has need of.
        node = loss.grad_fn.next_functions[0][0]
        node.metadata["mark"], self.graph = mark, weakref.ref(mark)
        return loss
